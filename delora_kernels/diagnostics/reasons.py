"""The codes of the reasons that reports and logs give: a list that only grows.

A reason is a text for people, and its wording may change; what a program acts on is the code. The
list holds the texts as the code writes them, `{}` where something is put in; a text has the code of
the entry that spells out most of it.
"""

import re
from functools import cache

from delora_kernels.diagnostics.reasons_of_calls import OF_CALLS
from delora_kernels.diagnostics.reasons_of_layers import OF_LAYERS

OTHER = "other"
"""The code of a text that is not on the list: of a stored base's form of one's own."""


REASONS = (*OF_LAYERS, *OF_CALLS)
"""Every code; of the two lists none goes, and new ones go to their ends."""


@cache
def code_of(text: str) -> str:
    """Return the code of a reason's text, or OTHER."""
    known = [(literal, code) for pattern, literal, code in _patterns() if pattern.fullmatch(text)]
    return max(known, default=(0, OTHER))[1]


@cache
def _patterns() -> tuple[tuple[re.Pattern[str], int, str], ...]:
    """Each text as a pattern, how many characters of it stand still, and its code."""
    texts = [(text, reason.code) for reason in REASONS for text in reason.texts]
    return tuple(
        (re.compile(".*".join(map(re.escape, text.split("{}"))), re.DOTALL), len(text.replace("{}", "")), code)
        for text, code in texts
    )


def as_markdown() -> str:
    """Return the list as docs/reasons.md shows it."""
    rows = [f"| `{reason.code}` | {reason.when} | {reason.do} |" for reason in REASONS]
    return "\n".join(["| code | when | what to do |", "| --- | --- | --- |", *rows])
