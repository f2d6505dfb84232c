"""What the public functions accept, and the one format of every error: argument, expectation, what
came, what to do.

Every check runs before anything is allocated or drawn. Kinds are tuples, not unions: torch.compile
of 2.7 traces those.
"""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_FLOATS = set(FLOATS)


def fail(kind: type[Exception], function: str, argument: str, expected: str, got: object, remedy: str) -> Exception:
    """Make the exception that every check raises: `function: argument must be expected, got got;
    remedy`.
    """
    return kind(f"{function}: {argument} must be {expected}, got {got}; {remedy}")


def tensor(function: str, argument: str, value: Any) -> Tensor:
    """Check that `value` is a float tensor with data."""
    if not isinstance(value, Tensor):
        raise fail(TypeError, function, argument, "a torch.Tensor", type(value).__name__, "pass a tensor")
    if value.dtype not in FLOATS:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in FLOATS)
        raise fail(TypeError, function, argument, f"one of {names}", value.dtype, "convert it, or dequantise it first")
    if value.layout != torch.strided:
        raise fail(TypeError, function, argument, "dense (torch.strided)", value.layout, "call .to_dense()")
    if value.is_meta:
        raise fail(ValueError, function, argument, "a tensor with data", "a meta tensor", "load or initialise it first")
    return value


def shape(function: str, argument: str, value: Tensor, expected: tuple[int, ...], letters: str, remedy: str) -> None:
    """Check an exact shape; `letters` names its dimensions, as in "[N, K]"."""
    if tuple(value.shape) != expected:
        raise fail(ValueError, function, argument, f"{letters} = {list(expected)}", list(value.shape), remedy)


def matrix(function: str, argument: str, value: Any, letters: str) -> Tensor:
    """Check that `value` is a float matrix."""
    value = tensor(function, argument, value)
    if value.dim() != 2:
        raise fail(ValueError, function, argument, f"2-D {letters}", f"shape {list(value.shape)}", "pass a matrix")
    return value


def same_device(function: str, argument: str, value: Tensor, x: Tensor) -> None:
    """Check that a tensor lives where x lives."""
    if value.device != x.device:
        raise fail(ValueError, function, argument, f"on x's device {x.device}", value.device, f"move it to {x.device}")


def constant(function: str, argument: str, value: Tensor) -> None:
    """Check that a tensor the method defines as constant asks for no gradient."""
    if value.requires_grad:
        raise fail(ValueError, function, argument, "a constant", "a tensor that requires grad", "pass .detach()")


def number(function: str, argument: str, value: Any) -> float:
    """Check a finite real number."""
    if isinstance(value, bool) or not isinstance(value, (int, float, torch.SymFloat, torch.SymInt)):
        raise fail(TypeError, function, argument, "a number", type(value).__name__, "pass a float")
    if not -math.inf < value < math.inf:  # math.isfinite does not trace
        raise fail(ValueError, function, argument, "finite", value, "pass a finite float")
    return float(value)


def number_or_tensor(function: str, argument: str, value: Any) -> float | Tensor:
    """Check a finite real number, or pass a tensor on unchecked."""
    return value if isinstance(value, Tensor) else number(function, argument, value)


def not_negative(function: str, argument: str, value: Any) -> float:
    """Check a finite number ≥ 0."""
    value = number(function, argument, value)
    if value < 0:
        raise fail(ValueError, function, argument, "≥ 0", value, "0 means no clamp")
    return value


