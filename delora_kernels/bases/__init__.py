"""What a frozen base linear is: the one way to its weight, whatever form it is stored in; one file
a form.

A base has

    why_not(module)   why `of` can't read it, or None
    of(module)        the base inside a module
    dense(dtype)      W [N, K] in a dtype, for one pass, into memory that nobody keeps
    weight            what a call takes as its weight: the tensor, or the stored base itself
    bias              [N] or None
    shape, device     (N, K), and where it lives

    plain.py               a dense tensor
    stored.py              what every other form has, and the list of forms
    read.py                the base inside any module
    numeric_check.py       whether a module's own forward is x Wᵀ + bias of the W that a form reads
    bitsandbytes_4bit.py   bitsandbytes' nf4 and fp4
    hqq_linear.py          HQQ
    gptqmodel_linear.py    GPTQModel's torch kernel
    torchao_weight.py      torchao's weight-only tensors
    packed_experts.py      bitsandbytes' 4-bit blocks for the 3-D weights of expert models
"""

from delora_kernels.bases.stored import StoredBase, register

__all__ = ["StoredBase", "register"]
