"""The Triton backend: the ops of `ops.py` as kernels that keep the traffic contract, for NVIDIA
GPUs from sm_80.

`forms.py` chooses how a frozen GEMM and its rank-R term come together. With TRITON_INTERPRET=1 the
same kernels run on CPU tensors in Triton's interpreter: slow, for tests.
"""

from delora_kernels.backends.eager import grouped_weight_grad, weight_grad
from delora_kernels.backends.triton.dropout import dropout_mask
from delora_kernels.backends.triton.fold import fold, fold_backward
from delora_kernels.backends.triton.launch import begin
from delora_kernels.backends.triton.project_route import project_route
from delora_kernels.backends.triton.reflect import reflect, reflect_backward
from delora_kernels.backends.triton.route_backward import expand_route_backward
from delora_kernels.backends.triton.row_norm import row_norm
from delora_kernels.backends.triton.stack_factors import stack_factors
from delora_kernels.backends.triton.stages import (
    expand,
    expand_backward,
    grouped_backward,
    grouped_linear,
    input_backward,
    keeps_folded,
    project,
    wants_scaled,
)
from delora_kernels.backends.triton.support import supports
