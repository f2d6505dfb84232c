"""The token-sized ops of `ops.py` over the compiled kernels: forms (b) and (d), which every shape
takes alike.
"""

from torch import Tensor

from delora_kernels.backends.cuda.dy_sums import dy_sums, finish_dy, takes
from delora_kernels.backends.cuda.grouped import grouped_sums, grouped_times_small, grouped_update
from delora_kernels.backends.cuda.kernels import (
    add_parts,
    drop,
    rank_update,
    scale_matrix,
    takes_term,
    times_small,
    times_small_parts,
    token_sums,
)
from delora_kernels.backends.grouped_stages import GroupedStages
from delora_kernels.backends.library_gemm import Stages

STAGES = Stages(
    times_small, times_small_parts, token_sums, takes_term, takes, dy_sums,
    finish_dy, add_parts, rank_update, scale_matrix, drop,
)  # fmt: skip

GROUPED = GroupedStages(grouped_times_small, grouped_update, grouped_sums)

grouped_linear = GROUPED.grouped_linear
grouped_backward = GROUPED.grouped_backward

project = STAGES.project
expand = STAGES.expand
expand_backward = STAGES.expand_backward
input_backward = STAGES.input_backward


keeps_folded = True
"""Â and B̂ are kept for backward: folded again there, they would cost a launch."""


def wants_scaled(x: Tensor, weight: Tensor) -> bool:
    """Whether `expand` wants row_norm's c ⊙ W: the pass of form (d) can't scale what comes after
    it.
    """
    return True
