"""The plots of one record: time over the frozen linear, memory, scaling, roofline, whole models.

Mixtures and reflections, which have other sizes than a rank, get figures of their own:
time-mixtures, ...
"""

from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.model import roofline_fraction
from benchmarks.report.by_case import Cases, Key, Row, by_case, condition, name_of

COLOURS = {"dk": "#0072B2", "peft": "#E69F00", "addmm": "#009E73", "peft-compile": "#CC79A7", "frozen": "#777777"}
COLOURS |= {"dk-triton": "#56B4E9", "dk-cuda": "#F0E442", "dk-eager": "#004466", "merged": "#999933"}
COLOURS |= {"peft-bf16": "#D55E00", "peft-fp16": "#D55E00", "authors": "#E69F00"}
COLOURS |= {"goat-eager": "#D55E00", "lora": "#009E73", "dense": "#E69F00", "dense-compile": "#CC79A7"}
"""Okabe and Ito's, told apart by everyone; those of one colour are never in one figure."""
OTHER = "#BBBBBB"
SHOWN = tuple(name for name in COLOURS if name not in ("frozen", "merged"))
VARIED = {"T": "T, tokens", "r": "r, rank", "E": "E, experts", "n_blocks": "n, blocks of a side"}


def draw(record: dict[str, Any]) -> dict[str, Figure]:
    """File stem → figure; those for which the record has nothing are left out."""
    cases = {key: impls for key, impls in by_case(record["rows"]).items() if key.backward and not key.dropout_p}
    drawn: dict[str, Figure | None] = {}
    for family in dict.fromkeys(key.family for key in cases):
        own = {key: impls for key, impls in cases.items() if key.family == family and "dk" in impls}
        makers = {"time": _time, "memory": _memory, "scaling": _scaling, "roofline": _roofline}
        drawn |= {f"{name}-{family}".rstrip("-"): make(record["machine"], own) for name, make in makers.items()}
    drawn["model"] = _model(record["machine"], by_case(record["rows"], "model"))
    return {name: figure for name, figure in drawn.items() if figure is not None}


def _centre(cases: Cases, column: str) -> Cases:
    """Return the cases with `column` whose T, inner sizes and precision most others share: one a
    method and shape.
    """
    measured = {key: impls for key, impls in cases.items() if any(row[column] for row in impls.values())}
    settings = {key: key._replace(method="", shape=None, K=0, N=0) for key in measured}
    if not measured:
        return {}
    every = list(settings.values())
    common = max(every, key=lambda setting: (every.count(setting), str(setting)))
    return {key: impls for key, impls in measured.items() if settings[key] == common}


def _grouped(machine: dict[str, Any], cases: Cases, column: str, title: str, bare: float | None) -> Figure | None:
    """Return a panel for each method, a group of bars for each shape, a bar for each
    implementation.
    """
    cases = _centre(cases, column)
    if not cases:
        return None
    methods = list(dict.fromkeys(key.method for key in cases))
    shapes = list(dict.fromkeys(key.projection for key in cases))
    names = [name for name in SHOWN if any(name in impls and impls[name][column] for impls in cases.values())]
    width = max(6.0, 1.6 + 0.34 * len(names) * len(shapes))
    figure = Figure(figsize=(width, 1.2 + 2.0 * len(methods)), layout="constrained")
    panels = figure.subplots(len(methods), 1, sharex=True, squeeze=False)[:, 0]
    for axes, method in zip(panels, methods, strict=True):
        own = {shapes.index(key.projection): impls for key, impls in cases.items() if key.method == method}
        tallest = max(impls[name][column] or 0.0 for impls in own.values() for name in names if name in impls)
        for number, name in enumerate(names):
            for place, impls in own.items():
                left = place - 0.4 + (number + 0.5) * 0.8 / len(names)
                _bar(axes, left, 0.74 / len(names), impls.get(name), column, COLOURS[name])
        if bare is not None:
            axes.axhline(bare, color="0.4", linewidth=0.8, linestyle="--")
        axes.set_ylim(0, 1.15 * (tallest or 1.0))
        axes.set_ylabel(name_of(method).replace(", ", ",\n"))
        axes.spines[["top", "right"]].set_visible(False)
    panels[-1].set_xticks(range(len(shapes)), shapes, fontsize=8)
    key = next(iter(cases))
    _head(figure, machine, f"{title}; T={key.T}, {key.inner}, {key.precision}", names)
    return figure


def _bar(axes: Axes, left: float, width: float, row: Row | None, column: str, colour: str) -> None:
    """Return a bar with its number; in place of one that was refused or had no memory, these
    words.
    """
    if row is None or row["status"] == "absent":
        return
    value = row[column]
    if value:
        axes.bar(left, value, width, color=colour)
        text = f"{value:.2f}" if value < 10 else f"{value:.0f}"
        axes.text(left, value, text, ha="center", va="bottom", fontsize=7)
    elif row["status"] != "ok":
        axes.text(left, 0, f" {row['status']}", ha="center", va="bottom", fontsize=7, rotation=90, color=colour)


def _head(figure: Figure, machine: dict[str, Any], title: str, names: list[str]) -> None:
    """Title, the line that says on what, and the legend of implementations."""
    from matplotlib.patches import Patch

    figure.suptitle(f"{title}\n{condition(machine)}", fontsize=8, x=0.02, ha="left")
    handles = [Patch(color=COLOURS.get(name, OTHER), label={"dk": "dk (ours)"}.get(name, name)) for name in names]
    columns = min(len(names), int(figure.get_figwidth()))
    figure.legend(handles=handles, loc="outside lower center", ncols=max(columns, 1), frameon=False, fontsize=8)


