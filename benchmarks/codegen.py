"""Cross-compile every Triton kernel in every table configuration, without a GPU: registers, spills, shared memory, MMA.

    python -m benchmarks.codegen --arch sm_80 --arch sm_90 [--json FILE]

Exit status 1 if a kernel spills on, or does not fit, an NVIDIA architecture, or if a 16-bit product for sm_90 does not
run on wgmma. gfx942 (`--arch gfx942`) is reported only.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from delora_kernels.backends.triton import tables
from delora_kernels.backends.triton.add_parts import BLOCK as PARTS_BLOCK
from delora_kernels.backends.triton.add_parts import add_parts_kernel, finish_dy_kernel
from delora_kernels.backends.triton.dropout import _BC, _BT, drop_kernel, mask_kernel
from delora_kernels.backends.triton.dy_sums import dy_sums_kernel
from delora_kernels.backends.triton.fold import BLOCK, WARPS, fold_backward_kernel, fold_kernel
from delora_kernels.backends.triton.rank_gemm import GROUP, RANKS, rank_gemm_kernel
from delora_kernels.backends.triton.rank_update import rank_update_kernel
from delora_kernels.backends.triton.row_norm import row_norm_kernel
from delora_kernels.backends.triton.scaled import BLOCK_COLUMNS, BLOCK_ROWS, scaled_kernel
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


GEMM_KERNELS = ("times_small", "token_sums", "dy_sums", "rank_update", "rank_gemm")
"""Kernels whose 16-bit products must run on the matrix units of the newest instruction."""


def variants(descriptors: bool = True) -> Iterator[Variant]:
    """Every shipped configuration, with the features that cost registers switched on.

    Args:
        descriptors: Whether the architecture loads tiles by descriptor.
    """
    for kernel in FEATURES:
        for rank_class in tables.TABLES[kernel]:
            for name, types in TYPES.items():
                for features in FEATURES[kernel]:
                    variant = _tabled(kernel, int(rank_class), name, *types, features)
                    if variant is not None:
                        yield variant
    for name in ("bf16", "fp16"):
        for way in ("descriptors", "pointers") if descriptors else ("pointers",):
            for layout in ("NT", "NN"):
                for keep in (False, True) if layout == "NT" else (False,):
                    yield _gemm(name, way, layout, keep)
    for small in ("fp32", "bf16"):
        yield from _folds(small)
    yield from _passes()


FEATURES: dict[str, tuple[str, ...]] = {
    "times_small": ("", "dropout"),
    "token_sums": ("", "vectors", "term", "dropout"),
    "dy_sums": ("", "dots"),
    "rank_update": ("", "prefill", "dropout"),
    "row_norm": ("", "scaled"),
}
"""Kernel → what its launches differ in: the vectors beside the product, the rank-R term of dx, what is not there."""


def _tabled(kernel: str, BR: int, name: str, big: str, small: str, features: str) -> Variant | None:
    """A configuration of tables.TABLES, or None where no launch asks for it."""
    tile = tables.tiles(kernel, BR, "fp32" if big == "fp32" else "mixed" if big != small else "")
    drop = features == "dropout"
    how, precision = (0, "ieee") if big == small else {"bf16": (1, "ieee"), "fp16": (3, "tf32x3")}[big]
    constants: dict[str, Any] = {"INTERPRETED": False, "BR": BR, "BT": tile.tokens, "BC": tile.columns}
    if kernel == "times_small":
        function, pointers = times_small_kernel, {"X": big, "S": small, "OUT": small}
        constants |= {"DROP": drop}
    elif kernel == "token_sums":
        function, pointers = token_sums_kernel, {"X": big, "H": small, "PRODUCT": "fp32"}
        if features == "term" and name not in ("bf16", "fp16"):
            return None  # it does not take them
        constants |= {"WITH_PRODUCT": True, "DROP": drop, "WITH_OUT": features == "term"}
        constants |= {"WITH_SUMS": features == "vectors", "WITH_DOTS": features == "vectors"}
        constants |= {"TRANSPOSED": features != "vectors"}
        if features == "vectors":
            pointers |= {"Y": big, "SUMS": "fp32", "DOTS": "fp32"}
        if constants["WITH_OUT"]:
            pointers |= {"S": small, "OUT": big}
    elif kernel == "dy_sums":
        if name in ("fp32", "fp16+fp32"):
            return None  # it does not take them
        function, pointers = dy_sums_kernel, {"DY": big, "S": small, "H": small, "DV": "fp32", "PRODUCT": "fp32"}
        pointers |= {"SUMS": "fp32", "Y": big, "DOTS": "fp32"} if features else {}
        constants |= {"WITH_SUMS": bool(features), "WITH_DOTS": bool(features), "HOW_H": how}
    elif kernel == "rank_update":
        function, pointers = rank_update_kernel, {"H": small, "S": small, "OUT": big, "COLUMN": "fp32", "BIAS": big}
        pointers |= {} if features == "prefill" else {"BASE": big} | ({"EXTRA": big} if drop else {})
        constants |= {"WITH_BASE": features != "prefill", "WITH_COLUMN": True, "WITH_EXTRA": drop, "WITH_BIAS": True}
        constants |= {"MASK_TERM": drop, "MASK_BASE": drop}
        how = 2 if how == 1 else how
    else:
        function, pointers = row_norm_kernel, {"W": big, "A": small, "B": small, "NORM": "fp32"}
        constants = {"INTERPRETED": False, "BN": tile.tokens, "BK": tile.columns, "BR": BR}
        constants |= {"WITH_COLUMN": bool(features), "WITH_SCALED": bool(features)}
        pointers |= {"MAGNITUDE": small, "COLUMN": "fp32", "SCALED": big} if features else {}
        how, precision = (0, "ieee") if big == small else (3, "tf32x3")
    if drop:
        pointers["SEED"] = "i64"
    constants |= {"HOW": how, "PRECISION": precision}
    options = {"num_warps": tile.warps, "num_stages": tile.stages}
    return Variant(kernel, f"{name} R={BR} {features}".strip(), function, pointers, constants, options)


def _gemm(name: str, way: str, layout: str, keep: bool) -> Variant:
    tile = tables.GEMMS[way]
    rows, tma = layout == "NT", way == "descriptors"
    right = (tile.columns, tile.inner) if rows else (tile.inner, tile.columns)
    pointers = {"H": name, "S": name, "COLUMN": "fp32", "BIAS": name, "OUT": name} | ({"KEPT": name} if keep else {})
    pointers |= {"X": name, "W": name}
    if tma:
        pointers |= {"X": f"{name}[{tile.tokens}, {tile.inner}]", "W": f"{name}[{right[0]}, {right[1]}]"}
    constants = {"TMA": tma, "ROWS": rows, "WITH_COLUMN": True, "WITH_BIAS": True, "KEEP": keep, "PRECISION": "ieee"}
    constants |= {"INTERPRETED": False, "BT": tile.tokens, "BC": tile.columns, "BD": tile.inner, "BR": RANKS}
    config = f"{name} {layout} {way}" + (" kept" if keep else "")
    options = {"num_warps": tile.warps, "num_stages": tile.stages}
    return Variant("rank_gemm", config, rank_gemm_kernel, pointers, constants | {"GROUP": GROUP}, options)


def _folds(small: str) -> Iterator[Variant]:
    shared = {"A": small, "B": small, "LAM": "fp32", "WEIGHT_NORM": "fp32", "NORM_A": "fp32", "NORM_B": "fp32"}
    hats, warps = {"A_HAT": "bf16", "B_HAT": "bf16"}, {"num_warps": WARPS}
    constants = {"NORMALISE": True, "CLAMP": True, "WITH_VECTOR": True, "BLOCK": BLOCK}
    yield Variant("fold", small, fold_kernel, shared | hats, constants, warps)
    cast = constants | {"NORMALISE": False, "CLAMP": False, "WITH_VECTOR": False}
    yield Variant("fold", f"{small} cast", fold_kernel, {"A": small, "B": small} | hats, cast, warps)
    gradients = {"GRAD_A": "fp32", "GRAD_B": "fp32", "DA": small, "DB": small, "ALONG": "fp32"}
    constants = {"CLAMP": True, "WITH_VECTOR": True, "WITH_A": True, "WITH_B": True, "BLOCK": BLOCK}
    yield Variant("fold_backward", small, fold_backward_kernel, shared | gradients, constants, warps)


def _passes() -> Iterator[Variant]:
    """Kernels without a product: sums of parts, scaling, masks."""
    yield Variant("add_parts", "bf16", add_parts_kernel, {"PARTS": "fp32", "OUT": "bf16"}, {"BLOCK": PARTS_BLOCK}, {})
    pointers = {"DV_PARTS": "fp32", "PRODUCT_PARTS": "fp32", "SUM_PARTS": "fp32", "DOT_PARTS": "fp32", "B": "bf16"}
    pointers |= {"COLUMN": "fp32", "DIVISOR": "fp32", "DV": "bf16", "DB": "fp32", "SUMS": "fp32", "DM": "fp32"}
    constants: dict[str, Any] = {f"WITH_{part}": True for part in ("DV", "PRODUCT", "SUMS", "DOTS", "COLUMN", "B")}
    for BR in (16, 32, 512):
        size = {"BN": PARTS_BLOCK // BR, "BR": BR, "BLOCK": PARTS_BLOCK}
        yield Variant("finish_dy", f"R={BR}", finish_dy_kernel, pointers, constants | size, {})
    for by_row in (False, True):
        size = {"BY_ROW": by_row, "BM": BLOCK_ROWS, "BC": BLOCK_COLUMNS}
        pointers = {"X": "bf16", "FACTOR": "fp32", "OUT": "bf16"}
        yield Variant("scaled", "rows" if by_row else "columns", scaled_kernel, pointers, size, {})
    size = {"BT": _BT, "BC": _BC}
    yield Variant("mask", "", mask_kernel, {"SEED": "i64", "MASK": "i1"}, size, {})
    pointers = {"X": "bf16", "SEED": "i64", "DROPPED": "bf16", "REST": "bf16"}
    yield Variant("drop", "bf16", drop_kernel, pointers, size, {})


def compile_variant(variant: Variant, arch: str, ones: bool = False) -> dict[str, Any]:
    """One row of the record: {"kernel", "arch", "config", "registers", "spill_bytes", "shared_bytes", "mma"}.

    Args:
        variant: What to compile.
        arch: "sm_90", "gfx942", ...
        ones: Every size and stride is 1, which Triton's launcher turns into a constant.
    """
    names, held = variant.function.arg_names, variant.function.do_not_specialize or ()
    free = {"threshold", *(names[i] if isinstance(i, int) else i for i in held)}
    floats = {"factor", "scale", "inverse", "sign", "eps"}
    signature, constants = {}, dict(variant.constants)
    for name in names:
        if name in variant.pointers:
            kind = variant.pointers[name]
            signature[name] = f"tensordesc<{kind}>" if "[" in kind else f"*{kind}"
        elif name in constants:
            signature[name] = "constexpr"
        elif (name.isupper() and len(name) > 1) or name in ("X", "S", "H", "Y", "W", "A", "B"):
            signature[name], constants[name] = "constexpr", None  # a tensor that this variant does without
        elif ones and name not in floats and name not in free:
            signature[name], constants[name] = "constexpr", 1
        else:
            signature[name] = "fp32" if name in floats else "i32"
    # as the launcher specialises them where pointers, sizes and strides are multiples of 16
    aligned = [i for i, name in enumerate(names) if signature[name][0] == "*" or signature[name] == "i32"]
    attributes = {(i,): [["tt.divisibility", 16]] for i in aligned if names[i] not in free}
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


def why_not(row: dict[str, Any]) -> str | None:
    """Why this row must not be shipped, or None."""
    if row["spill_bytes"]:
        return f"spills {row['spill_bytes']} bytes"
    limit = SHARED_LIMIT.get(row["arch"], sys.maxsize)
    if row["shared_bytes"] > limit:
        return f"asks for {row['shared_bytes']} bytes of shared memory, {limit} are there"
    narrow = row["config"].split()[0] in ("bf16", "fp16") if row["config"] else False
    if row["arch"] == "sm_90" and row["kernel"] in GEMM_KERNELS and narrow and row["mma"] != "wgmma":
        return "its products do not run on wgmma"
    return None


def _architecture_variants(arch: str) -> list[Variant]:
    return list(variants(descriptors=arch.startswith("sm_") and int(arch[3:]) >= 90))


def _count(arch: str) -> int:
    return len(_architecture_variants(arch))


def _compile(job: tuple[str, int]) -> dict[str, Any]:
    arch, index = job
    return compile_variant(_architecture_variants(arch)[index], arch)


def main() -> int:
    """Compile, print a table, write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", action="append", help="sm_80, sm_86, sm_89, sm_90, gfx942; default: sm_80 and sm_90")
    parser.add_argument("--json", type=Path, help="write the rows here")
    options = parser.parse_args()
    rows, bad = [], []
    jobs = [(arch, index) for arch in options.arch or ["sm_80", "sm_90"] for index in range(_count(arch))]
    print(f"{'kernel':<13} {'arch':<7} {'config':<26} {'regs':>5} {'spill':>6} {'shared':>7}  mma")
    with ProcessPoolExecutor() as pool:
        for row in pool.map(_compile, jobs, chunksize=4) if len(jobs) > 8 else map(_compile, jobs):
            rows.append(row)
            cells = ["-" if value is None else value for value in row.values()]
            print("{:<13} {:<7} {:<26} {:>5} {:>6} {:>7}  {}".format(*cells), flush=True)
            reason = why_not(row)
            if reason:
                bad.append(f"{row['kernel']} {row['arch']} {row['config']} ({reason})")
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    print(f"{len(rows)} configurations" + (f", FAILED: {'; '.join(bad)}" if bad else ", no spill, all fit, wgmma"))
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
