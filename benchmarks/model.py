"""What a layer should cost: time and bytes from the traffic contract and a device's two ceilings.

    python -m benchmarks.model --record FILE  # measured / predicted of every row of ours
    python -m benchmarks.model --from-binaries  # estimates from disassembled kernels: no GPU
    python -m benchmarks.model --copy-tbps 4.3 --gemm-tflops 790 --K 4096 --N 4096 --T 8192 --r 16
    python -m benchmarks.model --copy-tbps 4.3 --gemm-tflops 790 --experts 128 --K 2048 --N 768

A layer is a list of steps; each takes max(bytes / copy, FLOPs / GEMM), they follow each other,
launches are free. The frozen linear moves x, W and y; what a method adds depends on how the frozen
GEMM and its rank term come together (--form):

    b   library GEMM, then one pass over its result that reads and writes it
    d   the rank term is written first, the library GEMM accumulates onto it: one write
    c   a GEMM of our own with the rank term in its epilogue: no pass at all

A reflection has one form: a pass over what it reflects, and in the backward pass one over the
gradient beside it.

With --experts a line for the linears of a block of experts, [K → 2N] and [N → K]: their grouped
GEMM is the library's (form b), and dv and dB read dy each. A base that is stored in few bits
(--stored-bits) is read and written dense before each GEMM.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.cases import REFLECTIONS
from benchmarks.record import load

FORMS = {"b": 2, "d": 1, "c": 0}
"""Form → passes over the [T, N] or [T, K] result."""
BACKEND_FORMS = {"eager": "b", "triton": "d", "cuda": "d"}
"""Backend → the form that it takes where it can."""
ONE_READ = 32
"""Largest R at which one read of dy serves both dv and dB."""
RESULTS = Path(__file__).with_name("results")


class Step(NamedTuple):
    """Bytes and FLOPs of one step."""

    name: str
    bytes: float
    flops: float


class Ceilings(NamedTuple):
    """What a device can do: bytes per second of a copy, FLOP per second of a GEMM."""

    copy: float
    gemm: float

    def seconds(self, steps: list[Step]) -> float:
        """Of these steps, one after the other."""
        return sum(max(step.bytes / self.copy, step.flops / self.gemm) for step in steps)

    def roofline(self, steps: list[Step]) -> float:
        """Seconds if everything overlapped: the bound that no schedule beats."""
        return max(sum(s.bytes for s in steps) / self.copy, sum(s.flops for s in steps) / self.gemm)


def frozen(T: int, K: int, N: int, element: int, backward: bool) -> list[Step]:
    """Return the bare linear, and its dx."""
    gemm = Step("x Wᵀ", element * (T * K + N * K + T * N), 2.0 * T * K * N)
    return [gemm, Step("dy W", *gemm[1:])] if backward else [gemm]


def dequantised(numbers: float, bits: float, element: int, backward: bool) -> list[Step]:
    """Return what makes a weight of `numbers` dense, stored in `bits` each: once a pass."""
    step = Step("W dequantised", (bits / 8 + element) * numbers, 0.0)
    return [step, step] if backward else [step]


def experts(T: int, K: int, N: int, E: int, R: int, element: int, backward: bool) -> list[Step]:
    """Return one linear [N, K] of E experts that all have rows, with LoRA, T rows in all; R = 0:
    frozen.

    As `adapted` in form b, with every W read, and dy read once for dv and once for dB.
    """
    x, y, W = element * T * K, element * T * N, element * E * N * K
    gemm = Step("x_e W_eᵀ", x + W + y, 2.0 * T * K * N)
    steps = [gemm, Step("dy_e W_e", *gemm[1:])] if backward else [gemm]
    if R > 0:
        rank = {side: 2.0 * T * R * side for side in (K, N)}
        steps += [Step("h = x Âᵀ", x, rank[K]), Step("y += h B̂ᵀ", 2 * y, rank[N])]
        if backward:
            steps += [Step("dv", y, rank[N]), Step("dB", y, rank[N]), Step("dA", x, rank[K])]
            steps.append(Step("dx += dv Â", 2 * x, rank[K]))
    return steps


def reflected(method: str, T: int, K: int, N: int, element: int, backward: bool) -> list[Step]:
    """One layer of ETHER or ETHER+: x reflected, and for an output side z = x' Wᵀ, and the way
    back of each.
    """
    sides = {"x": K, "z": N} if method.endswith("-both") else {"x": K}
    steps = frozen(T, K, N, element, backward)
    for side, C in sides.items():
        flops = 4.0 * T * C * (2 if "plus" in method else 1)
        steps.append(Step(f"{side} reflected", 2 * element * T * C, flops))
        if backward:
            steps.append(Step(f"d{side} reflected, {side} read", 3 * element * T * C, 2 * flops))
    return steps


def adapted(method: str, T: int, K: int, N: int, R: int, element: int, backward: bool, form: str = "b") -> list[Step]:
    """One adapted layer by the traffic contract; R: total rank.

    Args:
        method: One of REFLECTIONS: see `reflected`. "dora" has a norm, a column scale and a kept
            [T, N] tensor; every other is x Wᵀ + h B̂ᵀ.
        T, K, N, R: Sizes.
        element: Bytes of an element of x and W.
        backward: Whether the backward pass counts.
        form: Key of FORMS.
    """
    if method in REFLECTIONS:
        return reflected(method, T, K, N, element, backward)
    dora = method == "dora"
    x, y, W = element * T * K, element * T * N, element * N * K
    rank = {side: 2.0 * T * R * side for side in (K, N)}
    steps = frozen(T, K, N, element, backward)
    steps.append(Step("h = x Âᵀ", x, rank[K]))
    steps.append(Step("y += h B̂ᵀ", FORMS[form] * y, rank[N]))
    if dora:
        steps.append(Step("row norm", W, 2.0 * N * K * R))
        steps.append(Step("c ⊙ W", min(W, y), 0.0))
    if backward:
        steps.append(Step("dv, dB", y if R <= ONE_READ else 2 * y, 2 * rank[N]))
        steps.append(Step("dA", x, rank[K]))
        steps.append(Step("dx += dh Â", FORMS[form] * x, rank[K]))
        if dora:
            steps.append(Step("kept: written, read for dm", 2 * y, 0.0))
            steps.append(Step("c ⊙ W again", min(W, y), 0.0))
    return steps


def siblings(T: int, K: int, outputs: Sequence[int], r: int, element: int, form: str = "d") -> list[Step]:
    """Several additive layers of one x as one call, forward and backward: x is read once for all
    their A, and once for all dA; dx is one buffer, which every dy W adds to.

    Args:
        T, K, r: Sizes; r of each.
        outputs: Out-features of each.
        element: Bytes of an element of x and W.
        form: Key of FORMS.
    """
    x, R = element * T * K, r * len(outputs)
    steps = [step for N in outputs for step in frozen(T, K, N, element, True)]
    steps.append(Step("h = x Âᵀ", x, 2.0 * T * R * K))
    for N in outputs:
        y, rank = element * T * N, 2.0 * T * r * N
        steps.append(Step("y += h B̂ᵀ", FORMS[form] * y, rank))
        steps.append(Step("dv, dB", y if r <= ONE_READ else 2 * y, 2 * rank))
    steps.append(Step("dA", x, 2.0 * T * R * K))
    steps.append(Step("dx += dh Â", FORMS[form] * x, 2.0 * T * R * K))
    return steps


def added_up(T: int, K: int, count: int, element: int) -> list[Step]:
    """Return what autograd does where `count` linears share an x: it adds the dx of each to those
    before it.
    """
    return [Step("dx += dx of the next", 3 * element * T * K, 0.0)] * (count - 1)


def kept_bytes(method: str, T: int, K: int, N: int, R: int, element: int, factors: bool = False) -> int:
    """Kept for backward beside x: h; the folded or cast `factors`, where a backend keeps them; one
    [T, N] for DoRA or where an output is reflected.
    """
    if method in REFLECTIONS:
        return element * T * N if method.endswith("-both") else 0
    return element * (T * R + R * (K + N) * factors + (T * N if method == "dora" else 0))


def predict(row: dict[str, Any], ceilings: Ceilings, form: str | None = None) -> float:
    """Milliseconds of a record's row, by default in its backend's form; of `frozen` and `merged`
    the bare linear's.
    """
    return 1e3 * ceilings.seconds(_steps(row, form or BACKEND_FORMS.get(str(row.get("backend")), "b")))


def roofline_fraction(row: dict[str, Any], machine: dict[str, Any]) -> float | None:
    """Return the part of the measured time that the roofline of the same run explains; None:
    nothing was measured.

    The bound has the contract's traffic with the rank term in the GEMM (form c), for every
    implementation alike.
    """
    ceilings = measured_ceilings(machine, row["dtype"])
    if ceilings is None or not row["median_ms"]:
        return None
    return 1e3 * ceilings.roofline(_steps(row, "c")) / float(row["median_ms"])


def measured_ceilings(machine: dict[str, Any], dtype: str) -> Ceilings | None:
    """Of the run that made a record; None in records without them."""
    name = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}[dtype]
    gemm, copy = machine.get("gemm_tflops_by_dtype", {}).get(name), machine.get("copy_tbps")
    return Ceilings(1e12 * copy, 1e12 * gemm) if gemm and copy else None


def _steps(row: dict[str, Any], form: str) -> list[Step]:
    T, K, N, element = row["T"], row["K"], row["N"], 4 if row["dtype"] == "float32" else 2
    backward = row["mode"] != "forward"
    if row["impl"] in ("frozen", "frozen-again", "merged"):
        return frozen(T, K, N, element, backward)
    R = (row["r"] + (row["impl"] != "lora")) * row["E"] if row["E"] else row["r"]  # a router has a column an expert
    return adapted(row["method"], T, K, N, R, element, backward, form)


def main(argv: Sequence[str] | None = None) -> int:
    """Print a prediction, or measured / predicted of records; 2: bad input."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    if "--from-binaries" in arguments:
        from benchmarks.codegen import estimates  # Triton is not there everywhere

        return estimates.main([word for word in arguments if word != "--from-binaries"])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--record", type=Path, nargs="*", help="records to compare with; without files: all under benchmarks/results")
    add("--copy-tbps", type=float, help="TB/s of a copy, reads and writes both counted")
    add("--gemm-tflops", type=float, help="TFLOP/s of a GEMM in the dtype")
    add("--form", choices=list(FORMS), help="how GEMM and rank term come together [what the row's backend does first]")
    methods = ("lora", "dora", "delora", *REFLECTIONS)
    add("--methods", nargs="+", choices=methods, default=list(methods), help="[all]")
    for letter, default in (("T", 8192), ("K", 4096), ("N", 4096), ("r", 16)):
        add(f"--{letter}", type=int, default=default, help="[%(default)s]")
    add("--experts", type=int, help="of a block whose tokens choose --top-k of them; its sizes are K and N")
    add("--top-k", type=int, default=8, help="[%(default)s]")
    add("--stored-bits", type=float, help="of a number of W, with its share of the scales, as 4.5")
    add("--element", type=int, default=2, help="bytes of an element of x and W [%(default)s]")
    args = parser.parse_args(arguments)
    if args.record is not None:
        for path in args.record or sorted(RESULTS.rglob("*.json")):
            _compare(path, args.form)
        return 0
    if not (args.copy_tbps and args.gemm_tflops):
        print(
            "benchmarks.model: give what the machine can do, as in --copy-tbps 0.02 --gemm-tflops 0.3 (make bench "
            "measures both), or --record to compare predictions with what was measured; --help has the rest",
            file=sys.stderr,
        )
        return 2
    predicted = _print_prediction if args.experts is None else _print_experts
    predicted(args, Ceilings(1e12 * args.copy_tbps, 1e12 * args.gemm_tflops))
    return 0


