"""The autograd Functions, one a family: which ops run in which order, what is kept for backward,
every gradient.

function.py     what they share: how a call is run, autocast, dtypes of gradients, no second
                derivatives
replayed.py     whole calls whose passes are on tape
low_rank.py     LoRA, DoRA, DeLoRA
input_gradient.py  dx of one linear or of siblings, one dense W at a time
mixture.py      mixtures of experts, GOAT
reflection.py   ETHER, ETHER+
fold.py         DeLoRA's normalised factors by themselves
"""
