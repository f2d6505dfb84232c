"""compare(): what adapters cost in one's own model, PEFT's way and fused, without training it.

The forms of the model (forms.py) take their passes in turn, so that a machine that slows down does
so for all of them. A pass is forward and backward from the same random state; what it changes
(gradients, buffers, random states) is put back at the end.
"""

import gc
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from delora_kernels import checks
from delora_kernels.diagnostics import versions
from delora_kernels.diagnostics.allocations import allocations
from delora_kernels.diagnostics.environment import processor
from delora_kernels.integrations.peft.compare.comparison import TITLES, Column, Comparison, Difference, mib
from delora_kernels.integrations.peft.compare.forms import Forms
from delora_kernels.integrations.peft.compare.problem import Problem
from delora_kernels.testing.errors import relative_error
from delora_kernels.version import __version__

WARMUP = 3
"""Passes of each form before any is timed: groups are found in the first, plans recorded by the
third.
"""

LEAST_WARMUP = {"frozen": 1, "peft": 1, "fused": 2}
"""The same where time is short: the fused form's second pass is the first that runs in groups."""


def compare(
    model: nn.Module,
    batch: Mapping[str, Any] | Tensor,
    *,
    steps: int = 5,
    loss: Callable[[Any], Tensor] | None = None,
    seconds: float | None = None,
) -> Comparison:
    """Measure a model without its adapters, with PEFT's own layers and with fused ones, forward and
    backward on one batch.

    The model is neither trained nor changed: its layers, gradients, buffers and the random states
    of torch and of Python are afterwards what they were, to the bit. It runs as it stands, in its
    mode, under the autocast around the call, with its gradient checkpointing. What counts passes
    (an open `watch_training`) counts these. Two threads must not use it meanwhile; the ranks of a
    distributed run may each compare the model that they hold.

    Args:
        model: Holds PEFT adapter layers, accelerated or not; of a DistributedDataParallel its
            module is measured. Its adapters must be switched on and not merged.
        batch: What the model is called with: keyword arguments, or one tensor; on its device.
        steps: Rounds in which each form takes one timed pass, after 3 that are not timed.
        loss: Output of the model → the scalar that is differentiated; None: the output's `loss`, or
            the output itself where it is a scalar.
        seconds: Take no further round that would make it last longer than this, by the rounds
            before; one is always taken, with fewer passes before it where all would take longer
            by the first one. None: take all of them.

    Returns:
        The comparison: `print` it. A form that ran out of memory has a note in place of numbers,
        and Ctrl-C ends the measurement early and gives what is known by then.

    Raises:
        TypeError, ValueError: an argument is not what is described here; nothing of the model
            trains, or an optimizer steps in its backward passes.
        RuntimeError: it is called under no_grad or inference_mode.
    """
    problem = Problem(model, batch, loss)
    if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
        raise checks.fail(ValueError, "compare", "steps", "an integer ≥ 1", repr(steps), "pass at least 1")
    if seconds is not None and checks.number("compare", "seconds", seconds) <= 0:
        raise checks.fail(ValueError, "compare", "seconds", "above 0", seconds, "pass None for no limit")
    run = _Run(problem, steps, seconds)
    with problem.put_back(), Forms(problem.model) as forms:
        try:
            run.measure(forms)
        except KeyboardInterrupt:
            run.interrupted = True
        report = replace(forms.report, _groups=partial(tuple, forms.report.groups))  # as they are in this form
    return Comparison(
        tuple(run.columns()),
        tuple(run.differences),
        report,
        _facts(problem, run.rounds, run.began),
        problem.tokens,
        run.interrupted,
    )


