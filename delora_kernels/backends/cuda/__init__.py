"""The compiled backend: the ops of `ops.py` as CUDA C++ kernels (csrc/), for machines where Triton
can't run.

`launch.py` binds them, the files named after ops and `kernels.py` are their functions of tensors,
`stages.py` the ops that have a library GEMM beside them. A library compiled by csrc/host_shim runs
the same kernels on CPU tensors: slow, for tests.
"""

from delora_kernels.backends.cuda.fold import fold, fold_backward
from delora_kernels.backends.cuda.kernels import dropout_mask
from delora_kernels.backends.cuda.launch import begin
from delora_kernels.backends.cuda.reflect import reflect, reflect_backward
from delora_kernels.backends.cuda.route import expand_route_backward, project_route
from delora_kernels.backends.cuda.row_norm import row_norm
from delora_kernels.backends.cuda.stack_factors import stack_factors
from delora_kernels.backends.cuda.stages import (
    expand,
    expand_backward,
    grouped_backward,
    grouped_linear,
    input_backward,
    keeps_folded,
    project,
    wants_scaled,
)
from delora_kernels.backends.cuda.support import supports, why_not_here
from delora_kernels.backends.eager import grouped_weight_grad, weight_grad
