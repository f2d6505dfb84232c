"""Docstrings that describe several arguments in one line, as those of this library do, taken apart
for the API pages: `A, B: As in lora_linear.` becomes an entry for A and one for B.
"""

import re
from typing import Any

from griffe import Extension

_NAME = r"\*{0,2}[A-Za-z_]\w*"
_GROUP = re.compile(
    rf"^(?P<indent> {{4,8}})(?P<names>{_NAME}(?:,\s+{_NAME})+):(?P<text> .*(?:\n(?P=indent) .*)*)", re.M
)


class GroupedArguments(Extension):
    """Rewrites docstrings before they are read."""

    def on_function(self, *, func: Any, **_: Any) -> None:
        """Take a function's apart."""
        _take_apart(func)

    def on_class(self, *, cls: Any, **_: Any) -> None:
        """Take a class's apart."""
        _take_apart(cls)


def _take_apart(found: Any) -> None:
    if found.docstring is not None:
        found.docstring.value = _GROUP.sub(_entries, found.docstring.value)


def _entries(group: re.Match[str]) -> str:
    names = re.split(r",\s+", group["names"])
    return "\n".join(f"{group['indent']}{name}:{group['text']}" for name in names)
