"""Which dtype sums have, and whether float32 operands may be multiplied as tf32."""

import torch


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of sums, norms and small gradients for tensors of `dtype`: float64 for
    float64, else float32.
    """
    return torch.float64 if dtype == torch.float64 else torch.float32


def allow_tf32() -> bool:
    """Return what `torch.backends.cuda.matmul.fp32_precision` says, or
    `torch.set_float32_matmul_precision`, its elder.

    From torch 2.9 on the elder one can't be asked once the new one was set.
    """
    try:
        return bool(torch.backends.cuda.matmul.fp32_precision == "tf32")
    except AttributeError:
        return torch.get_float32_matmul_precision() != "highest"
