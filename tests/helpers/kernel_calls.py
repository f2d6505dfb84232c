"""What a backend's kernels are asked in each of their surroundings: the dtypes of base and
adapters, no tokens.
"""

import torch

from delora_kernels import functional as F
from delora_kernels import use_backend

DTYPES = {
    "float32": (torch.float32, None),
    "float16": (torch.float16, None),
    "bfloat16": (torch.bfloat16, None),
    "bfloat16+float32": (torch.bfloat16, torch.float32),
    "float16+float32": (torch.float16, torch.float32),
}
"""Name → the dtype of the base, and that of the adapters where it differs."""


def check_no_tokens(backend: str) -> None:
    """A call without tokens gives no outputs, and gradients of zero."""
    tensors = {"x": torch.zeros(0, 6), "weight": torch.zeros(5, 6), "A": torch.zeros(2, 6), "B": torch.zeros(5, 2)}
    leaves = {name: value.requires_grad_() for name, value in tensors.items()}
    with use_backend(backend):
        y = F.lora_linear(**leaves)
        y.sum().backward()
    assert y.shape == (0, 5)
    assert all(torch.equal(value.grad, torch.zeros_like(value)) for value in leaves.values())
