"""The Triton backend: the ops of `ops.py` as kernels that keep the traffic contract, for NVIDIA GPUs from sm_80.

The frozen GEMMs are the library's; the rank-R term goes over their output in place. With
TRITON_INTERPRET=1 the same kernels run on CPU tensors in Triton's interpreter: slow, for tests.
"""

from delora_kernels.backends.eager import weight_grad
from delora_kernels.backends.triton.dropout import dropout_mask
from delora_kernels.backends.triton.fold import fold, fold_backward
from delora_kernels.backends.triton.route import route, route_backward
from delora_kernels.backends.triton.row_norm import row_norm
from delora_kernels.backends.triton.stages import expand, expand_backward, input_grad, project, project_backward
from delora_kernels.backends.triton.support import supports

__all__ = [
    "dropout_mask",
    "expand",
    "expand_backward",
    "fold",
    "fold_backward",
    "input_grad",
    "project",
    "project_backward",
    "route",
    "route_backward",
    "row_norm",
    "supports",
    "weight_grad",
]
