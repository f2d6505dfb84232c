"""What checks the arguments of ETHER's public functions and turns them into a `ReflectCall`."""

from typing import Any

from torch import Tensor

from delora_kernels import backends, checks
from delora_kernels.call import ReflectCall, ReflectOptions
from delora_kernels.settle import as_rows, dtypes, refuse_transforms

BLOCKS = ("paper", "official")


def ether_call(
    x: Any, weight: Any, u: Any = None, bias: Any = None, *, u_out: Any = None, blocks: Any = "paper"
) -> ReflectCall:
    """The call that `functional.ether_linear` makes."""
    return _call("ether_linear", x, weight, bias, u, None, u_out, None, blocks, 1)


def ether_plus_call(
    x: Any,
    weight: Any,
    u: Any = None,
    v: Any = None,
    bias: Any = None,
    *,
    u_out: Any = None,
    v_out: Any = None,
    blocks: Any = "paper",
) -> ReflectCall:
    """The call that `functional.ether_plus_linear` makes."""
    return _call("ether_plus_linear", x, weight, bias, u, v, u_out, v_out, blocks, 2)


def _call(
    name: str,
    x: Any,
    weight: Any,
    bias: Any,
    u: Any,
    v: Any,
    u_out: Any,
    v_out: Any,
    blocks: Any,
    directions: int,
) -> ReflectCall:
    refuse_transforms(name, (x, weight, bias, u, v, u_out, v_out), f"reference.{name}")
    checks.base(name, x, weight, bias)
    N, K = weight.shape
    _side(name, ("u", "v"), (u, v)[:directions], x, K, "K", "weight's columns")
    _side(name, ("u_out", "v_out"), (u_out, v_out)[:directions], x, N, "N", "weight's rows")
    if u is None and u_out is None:
        remedy = "pass the vectors of a side, or use the frozen linear alone"
        raise checks.fail(ValueError, name, "u", "a tensor where u_out is None", "None", remedy)
    official = checks.option(name, "blocks", blocks, BLOCKS) == "official"
    by_row_groups = official and u is not None and u.shape[0] > 1
    compute_dtype, rank_dtype = dtypes(x, *(t for t in (u, u_out) if t is not None))
    rows, settled = as_rows(x), (name, by_row_groups, compute_dtype, rank_dtype)
    call = ReflectCall(rows, weight, bias, u, v, u_out, v_out, ReflectOptions(*settled, backend=""))
    return call._replace(options=ReflectOptions(*settled, backends.choose(call)))


def _side(
    name: str, names: tuple[str, str], vectors: tuple[Any, ...], x: Tensor, C: int, letter: str, what: str
) -> None:
    """Check the vectors of one side: all there or none, [blocks, C / blocks] each."""
    given = [each for each in vectors if each is not None]
    if given and len(given) < len(vectors):
        missing = names[0] if vectors[0] is None else names[1]
        raise checks.fail(ValueError, name, missing, "a tensor", "None", f"pass both {names[0]} and {names[1]}")
    for argument, value in zip(names, given, strict=False):
        value = checks.matrix(name, argument, value, f"[blocks, {letter} / blocks]")
        if value.numel() != C or C == 0:
            expected = f"[blocks, {letter} / blocks] with {letter} = {C}, {what}"
            raise checks.fail(ValueError, name, argument, expected, list(value.shape), "pass one row for each block")
        checks.same_device(name, argument, value, x)
    if len(given) == 2:
        remedy = f"{names[0]} and {names[1]} have the same blocks"
        checks.shape(name, names[1], given[1], tuple(given[0].shape), f"[blocks, {letter} / blocks]", remedy)
