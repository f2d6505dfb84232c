"""Cross-compile every Triton kernel in every table configuration, without a GPU: registers, spills, shared memory, MMA.

    python -m benchmarks.codegen --arch sm_80 --arch sm_90 [--json FILE]

Exit status 1 if a kernel spills on, or does not fit, an NVIDIA architecture. gfx942 (`--arch gfx942`) is reported only.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from delora_kernels.backends.triton import tables
from delora_kernels.backends.triton.dropout import _BC, _BT, drop_kernel, mask_kernel
from delora_kernels.backends.triton.dy_sums import dy_sums_kernel
from delora_kernels.backends.triton.fold import BLOCK, fold_backward_kernel, fold_kernel
from delora_kernels.backends.triton.rank_update import rank_update_kernel
from delora_kernels.backends.triton.row_norm import row_norm_kernel
from delora_kernels.backends.triton.times_small import times_small_kernel
from delora_kernels.backends.triton.token_sums import token_sums_kernel

SHARED_LIMIT = {"sm_80": 163 * 1024, "sm_86": 99 * 1024, "sm_89": 99 * 1024, "sm_90": 227 * 1024}
"""Bytes of shared memory that one block may have."""

TYPES = {
    "bf16": ("bf16", "bf16"),
    "bf16+fp32": ("bf16", "fp32"),
    "fp16": ("fp16", "fp16"),
    "fp16+fp32": ("fp16", "fp32"),
    "fp32": ("fp32", "fp32"),
}
"""Name → dtype of token-sized tensors, dtype of factors."""

_MMA = (("wgmma", "wgmma.mma_async"), ("mma.sync", "mma.sync"), ("mfma", "v_mfma"))


class Variant(NamedTuple):
    """One kernel in one configuration: what it is called, its pointers' dtypes, its constants, its launch options."""

    kernel: str
    config: str
    function: Any
    pointers: dict[str, str]
    constants: dict[str, Any]
    options: dict[str, int]


def variants() -> Iterator[Variant]:
    """Every shipped configuration, with the features that cost registers switched on."""
    for kernel, classes in tables.TABLES.items():
        for rank_class in classes:
            for name, (big, small) in TYPES.items():
                if kernel == "dy_sums" and name in ("fp32", "fp16+fp32"):
                    continue  # it does not take them
                for drop in (False, True) if kernel not in ("row_norm", "dy_sums") else (False,):
                    yield _variant(kernel, int(rank_class), name, big, small, drop)
    for small in ("fp32", "bf16"):
        yield from _folds(small)
    size = {"BT": _BT, "BC": _BC}
    yield Variant("mask", "", mask_kernel, {"SEED": "i64", "MASK": "i1"}, size, {})
    pointers = {"X": "bf16", "SEED": "i64", "DROPPED": "bf16", "REST": "bf16"}
    yield Variant("drop", "bf16", drop_kernel, pointers, size, {})


def _folds(small: str) -> Iterator[Variant]:
    constants = {"CLAMP": True, "WITH_VECTOR": True, "BLOCK": BLOCK}
    shared = {"A": small, "B": small, "LAM": "fp32", "WEIGHT_NORM": "fp32", "NORM_A": "fp32", "NORM_B": "fp32"}
    yield Variant("fold", small, fold_kernel, shared | {"A_HAT": "bf16", "B_HAT": "bf16"}, constants, {})
    gradients = {"GRAD_A": "fp32", "GRAD_B": "fp32", "DA": small, "DB": small, "ALONG": "fp32"}
    both = constants | {"WITH_A": True, "WITH_B": True}
    yield Variant("fold_backward", small, fold_backward_kernel, shared | gradients, both, {})


