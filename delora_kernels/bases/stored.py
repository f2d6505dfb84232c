"""A base whose weight is stored in another form than a dense tensor, and the list of such forms.

A form of your own is a subclass of `StoredBase` with `of` and `dense`, registered under the name of
the module class that holds such a weight (or of the tensor class, where nn.Linear holds it):

    class PackedBase(bases.StoredBase):
        @classmethod
        def of(cls, module):
            base = cls((module.out_features, module.in_features), module.codes.device, module.bias)
            base.codes, base.scales = module.codes, module.scales
            return base

        def dense(self, dtype):
            return self.codes.to(dtype) * self.scales.to(dtype)

    bases.register("my_package.PackedLinear", PackedBase)

It is used where the module's own forward is x Wᵀ + bias of that W: numeric_check.py finds out at
its first use.
"""

import importlib
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

Parts = list[tuple[slice | None, Callable[[], Tensor]]]
"""Rows of W, or None for all of them, and what makes them dense: one part after the other."""


class StoredBase:
    """A frozen linear y = x Wᵀ + bias whose weight is made dense once a pass.

    Args:
        shape: N, K.
        device: Where the weight lives.
        bias: [N] or None.
        compute_dtype: Dtype in which the module's own forward multiplies; None: x's.
        key: What its numbers depend on besides its class, device and dtype: those of one key are
            compared with the module's own forward once.
    """

    compared_in: torch.dtype = torch.float32
    """The dtype in which a base that multiplies in that of x is compared with its module."""

    def __init__(
        self,
        shape: Any,
        device: torch.device,
        bias: Tensor | None = None,
        compute_dtype: torch.dtype | None = None,
        key: tuple[Any, ...] = (),
    ) -> None:
        self.shape, self.device, self.bias = torch.Size(shape), device, bias
        self.compute_dtype, self.key = compute_dtype, key

    @classmethod
    def why_not(cls, module: nn.Module) -> str | None:
        """Say why the base inside `module`, which is plainly called, can't be read now, or None."""
        return None

    @classmethod
    def of(cls, module: Any) -> "StoredBase":
        """Read the base inside `module`. It must hold what it needs of it: later the module may
        store its weight otherwise, or another one.
        """
        raise NotImplementedError

    def dense(self, dtype: torch.dtype) -> Tensor:
        """Return W [N, K] in `dtype`, a new tensor that nobody else holds."""
        raise NotImplementedError

    def dense_parts(self, dtype: torch.dtype) -> Parts:
        """Say how to make W in `dtype` where it need not be whole at once; each part is a new
        tensor that nobody else holds.
        """
        return [(None, partial(self.dense, dtype))]

    def computes_in(self, x: Tensor) -> torch.dtype:
        """Return the dtype in which the module's own forward multiplies x, without autocast; where
        that forward settles something at its first call, so does this.
        """
        return x.dtype if self.compute_dtype is None else self.compute_dtype

    def output(self, y: Tensor, x: Tensor) -> Tensor:
        """Return y as the module's own forward does: in x's dtype, under autocast too."""
        return y if y.dtype == x.dtype else y.to(x.dtype)

    @property
    def weight(self) -> Any:
        """What a call takes as its weight."""
        return self

    @property
    def dtype(self) -> torch.dtype:
        """The dtype in which it multiplies, as far as that is settled."""
        return self.compute_dtype or self.compared_in

    def why_not_input(self, x: Tensor) -> str | None:
        """Say why a product with x is left to the module's own forward, or None."""
        if x.device != self.device:
            return "its input is on another device"
        if torch.is_autocast_enabled(x.device.type):
            return f"its input is {x.dtype} under autocast" if x.dtype not in CASTABLE else None
        own = x.dtype if self.compute_dtype is None else self.compute_dtype
        if torch.promote_types(own, x.dtype) != own:  # the branch would see x rounded, which it does not in PEFT
            return f"its input is {x.dtype}, and its base multiplies in {own}"
        return None

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(map(str, (tuple(self.shape), self.device, *self.key)))})"


CASTABLE = (torch.float16, torch.bfloat16, torch.float32)
"""What autocast casts."""


class Broken(str):
    """A reason for which a module's own forward, too, gives wrong numbers or gradients: an
    accelerated layer refuses to run.

    Args:
        reason: The text.
        only_training: Its output is right, but no gradient passes through it.
    """

    only_training: bool

    def __new__(cls, reason: str, only_training: bool = False) -> "Broken":
        made = super().__new__(cls, reason)
        made.only_training = only_training
        return made


def refuses(reason: str, x: Tensor) -> bool:
    """Whether a layer must not run on x for `reason`."""
    return isinstance(reason, Broken) and not (
        reason.only_training and not (torch.is_grad_enabled() and x.requires_grad)
    )


def why_not_merged(base: nn.Module) -> str:
    """Say why an adapter can't be merged into a stored base, and what to do."""
    return (
        f"can't be merged into a {type(base).__name__}: quantising W + ΔW would round the adapter away; keep it beside "
        "the base, or load the model in 16 bits, load the adapter there, and merge"
    )


def register(name: str, form: type[StoredBase]) -> None:
    """Make `form` what reads the bases of one class.

    Args:
        name: Dotted name of the exact class of the module, or where nn.Linear holds the weight, of
            its tensor: "bitsandbytes.nn.modules.Linear4bit".
        form: A subclass of `StoredBase`.

    Raises:
        TypeError: an argument is of another kind.
    """
    if not isinstance(name, str) or "." not in name:
        raise TypeError(f"register: name must be a class's dotted name, got {name!r}; pass 'package.module.Class'")
    if not (isinstance(form, type) and issubclass(form, StoredBase)):
        raise TypeError(f"register: form must be a subclass of StoredBase, got {form!r}; derive one")
    FORMS[name] = form


FORMS: dict[str, Any] = {
    "bitsandbytes.nn.modules.Linear4bit": ("bitsandbytes_4bit", "Bitsandbytes4bit"),
    "bitsandbytes.nn.modules.LinearNF4": ("bitsandbytes_4bit", "Bitsandbytes4bit"),
    "bitsandbytes.nn.modules.LinearFP4": ("bitsandbytes_4bit", "Bitsandbytes4bit"),
    "gptqmodel.nn_modules.qlinear.torch.TorchLinear": ("gptqmodel_linear", "GptqmodelBase"),
    "gptqmodel.nn_modules.qlinear.torch.TorchQuantLinear": ("gptqmodel_linear", "GptqmodelBase"),
    "hqq.core.quantize.HQQLinear": ("hqq_linear", "HqqBase"),
    "torchao.quantization.Float8Tensor": ("torchao_weight", "TorchaoWeight"),
    "torchao.quantization.Int8Tensor": ("torchao_weight", "TorchaoWeight"),
}
"""Dotted name of a class → the form that reads it; the library's own as file and class, imported
where one is met, for each imports its library.
"""


def dotted_name(kind: type) -> str:
    """Return a class's name as `register` takes it."""
    return f"{kind.__module__}.{kind.__qualname__}"


# A constant of what torch.compile traces, which can't read the names of all classes.
dotted_name._dynamo_marked_constant = True  # type: ignore[attr-defined]


def form_of(kind: type) -> type[StoredBase] | None:
    """Return the form registered for a class of modules or tensors, or None."""
    name = dotted_name(kind)
    form: Any = FORMS.get(name)
    if isinstance(form, tuple):
        file, own = form
        form = FORMS[name] = getattr(importlib.import_module(f"{__package__}.{file}"), own)
    return form
