"""The figures of README and of pages in docs/, each between two comments that name a kind and the
records it comes from.

    <!-- figures: layer-time benchmarks/results/cpu-xeon-2c/FILE.json -->
    ...
    <!-- end of figures -->

`python -m benchmarks.report --readme` writes what stands between them; a test compares.
"""

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.method_comparison import LABELS
from benchmarks.record import load
from benchmarks.report import what_people_run
from benchmarks.report.by_case import Impls, by_case, condition, device_of, name_of, peft_of
from benchmarks.report.mixtures import over_frozen
from benchmarks.report.reflections import at_its_place
from benchmarks.report.tables import precision_text

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
PAGES = (README, ROOT / "docs" / "measurements.md", ROOT / "docs" / "goat.md")
_BLOCK = re.compile(
    r"(?P<head><!-- figures: (?P<kind>\S+)(?P<files>(?: \S+)+) -->\n).*?(?P<foot>\n<!-- end of figures -->)", re.S
)


def blocks(text: str) -> list[str]:
    """Return the kinds of figures that a page has, in order."""
    return [block["kind"] for block in _BLOCK.finditer(text)]


def written(text: str, page: Path = README) -> str:
    """Return the text of `page` with every figure as its records give it.

    Raises:
        ValueError: a block names a kind of figure that there is not, or a record that is none.
    """

    def fill(block: re.Match[str]) -> str:
        if block["kind"] not in KINDS:
            raise ValueError(f"a page names the figures {block['kind']!r}, there are {', '.join(KINDS)}")
        figures = KINDS[block["kind"]](*(ROOT / file for file in block["files"].split()))
        up = "../" * len(page.relative_to(ROOT).parts[1:])
        return block["head"] + figures.replace("](benchmarks/", f"]({up}benchmarks/") + block["foot"]

    return _BLOCK.sub(fill, text)


def _pairs(record: dict[str, Any], column: str, every_shape: bool = False) -> Iterator[tuple[str, str, Impls]]:
    """Precision, method, impls: cases of the record's first shape, or all, in which PEFT and we
    have `column`.
    """
    cases = [
        (key, impls)
        for key, impls in by_case(record["rows"]).items()
        if key.backward and not key.dropout_p
        if impls.get("dk", {}).get(column) and (peft_of(impls) or {}).get(column)
    ]
    first = cases[0][0][2:6] if cases else ()  # T, K, N, r
    for key, impls in cases:
        if every_shape or (key.T, key.K, key.N, key.r) == first:
            yield key.precision, key.method, impls


def _title(text: str, record: dict[str, Any], row: dict[str, Any]) -> str:
    shape = ", ".join(f"{letter}={row[letter]}" for letter in "TKNr")
    return f"*{text}. {shape}. {condition(record['machine'])}.*\n"


def layer_time(path: Path) -> str:
    """Frozen linear, PEFT and ours in milliseconds."""
    record = load(path)
    cases = list(_pairs(record, "median_ms"))
    text = "Milliseconds, forward + backward; in brackets the part of PEFT's time"
    lines = [_title(text, record, cases[0][2]["dk"])]
    lines += ["| precision | method | frozen linear | PEFT | delora-kernels |", "| --- | --- | ---: | ---: | ---: |"]
    for precision, method, impls in cases:
        ours, peft = impls["dk"]["median_ms"], (peft_of(impls) or {})["median_ms"]
        cells = f"{impls['frozen']['median_ms']:.1f} | {peft:.1f} | {ours:.1f} (**{ours / peft:.2f}**)"
        lines.append(f"| {precision_text(precision)} | {name_of(method)} | {cells} |")
    return "\n".join(lines)


