"""How results are judged: input makers, float64 oracles, tolerances, poison; shared by tests,
`check` and benchmarks.

    dtypes = {"dtype": torch.bfloat16, "adapter_dtype": torch.float32}
    problem = METHODS["dora"].problem(T=64, K=128, N=96, r=8, **dtypes)
    for m in measure(problem):
        assert m.ok, m

A `Problem` is one computation with its inputs and three ways to do it: the code under test, eager
PyTorch in the same dtypes, and the oracle in float64. `measure` runs all three and compares,
`failures` as much of them as a verdict takes. The rest of the package imports it where kernels are
checked or prove themselves (diagnostics/proof.py), and not before.
"""

from delora_kernels.testing.dropout import measure_dropout_mask
from delora_kernels.testing.errors import relative_error
from delora_kernels.testing.finite_differences import gradcheck
from delora_kernels.testing.methods.method import Method
from delora_kernels.testing.methods.table import METHODS
from delora_kernels.testing.ops.cases import OPS
from delora_kernels.testing.ops.problems import op_problems
from delora_kernels.testing.poison import uninitialised_is_nan
from delora_kernels.testing.problem import Measurement, Problem, failures, measure

__all__ = [
    "METHODS",
    "OPS",
    "Measurement",
    "Method",
    "Problem",
    "failures",
    "gradcheck",
    "measure",
    "measure_dropout_mask",
    "op_problems",
    "relative_error",
    "uninitialised_is_nan",
]
