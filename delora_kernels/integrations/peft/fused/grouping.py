"""Which fused layers may share an input: what accelerate()'s `group` asks for, and what
report.groups says.
"""

import weakref
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from typing import Any

from torch import nn

from delora_kernels.integrations.peft.fused.groups import PLACE, Family, Place, form, place_of


def check_groups(groups: Any, names: Collection[str]) -> None:
    """Check accelerate()'s `group`.

    Args:
        groups: True, False, or names of layers, group by group.
        names: Of the layers that are or will be fused.

    Raises:
        TypeError, ValueError: as accelerate() says.
    """
    if isinstance(groups, bool):
        return
    where, expected = "accelerate: group", "be True, False or lists of layer names, as report.groups"
    if isinstance(groups, str) or not isinstance(groups, Sequence):
        raise TypeError(f"{where} must {expected}, got a {type(groups).__name__}")
    seen: set[str] = set()
    for group in groups:
        if isinstance(group, str) or not isinstance(group, Sequence) or len(group) < 2:
            raise TypeError(f"{where} must {expected}, of two layers or more, got {group!r}")
        for name in group:
            if name not in names:
                raise ValueError(f"{where} names {name!r}, no fused linear of this model; print(report) shows them")
            if name in seen:
                raise ValueError(f"{where} names {name!r} twice; a layer is in one group at most")
            seen.add(name)


def settle_in(layers: Mapping[str, nn.Module], fresh: Collection[str], groups: bool | Sequence[Sequence[str]]) -> None:
    """Give fused layers their places.

    Args:
        layers: Qualified name → layer.
        fresh: Names of those that were just fused.
        groups: True: siblings among the fresh ones are watched; False: all run alone; or names of
            layers, group by group: these, and no others.
    """
    if groups is True:
        families: dict[str, list[nn.Module]] = {}
        for name in (each for each in fresh if hasattr(layers[each], "read_plan")):
            families.setdefault(name.rpartition(".")[0], []).append(layers[name])
        for siblings in families.values():
            if len(siblings) > 1:
                _join(Family(), siblings)
        return
    for layer in layers.values():
        move_out(layer)
    for names in groups or ():
        members = [layers[name] for name in names]
        _join(Family(watched=False), members)
        form(members)


def _join(family: Family, layers: Sequence[nn.Module]) -> None:
    for layer in layers:
        layer.__dict__[PLACE] = Place(family)


def move_out(layer: nn.Module) -> None:
    """Take a layer's place away."""
    layer.__dict__.pop(PLACE, None)


class Groups:
    """The groups among some layers, as they are whenever one asks.

    Args:
        names: Layer → its qualified name.
    """

    def __init__(self, names: Mapping[nn.Module, str]) -> None:
        self._names: Any = weakref.WeakKeyDictionary(names)

    def __reduce__(self) -> Any:
        return partial, (tuple, self())

    def __call__(self) -> tuple[tuple[str, ...], ...]:
        """Return their names, the leader's first."""
        places = [place_of(layer) for layer in list(self._names)]
        groups = dict.fromkeys(place.group for place in places if place is not None and place.group is not None)
        return tuple(tuple(self._names[layer] for layer in group.layers()) for group in groups)
