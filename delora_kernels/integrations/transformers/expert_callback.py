"""Transformers: ExpertCallback logs how a mixture's routers use their experts, and says when
experts die.

It also keeps the balance loss, which backward adds of itself, in step with what a Trainer
multiplies the loss by.
"""

import logging
from contextlib import ExitStack
from typing import Any

from tqdm.auto import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from delora_kernels.nn.moe import Routed, set_loss_scale
from delora_kernels.routing.report import ExpertReport
from delora_kernels.routing.watch import ExpertWatch, watch_experts

logger = logging.getLogger(__name__)


class ExpertCallback(TrainerCallback):
    """Log the routers of a Trainer's model: `Trainer(..., callbacks=[dk.ExpertCallback()])`.

    With each logged loss come `router/balance` (the paper's: 1 is even), `router/entropy` (1 is
    even) and `router/dead_experts`, over the training batches since the log before; they are in
    `state.log_history`, and in the logs of callbacks that come after this one. When other experts
    are dead than before, the main process says so.

    Before each step the layers are told what the loss is multiplied by: 1 over the accumulation
    steps, times a GradScaler's scale. Without this callback, `nn.set_loss_scale` does that.

    Args:
        by_layer: Log the numbers of every layer too, and the tokens that each of its experts got:
            `router/<layer>/balance`, `.../entropy`, `.../dead_experts`, `.../tokens/<expert>`.

    Attributes:
        history: (step, `ExpertReport`) of every log.
    """

    def __init__(self, by_layer: bool = False) -> None:
        self.by_layer = by_layer
        self.history: list[tuple[int, ExpertReport]] = []
        self._watch: ExpertWatch | None = None
        self._hooks = ExitStack()
        self._dead: frozenset[tuple[str, int]] = frozenset()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Begin to count."""
        self._hooks.close()
        if any(isinstance(module, Routed) for module in kwargs["model"].modules()):
            self._watch = self._hooks.enter_context(watch_experts(kwargs["model"], training=True))
        else:
            self._watch = None
            logger.warning("ExpertCallback: the model has no routers, nothing is logged of them")

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Tell the layers what the loss is multiplied by."""
        scaler = getattr(kwargs.get("optimizer"), "scaler", None)
        scale = 1.0 if scaler is None else scaler.get_scale()
        set_loss_scale(kwargs["model"], scale / args.gradient_accumulation_steps)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Add the routers' numbers to the log of a loss."""
        if self._watch is None or not self._watch.counted or logs is None or "loss" not in logs:
            return
        report = self._watch.report()
        self._watch.reset()
        self.history.append((state.global_step, report))
        numbers = report.summary() | (report.by_layer() if self.by_layer else {})
        logs.update(numbers)
        if state.log_history:
            state.log_history[-1].update(numbers)
        dead = frozenset(report.dead)
        if dead != self._dead and state.is_world_process_zero:
            tqdm.write(f"delora-kernels: step {state.global_step}: {report.headline}")
        self._dead = dead

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Stop counting."""
        self._hooks.close()
