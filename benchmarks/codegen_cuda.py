"""Compile every CUDA kernel of csrc/ for every GPU that nvcc knows: registers, spills, shared
memory, tensor cores.

    python -m benchmarks.codegen_cuda [--arch sm_90 ...] [--json FILE] [--summary] [--speed]

Exit status 1 where nvcc fails or warns (-Wall, -Wextra), a kernel spills, asks for more shared
memory than a block has, or leaves the tensor cores out where they could multiply. Rows are those of
`benchmarks.codegen`. With --speed kernels in bfloat16 are disassembled for sm_90, and read as
Triton's are.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

CSRC = Path(__file__).resolve().parents[1] / "csrc"
SHARED_LIMIT = 48 * 1024
"""Bytes of shared memory that a block has on every GPU without asking for more."""

GEMM_KERNELS = (
    *("times_small", "project_route", "token_sums", "dy_sums", "rank_update", "row_norm"),
    *("grouped_times_small", "grouped_update", "grouped_sums"),
)
SPEED_OF = "bf16, bf16"
"""How the template arguments of kernels begin that --speed disassembles."""
FLAGS = ["-std=c++17", "-Werror", "all-warnings", "-Xcompiler", "-Wall,-Wextra", "-Xptxas", "-v"]
_PRODUCTS = {"wmma": "wmma.mma.sync", "tf32": "mma.sync.aligned.m16n8k8.row.col.f32.tf32"}
_ENTRY = re.compile(r"Compiling entry function '(\w+)' for '(\w+)'")
_SPILLS = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_USED = re.compile(r"Used (\d+) registers(?:.*?(\d+) bytes smem)?")


def architectures() -> list[str]:
    """Return what nvcc compiles for: sm_75, sm_80, ..."""
    listed = subprocess.run(["nvcc", "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout
    return sorted(("sm_" + name.split("_")[1] for name in listed.split()), key=lambda arch: int(arch[3:]))


def compile_file(file: Path, arch: str, speed: bool = False) -> list[dict[str, Any]]:
    """Return the rows of the kernels of one file, on request those for sm_90 with what
    `benchmarks.codegen.cuda` reads in their disassembly.

    Raises:
        RuntimeError: nvcc failed, or warned; the text has its messages.
    """
    with tempfile.TemporaryDirectory() as folder:
        target = ["-arch", arch, "-cubin", "-o", f"{folder}/{file.stem}.cubin", "--keep", "--keep-dir", folder]
        done = subprocess.run(["nvcc", *FLAGS, *target, str(file)], capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{file.name} for {arch}:\n{done.stdout}{done.stderr}")
        rows = parse(done.stdout + done.stderr)
        ptx = Path(folder, f"{file.stem}.ptx").read_text(encoding="utf-8") if rows else ""
        names = _demangle([row["kernel"] for row in rows])
        if speed and arch == "sm_90":
            from benchmarks.codegen import cuda  # Triton's disassembler is not there everywhere

            wanted = {row["kernel"] for row, name in zip(rows, names, strict=True) if name[1].startswith(SPEED_OF)}
            found = cuda.speeds(Path(folder, f"{file.stem}.cubin"), wanted)
            for row in rows:
                row |= {"speed": found[row["kernel"]]} if row["kernel"] in found else {}
    bodies = {part.split("(", 1)[0].strip(): part for part in ptx.split(".entry ")[1:]}
    for row in rows:
        row["mma"] = next((name for name, text in _PRODUCTS.items() if text in bodies[row["kernel"]]), None)
    for row, (kernel, config) in zip(rows, names, strict=True):
        row |= {"kernel": kernel, "config": config}
    return rows


def parse(text: str) -> list[dict[str, Any]]:
    """Return the rows that ptxas -v reports, with mangled names."""
    rows: list[dict[str, Any]] = []
    for line in text.splitlines():
        if found := _ENTRY.search(line):
            rows.append({"kernel": found[1], "arch": found[2], "config": "", "registers": 0, "spill_bytes": 0})
        elif (found := _SPILLS.search(line)) and rows:
            rows[-1]["spill_bytes"] = max(map(int, found.groups()))
        elif (found := _USED.search(line)) and rows:
            rows[-1] |= {"registers": int(found[1]), "shared_bytes": int(found[2] or 0)}
    return rows


def _demangle(names: list[str]) -> list[tuple[str, str]]:
    """Kernel and template arguments of each mangled name."""
    if not names:
        return []
    done = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True)
    result = []
    for line in done.stdout.splitlines():
        name = line.removeprefix("void ").split("(", 1)[0].removeprefix("dk::")
        kernel, _, config = name.partition("<")
        config = config.removesuffix(">").replace("__nv_bfloat16", "bf16").replace("__half", "fp16").replace("dk::", "")
        result.append((kernel, config.replace("float", "fp32")))
    return result


def why_not(row: dict[str, Any]) -> str | None:
    """Why this row must not be shipped, or None."""
    if row["spill_bytes"]:
        return f"spills {row['spill_bytes']} bytes"
    if row["shared_bytes"] > SHARED_LIMIT:
        return f"asks for {row['shared_bytes']} bytes of shared memory, {SHARED_LIMIT} are there"
    types = row["config"].split(", ")[:2]
    can = types != ["fp32", "fp32"] if int(row["arch"][3:]) >= 80 else types == ["fp16", "fp16"]
    if row["kernel"] in GEMM_KERNELS and can and not row["mma"]:
        return "its products do not run on tensor cores"
    return None


def summary(rows: list[dict[str, Any]]) -> str:
    """Return a Markdown table: for each kernel the most that one configuration takes, registers by
    architecture.
    """
    archs = list(dict.fromkeys(row["arch"] for row in rows))
    lines = [f"| kernel | configurations | shared bytes | spilled bytes | registers {' | '.join(archs)} |"]
    lines.append("| --- | ---: | ---: | ---: |" + " ---: |" * len(archs))
    for kernel in dict.fromkeys(row["kernel"] for row in rows):
        mine = [row for row in rows if row["kernel"] == kernel]
        most = [max(row["registers"] for row in mine if row["arch"] == arch) for arch in archs]
        worst = [max(row[key] for row in mine) for key in ("shared_bytes", "spill_bytes")]
        cells = [len({row["config"] for row in mine}), *worst, *most]
        lines.append(f"| {kernel} | {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def speed_table(rows: list[dict[str, Any]]) -> str:
    """Return a Markdown table: a line for each kernel that was disassembled."""
    head = "blocks | KB in flight | single elements | barriers | products | instructions"
    lines = [f"| kernel | configuration | {head} |", "| --- | --- |" + " ---: |" * 6]
    for row in rows:
        if "speed" in row:
            found = row["speed"] | {"in_flight": row["speed"]["in_flight"] // 1024}
            cells = (str(found[name]) for name in ("blocks", "in_flight", "single", "barriers", "products", "turn"))
            lines.append(f"| {row['kernel']} | {row['config']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> int:
    """Compile, print a table, write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", action="append", help="sm_75, sm_90, ...; default: all that nvcc knows")
    parser.add_argument("--json", type=Path, help="write the rows here")
    parser.add_argument("--speed", action="store_true", help="a table of what the disassembly says, of sm_90")
    parser.add_argument("--summary", action="store_true", help="a Markdown table by kernel behind the rows")
    options = parser.parse_args()
    jobs = [(file, arch) for arch in options.arch or architectures() for file in sorted(CSRC.glob("*.cu"))]
    rows: list[dict[str, Any]] = []
    bad: list[str] = []
    print(f"{'kernel':<16} {'arch':<7} {'config':<16} {'regs':>5} {'spill':>6} {'shared':>7}  mma")
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for found in pool.map(lambda job: _rows_or_error(job[0], job[1], options.speed), jobs):
            if isinstance(found, RuntimeError):
                print(found, file=sys.stderr)
                bad.append(str(found).splitlines()[0])
                continue
            rows += found
            for row in found:
                cells = ["-" if value is None else value for name, value in row.items() if name != "speed"]
                print("{:<16} {:<7} {:<16} {:>5} {:>6} {:>7}  {}".format(*cells), flush=True)
                if reason := why_not(row):
                    bad.append(f"{row['kernel']} {row['arch']} {row['config']} ({reason})")
    if options.summary:
        print(summary(rows))
    if options.speed:
        print(speed_table(rows))
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    print(f"{len(rows)} kernels" + (f", FAILED: {'; '.join(bad)}" if bad else ", no warning, no spill, all fit"))
    return 1 if bad else 0


def _rows_or_error(file: Path, arch: str, speed: bool = False) -> list[dict[str, Any]] | RuntimeError:
    try:
        return compile_file(file, arch, speed)
    except RuntimeError as error:
        return error


if __name__ == "__main__":
    sys.exit(main())