def _time(machine: dict[str, Any], cases: Cases) -> Figure | None:
    title = "Time over the frozen linear (dashed: 1), forward + backward"
    return _grouped(machine, cases, "ratio_to_frozen", title, 1.0)


def _memory(machine: dict[str, Any], cases: Cases) -> Figure | None:
    return _grouped(machine, cases, "peak_mib", "Peak memory of one layer, MiB, forward + backward", None)


def _scaling(machine: dict[str, Any], cases: Cases) -> Figure | None:
    """Columns: what is varied, as far as there are two points; rows: methods; of each the series
    with most points.
    """
    lines: dict[str, dict[str, Cases]] = {}
    for letter in VARIED:
        groups: dict[Key, Cases] = {}
        for key, impls in cases.items():
            if getattr(key, letter):
                groups.setdefault(Key(**{**key._asdict(), letter: None}), {})[key] = impls
        for rest, points in groups.items():
            if len(points) > max(1, len(lines.get(letter, {}).get(rest.method, {}))):
                lines.setdefault(letter, {})[rest.method] = points
    if not lines:
        return None
    methods = list(dict.fromkeys(method for found in lines.values() for method in found))
    figure = Figure(figsize=(max(6.0, 1.0 + 3.2 * len(lines)), 1.0 + 2.0 * len(methods)), layout="constrained")
    panels = figure.subplots(len(methods), len(lines), squeeze=False)
    names: dict[str, None] = {}
    for column, (letter, found) in enumerate(lines.items()):
        for at, method in enumerate(methods):
            if method in found:
                names |= _curves(panels[at, column], letter, found[method])
            else:
                panels[at, column].set_axis_off()
        panels[-1, column].set_xlabel(VARIED[letter])
    for at, method in enumerate(methods):
        panels[at, 0].set_ylabel(name_of(method).replace(", ", ",\n"))
    title = "Time over the frozen linear (dashed: 1), forward + backward; above each panel what stays"
    _head(figure, machine, title, list(names))
    return figure


def _curves(axes: Axes, letter: str, points: Cases) -> dict[str, None]:
    """Return a line for each implementation; their names."""
    names: dict[str, None] = {}
    for name in SHOWN:
        ratios = {getattr(k, letter): impls[name]["ratio_to_frozen"] for k, impls in points.items() if name in impls}
        line = sorted((at, ratio) for at, ratio in ratios.items() if ratio)
        if len(line) > 1:
            names[name] = None
            axes.plot(*zip(*line, strict=True), "o-", markersize=3.5, color=COLOURS[name])
    axes.axhline(1.0, color="0.4", linewidth=0.8, linestyle="--")
    axes.set_xscale("log", base=2)
    ticks = sorted(getattr(key, letter) for key in points)
    axes.set_xticks(ticks, [str(x) for x in ticks], fontsize=8)
    axes.minorticks_off()
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_ylim(0, 1.1 * axes.dataLim.ymax)
    key = next(iter(points))
    fixed = [f"{key.K} → {key.N}", *([f"T={key.T}"] if letter != "T" else [])]
    fixed += [part for part in key.inner.split(", ") if part[0] != letter[0]]
    axes.set_title(", ".join(fixed), fontsize=8)
    return names


def _roofline(machine: dict[str, Any], cases: Cases) -> Figure | None:
    """For each case at the centre, the part of the measured time that the two ceilings explain."""
    centre = _centre(cases, "median_ms")
    bars = []
    for key, impls in centre.items():
        for name in ("frozen", *SHOWN):
            share = roofline_fraction(impls[name], machine) if name in impls else None
            if share is not None:
                bars.append((f"{name_of(key.method)}, {key.projection.splitlines()[0]}, {name}", name, share))
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
    key = next(iter(centre))
    title = "Roofline time of the contract's traffic / measured time (1: at the ceilings)"
    _head(figure, machine, f"{title}\nT={key.T}, {key.inner}, {key.precision}", [])
    return figure


def _model(machine: dict[str, Any], cases: Cases) -> Figure | None:
    """Tokens per second, peak and longest sequence of the whole models."""
    row = next((row for impls in cases.values() for row in impls.values()), {})
    panels = {"tokens_per_s": "tokens / s", "peak_mib": "peak of a step, MiB"}
    panels["longest_sequence"] = f"longest sequence in {row.get('limit_mib')} MiB, tokens"
    panels = {n: t for n, t in panels.items() if any(r.get(n) for i in cases.values() for r in i.values())}
    if not panels:
        return None
    names = list(dict.fromkeys(name for impls in cases.values() for name in impls))
    labels = [name_of(key.method) + ("\ncheckpointed" if key.checkpointing else "") for key in cases]
    size = max(3.4, 0.5 + 0.34 * len(names) * len(cases))
    figure = Figure(figsize=(1.0 + size * len(panels), 3.4), layout="constrained")
    for axes, (column, title) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        for number, name in enumerate(names):
            for place, impls in enumerate(cases.values()):
                left = place - 0.4 + (number + 0.5) * 0.8 / len(names)
                _bar(axes, left, 0.74 / len(names), impls.get(name), column, COLOURS.get(name, OTHER))
        axes.set_title(title, fontsize=9)
        axes.tick_params(labelsize=8)
        axes.set_xticks(range(len(labels)), labels)
        axes.spines[["top", "right"]].set_visible(False)
    step = f"one optimiser step of {row['batch']} × {row['sequence']} tokens"
    _head(figure, machine, f"{row['shape']}, {row['blocks']} blocks, {step}", names)
    return figure
