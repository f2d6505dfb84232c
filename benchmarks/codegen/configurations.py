"""Cross-compile every Triton kernel in every table configuration, without a GPU: registers, spills,
shared memory, MMA.

    python -m benchmarks.codegen [--arch sm_80 ...] [--kernel add_parts ...] [--json FILE]

Exit status 1 if a kernel spills on, or does not fit, an NVIDIA architecture, or if a 16-bit product
for sm_90 does not run on wgmma. gfx942 (`--arch gfx942`) is reported only.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from benchmarks.codegen.variants import GEMM_KERNELS, Variant, variants

SHARED_LIMIT = {"sm_80": 163 * 1024, "sm_86": 99 * 1024, "sm_89": 99 * 1024, "sm_90": 227 * 1024}
"""Bytes of shared memory that one block may have."""

_MMA = (("wgmma", "wgmma.mma_async"), ("mma.sync", "mma.sync"), ("mfma", "v_mfma"))


def compile_variant(variant: Variant, arch: str, ones: bool = False) -> dict[str, Any]:
    """One row of the record: {"kernel", "arch", "config", "registers", "spill_bytes",
    "shared_bytes", "mma"}.

    Args:
        variant: What to compile.
        arch: "sm_90", "gfx942", ...
        ones: Every size and stride is 1, which Triton's launcher turns into a constant.
    """
    names, held = variant.function.arg_names, variant.function.do_not_specialize or ()
    free = {"threshold", *(names[i] if isinstance(i, int) else i for i in held)}
    floats = {"factor", "scale", "inverse", "sign", "eps", "count"}
    signature, constants = {}, dict(variant.constants)
    for name in names:
        if name in variant.pointers:
            kind = variant.pointers[name]
            signature[name] = f"tensordesc<{kind}>" if "[" in kind else f"*{kind}"
        elif name in constants:
            signature[name] = "constexpr"
        elif (name.isupper() and len(name) > 1) or name in ("X", "S", "H", "Y", "W", "A", "B", "V"):
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
    """Return the registers of a thread, and the bytes of its stack, where spilled registers go."""
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
    # ranks are the rows of a masked x's product, and wgmma has 64: so few take less than half of
    # x's time without it
    few = row["kernel"] == "token_sums" and row["config"].endswith("R=16 dropout")
    if row["arch"] == "sm_90" and row["kernel"] in GEMM_KERNELS and narrow and not few and row["mma"] != "wgmma":
        return "its products do not run on wgmma"
    return None


def summary(rows: list[dict[str, Any]]) -> str:
    """Return a Markdown table: for each kernel and architecture the number of configurations, and
    the most that one takes.
    """
    lines = ["| kernel | arch | configurations | registers | spilled bytes | shared bytes | 16-bit products on |"]
    lines.append("| --- | --- | ---: | ---: | ---: | ---: | --- |")
    for kernel, arch in dict.fromkeys((row["kernel"], row["arch"]) for row in rows):
        group = [row for row in rows if (row["kernel"], row["arch"]) == (kernel, arch)]
        most = [max(row[key] or 0 for row in group) for key in ("registers", "spill_bytes", "shared_bytes")]
        units = sorted({row["mma"] for row in group if row["mma"]})
        lines.append(f"| {kernel} | {arch} | {len(group)} | {' | '.join(map(str, most))} | {', '.join(units)} |")
    return "\n".join(lines)


def _architecture_variants(arch: str) -> list[Variant]:
    return list(variants(divmod(int(arch[3:]), 10) if arch.startswith("sm_") else (0, 0)))


def _compile(job: tuple[str, int]) -> dict[str, Any]:
    arch, index = job
    return compile_variant(_architecture_variants(arch)[index], arch)


def main() -> int:
    """Compile, print a table, write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", action="append", help="sm_80, sm_86, sm_89, sm_90, gfx942; default: sm_80 and sm_90")
    parser.add_argument("--kernel", action="append", help="add_parts, ...; default: all")
    parser.add_argument("--json", type=Path, help="write the rows here")
    parser.add_argument("--summary", action="store_true", help="a Markdown table by kernel behind the rows")
    options = parser.parse_args()
    rows, bad = [], []
    jobs = [
        (arch, index)
        for arch in options.arch or ["sm_80", "sm_90"]
        for index, variant in enumerate(_architecture_variants(arch))
        if options.kernel is None or variant.kernel in options.kernel
    ]
    print(f"{'kernel':<13} {'arch':<7} {'config':<26} {'regs':>5} {'spill':>6} {'shared':>7}  mma")
    with ProcessPoolExecutor() as pool:
        for row in pool.map(_compile, jobs, chunksize=4) if len(jobs) > 8 else map(_compile, jobs):
            rows.append(row)
            cells = ["-" if value is None else value for value in row.values()]
            print("{:<13} {:<7} {:<26} {:>5} {:>6} {:>7}  {}".format(*cells), flush=True)
            reason = why_not(row)
            if reason:
                bad.append(f"{row['kernel']} {row['arch']} {row['config']} ({reason})")
    if options.summary:
        print(summary(rows))
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    print(f"{len(rows)} configurations" + (f", FAILED: {'; '.join(bad)}" if bad else ", no spill, all fit, wgmma"))
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
