"""One reason: its code, and what is said of it."""

from typing import NamedTuple


class Reason(NamedTuple):
    """One code.

    Args:
        code: The name, which never changes.
        when: What is so.
        do: What to do about it.
        texts: What is said of it.
    """

    code: str
    when: str
    do: str
    texts: tuple[str, ...]
