"""Transformers: WeightChangesCallback measures, while a Trainer trains, how far lengths and
directions of the weights have moved.
"""

import logging
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor
from tqdm.auto import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from delora_kernels import checks
from delora_kernels.integrations.peft.changes import WeightChanges, weight_changes
from delora_kernels.integrations.peft.changes.measure import AXES
from delora_kernels.nn.base import MergeableLinear

logger = logging.getLogger(__name__)


class WeightChangesCallback(TrainerCallback):
    """Collect `weight_changes` of a Trainer's model: `Trainer(...,
    callbacks=[dk.WeightChangesCallback(every=50)])`.

    It measures at every `every`-th step and when training ends, on the main process. A log at such
    a step has `weights/magnitude`, `weights/direction` and `weights/update`, the means over layers.

        callback.changes.correlation()     # of ΔD and ΔM over layers and steps
        callback.changes.plot("changes.png")

    Args:
        every: Steps from one measurement to the next.
        keep_start: Keep a copy, on the CPU, of the weights that train themselves, as in full
            fine-tuning, when training begins; it is gone when training ends. None: where the model
            has no adapters.
        axis: As `weight_changes` takes it.

    Attributes:
        changes: `WeightChanges` of all measured steps; None before the first.

    Raises:
        TypeError, ValueError: an argument is of another kind or range.
    """

    def __init__(self, *, every: int = 100, keep_start: bool | None = None, axis: str = "output") -> None:
        name = type(self).__name__
        if isinstance(every, bool) or not isinstance(every, int):
            raise checks.fail(TypeError, name, "every", "an int", type(every).__name__, "pass a number of steps")
        if every < 1:
            raise checks.fail(ValueError, name, "every", "1 or more", every, "pass a number of steps")
        if keep_start is not None and not isinstance(keep_start, bool):
            got, remedy = type(keep_start).__name__, "pass True, False or None"
            raise checks.fail(TypeError, name, "keep_start", "a bool or None", got, remedy)
        self.every, self.keep_start = every, keep_start
        self.axis = checks.option(name, "axis", axis, AXES)
        self.changes: WeightChanges | None = None
        self._start: dict[str, Tensor] | None = None
        self._measures = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Keep what is needed of the start."""
        self.changes, self._start, model = None, None, kwargs["model"]
        self._measures = state.is_world_process_zero
        adapted = any(isinstance(module, (BaseTunerLayer, MergeableLinear)) for module in model.modules())
        keep = not adapted if self.keep_start is None else self.keep_start
        if not adapted and not keep:
            logger.warning("WeightChangesCallback: the model has no adapters and keep_start is off: nothing to measure")
            self._measures = False
        if keep and self._measures:
            self._start = {
                name: parameter.detach().to("cpu", copy=True)
                for name, parameter in model.named_parameters()
                if parameter.requires_grad and parameter.dim() > 1
            }

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Measure at every `every`-th step."""
        if state.global_step % self.every == 0:
            self._measure(kwargs["model"], state.global_step)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Add the means to the log of a step that was measured."""
        if (
            self.changes is None
            or logs is None
            or "loss" not in logs
            or self.changes.steps[-1:] != (state.global_step,)
        ):
            return
        numbers = self.changes.summary()
        logs.update(numbers)
        if state.log_history:
            state.log_history[-1].update(numbers)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Measure the end, and say what came of it."""
        if not self._measured(state.global_step):
            self._measure(kwargs["model"], state.global_step)
        self._start, self._measures = None, False
        if self.changes is not None:
            tqdm.write(f"delora-kernels: {self.changes.headline}")

    def _measured(self, step: int) -> bool:
        return self.changes is not None and self.changes.steps[-1:] == (step,)

    def _measure(self, model: Any, step: int) -> None:
        if self._measures:
            found = weight_changes(model, since=self._start, step=step, axis=self.axis)
            self.changes = found if self.changes is None else self.changes + found
