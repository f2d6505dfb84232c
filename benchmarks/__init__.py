"""Measurements of delora-kernels: each one a command that writes a record naming the machine and
the commit.
"""
