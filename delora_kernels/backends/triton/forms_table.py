"""Forms by device, as `python -m benchmarks.tune` timed them: not written by hand."""

import torch

FORMS: dict[tuple[tuple[int, int], torch.dtype, str], dict[str, str]] = {}
