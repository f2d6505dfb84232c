"""The report: report.md for people, report.json for programs, two plots."""

import json
from dataclasses import asdict
from typing import Any

from benchmarks.finetune import plots
from benchmarks.finetune.config import Config
from benchmarks.finetune.floor import COLUMNS, Floor
from benchmarks.finetune.sizing import ENOUGH_ROUNDS
from benchmarks.finetune.summary import ENOUGH_STEPS, Result, largest, precision, rows, spread_ms, tokens
from benchmarks.finetune.train import Run
from benchmarks.finetune.verdict import WINDOW

FILES = ("report.md", "report.json", "loss.png", "bars.png")


def write(result: Result) -> None:
    """Write report.json, report.md, loss.png and bars.png into the run's folder."""
    out = result.config.out
    (out / "report.json").write_text(json.dumps(as_json(result), indent=1) + "\n", encoding="utf-8")
    (out / "report.md").write_text(markdown(result), encoding="utf-8")
    plots.loss(result).savefig(out / "loss.png", dpi=150)
    plots.bars(result).savefig(out / "bars.png", dpi=150)


def as_json(result: Result) -> dict[str, Any]:
    """Everything that was measured, as plain JSON values."""
    runs = {"eager": _run(result, result.eager), "fused": _run(result, result.fused)}
    record: dict[str, Any] = {
        "machine": result.machine,
        "config": result.config.as_json(),
        "model": result.model,
        "fusion": result.fusion,
        "complete": result.end is None,
        "end": result.end,
        "steps": result.steps,
        "largest_loss_difference": largest(result.differences(result.fused)),
        "runs": runs,
    }
    if result.config.times:
        record["speedup"] = result.speedup()
        record["speedup_interval"] = result.speedup_interval()[1:]
    if result.floor is not None:
        record["floor"] = result.floor.as_json()
    record["yardsticks"] = [
        {
            "name": run.name,
            "losses": run.losses,
            "largest_loss_difference": largest(result.differences(run)),
        }
        for run in result.nudged_or_reordered
    ]
    verdict = result.verdict()
    if verdict is not None:
        record["verdict"] = {"passed": verdict.passed, "words": verdict.words(), "window": WINDOW, **asdict(verdict)}
    return record


def _run(result: Result, run: Run) -> dict[str, Any]:
    """One run's numbers."""
    numbers: dict[str, Any] = {
        "name": run.name,
        "kept_mib": run.kept_mib,
        "peak_mib": run.peak_mib[: result.steps],
        "heldout_loss": run.heldout,
        "losses": result.losses(run),
    }
    if result.config.scaler:
        numbers["skipped_steps"] = run.skipped
    if result.config.times:
        p20, p50, p80 = spread_ms(result.step_ms(run))
        numbers |= {"median_ms": p50, "p20_ms": p20, "p80_ms": p80}
        numbers |= {
            "tokens_per_s": result.tokens_per_s(run),
            "step_tokens": run.tokens[: result.steps],
            "step_ms": result.step_ms(run),
        }
    return numbers


def markdown(result: Result) -> str:
    """Return the report for people."""
    config, machine = result.config, result.machine
    lines = [
        f"# Fine-tuning {result.model} with {config.method}, rank {config.rank}",
        "",
        f"{result.steps} steps each of {_without(config)} and of the same model after `delora_kernels.accelerate()`, "
        f"{tokens(config)} per step, {precision(config)}. "
        "Both start from the same weights, see the same batches and take their steps in turn.",
        "",
    ]
    if result.end:
        lines += [f"**{result.end[0].upper()}{result.end[1:]}.** What follows was measured until then.", ""]
    if result.shortened():
        lines += [f"In the end {result.shortened()}.", ""]
    verdict = result.verdict()
    if verdict is not None:
        lines += [f"**{verdict.words()}.**", ""]
    if result.floor is not None:
        lines += _floor(result.floor)
    lines += [f"## {config.method}: time, memory, losses", ""]
    lines += [f"| | {config.eager_name} | accelerated | |", "|---|---:|---:|---:|"]
    lines += [f"| {row.label.strip()} | {' | '.join(row.cells)} | {row.remark} |" for row in rows(result)]
    lines += ["", *_explanations(result), "", "![training loss](loss.png)", "", "![step time and memory](bars.png)", ""]
    lines += ["## What was fused", "", "```text", result.fusion, "```", ""]
    lines += ["## Machine", "", "| | |", "|---|---|"]
    lines += [f"| {name} | {value} |" for name, value in machine.items() if value is not None]
    lines += ["", "## Settings", "", "| | |", "|---|---|"]
    lines += [f"| {name} | {value} |" for name, value in config.as_json().items() if value not in (None, [])]
    return "\n".join(lines) + "\n"


def _floor(floor: Floor) -> list[str]:
    """Return the first table, and what it says."""
    lines = ["## What adapters cost over the frozen model", ""]
    lines += [f"| {' | '.join(COLUMNS)} |", "|---" + "|---:" * (len(COLUMNS) - 1) + "|"]
    lines += [f"| {' | '.join(line)} |" for line in floor.cells()]
    words = f"{floor.words()}, {floor.threads} threads"
    return [
        *lines,
        "",
        f"* {words[0].upper()}{words[1:]}; in brackets the interval that holds 95 % over rounds drawn anew. A step is "
        "forward, backward and AdamW; the frozen model's computes every input gradient too.",
        "* PEFT's overhead is its step less the frozen model's; gone is the part of it that the accelerated step does "
        f"not have. Neither is told for fewer than {ENOUGH_ROUNDS} rounds, or where the speed's interval holds 1: too "
        "noisy.",
        "",
    ]


def _without(config: Config) -> str:
    """Return the first run in words."""
    theirs = {"goat": "GOAT", "ether": "ETHER", "ether+": "ETHER+"}.get(config.method)
    return "PEFT as it comes" if theirs is None else f"{theirs} as its authors run it"


def _explanations(result: Result) -> list[str]:
    """Return what the table's lines mean."""
    lines = []
    if result.config.times:
        lines.append(
            "* A step is forward, backward, clipping and the optimiser's update. The speed-up is the median over the "
            "steps of eager ms / accelerated ms, with the interval that holds 95 % of it over steps drawn anew; it is "
            f"not told for fewer than {ENOUGH_STEPS} steps, or if the interval holds 1: too noisy."
        )
    lines += [
        "* Kept for backward: what autograd keeps between one forward pass and its backward pass, "
        "parameters and buffers left out, each storage counted once. Ours is x and a [T, r] tensor a layer, for DoRA a "
        "[T, N] tensor, and on a GPU the factors as its kernels multiply them, r (K + N) numbers.",
        "* The held-out text shares no paragraph with the training text.",
    ]
    if not result.nudged_or_reordered:
        return lines
    if result.config.reordered:
        lines.append(
            f"* Eager runs: {result.config.eager_name}, and again with the sequences of each step dealt to its parts "
            "anew: the same gradient, summed in another order. The distance of two runs is |loss − loss|. Passed: the "
            "accelerated run is no further from the eager runs, on average over them, than the two eager runs furthest "
            f"apart, in its mean over all steps and in its largest mean over {WINDOW} steps in a row."
        )
    else:
        lines.append(
            f"* Eager, nudged: {result.config.eager_name} once more, its adapter matrices changed at the start by at "
            f"most one rounding error of {result.config.dtype}. How far that drives its losses from the eager run's is "
            "the yardstick for the loss difference above."
        )
    return lines
