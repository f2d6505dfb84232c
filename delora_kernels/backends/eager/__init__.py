"""The eager backend: every op of `ops.py` in plain torch, on every device; the default on a CPU."""

from delora_kernels.backends.eager.fold import fold, fold_backward
from delora_kernels.backends.eager.grouped import grouped_backward, grouped_linear, grouped_weight_grad
from delora_kernels.backends.eager.low_rank import (
    dropout_mask,
    expand,
    expand_backward,
    input_backward,
    project,
    row_norm,
    wants_scaled,
    weight_grad,
)
from delora_kernels.backends.eager.reflect import reflect, reflect_backward
from delora_kernels.backends.eager.route import expand_route_backward, project_route
from delora_kernels.backends.eager.stack_factors import stack_factors
from delora_kernels.call import AnyCall


def supports(call: AnyCall) -> str | None:
    """None: plain torch takes every call."""
    return None
