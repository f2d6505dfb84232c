"""Markdown tables of one record, losses shown as plainly as wins, and the comparison of two."""

from typing import Any, NamedTuple

from benchmarks.cases import BOTH, PRECISIONS
from benchmarks.report import mixtures, reflections
from benchmarks.report.by_case import Cases, Key, Row, by_case, condition, device_of, name_of

NOISE = 0.05
"""A comparison calls nothing a change that is smaller."""

BUSY = 1.5
"""How many times its shortest time the same frozen linear may take in other cases of a record on a
quiet machine.
"""


def _table(head: list[str], left: int, lines: list[list[str]]) -> list[str]:
    rule = ["---"] * left + ["---:"] * (len(head) - left)
    return [f"| {' | '.join(cells)} |" for cells in (head, rule, *lines)]


def _number(value: float | None, digits: int = 3) -> str:
    return "" if value is None else f"{value:.{digits}g}" if abs(value) < 100 else f"{value:.0f}"


def report(record: dict[str, Any]) -> str:
    """Return the whole report of one record."""
    machine, rows = record["machine"], record["rows"]
    lines = ["# Benchmarks", "", f"*{condition(machine)}.*", ""]
    if machine.get("copy_tbps"):
        gemm = ", ".join(f"{name} {value:.3g} TFLOP/s" for name, value in machine["gemm_tflops_by_dtype"].items())
        lines += [f"Ceilings of the same run: copy {1e3 * machine['copy_tbps']:.4g} GB/s; GEMM {gemm}.", ""]
    lines += _noise(rows)
    lines += _layers(rows) + requirements(rows, machine) + _models(rows) + _not_there(rows)
    return "\n".join(lines) + "\n"


def _noise(rows: list[Row]) -> list[str]:
    """How far times may be trusted: within the rounds of a case, and from case to case."""
    noise, spread = noise_of(rows), spread_of(rows)
    if noise is None:
        return []
    text = f"Noise: the frozen linear timed twice in the same rounds differs by {noise:.1%} (median over cases)"
    if spread is not None and spread.longest > BUSY * spread.shortest:
        text = (
            f"**The machine was busy**: the same frozen linear ({spread.what}) took {_number(spread.shortest)} to "
            f"{_number(spread.longest)} ms in different cases. Compare times over the frozen linear, not ms of "
            f"different cases, and run again on a quiet machine. Within the same rounds the frozen linear, timed "
            f"twice, differs by {noise:.1%} (median over cases)"
        )
    return [f"{text}.", ""]


class Spread(NamedTuple):
    """How one frozen linear's times differ from case to case."""

    what: str
    shortest: float
    longest: float


def spread_of(rows: list[Row]) -> Spread | None:
    """Return the frozen linear whose times differ most among cases with the same sizes, precision
    and mode, or None.
    """
    times: dict[tuple[Any, ...], list[float]] = {}
    for key, impls in by_case(rows).items():
        for row in impls.values():
            if row["impl"] in ("frozen", "frozen-again") and row["median_ms"]:
                times.setdefault((key.T, key.K, key.N, key.precision, key.mode), []).append(row["median_ms"])
    found = [
        Spread(f"{T}, {K} → {N}, {precision}, {mode}", min(each), max(each))
        for (T, K, N, precision, mode), each in times.items()
    ]
    return max(found, key=lambda spread: spread.longest / spread.shortest, default=None)


