"""Every op of ops.py as random problems.

formulas.py   each op by its formula alone: the oracle
cases.py      random arguments, each variant that autograd/ asks for
problems.py   the two put together, for `measure`
"""