def layer_memory(path: Path) -> str:
    """MiB of PEFT and of ours."""
    record = load(path)
    cases = list(_pairs(record, "peak_mib"))
    precision = precision_text(cases[0][0])
    lines = [_title(f"MiB, PEFT → delora-kernels; {precision}", record, cases[0][2]["dk"])]
    lines += ["| method | kept for backward | allocated, summed | peak |", "| --- | ---: | ---: | ---: |"]
    for of, method, impls in cases:
        if of == cases[0][0]:
            peft, ours = peft_of(impls) or {}, impls["dk"]
            cells = [f"{peft[key]:.1f} → {ours[key]:.1f}" for key in ("saved_mib", "allocated_mib", "peak_mib")]
            lines.append(f"| {name_of(method)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def layer_range(path: Path) -> str:
    """One sentence: between which parts of PEFT's time each method lies, over all that the record
    trains.
    """
    record = load(path)
    parts: dict[str, list[float]] = {}
    cases = list(_pairs(record, "median_ms", every_shape=True))
    for _, method, impls in cases:
        parts.setdefault(method, []).append(impls["dk"]["median_ms"] / (peft_of(impls) or {})["median_ms"])
    ranges = [f"{min(found):.2f} to {max(found):.2f} for {name_of(method)}" for method, found in parts.items()]
    where = f"[record]({path.relative_to(ROOT).as_posix()})"
    sizes = [sorted({impls["dk"][letter] for *_, impls in cases}) for letter in "TKNr"]
    spans = [f"{n[0]} to {n[-1]}" if len(n) > 1 else str(n[0]) for n in sizes]
    shapes = ", ".join(f"{letter} {span}" for letter, span in zip("TKNr", spans, strict=True))
    precisions = " and ".join(dict.fromkeys(precision_text(precision) for precision, *_ in cases))
    on = f"On {device_of(record['machine'])}, {precisions}, {shapes}"
    return f"{on}, the parts were {', '.join(ranges)} ({where})."


def layer_reflections(path: Path) -> str:
    """One sentence: ETHER and ETHER+, and the authors' form of them, over the frozen linear, where
    limits apply.
    """
    record = load(path)
    cases = {k: impls for k, impls in by_case(record["rows"]).items() if at_its_place(k, record["machine"])}
    cases = {key: impls for key, impls in cases.items() if over_frozen(impls, "dk") and key.n_blocks == 1}
    first = next(iter(cases))
    parts = []
    for key, impls in cases.items():
        if key.precision == first.precision:
            authors = over_frozen(impls, "authors")
            theirs = f" (the authors' form {authors:.2f})" if authors else ""
            parts.append(f"{name_of(key.method)} {over_frozen(impls, 'dk'):.2f}{theirs}")
    where = f"[record]({path.relative_to(ROOT).as_posix()})"
    on = f"On {device_of(record['machine'])}, {precision_text(first.precision)}, T={first.T}, K={first.K}, N={first.N}"
    return f"{on}, forward + backward over the frozen linear: {'; '.join(parts)} ({where})."


def finetune(path: Path) -> str:
    """One sentence on a record of `make demo`."""
    record = json.loads(path.read_text(encoding="utf-8"))
    eager, fused = record["runs"]["eager"], record["runs"]["fused"]
    (start, *_, fused_end), eager_end = fused["heldout_loss"], eager["heldout_loss"][-1]
    losses = f"held-out loss {start:.3f} → {eager_end:.3f} eager and {fused_end:.3f} fused"
    speed = f"{eager['median_ms']:.0f} → {fused['median_ms']:.0f} ms a step ({record['speedup']:.2f}x)"
    kept = f"{eager['kept_mib']:.0f} → {fused['kept_mib']:.0f} MiB kept for backward"
    where = f"[record]({path.relative_to(ROOT).as_posix()})"
    return f"{record['machine']['cpu']}: {speed}, {kept}, {losses} ({where})."


def methods(path: Path) -> str:
    """Held-out loss, time and memory of every method of a record of
    `benchmarks.method_comparison`.
    """
    record = json.loads(path.read_text(encoding="utf-8"))
    c, rows = record["config"], record["rows"]
    precision = "bf16 base, autocast" if c["dtype"] == "bf16" else "all fp32"
    size = f"{c['steps']} steps of {c['batch_size']} × {c['seq_len']} tokens, {c['seeds']} seeds, {precision}"
    lines = [f"*{record['model']}, total rank {c['rank']} on every linear, {size}. {condition(record['machine'])}.*\n"]
    lines += ["| method | learning rate | held-out loss before → after (lowest to highest) | ms a step | MiB kept |"]
    lines += ["| --- | ---: | ---: | ---: | ---: |"]
    for method in c["methods"]:
        own = [row for row in rows if row["method"] == method]
        before, after = ([row["heldout_loss"][at] for row in own] for at in (0, -1))
        losses = f"{fmean(before):.3f} → **{fmean(after):.3f}** ({min(after):.3f} to {max(after):.3f})"
        cost = f"{fmean(row['median_ms'] for row in own):.0f} | {fmean(row['kept_mib'] for row in own):.0f}"
        lines.append(f"| {LABELS[method]} | {own[0]['lr']:.3g} | {losses} | {cost} |")
    return "\n".join(lines)


KINDS: dict[str, Callable[..., str]] = {
    "what-people-run": what_people_run.table,
    "layer-time": layer_time,
    "layer-memory": layer_memory,
    "layer-range": layer_range,
    "layer-reflections": layer_reflections,
    "finetune": finetune,
    "methods": methods,
}
