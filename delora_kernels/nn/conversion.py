"""convert: adapters in the place of a model's linears, all or none, with a progress bar where that
takes long.
"""

from collections.abc import Iterable
from typing import Any, TypeVar

from torch import nn
from tqdm.auto import tqdm

from delora_kernels import checks
from delora_kernels.nn.base import AdapterLinear, base_of

BAR_AFTER_SECONDS = 2
"""GOAT's full SVD takes seconds for each weight of a large model; what ends sooner shows no bar."""

Adapter = TypeVar("Adapter", bound=AdapterLinear)


def convert(
    model: nn.Module, adapter: type[Adapter], targets: Iterable[str], *, progress: bool = True, **options: Any
) -> dict[str, Adapter]:
    """Put an adapter module on every target linear of `model`, in its place.

        model.requires_grad_(False)
        convert(model, GoatLinear, ["q_proj", "v_proj"], r=4, experts=8)

    Each is `adapter.from_linear(linear, **options)`, in the order of `model.named_modules()`. A
    linear that the model holds several times becomes one adapter, held as often. The model changes
    only after all of them are made. Its other parameters are left as they are.

    Args:
        model: Any module that holds the linears.
        adapter: LoRALinear, DoRALinear, DeLoRALinear, MoELoRALinear, GoatLinear or DeLoRAMoELinear.
        targets: Names of linears, or the last parts of dotted names, as PEFT's list of
            `target_modules`.
        progress: Show a bar on stderr if it takes longer than `BAR_AFTER_SECONDS`.
        **options: The adapter's arguments, beside those that the linear decides.

    Returns:
        Name → the adapter that is there now.

    Raises:
        TypeError, ValueError: a target is not there or no plain linear, or an option does not fit
            one of them; the text names it and the remedy. The model is as it was.
    """
    if not (isinstance(adapter, type) and issubclass(adapter, AdapterLinear)):
        got = adapter.__name__ if isinstance(adapter, type) else type(adapter).__name__
        remedy = "pass one of delora_kernels.nn, such as LoRALinear"
        raise checks.fail(TypeError, "convert", "adapter", "an adapter's class", got, remedy)
    found = _targets(model, targets)
    made: dict[int, Adapter] = {}
    with tqdm(found.items(), desc=adapter.__name__, delay=BAR_AFTER_SECONDS, disable=not progress) as bar:
        for name, linear in bar:
            bar.set_postfix_str(name, refresh=False)
            if id(linear) in made:
                continue
            try:
                made[id(linear)] = adapter.from_linear(linear, **options)
            except (TypeError, ValueError) as error:
                raise type(error)(f"convert at {name}: {error}") from error
    placed = {name: made[id(linear)] for name, linear in found.items()}
    for name, module in placed.items():
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, module)
    return placed


def _targets(model: nn.Module, targets: Iterable[str]) -> dict[str, nn.Module]:
    """Name → linear, each checked; a linear held several times is there as often."""
    name = "convert"
    if isinstance(targets, str):
        raise checks.fail(TypeError, name, "targets", "several names", f"the one str {targets!r}", "put it into a list")
    found: dict[str, nn.Module] = {}
    for target in targets:
        here = {
            held: module
            for held, module in model.named_modules(remove_duplicate=False)
            if held and f".{held}".endswith(f".{target}")
        }
        if not here:
            expected = "names of modules inside the model"
            raise checks.fail(ValueError, name, "targets", expected, repr(target), "see model.named_modules()")
        found |= here
    if not found:
        raise checks.fail(ValueError, name, "targets", "names of linears", "none", "pass a list such as ['q_proj']")
    for held, module in found.items():
        base_of(f"{name} at {held}", module)
    order = [held for held, _ in model.named_modules(remove_duplicate=False) if held in found]
    return {held: found[held] for held in order}