def _print_experts(args: argparse.Namespace, ceilings: Ceilings) -> None:
    rows, E, element = args.T * args.top_k, args.experts, args.element
    steps: dict[int, list[Step]] = {0: [], args.r: []}
    for K, N in ((args.K, 2 * args.N), (args.N, args.K)):
        for R, so_far in steps.items():
            so_far += dequantised(E * N * K, args.stored_bits, element, True) if args.stored_bits else []
            so_far += experts(rows, K, N, E, R, element, True)
    bare, lora = (1e3 * ceilings.seconds(steps[R]) for R in (0, args.r))
    print(
        f"predicted, forward + backward; {args.experts} experts, {args.T} tokens with {args.top_k} each, K={args.K} "
        f"N={args.N} r={args.r}: frozen {bare:.3f} ms, LoRA {lora:.3f} ms, {lora / bare:.3f} over frozen"
    )


def _print_prediction(args: argparse.Namespace, ceilings: Ceilings) -> None:
    sizes = (args.T, args.K, args.N)
    stored = dequantised(args.N * args.K, args.stored_bits, args.element, True) if args.stored_bits else []
    bare = 1e3 * ceilings.seconds(stored + frozen(*sizes, args.element, True))
    print(f"predicted, forward + backward; T={args.T} K={args.K} N={args.N} r={args.r}; frozen linear {bare:.3f} ms\n")
    print("| method | form | ms | over frozen | kept for backward, MiB |\n| --- | --- | ---: | ---: | ---: |")
    for method in args.methods:
        kept = kept_bytes(method, *sizes, args.r, args.element, factors=True) / 2**20
        for form in ("-",) if method in REFLECTIONS else FORMS:
            ms = 1e3 * ceilings.seconds(stored + adapted(method, *sizes, args.r, args.element, True, form))
            print(f"| {method} | {form} | {ms:.3f} | {ms / bare:.3f} | {kept:.1f} |")


def _compare(path: Path, form: str | None) -> None:
    try:
        record = load(path)
    except ValueError:
        return  # a record of the demo
    rows = [
        row
        for row in record["rows"]
        if row["kind"] == "layer" and row["median_ms"] and row["impl"].startswith(("dk", "frozen"))
    ]
    compared = [(row, measured_ceilings(record["machine"], row["dtype"])) for row in rows]
    if not any(ceilings for _, ceilings in compared):
        print(f"{path}: no ceilings in this record\n")
        return
    print(f"{path}{'' if form is None else f' (form {form})'}\n")
    print("| method | impl | T | K | N | r | precision | mode | ms | predicted | ratio |")
    print("| --- " * 8 + "| ---: " * 3 + "|")
    for row, ceilings in compared:
        if ceilings is not None:
            predicted = predict(row, ceilings, form)
            what = " | ".join(str(row[name]) for name in ("method", "impl", "T", "K", "N", "r", "precision", "mode"))
            print(f"| {what} | {row['median_ms']:.3f} | {predicted:.3f} | {row['median_ms'] / predicted:.2f} |")
    print()


if __name__ == "__main__":
    sys.exit(main())
