"""The plots of one record: time over the frozen linear, memory, scaling, roofline, whole models."""

from collections.abc import Callable
from typing import Any

from matplotlib.figure import Figure

from benchmarks.cases import BOTH
from benchmarks.model import roofline_fraction
from benchmarks.report.tables import by_case, condition, name_of

Row = dict[str, Any]

COLOURS = {"dk": "#0072B2", "peft": "#E69F00", "addmm": "#009E73", "peft-compile": "#CC79A7", "frozen": "#777777"}
COLOURS |= {"dk-triton": "#56B4E9", "dk-eager": "#004466", "peft-bf16": "#D55E00", "merged": "#999933"}
COLOURS |= {"goat-eager": "#D55E00", "dense": "#E69F00", "dense-compile": "#CC79A7"}
"""Okabe and Ito's, told apart by everyone."""
OTHER = "#BBBBBB"
SHOWN = tuple(name for name in COLOURS if name not in ("frozen", "merged"))


def draw(record: dict[str, Any]) -> dict[str, Figure]:
    """File stem → figure; those for which the record has nothing are left out."""
    makers: dict[str, Callable[[dict[str, Any]], Figure | None]] = {
        "time": _time,
        "memory": _memory,
        "scaling": _scaling,
        "roofline": _roofline,
        "model": _model,
    }
    drawn = {name: make(record) for name, make in makers.items()}
    return {name: figure for name, figure in drawn.items() if figure is not None}


def _centre(record: dict[str, Any], column: str) -> dict[tuple[Any, ...], dict[str, Row]]:
    """The cases with `column` whose T, r and precision most others share: one a method and shape; no dropout."""
    cases = {k: v for k, v in by_case(record["rows"]).items() if k[-1] == BOTH and not k[-2] and "dk" in v}
    cases = {k: v for k, v in cases.items() if any(row[column] for row in v.values())}
    if not cases:
        return {}
    settings = [(key[2], key[5], key[7]) for key in cases]
    common = max(set(settings), key=lambda setting: (settings.count(setting), str(setting)))
    return {key: impls for key, impls in cases.items() if (key[2], key[5], key[7]) == common}


def _grouped(record: dict[str, Any], column: str, title: str, bare: float | None) -> Figure | None:
    """A panel for each method, a group of bars for each shape, a bar for each implementation."""
    cases = _centre(record, column)
    if not cases:
        return None
    methods = list(dict.fromkeys(key[0] for key in cases))
    shapes = list(dict.fromkeys((key[1] or f"{key[3]} → {key[4]}") for key in cases))
    names = [name for name in SHOWN if any(name in impls and impls[name][column] for impls in cases.values())]
    figure = Figure(
        figsize=(max(6.0, 1.6 + 0.34 * len(names) * len(shapes)), 1.0 + 2.0 * len(methods)), layout="constrained"
    )
    panels = figure.subplots(len(methods), 1, sharex=True, squeeze=False)[:, 0]
    for axes, method in zip(panels, methods, strict=True):
        top = 0.0
        for number, name in enumerate(names):
            width = 0.8 / len(names)
            for place, shape in enumerate(shapes):
                row = next(
                    (v.get(name) for k, v in cases.items() if k[0] == method and (k[1] or f"{k[3]} → {k[4]}") == shape),
                    None,
                )
                if row is None or not row[column]:
                    continue
                left, value = place - 0.4 + (number + 0.5) * width, row[column]
                top = max(top, value)
                axes.bar(left, value, width * 0.92, color=COLOURS[name])
                axes.text(
                    left, value, f"{value:.2f}" if value < 10 else f"{value:.0f}", ha="center", va="bottom", fontsize=7
                )
        if bare is not None:
            axes.axhline(bare, color="0.4", linewidth=0.8, linestyle="--")
        axes.set_ylim(0, 1.15 * (top or 1.0))
        axes.set_ylabel(name_of(method))
        axes.spines[["top", "right"]].set_visible(False)
    panels[-1].set_xticks(range(len(shapes)), shapes, fontsize=8)
    key = next(iter(cases))
    _head(figure, record, f"{title}; T={key[2]}, r={key[5]}, {key[7]}", names)
    return figure


def _head(figure: Figure, record: dict[str, Any], title: str, names: list[str]) -> None:
    """Title, the line that says on what, and the legend of implementations."""
    from matplotlib.patches import Patch

    figure.suptitle(f"{title}\n{condition(record['machine'])}", fontsize=8, x=0.02, ha="left")
    handles = [Patch(color=COLOURS.get(name, OTHER), label=name) for name in names]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(names), frameon=False, fontsize=8)


def _time(record: dict[str, Any]) -> Figure | None:
    return _grouped(record, "ratio_to_frozen", "Time over the frozen linear (dashed: 1), forward + backward", 1.0)


def _memory(record: dict[str, Any]) -> Figure | None:
    return _grouped(record, "peak_mib", "Peak memory of one layer, MiB, forward + backward", None)


