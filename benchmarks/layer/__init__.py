"""One adapted linear layer: the methods, their implementations on the same tensors, the gate, the
measurement.
"""
