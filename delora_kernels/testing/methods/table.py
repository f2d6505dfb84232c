"""Every method and every convention of it. A new one is one entry in its file: tests, `check` and
benchmarks run it.
"""

from delora_kernels.testing.methods import delora, dora, ether, grouped, lora, moe

_FILES = (lora, dora, delora, moe, ether, grouped)

METHODS = {method.name: method for file in _FILES for method in file.METHODS}
"""Name → method, in the order `check` shows them."""
