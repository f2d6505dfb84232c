"""Tile sizes by device, as `python -m benchmarks.tune` timed them: not written by hand."""

TILES: dict[tuple[tuple[int, int], str], dict[str, tuple[int, ...]]] = {}
