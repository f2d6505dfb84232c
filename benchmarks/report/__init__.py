"""Records shown to people: Markdown tables, plots, the comparison of two records, and README's
figures.
"""
