"""What the papers claim, run again at a size that anyone can rerun: `python -m benchmarks.claims`.

rules.py has budgets, seeds, rates and the rule of the verdicts, fixed before the first run; a
claim is one file, which says which runs it wants of a record, and judges and draws them.
"""