def _variant(kernel: str, BR: int, name: str, big: str, small: str, drop: bool) -> Variant:
    config = f"{name} R={BR}" + (" dropout" if drop else "")
    tile = tables.tiles(kernel, BR)
    mixed = {"bf16": (1, "ieee"), "fp16": (3, "tf32x3")}  # launch.meeting, launch.precision
    how = (0, "ieee") if big == small else mixed[big]
    constants: dict[str, Any] = {"INTERPRETED": False, "BR": BR, "BT": tile.tokens, "BC": tile.columns}
    pointers = {"X": big, "S": small, "OUT": small}
    function: Any = times_small_kernel
    if kernel == "token_sums":
        function = token_sums_kernel
        pointers = {"X": big, "H": small, "Y": big, "PRODUCT": "fp32", "SUMS": "fp32", "DOTS": "fp32"}
        constants |= {"WITH_PRODUCT": True, "WITH_SUMS": not drop, "WITH_DOTS": not drop}
    elif kernel == "dy_sums":
        function = dy_sums_kernel
        pointers = {"DY": big, "S": small, "H": small, "Y": big, "DV": "fp32", "PRODUCT": "fp32", "SUMS": "fp32"}
        pointers["DOTS"] = "fp32"
        constants |= {"WITH_SUMS": True, "WITH_DOTS": True, "HOW_H": how[0]}
    elif kernel == "rank_update":
        function = rank_update_kernel
        pointers = {"BASE": big, "H": small, "S": small, "COLUMN": "fp32", "EXTRA": big, "BIAS": big, "OUT": big}
        constants |= {"WITH_COLUMN": True, "WITH_EXTRA": drop, "WITH_BIAS": True, "MASK_TERM": drop, "MASK_BASE": drop}
        how = (2, "ieee") if how[0] == 1 else how
    elif kernel == "row_norm":
        function = row_norm_kernel
        pointers = {"W": big, "A": small, "B": small, "NORM": "fp32"}
        constants = {"INTERPRETED": False, "BN": tile.tokens, "BK": tile.columns, "BR": BR}
        how = (0, "ieee") if big == small else (3, "tf32x3")
    if kernel in ("times_small", "token_sums"):
        constants["DROP"] = drop
    if drop:
        pointers["SEED"] = "i64"
    constants |= {"HOW": how[0], "PRECISION": how[1]}
    return Variant(kernel, config, function, pointers, constants, {"num_warps": tile.warps, "num_stages": tile.stages})


def compile_variant(variant: Variant, arch: str, ones: bool = False) -> dict[str, Any]:
    """One row of the record: {"kernel", "arch", "config", "registers", "spill_bytes", "shared_bytes", "mma"}.

    Args:
        variant: What to compile.
        arch: "sm_90", "gfx942", ...
        ones: Every size and stride is 1, which Triton's launcher turns into a constant.
    """
    names = variant.function.arg_names
    floats = {"factor", "scale", "inverse", "sign", "eps"}
    signature, constants = {}, dict(variant.constants)
    for name in names:
        if name in variant.pointers:
            signature[name] = f"*{variant.pointers[name]}"
        elif name in constants:
            signature[name] = "constexpr"
        elif (name.isupper() and len(name) > 1) or name in ("X", "S", "H", "Y", "W", "A", "B"):
            signature[name], constants[name] = "constexpr", None  # a tensor that this variant does without
        elif ones and name not in floats and name != "threshold":
            signature[name], constants[name] = "constexpr", 1
        else:
            signature[name] = "fp32" if name in floats else "i32"
    # as the launcher specialises them where pointers, sizes and strides are multiples of 16
    aligned = [i for i, name in enumerate(names) if signature[name][0] == "*" or signature[name] == "i32"]
    attributes = {(i,): [["tt.divisibility", 16]] for i in aligned if names[i] != "threshold"}
    source = ASTSource(variant.function, signature, constants, attributes)
    nvidia = arch.startswith("sm_")
    target = GPUTarget("cuda", int(arch[3:]), 32) if nvidia else GPUTarget("hip", arch, 64)
    compiled = triton.compile(source, target=target, options=variant.options)
    text = compiled.asm["ptx" if nvidia else "amdgcn"]
    row: dict[str, Any] = {
        "kernel": variant.kernel,
        "arch": arch,
        "config": variant.config,
        "registers": None,
        "spill_bytes": None,
    }
    if nvidia:
        row["registers"], row["spill_bytes"] = _resources(compiled.asm["cubin"])
    mma = next((name for name, instruction in _MMA if instruction in text), None)
    return row | {"shared_bytes": compiled.metadata.shared, "mma": mma}


def _resources(cubin: bytes) -> tuple[int, int]:
    """Registers of a thread, and the bytes of its stack, where spilled registers go."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", text).groups()  # type: ignore[union-attr]
    return int(registers), int(stack)


def main() -> int:
    """Compile, print a table, write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", action="append", help="sm_80, sm_86, sm_89, sm_90, gfx942; default: sm_80 and sm_90")
    parser.add_argument("--json", type=Path, help="write the rows here")
    options = parser.parse_args()
    rows, bad = [], []
    print(f"{'kernel':<13} {'arch':<7} {'config':<26} {'regs':>5} {'spill':>6} {'shared':>7}  mma")
    for arch in options.arch or ["sm_80", "sm_90"]:
        for variant in variants():
            row = compile_variant(variant, arch)
            rows.append(row)
            cells = ["-" if value is None else value for value in row.values()]
            print("{:<13} {:<7} {:<26} {:>5} {:>6} {:>7}  {}".format(*cells))
            if row["spill_bytes"] or row["shared_bytes"] > SHARED_LIMIT.get(arch, sys.maxsize):
                bad.append(f"{row['kernel']} {arch} {row['config']}")
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    print(f"{len(rows)} configurations" + (f", FAILED: {'; '.join(bad)}" if bad else ", no spill, all fit"))
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
