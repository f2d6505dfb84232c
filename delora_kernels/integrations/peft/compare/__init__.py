"""compare(): frozen, PEFT's own and fused passes of one's own model, side by side."""

from delora_kernels.integrations.peft.compare.comparison import Column, Comparison, Difference
from delora_kernels.integrations.peft.compare.run import compare

__all__ = ["Column", "Comparison", "Difference", "compare"]
