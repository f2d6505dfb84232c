"""Which form a frozen GEMM with a rank-R term takes, per device and class of shapes.

(b) UPDATE: library GEMM, then one pass over its output. (d) PREFILL: one pass writes the term, the
    GEMM adds to it.
(c) OWN: our GEMM, with the term in its epilogue. What each moves and costs is in docs/kernels.md.
"""

import torch
from torch import Tensor

from delora_kernels.backends.triton import tuned

UPDATE, PREFILL, OWN = "b", "d", "c"

FORMS = tuned.FORMS
"""(device capability, dtype, "expand" or "dx") → shape class → form, as `benchmarks.tune` timed it;
else DEFAULT.
"""

DEFAULT = PREFILL
"""By the cost model the cheapest with a library GEMM: the GEMM's read of its output hides under its
arithmetic.
"""

_capabilities: dict[torch.device, tuple[int, int]] = {}


def capability(device: torch.device) -> tuple[int, int]:
    """Return the compute capability of a GPU, asked for once; (0, 0) for the CPU of the
    interpreter.
    """
    if device not in _capabilities:
        _capabilities[device] = torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)
    return _capabilities[device]


def shape_class(T: int, columns: int, inner: int) -> str:
    """Few or many tokens, a narrow or wide output, a short or long sum: coarse, so that it does not
    follow T.
    """
    tokens = "few" if T < 2048 else "many"
    return f"{tokens} {'narrow' if columns < 4096 else 'wide'} {'short' if inner < 8192 else 'long'}"


def choose(op: str, left: Tensor, columns: int, inner: int) -> str:
    """Return the form for a product [T, inner] · [inner, columns].

    Args:
        op: "expand" or "dx".
        left: The token-sized operand: x or dy.
        columns: Of the output.
        inner: What the product sums over.
    """
    if not FORMS:
        return DEFAULT
    forms = FORMS.get((capability(left.device), left.dtype, op))
    return DEFAULT if forms is None else forms.get(shape_class(left.shape[0], columns, inner), DEFAULT)