class _Run:
    """The measurement, as far as it has come."""

    def __init__(self, problem: Problem, steps: int, seconds: float | None = None) -> None:
        self.problem, self.steps, self.seconds = problem, steps, seconds
        self.began, self.rounds = time.perf_counter(), 0
        self.interrupted = False
        self.short: bool | None = None
        self.differences: list[Difference] = []
        self.spent: dict[str, list[float]] = {form: [] for form in TITLES}
        self.peaks: dict[str, float] = {}
        self.notes: dict[str, str] = {}

    def columns(self) -> Iterator[Column]:
        """Yield the columns, in order."""
        for form in TITLES:
            note = self.notes.get(form, "")
            if not self.spent[form] and not note:
                note = "not measured: interrupted"
            yield Column(form, tuple(self.spent[form]), self.peaks.get(form), note)

    def measure(self, forms: Forms) -> None:
        """Warm up, time, weigh, compare the numbers."""
        todo = list(TITLES)
        if not forms.differ:
            todo.remove("peft")
            self.notes["peft"] = "not measured: no layer of this model has a forward of PEFT's that is fused"
        passes = len(todo) * (WARMUP + self.steps + 1) + 2
        with tqdm(total=passes, desc="compare", unit="pass", leave=False, disable=None) as bar:
            for form in list(todo):
                with forms.as_form(form), self._or_note(form, todo):
                    self._warm_up(form, len(todo), bar)
            first = time.perf_counter()
            while self.rounds < self.steps and not self._time_is_up(first, len(todo)):
                turn = self.rounds % max(len(todo), 1)
                self.rounds += 1
                for form in todo[turn:] + todo[:turn]:
                    with forms.as_form(form), self._or_note(form, todo):
                        self.spent[form].append(self._timed())
                        bar.update()
            for form in (form for form in list(todo) if form not in self.peaks):
                with forms.as_form(form), self._or_note(form, todo):
                    self._weigh(form)
                    bar.update()
            if {"peft", "fused"} <= set(todo):
                with self._or_note("differences", todo):
                    self.differences = self._differences(forms)
                bar.update(2)

    def _warm_up(self, form: str, forms: int, bar: Any) -> None:
        """Take the passes before any is timed; where time is short PEFT's only one is weighed."""
        for done in range(WARMUP):
            if self.short and done == LEAST_WARMUP[form]:
                return
            started = time.perf_counter()
            if self.short and form == "peft":
                self._weigh(form)
            else:
                self.problem.run()
            bar.update()
            if self.short is None:
                least = (forms * (WARMUP + 2) + 2) * (time.perf_counter() - started)
                self.short = self.seconds is not None and least > self.seconds

    def _weigh(self, form: str) -> None:
        # what is allocated once and kept the frozen form's first pass has allocated
        self.peaks[form] = mib(allocations(self.problem.run, self.problem.device.type, warm=True).peak)

    def _time_is_up(self, first: float, forms: int) -> bool:
        """Whether one more round and the passes behind the rounds, a pass for each form and two
        more, would end too late.
        """
        if self.seconds is None or self.rounds == 0:
            return False
        now = time.perf_counter()
        a_round = (now - first) / self.rounds
        behind = a_round * (forms + 2) / max(forms, 1)
        return now - self.began + a_round + behind > self.seconds

    def _timed(self) -> float:
        device = self.problem.device
        self.problem.reset()
        _wait_for(device)
        start = time.perf_counter()
        self.problem.forward_backward()
        _wait_for(device)
        return 1e3 * (time.perf_counter() - start)

    @contextmanager
    def _or_note(self, form: str, todo: list[str]) -> Iterator[None]:
        """Make running out of memory a result of this form, or of the differences."""
        try:
            yield
        except (RuntimeError, MemoryError) as error:
            if not _out_of_memory(error):
                raise
            error.__traceback__ = None  # it holds the frames, and they the tensors
        else:
            return
        if form in todo:
            todo.remove(form)
            self.spent[form], self.notes[form] = [], "out of memory"
        self.problem.reset()
        gc.collect()
        if self.problem.device.type == "cuda":
            torch.cuda.empty_cache()

    def _differences(self, forms: Forms) -> list[Difference]:
        """Compare the numbers of two passes without dropout, whose masks need not be the same."""
        results: dict[str, dict[str, Tensor]] = {}
        with self.problem.without_dropout():
            for form in ("peft", "fused"):
                with forms.as_form(form):
                    results[form] = self.problem.results()
        peft, fused = results["peft"], results["fused"]
        errors = {name: relative_error(fused[name], peft[name]) for name in peft if name in fused}
        errors |= dict.fromkeys(peft.keys() ^ fused.keys(), float("inf"))  # a gradient that only one has
        shown = [Difference(name, errors.pop(name)) for name in ("loss", "output") if name in errors]
        worst = max(errors, key=lambda name: errors[name], default=None)
        return shown if worst is None else [*shown, Difference(worst, errors[worst])]


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _out_of_memory(error: BaseException) -> bool:
    said = str(error)
    known = isinstance(error, torch.OutOfMemoryError | MemoryError)
    return known or "DefaultCPUAllocator" in said or "ALLOC_FAILED" in said


def _facts(problem: Problem, rounds: int, began: float) -> dict[str, str]:
    device = problem.device
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else processor()
    threads = "" if device.type == "cuda" else f", {torch.get_num_threads()} threads"
    libraries = f"torch {torch.__version__}, PEFT {versions.installed('peft')}"
    return {
        "model": problem.in_words(),
        "machine": f"{where}{threads}",
        "versions": f"delora-kernels {__version__}, {libraries}",
        "pass": f"forward + backward, median of {rounds}",
        "took": f"{time.perf_counter() - began:.0f} s",
    }
