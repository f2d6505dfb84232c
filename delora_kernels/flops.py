"""What torch.utils.flop_counter counts for each op: the multiply-adds of its matrix products, as
for any GEMM.

Call `register()` before a FlopCounterMode is made, or it counts nothing inside the fused layers. It
is not done at import because torch's flop counter imports Triton.

A reflection counts: x·û and the update by û are products of every block with a matrix of one column
(ETHER+: two), and torch counts them where plain torch computes them. Norms, softmax, gating, masks
and whatever else goes element by element do not, here or there.
"""

import math
from collections.abc import Callable
from typing import Any

import torch

from delora_kernels import ops
from delora_kernels.op_arguments import (
    Gated,
    Gating,
    Masks,
    Rescaled,
    Rescaling,
    TermGradients,
)


def _gemm(rows: int, inner: int, columns: int) -> int:
    return 2 * rows * inner * columns


def _row_norm(weight: Any, A_hat: Any, *_: Any) -> int:
    return math.prod(weight[:-2]) * _gemm(weight[-2], A_hat[-2], weight[-1])


def _project(x: Any, A_hat: Any, masks: Masks) -> int:
    return _gemm(x[0], x[1], A_hat[0])


def _expand(x: Any, weight: Any, bias: Any, term: Any, rescaling: Rescaling) -> int:
    frozen = _gemm(x[0], x[1], weight[0]) * (1 if rescaling.seed is None else 2)
    return frozen + _gemm(x[0], term.h[1], weight[0])


def _expand_backward(dy: Any, term: Any, rescaled: Rescaled, need_bias: bool) -> int:
    return sum(_gemm(dy[0], dy[1], small[1]) for small in (term.h, term.B_hat) if small is not None)


def _input_backward(dy: Any, frozen: Any, branch: Any, masks: Masks) -> int:
    x, weight, dv = branch.x, frozen.weight, branch.dv
    total = 0 if x is None else _gemm(branch.r, x[0], x[1])
    if weight is not None:
        total += _gemm(dy[0], dy[1], weight[1]) * (2 if frozen.two_term else 1) + _gemm(dy[0], dv[1], weight[1])
    return total


def _weight_grad(dy: Any, x: Any, c: Any, dropout_p: float, seed: Any) -> int:
    return _gemm(dy[1], x[0], x[1]) * (1 if seed is None else 2)


def _project_route(x: Any, A_hat: Any, masks: Masks, gates: Any, top_k: int, gating: Gating) -> int:
    return _project(x, A_hat, masks)


def _expand_route_backward(dy: Any, v: Any, B_hat: Any, need_bias: bool, gated: Gated, gating: Gating) -> int:
    return _expand_backward(dy, TermGradients(v, B_hat), Rescaled(), need_bias)


def _reflect(x: Any, u: Any, v: Any, bias: Any) -> int:
    """Return the products x·û, then the update, for each vector of a block."""
    return 2 * _gemm(x[0], x[1], 1 if v is None else 2)


def _reflect_backward(dy: Any, x: Any, u: Any, v: Any, need_dx: bool) -> int:
    """x·û and dy·û, their sums over tokens with dy and x, and the update of dx."""
    return (5 if need_dx else 4) * _gemm(x[0], x[1], 1 if v is None else 2)


def _grouped_linear(x: Any, weight: Any, bias: Any, offsets: Any, A_hat: Any, B_hat: Any, *_: Any) -> int:
    """Every row belongs to one expert: rows behind the last offset are counted too."""
    R = 0 if A_hat is None else A_hat[1]
    return _gemm(x[0], x[1], weight[1]) + _gemm(x[0], x[1] + weight[1], R)


def _grouped_backward(dy: Any, x: Any, h: Any, weight: Any, offsets: Any, A_hat: Any, B_hat: Any, *_: Any) -> int:
    total = 0 if weight is None else _gemm(dy[0], dy[1], weight[2])
    if B_hat is not None and (x is not None or A_hat is not None):
        total += _gemm(dy[0], dy[1], B_hat[2])
        total += 0 if x is None else _gemm(B_hat[2], dy[0], x[1])
        total += 0 if weight is None or A_hat is None else _gemm(dy[0], B_hat[2], weight[2])
    return total + (0 if h is None else _gemm(dy[1], dy[0], h[1]))


def _grouped_weight_grad(dy: Any, x: Any, offsets: Any) -> int:
    return _gemm(dy[1], dy[0], x[1])


FORMULAS: dict[str, Callable[..., int]] = {
    "row_norm": _row_norm,
    "project": _project,
    "expand": _expand,
    "expand_backward": _expand_backward,
    "input_backward": _input_backward,
    "weight_grad": _weight_grad,
    "project_route": _project_route,
    "expand_route_backward": _expand_route_backward,
    "reflect": _reflect,
    "reflect_backward": _reflect_backward,
    "grouped_linear": _grouped_linear,
    "grouped_backward": _grouped_backward,
    "grouped_weight_grad": _grouped_weight_grad,
}
"""Op name → FLOPs from the arguments of its function, tensors given as shapes."""

WITHOUT_PRODUCTS = ("fold", "fold_backward", "stack_factors", "dropout_mask")
"""The other ops."""


def register() -> None:
    """Tell torch.utils.flop_counter the formulas; harmless when repeated."""
    from torch.utils.flop_counter import flop_registry, register_flop_formula

    for name in FORMULAS:
        op = getattr(torch.ops.delora_kernels, name)
        if op not in flop_registry:
            register_flop_formula(op)(_of_values(name))


def _of_values(name: str) -> Callable[..., int]:
    """Return an op's formula as the flop counter calls it, with the values of the schema."""
    return lambda *values, **_: FORMULAS[name](*ops.packed(name, values[:-1]))
