"""What training did to the weights: how far lengths and directions of their rows have moved.

changes.py     weight_changes, which walks a model
weights.py     W of any module as a matrix [N, K]
adapted.py     W' of a layer with adapters, made a few rows at a time
measure.py     ΔM, ΔD and norms of one pair W, W'
report.py      WeightChanges: rows, correlation, table, plot
"""

from delora_kernels.integrations.peft.changes.changes import weight_changes
from delora_kernels.integrations.peft.changes.report import LayerChange, WeightChanges

__all__ = ["LayerChange", "WeightChanges", "weight_changes"]
