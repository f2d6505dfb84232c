"""What the library says of itself and of the machine.

check.py         `python -m delora_kernels check`: every op and method judged in float64
environment.py   `python -m delora_kernels`: versions, devices, backends and why each can or can't
                 run
explain.py       which backend a call takes, and why
proof.py         kernels prove themselves on a device before an automatic choice takes them
stored_forms.py  stored bases of the installed libraries, for the check
versions.py      the supported versions of other software
"""
