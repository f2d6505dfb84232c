"""What torch.utils.flop_counter counts for each op: the multiply-adds of its matrix products, as for any GEMM.

Call `register()` before a FlopCounterMode is made, or it counts nothing inside the fused layers. It is not done at
import because torch's flop counter imports Triton.
"""

from collections.abc import Callable
from typing import Any

import torch


def _gemm(rows: int, inner: int, columns: int) -> int:
    return 2 * rows * inner * columns


def _row_norm(weight: Any, A_hat: Any, *_: Any, **__: Any) -> int:
    return _gemm(weight[0], A_hat[0], weight[1])


def _project(x: Any, A_hat: Any, *_: Any, **__: Any) -> int:
    return _gemm(x[0], x[1], A_hat[0])


def _expand(
    x: Any,
    weight: Any,
    bias: Any,
    h: Any,
    B_hat: Any,
    scale: Any,
    c: Any,
    scaled: Any,
    keep: Any,
    p: Any,
    seed: Any,
    *_: Any,
    **__: Any,
) -> int:
    frozen = _gemm(x[0], x[1], weight[0]) * (1 if seed is None else 2)
    return frozen + _gemm(x[0], h[1], weight[0])


def _expand_backward(dy: Any, h: Any, B_hat: Any, *_: Any, **__: Any) -> int:
    return sum(_gemm(dy[0], dy[1], small[1]) for small in (h, B_hat) if small is not None)


def _input_backward(dy: Any, weight: Any, dv: Any, A_hat: Any, x: Any, r: int, *others: Any, **__: Any) -> int:
    *_, two_term, _backend = others
    total = 0 if x is None else _gemm(r, x[0], x[1])
    if weight is not None:
        total += _gemm(dy[0], dy[1], weight[1]) * (2 if two_term else 1) + _gemm(dy[0], dv[1], weight[1])
    return total


def _weight_grad(dy: Any, x: Any, c: Any, p: Any, seed: Any, *_: Any, **__: Any) -> int:
    return _gemm(dy[1], x[0], x[1]) * (1 if seed is None else 2)


FORMULAS: dict[str, Callable[..., int]] = {
    "row_norm": _row_norm,
    "project": _project,
    "expand": _expand,
    "expand_backward": _expand_backward,
    "input_backward": _input_backward,
    "weight_grad": _weight_grad,
}
"""Op name → FLOPs from its arguments, tensors given as shapes; fold, its inverse and masks have no matrix product."""


def register() -> None:
    """Tell torch.utils.flop_counter the formulas; harmless when repeated."""
    from torch.utils.flop_counter import flop_registry, register_flop_formula

    for name, formula in FORMULAS.items():
        op = getattr(torch.ops.delora_kernels, name)
        if op not in flop_registry:
            register_flop_formula(op)(formula)
