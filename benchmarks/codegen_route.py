"""Cross-compile the mixture's gating kernels, as `benchmarks.codegen` does the others, without a GPU.

python -m benchmarks.codegen_route [--arch sm_90]
"""

import argparse
import sys
from collections.abc import Iterator
from typing import Any

import triton

from benchmarks.codegen import SHARED_LIMIT, Variant, compile_variant
from delora_kernels.backends.triton.route import TOKENS, blocks, route_backward_kernel, route_kernel

EXPERTS = (2, 8, 64)
RANKS = (1, 4, 16)


def variants() -> Iterator[Variant]:
    """Both kernels for few and many experts, low and high ranks, each way to weigh."""
    for small in ("fp32", "bf16"):
        for E in EXPERTS:
            for r in RANKS if E == 8 else (4,):
                for given, shared in ((False, False), (True, False), (False, True)):
                    way = "gates" if given else "shared A" if shared else "top-2"
                    flags: dict[str, Any] = {"GIVEN": given, "SHARED": shared, "WITH_SHARE": True}
                    flags |= {"RENORMALIZE": not given} | blocks(E, r)
                    config = f"{small} E={E} r={r} {way}"
                    forward = {"H": small, "GATES": "fp32", "SCALE": "fp32", "SHARE": "fp32", "V": small, "W": "fp32"}
                    forward |= dict.fromkeys(("F_SUM", "P_SUM", "Z_SUM"), "fp32")
                    yield Variant("route", config, route_kernel, forward, flags | {"K": 0 if given else 2}, {})
                    backward = {"DV": small, "H": small, "DH": small, "W": "fp32", "SCALE": "fp32", "SHARE": "fp32"}
                    backward |= dict.fromkeys(("DP", "DZ", "DGATES", "DS_SUM"), "fp32")
                    yield Variant("route_backward", config, route_backward_kernel, backward, flags, {})


def main() -> int:
    """Compile and print a table; the status is 1 if a kernel spills or does not fit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", action="append", help="default: sm_80 and sm_90")
    options = parser.parse_args()
    bad = 0
    print(f"{TOKENS} tokens a program, Triton {triton.__version__}")
    print(f"{'kernel':<15} {'arch':<6} {'config':<26} {'regs':>5} {'spill':>6} {'shared':>7}")
    for arch in options.arch or ["sm_80", "sm_90"]:
        for variant in variants():
            row = compile_variant(variant, arch)
            bad += bool(row["spill_bytes"]) or row["shared_bytes"] > SHARED_LIMIT.get(arch, sys.maxsize)
            numbers = f"{row['registers']:>5} {row['spill_bytes']:>6} {row['shared_bytes']:>7}"
            print(f"{row['kernel']:<15} {arch:<6} {row['config']:<26} {numbers}")
    print("all fit without a spill" if not bad else f"{bad} FAILED")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