def noise_of(rows: list[Row]) -> float | None:
    """Median over the cases of |frozen-again / frozen − 1|."""
    apart = sorted(
        abs(row["ratio_to_frozen"] - 1) for row in rows if row["impl"] == "frozen-again" and row["ratio_to_frozen"]
    )
    return apart[len(apart) // 2] if apart else None


def _layers(rows: list[Row]) -> list[str]:
    lines: list[str] = []
    cases = {key: impls for key, impls in by_case(rows).items() if any(row["median_ms"] for row in impls.values())}
    for mode in dict.fromkeys(key.mode for key in cases):
        what = "forward + backward with dx" if mode == BOTH else f"{mode}, no gradients"
        lines += [f"## One layer, {what}", "", "Times over the frozen linear (**bold**: ours); ms in brackets.", ""]
        chosen = {key: impls for key, impls in cases.items() if key.mode == mode}
        shown = [name for name in _implementations(chosen) if name not in ("frozen", "frozen-again")]
        body = []
        for key, impls in chosen.items():
            body.append([*_what(key), _ms(impls.get("frozen")), *(_cell(impls.get(name), name) for name in shown)])
        lines += [*_table([*_HEAD, "frozen, ms", *shown], 4, body), ""]
    memory = {key: impls for key, impls in cases.items() if any(r["peak_mib"] is not None for r in impls.values())}
    memory = {key: impls for key, impls in memory.items() if key.backward}
    if memory:
        shown = [n for n in _implementations(memory) if n not in ("frozen-again", "merged")]
        lines += ["## Memory of one layer", "", "MiB kept for backward / at the peak, above what was there before.", ""]
        body = [[*_what(key), *(_weights(impls.get(name)) for name in shown)] for key, impls in memory.items()]
        lines += [*_table([*_HEAD, *shown], 4, body), ""]
    return lines


def requirements(rows: list[Row], machine: dict[str, Any]) -> list[str]:
    """Return the tables of mixtures and of reflections against their limits; nothing where there
    are none.
    """
    lines: list[str] = []
    cases = by_case(rows)
    gated = mixtures.mixture_lines(cases)
    if gated:
        lines += ["## Mixtures of experts, forward + backward", "", mixtures.NOTE, ""]
        lines += [*_table(mixtures.HEAD, 3, gated), ""]
    reflected, note = reflections.reflection_lines(cases, machine)
    if reflected:
        lines += ["## ETHER and ETHER+, forward + backward", "", note, ""]
        lines += [*_table(reflections.HEAD, 3, reflected), ""]
    return lines


def _implementations(cases: Cases) -> list[str]:
    """Those that any case has measured or refused, in the order of the first."""
    names = {name: None for impls in cases.values() for name, row in impls.items() if row["status"] != "absent"}
    return list(names)


_HEAD = ["method", "shape", "T, K → N, r", "precision"]


def _what(key: Key) -> list[str]:
    return [name_of(key.method), key.shape or "", key.sizes, key.conditions]


def _ms(row: Row | None) -> str:
    return _number(row["median_ms"]) if row else ""


def _cell(row: Row | None, name: str) -> str:
    if row is None or row["status"] == "absent":
        return ""
    if row["status"] != "ok":
        return str(row["status"])
    if row["ratio_to_frozen"] is None:
        return _ms(row)
    ratio = f"{row['ratio_to_frozen']:.2f}"
    host = f", host {_number(row['host_ms'])}" if row.get("host_ms") else ""
    graph = f", graph {_number(row['graph_ms'])}" if row.get("graph_ms") else ""
    return f"{f'**{ratio}**' if name.startswith('dk') else ratio} ({_ms(row)}{host}{graph})"


def _weights(row: Row | None) -> str:
    if row is None or row["peak_mib"] is None:
        return "" if row is None or row["status"] in ("absent", "ok") else str(row["status"])
    return f"{_number(row['saved_mib'])} / {_number(row['peak_mib'])}"


def _models(rows: list[Row]) -> list[str]:
    body = []
    for impls in by_case(rows, "model").values():
        peft = impls.get("peft")
        for name, row in impls.items():
            over = row["median_ms"] / peft["median_ms"] if row["median_ms"] and peft and peft["median_ms"] else None
            sizes = f"{row['blocks']} blocks, {row['batch']} × {row['sequence']}"
            sizes += ", checkpointing" if row["checkpointing"] else ""
            numbers = [_ms(row) if row["status"] == "ok" else row["status"], f"{over:.2f}" if over else ""]
            numbers += [_number(row.get("tokens_per_s"), 4), _number(row["peak_mib"])]
            longest = row.get("longest_sequence")
            body.append(
                [
                    name_of(row["method"]),
                    sizes,
                    name,
                    *numbers,
                    "" if longest is None else f"{longest} in {row['limit_mib']} MiB",
                ]
            )
    if not body:
        return []
    head = ["method", "model", "", "step, ms", "over PEFT", "tokens/s", "peak, MiB", "longest sequence"]
    return ["## A whole model, one optimiser step", "", *_table(head, 3, body), ""]


def _not_there(rows: list[Row]) -> list[str]:
    """Return what was not measured, and why: once for each reason."""
    reasons: dict[tuple[str, str, str], int] = {}
    for row in rows:
        if row["status"] != "ok":
            key = (row["status"], row["impl"], str(row["note"]))
            reasons[key] = reasons.get(key, 0) + 1
    if not reasons:
        return []
    body = [
        [status, impl, str(count), note.replace("|", "\\|")] for (status, impl, note), count in sorted(reasons.items())
    ]
    return ["## Not measured", "", *_table(["status", "implementation", "cases", "why"], 4, body), ""]


def compare(base: dict[str, Any], record: dict[str, Any]) -> str:
    """Return what changed from `base` to `record`: every case of ours in both, slower ones
    first.
    """
    before, after = by_case(base["rows"]), by_case(record["rows"])
    body = []
    for key in after.keys() & before.keys():
        for name, row in after[key].items():
            old = before[key].get(name)
            if name.startswith("dk") and old and old["ratio_to_frozen"] and row["ratio_to_frozen"]:
                change = row["ratio_to_frozen"] / old["ratio_to_frozen"]
                word = "slower" if change > 1 + NOISE else "faster" if change < 1 - NOISE else ""
                ratios = [f"{old['ratio_to_frozen']:.2f}", f"{row['ratio_to_frozen']:.2f}", f"{change:.2f}", word]
                body.append((change, [*_what(key), key.mode, name, *ratios]))
    lines = [
        "# What changed",
        "",
        f"*From {condition(base['machine'])}*  ",
        f"*to {condition(record['machine'])}.*",
        "",
    ]
    if device_of(base["machine"]) != device_of(record["machine"]):
        lines += ["**Different devices: the times over the frozen linear are compared, not the devices.**", ""]
    if not body:
        return "\n".join([*lines, "The records share no case."]) + "\n"
    cells = [line for _, line in sorted(body, key=lambda pair: -pair[0])]
    slower = sum(line[-1] == "slower" for line in cells)
    faster = sum(line[-1] == "faster" for line in cells)
    lines += [
        f"Time over the frozen linear: {slower} of {len(cells)} slower by more than {NOISE:.0%}, {faster} faster.",
        "",
    ]
    head = [*_HEAD, "mode", "", "before", "after", "after / before", ""]
    return "\n".join(lines + _table(head, 6, cells)) + "\n"


def precision_text(name: str) -> str:
    """Return a precision in words."""
    return PRECISIONS[name].text
