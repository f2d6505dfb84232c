"""Tile sizes and forms by device, as `python -m benchmarks.tune` timed them: not written by hand.

`tables.py` says what the keys and entries of TILES are, `forms.py` those of FORMS.
"""

import torch

TILES: dict[tuple[tuple[int, int], str], dict[str, tuple[int, ...]]] = {}

FORMS: dict[tuple[tuple[int, int], torch.dtype, str], dict[str, str]] = {}