def probability(function: str, value: Any) -> float:
    """Check a dropout probability, in [0, 1)."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise fail(TypeError, function, "dropout_p", "a number", type(value).__name__, "pass a float in [0, 1)")
    if not 0.0 <= value < 1.0:  # NaN fails too
        raise fail(ValueError, function, "dropout_p", "in [0, 1)", value, "pass the probability of dropping an element")
    return float(value)


def ranks(function: str, value: Any, A: Tensor) -> tuple[int, ...]:
    """Return the widths of the adapters stacked in A `[r, K]`, or () for one adapter."""
    if value is None:
        return ()
    if not isinstance(value, (list, tuple)) or not all(type(r) is int for r in value):
        raise fail(TypeError, function, "ranks", "a list of ints, or None", repr(value), "pass the adapters' ranks")
    if not value or min(value) < 1 or sum(value) != A.shape[0]:
        expected = f"positive and sum to A's {A.shape[0]} rows"
        raise fail(ValueError, function, "ranks", expected, list(value), "pass the rank of each stacked adapter")
    return tuple(value)


def probabilities(function: str, value: Any, ranks: tuple[int, ...]) -> tuple[float, ...]:
    """Return the dropout probability of each stacked adapter; one number counts for all of them."""
    if not isinstance(value, (list, tuple)):
        return (probability(function, value),) * max(1, len(ranks))
    if len(value) != len(ranks):
        expected = f"{len(ranks)} numbers, one for each of ranks" if ranks else "one number where ranks is None"
        raise fail(ValueError, function, "dropout_p", expected, f"{len(value)} numbers", "pass both, or one number")
    return tuple(probability(function, p) for p in value)


def option(function: str, argument: str, value: Any, choices: tuple[str, ...]) -> str:
    """Check a named option."""
    if value not in choices:
        raise fail(ValueError, function, argument, f"one of {choices}", repr(value), "pick one of them")
    return str(value)


PLAIN = (torch.nn.Parameter, Tensor)
"""The types of tensors that are nothing but memory: a subclass may be a shard, quantised, or fake.
"""


def plainly_right(x: Any, weight: Any, bias: Any, A: Any, B: Any) -> bool:
    """Whether `base` and `factors` would find nothing, found the short way; False: ask them."""
    if not (type(x) in PLAIN and type(weight) in PLAIN and type(A) in PLAIN and type(B) in PLAIN):
        return False
    dtype, device, layout = x.dtype, x.device, torch.strided
    N, K = weight.shape if weight.dim() == 2 else (-1, -1)
    r = A.shape[0] if A.dim() == 2 else 0
    return (
        dtype == weight.dtype
        and {dtype, A.dtype, B.dtype} <= _FLOATS
        and x.dim() > 0
        and r > 0
        and x.shape[-1] == K == A.shape[1]
        and B.shape == (N, r)
        and device == weight.device == A.device == B.device
        and device.type != "meta"
        and layout == x.layout == weight.layout == A.layout == B.layout
        and (
            bias is None
            or (
                type(bias) in PLAIN
                and bias.dtype in _FLOATS
                and bias.shape == (N,)
                and bias.device == device
                and bias.layout == layout
            )
        )
    )


def is_stored(weight: Any) -> bool:
    """Whether this is a base of `bases/` that stands in a weight's place: it can be made dense."""
    return not isinstance(weight, Tensor) and hasattr(type(weight), "dense")


def base(function: str, x: Any, weight: Any, bias: Any) -> None:
    """Check x [..., K], weight [N, K] and bias [N] against each other."""
    x = tensor(function, "x", x)
    stored = is_stored(weight)  # a base that has been judged where it was read, and casts x itself
    weight = weight if stored else matrix(function, "weight", weight, "[N, K]")
    same_device(function, "weight", weight, x)
    if x.dim() == 0 or x.shape[-1] != weight.shape[1]:
        expected = f"[..., K] with K = {weight.shape[1]}, weight's columns"
        raise fail(ValueError, function, "x", expected, f"shape {list(x.shape)}", "weight is [N, K] as in nn.Linear")
    autocast = torch.is_autocast_enabled(x.device.type) and (stored or torch.float64 not in (x.dtype, weight.dtype))
    if not stored and x.dtype != weight.dtype and not autocast:
        raise fail(
            TypeError, function, "x", f"{weight.dtype}, weight's dtype", x.dtype, "cast x, or use torch.autocast"
        )
    if bias is not None:
        bias = tensor(function, "bias", bias)
        shape(function, "bias", bias, (weight.shape[0],), "[N]", "pass one value for each row of weight, or None")
        same_device(function, "bias", bias, x)


