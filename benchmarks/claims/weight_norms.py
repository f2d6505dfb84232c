"""Norms of pretrained weights: by how much the column norms of modules and depths differ, which
DeLoRA's weight-norm scaling gives back to each layer.

The paper (section 3.4, figure 4) shows the means of column norms in Stable Diffusion's attention,
and calls their differences systematic. Here: the models of all tasks, as they are pretrained.
"""

from statistics import fmean

from matplotlib.figure import Figure

from benchmarks.claims import figures
from benchmarks.claims.claim import Claim, Line
from benchmarks.claims.record import Record
from benchmarks.claims.rules import CANNOT_TELL, LEAST_FACTOR, Rules, interval, more
from benchmarks.claims.sweep import Sweep
from benchmarks.claims.text_scores import own
from benchmarks.claims.training import Run

SEES = "figure 4: modules and positions differ systematically"
MODELS = {"the transformer on digits": None, "MiniLM": "docstrings", "SmolLM2-135M": "help topics"}
"""Each model's text task, if it has one."""


def of_models(record: Record, rules: Rules) -> list[list[Run]]:
    """Return for each model a run of one step a seed, whose frozen weights are looked at."""
    each = []
    for task in MODELS.values():
        its = own(task, rules) if task else rules
        sweep = Sweep(record, its, "delora")
        each.append([sweep.run(-10, seed, steps=1, marks=(0, 1), watch=("column_norms",)) for seed in its.seeds])
    return each


def runs(record: Record, rules: Rules) -> list[Run]:
    """Return the runs of both models."""
    return [run for some in of_models(record, rules) for run in some]


def lines(record: Record, rules: Rules) -> list[Line]:
    """Judge the ratio of the largest layer's mean column norm to the smallest's."""
    made = []
    for model, some in zip(MODELS, of_models(record, rules), strict=True):
        claimed = f"{model}: mean column norms differ between layers by a factor of {LEAST_FACTOR:g} or more"
        if not all(run in record for run in some):
            made.append(Line(claimed, SEES, "", f"{CANNOT_TELL}: incomplete"))
            continue
        norms = [record[run]["watched"]["column_norms"][0] for run in some]
        ratios = [max(found.values()) / min(found.values()) for found in norms]
        least, most = min(norms[0], key=norms[0].__getitem__), max(norms[0], key=norms[0].__getitem__)
        ours = f"{interval(ratios).mean:.2f}, {most} over {least}: {interval(ratios)}"
        made.append(Line(claimed, SEES, ours, more(ratios, LEAST_FACTOR)))
    return made


def draw(record: Record, rules: Rules) -> Figure | None:
    """Draw mean column norms over depth, a line a kind of module, the mean over the seeds."""
    figure, drawn = figures.page(13.0, 3.4), False
    for axes, model, some in zip(figure.subplots(1, len(MODELS)), MODELS, of_models(record, rules), strict=True):
        found = [record[run]["watched"]["column_norms"][0] for run in some if run in record]
        axes.set(title=model, xlabel="block", ylabel="mean column norm of W")
        kinds: dict[str, list[float]] = {}
        for name in found[0] if found else ():
            kinds.setdefault(_kind(name), []).append(fmean(one[name] for one in found))
        for kind, values in kinds.items():
            axes.plot(range(len(values)), values, "o-", markersize=3, label=kind)
            drawn = True
        if kinds:
            axes.legend(frameon=False, fontsize=7)
            axes.set_xticks(range(max(map(len, kinds.values()))))
    return figures.finished(figure, rules) if drawn else None


def _kind(name: str) -> str:
    """Return a layer's name without what comes before its block's number."""
    parts = name.split(".")
    return ".".join(parts[1 + max(place for place, part in enumerate(parts) if part.isdigit()) :])


CLAIM = Claim(
    "weight-norms",
    "DeLoRA: how weight norms differ",
    "Bini et al., arXiv:2503.18225, section 3.4, figure 4",
    2,
    runs,
    lines,
    draw,
    core=False,
)
