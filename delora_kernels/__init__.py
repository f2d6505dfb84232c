"""Fused low-rank adapters for PyTorch: LoRA, DoRA and DeLoRA at the speed and memory of the frozen model."""

from delora_kernels import functional
from delora_kernels.backends import use_backend

__all__ = ["functional", "use_backend"]
