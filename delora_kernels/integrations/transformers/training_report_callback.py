"""Transformers: TrainingReportCallback says, a few steps into a Trainer's training, whether the
adapters train.

It looks twice: before the first step at what shows in values alone (the packing of experts'
factors, lost quantisation states), and once `steps` optimiser steps have really run with a learning
rate above 0. Then its hooks are gone.
"""

import logging
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from tqdm.auto import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from delora_kernels import checks
from delora_kernels.integrations.peft.training.report import TrainingReport, training_report
from delora_kernels.integrations.peft.training.watch import TrainingWatch, watch_training

logger = logging.getLogger(__name__)


class TrainingReportCallback(TrainerCallback):
    """Say whether the adapters of a Trainer's model train: `Trainer(...,
    callbacks=[dk.TrainingReportCallback()])`.

    The main process prints the first line of the report and logs all of it: as a warning where
    there is an alarm, else as info. Dense models are judged as those with experts are.

    Args:
        steps: Optimiser steps with a learning rate above 0 after which it judges; steps that a
            GradScaler leaves out do not count. A run that ends before is judged at its end.
        stop: Raise where there is an alarm, before more is spent on the run.

    Attributes:
        report: The last `TrainingReport`; None before training begins, or without adapters.

    Raises:
        RuntimeError: `stop`, and there is an alarm; the text is the report.
        TypeError, ValueError: an argument is of another kind or range.
    """

    def __init__(self, *, steps: int = 5, stop: bool = False) -> None:
        name = type(self).__name__
        if isinstance(steps, bool) or not isinstance(steps, int):
            raise checks.fail(TypeError, name, "steps", "an int", type(steps).__name__, "pass a number of steps")
        if steps < 1:
            raise checks.fail(ValueError, name, "steps", "1 or more", steps, "pass a number of steps")
        if not isinstance(stop, bool):
            raise checks.fail(TypeError, name, "stop", "a bool", type(stop).__name__, "pass True or False")
        self.steps, self.stop = steps, stop
        self.report: TrainingReport | None = None
        self._watch: TrainingWatch | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Begin to count, and judge what needs no step."""
        self._close()
        self.report, model = None, kwargs["model"]
        if not any(isinstance(module, BaseTunerLayer) for module in model.modules()):
            logger.warning("TrainingReportCallback: the model has no PEFT adapter layers, nothing is watched")
            return
        self._watch = watch_training(model, kwargs.get("optimizer"))
        self.report = training_report(model)
        if self.report.alarms:
            self._judge(model, state)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Judge once enough steps have run."""
        if self._watch is not None and self._watch.steps >= self.steps:
            self._judge(kwargs["model"], state)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Judge a run that was shorter than that."""
        if self._watch is not None:
            self._judge(kwargs["model"], state)

    def _judge(self, model: Any, state: TrainerState) -> None:
        self.report = training_report(model)
        self._close()
        text = str(self.report)
        if self.report.alarms and self.stop:
            raise RuntimeError(f"TrainingReportCallback: stop=True, and an adapter does not train as it should: {text}")
        if state.is_world_process_zero:
            logger.log(logging.WARNING if self.report.alarms else logging.INFO, text)
            tqdm.write(f"delora-kernels: {text.splitlines()[0]}")

    def _close(self) -> None:
        """Take the hooks away."""
        if self._watch is not None:
            self._watch.close()
        self._watch = None