def _scaling(record: dict[str, Any]) -> Figure | None:
    """Columns: T, r, E as far as there are three points or two; rows: methods."""
    cases = {k: v for k, v in by_case(record["rows"]).items() if k[-1] == BOTH and not k[-2] and "dk" in v}
    letters = {"T": 2, "r": 5, "E": 6}
    lines: dict[str, dict[str, dict[str, dict[int, float]]]] = {}
    for letter, at in letters.items():
        groups: dict[tuple[Any, ...], dict[int, dict[str, Row]]] = {}
        for key, impls in cases.items():
            if key[at]:
                groups.setdefault((*key[:at], *key[at + 1 :]), {})[key[at]] = impls
        for rest, points in groups.items():
            known = lines.setdefault(letter, {}).get(rest[0], {}).get("dk", {})
            if len(points) < 2 or len(points) <= len(known):
                continue
            series = {n: {x: i[n]["ratio_to_frozen"] for x, i in sorted(points.items()) if n in i} for n in SHOWN}
            lines[letter][rest[0]] = {n: {x: y for x, y in s.items() if y} for n, s in series.items()}
    lines = {letter: methods for letter, methods in lines.items() if methods}
    if not lines:
        return None
    methods = list(dict.fromkeys(method for found in lines.values() for method in found))
    figure = Figure(figsize=(1.0 + 3.2 * len(lines), 1.0 + 2.0 * len(methods)), layout="constrained")
    panels = figure.subplots(len(methods), len(lines), squeeze=False)
    names: dict[str, None] = {}
    for column, (letter, found) in enumerate(lines.items()):
        for at, method in enumerate(methods):
            axes = panels[at, column]
            for name, line in found.get(method, {}).items():
                if len(line) > 1:
                    names[name] = None
                    axes.plot(list(line), list(line.values()), "o-", markersize=3.5, color=COLOURS[name])
            axes.axhline(1.0, color="0.4", linewidth=0.8, linestyle="--")
            axes.set_xscale("log", base=2)
            ticks = sorted({x for series in found.get(method, {}).values() for x in series})
            axes.set_xticks(ticks, [str(x) for x in ticks], fontsize=8)
            axes.spines[["top", "right"]].set_visible(False)
            axes.set_ylim(bottom=0)
            if column == 0:
                axes.set_ylabel(name_of(method))
            if at == len(methods) - 1:
                axes.set_xlabel({"T": "T, tokens", "r": "r, rank", "E": "E, experts"}[letter])
    _head(figure, record, "Time over the frozen linear (dashed: 1), forward + backward", list(names))
    return figure


def _roofline(record: dict[str, Any]) -> Figure | None:
    """For each case at the centre, the part of the measured time that the two ceilings explain."""
    bars = []
    for key, impls in _centre(record, "median_ms").items():
        for name in ("frozen", *SHOWN):
            share = roofline_fraction(impls[name], record["machine"]) if name in impls else None
            if share is not None:
                bars.append((f"{name_of(key[0])} {key[1] or ''}  {name}", name, share))
    if not bars:
        return None
    figure = Figure(figsize=(7.0, 1.0 + 0.19 * len(bars)), layout="constrained")
    axes = figure.subplots()
    for place, (_, name, share) in enumerate(reversed(bars)):
        axes.barh(place, share, color=COLOURS[name])
        axes.text(share, place, f" {share:.2f}", va="center", fontsize=7)
    axes.set_yticks(range(len(bars)), [label for label, *_ in reversed(bars)], fontsize=7)
    axes.set_ylim(-0.6, len(bars) - 0.4)
    axes.axvline(1.0, color="0.4", linewidth=0.8, linestyle="--")
    axes.spines[["top", "right"]].set_visible(False)
    _head(figure, record, "Roofline time of the contract's traffic / measured time (1: at the ceilings)", [])
    return figure


def _model(record: dict[str, Any]) -> Figure | None:
    """Tokens per second, peak and longest sequence of the whole models."""
    cases = by_case(record["rows"], "model")
    panels = {"tokens_per_s": "tokens / s", "peak_mib": "peak, MiB", "longest_sequence": "longest sequence"}
    panels = {n: t for n, t in panels.items() if any(r.get(n) for i in cases.values() for r in i.values())}
    if not panels:
        return None
    names = list(dict.fromkeys(name for impls in cases.values() for name in impls))
    labels = [name_of(key[0]) + ("\ncheckp." if key[-1] else "") for key in cases]
    figure = Figure(figsize=(1.0 + 3.4 * len(panels), 3.4), layout="constrained")
    for axes, (column, title) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        for number, name in enumerate(names):
            width = 0.8 / len(names)
            values = [impls[name].get(column) or 0.0 if name in impls else 0.0 for impls in cases.values()]
            places = [place - 0.4 + (number + 0.5) * width for place in range(len(cases))]
            axes.bar(places, values, width * 0.92, color=COLOURS.get(name, OTHER))
            for place, value in zip(places, values, strict=True):
                axes.text(place, value, f"{value:.0f}" if value else "", ha="center", va="bottom", fontsize=7)
        axes.set_title(title, fontsize=9)
        axes.set_xticks(range(len(labels)), labels, fontsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    _head(figure, record, f"{next(iter(cases))[1]}, one optimiser step", names)
    return figure
