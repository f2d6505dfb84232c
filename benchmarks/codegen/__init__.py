"""What the compiler makes of the Triton kernels, without a GPU.

configurations.py   every shipped configuration: registers, spills, shared memory, matrix units
recording.py        what real calls launch (calls.py), compiling.py compiles it, sass.py reads it
measures.py         what that says of speed, with a warp's walk through it (warp.py)
"""
