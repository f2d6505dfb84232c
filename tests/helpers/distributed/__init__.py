"""Two processes on one machine (gloo, CPU) that train accelerated PEFT models; run by
tests/distributed.
"""