def pair(
    function: str, A: Any, B: Any, names: tuple[str, str] = ("A", "B"), K: int | None = None, N: int | None = None
) -> None:
    """Check a low-rank pair: A [r, K] and B [N, r] with r ≥ 1; K and N as given, or any."""
    A, B = matrix(function, names[0], A, "[r, K]"), matrix(function, names[1], B, "[N, r]")
    if A.shape[0] == 0:
        raise fail(ValueError, function, names[0], "[r, K] with r ≥ 1", list(A.shape), "use the frozen linear alone")
    if K is not None:
        shape(function, names[0], A, (A.shape[0], K), "[r, K]", "K is weight's number of columns")
    rows = B.shape[0] if N is None else N
    shape(function, names[1], B, (rows, A.shape[0]), "[N, r]", f"r is {names[0]}'s number of rows")


def factors(function: str, x: Tensor, weight: Tensor, A: Any, B: Any, names: tuple[str, str] = ("A", "B")) -> None:
    """Check a low-rank pair against x and weight."""
    pair(function, A, B, names, K=weight.shape[1], N=weight.shape[0])
    for name, value in zip(names, (A, B), strict=True):
        same_device(function, name, value, x)


def scalar_tensor(function: str, argument: str, value: Any, x: Tensor) -> Tensor:
    """Check a number or a 0-d or [1] tensor on x's device, and return it as a tensor."""
    if not isinstance(value, Tensor):
        return torch.full((), number(function, argument, value), dtype=torch.float64, device=x.device)
    value = tensor(function, argument, value)
    if value.numel() != 1 or value.dim() > 1:
        raise fail(
            ValueError, function, argument, "a number, 0-d or [1]", f"shape {list(value.shape)}", "pass one value"
        )
    same_device(function, argument, value, x)
    return value


def seed(function: str, value: Any, x: Tensor, masks: int = 0) -> Tensor:
    """Return the dropout seed as an int64 tensor on x's device, 0-d or `[masks]`; None draws from
    torch's generator there.

    One seed for several masks makes seed, seed + 1, ... of it.
    """
    shape = (masks,) if masks else ()
    if value is None:
        return torch.randint(-(1 << 63), (1 << 63) - 1, shape, dtype=torch.int64, device=x.device)
    if isinstance(value, Tensor):
        if value.dtype != torch.int64 or value.dim() != 0:
            got = f"{value.dtype} of shape {list(value.shape)}"
            raise fail(TypeError, function, "seed", "an int or a 0-d int64 tensor", got, "pass torch.tensor(seed)")
        same_device(function, "seed", value, x)
    elif isinstance(value, bool) or not isinstance(value, int):
        raise fail(TypeError, function, "seed", "an int or a 0-d int64 tensor", type(value).__name__, "pass an int")
    elif not -(1 << 63) <= value < 1 << 63:
        raise fail(ValueError, function, "seed", "a 64-bit signed integer", value, "reduce it modulo 2⁶³")
    else:
        value = torch.full((), value, dtype=torch.int64, device=x.device)
    return value + torch.arange(masks, device=x.device) if masks else value


def low_rank(function: str, x: Any, weight: Any, bias: Any, A: Any, B: Any, *others: Any) -> None:
    """Check what every low-rank method takes; `others` are tensors that transforms may hide in."""
    no_transforms(function, (x, weight, bias, A, B, *others), f"reference.{function}")
    if not plainly_right(x, weight, bias, A, B):
        base(function, x, weight, bias)
        factors(function, x, weight, A, B)


def active_transform(tensors: Iterable[Any]) -> str | None:
    """Name the functional transform that is under way, which the autograd Function can't take part
    in, or None.
    """
    if torch.compiler.is_compiling():
        return None
    if torch._C._are_functorch_transforms_active():
        return "torch.func transforms"
    if forward_ad._current_level >= 0:
        duals = (forward_ad.unpack_dual(t) for t in tensors if isinstance(t, Tensor) and t.is_floating_point())
        if any(dual.tangent is not None for dual in duals):
            return "forward-mode differentiation"
    return None


def no_transforms(function: str, tensors: Iterable[Any], instead: str) -> None:
    """Raise where a functional transform is under way that `function` can't take part in."""
    transform = active_transform(tensors)
    if transform is not None:
        raise RuntimeError(f"{function} does not support {transform}; use delora_kernels.{instead} there")
