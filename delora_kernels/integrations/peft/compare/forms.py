"""One model in three forms: PEFT's own layers, fused ones, and none at all; put back as it was.

A form is a matter of each adapter layer's class, of its place in a group, and of PEFT's switch; no
tensor is touched, and changing it takes microseconds a layer.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from delora_kernels.integrations.peft.fused import accelerate
from delora_kernels.integrations.peft.fused.groups import PLACE, Family, Group, Place
from delora_kernels.integrations.peft.fused.groups import form as join
from delora_kernels.integrations.peft.fused.layers import fused_class, peft_class, swap_class
from delora_kernels.integrations.peft.fused.report import Report


class Forms:
    """The forms of a model; as a context, it leaves the model as it found it.

    Args:
        model: Holds PEFT adapter layers.

    Raises:
        TypeError, ValueError: as accelerate().

    Attributes:
        report: What accelerate() said when the model was first fused.
    """

    def __init__(self, model: nn.Module) -> None:
        self.layers: list[Any] = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
        self._before = [_Form(layer) for layer in self.layers]
        self._switches = [layer._disable_adapters for layer in self.layers]
        self.report: Report = accelerate(model, prove=False)  # its first passes are not timed
        self._share_inputs_anew()
        self._fused = [_Form(layer) for layer in self.layers]

    def _share_inputs_anew(self) -> None:
        """Give layers that had places others like them, so that what these passes find is not
        theirs.
        """
        families: dict[Family, Family] = {}
        groups: dict[Group, None] = {}
        for layer, form in zip(self.layers, self._before, strict=True):
            if form.place is not None:
                family = families.setdefault(form.place.family, Family(form.place.family.watched))
                layer.__dict__[PLACE] = Place(family)
                groups |= {} if form.place.group is None else {form.place.group: None}
        for group in groups:
            join(group.layers())

    @property
    def differ(self) -> bool:
        """Whether any layer runs otherwise fused than by PEFT."""
        return any(peft_class(type(layer)) is not fused_class(type(layer)) for layer in self.layers)

    def __enter__(self) -> "Forms":
        return self

    def __exit__(self, *_: object) -> None:
        for layer, form, switch in zip(self.layers, self._before, self._switches, strict=True):
            form.give(layer)
            layer._disable_adapters = switch

    @contextmanager
    def as_form(self, name: str) -> Iterator[None]:
        """Put the model in the form "frozen", "peft" or "fused"."""
        for layer, fused, switch in zip(self.layers, self._fused, self._switches, strict=True):
            if name == "fused":
                fused.give(layer)
            else:
                _Form.of_peft(layer).give(layer)
            # PEFT's own way of switching also changes which parameters require a gradient
            layer._disable_adapters = switch or name == "frozen"
        try:
            yield
        finally:
            if name == "fused":  # with the groups that this pass may have found
                self._fused = [_Form(layer) for layer in self.layers]


class _Form:
    """The class of a layer, and its place in a group."""

    def __init__(self, layer: Any) -> None:
        self.kind, self.place = type(layer), layer.__dict__.get(PLACE)

    @classmethod
    def of_peft(cls, layer: Any) -> "_Form":
        form = cls(layer)
        form.kind, form.place = peft_class(form.kind), None
        return form

    def give(self, layer: Any) -> None:
        if type(layer) is not self.kind:
            swap_class(layer, self.kind)
        if self.place is None:
            layer.__dict__.pop(PLACE, None)
        else:
            layer.__dict__[PLACE] = self.place
