"""Transformers: AccelerateCallback applies accelerate() to the model of a Trainer and says what
came of it.

It acts as soon as the Trainer has its model, and again when training begins: by then the callback
may have been added late, the model made anew (model_init) or wrapped. On a GPU the kernels prove
themselves there, under the autocast that `bf16` or `fp16` asks for, and not in the first step.
"""

import logging
from collections.abc import Sequence
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from delora_kernels import checks
from delora_kernels.integrations.peft.fused import accelerate, restore
from delora_kernels.integrations.peft.fused.report import Report

logger = logging.getLogger(__name__)


class AccelerateCallback(TrainerCallback, ExportableState):
    """Make the PEFT adapters of a Trainer's model run fused: `Trainer(...,
    callbacks=[dk.AccelerateCallback()])`.

    It works in everything built on Transformers' Trainer, such as TRL's SFTTrainer with a
    `peft_config`. The main process prints the first line of the report and logs all of it: as a
    warning if a layer was not fused, else as info. Checkpoints say which layers share an input, so
    that a resumed run has its groups from its first step on, and ends at the bits of the whole run.

    Args:
        strict: Raise unless every adapter layer can be fused.
        restore_at_end: Give the layers PEFT's own forward back when training ends, for generating.

    Attributes:
        report: What accelerate() returned last; None before the Trainer has a model, or if it holds
            no adapters.

    Raises:
        ValueError: `strict`, and the Trainer's model has no PEFT adapter layer; else that is logged
            as a warning.
        RuntimeError: `strict`, and a layer can't be fused; the text is the report.
        TypeError: an argument is no bool.
    """

    def __init__(self, *, strict: bool = False, restore_at_end: bool = False) -> None:
        for name, value in (("strict", strict), ("restore_at_end", restore_at_end)):
            if not isinstance(value, bool):
                remedy = "pass True or False"
                raise checks.fail(TypeError, "AccelerateCallback", name, "a bool", type(value).__name__, remedy)
        self.strict = strict
        self.restore_at_end = restore_at_end
        self.report: Report | None = None
        self._said = ""

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Accelerate the model that the Trainer was given or has made."""
        self._apply(args, kwargs["model"], state.is_world_process_zero)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Accelerate what is trained: another model, or layers that came later; harmless where
        nothing is new.
        """
        self._apply(args, kwargs["model"], state.is_world_process_zero)
        kept: Any = state.stateful_callbacks or {}
        saved: Any = kept.get(type(self).__name__) if state.global_step > 0 else None
        saved = saved[0] if isinstance(saved, list) and saved else saved
        groups = saved["attributes"].get("groups", ()) if saved else ()
        if self.report is not None and {name for group in groups for name in group} <= {
            layer.name for layer in self.report.layers
        }:
            self._apply(args, kwargs["model"], state.is_world_process_zero, groups)

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint keeps: the groups of layers that share an input."""
        groups = [] if self.report is None else [list(group) for group in self.report.groups]
        return {
            "args": {"strict": self.strict, "restore_at_end": self.restore_at_end},
            "attributes": {"groups": groups},
        }

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Undo it if `restore_at_end`."""
        if self.restore_at_end:
            restore(kwargs["model"])

    def _apply(
        self, args: TrainingArguments, model: Any, is_main_process: bool, groups: Sequence[Sequence[str]] = ()
    ) -> None:
        try:
            with _autocast(args, model):  # its kernels are the ones to be proved
                self.report = accelerate(model, strict=self.strict, group=groups or True)
        except ValueError:  # no adapter layer
            self.report = None
            remedy = "give the Trainer a model of peft.get_peft_model, or TRL's trainers a peft_config"
            got = f"a {type(model).__name__} without any"
            error = checks.fail(ValueError, "AccelerateCallback", "model", "one with PEFT adapter layers", got, remedy)
            if self.strict:
                raise error from None
            text, level = f"nothing was fused: {error}", logging.WARNING
        else:
            text, level = str(self.report), logging.WARNING if self.report.declined else logging.INFO
        if is_main_process and text != self._said:
            self._said = text
            logger.log(level, text)
            if self.report is not None:
                # a Trainer's users rarely show info messages: this one line tells them that the
                # callback did its work
                tqdm.write(f"delora-kernels: {text.splitlines()[0]}")


def _autocast(args: TrainingArguments, model: Any) -> torch.autocast:
    """Return the autocast of the Trainer's passes."""
    device = next((parameter.device.type for parameter in model.parameters()), "cpu")
    fp16, bf16 = (getattr(args, name, False) for name in ("fp16", "bf16"))
    return torch.autocast(device, torch.float16 if fp16 else torch.bfloat16, enabled=fp16 or bf16)
