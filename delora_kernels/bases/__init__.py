"""What a frozen base linear is: the one way to its weight, whatever form it is stored in; one file
a form.

A base has

    why_not(module)   why `of` can't read it, or None
    of(module)        the base inside a module
    dense(dtype)      W [N, K] in a dtype, for one pass, into memory that nobody keeps
    bias              [N] or None
    shape, device     (N, K), and where it lives
"""
