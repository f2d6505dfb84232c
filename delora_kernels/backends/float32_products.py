"""Whether PyTorch lets float32 operands be multiplied as tf32, by either of the interfaces that it has for that."""

import torch


def allow_tf32() -> bool:
    """What `torch.backends.cuda.matmul.fp32_precision` says, or `torch.set_float32_matmul_precision`, its elder.

    From torch 2.9 on the elder one can't be asked once the new one was set.
    """
    try:
        return bool(torch.backends.cuda.matmul.fp32_precision == "tf32")
    except AttributeError:
        return torch.get_float32_matmul_precision() != "highest"
