"""Docstrings as the API pages show them. `A, B: As in lora_linear.` describes several arguments in
one line, and becomes an entry for A and one for B; what a `**options` takes is shown by itself, for
the signature has no default of it.
"""

import re
from typing import Any

from griffe import Extension, ParameterKind

_NAME = r"\*{0,2}[A-Za-z_]\w*"
_ENTRY = rf"^    (?P<names>{_NAME}(?:,\s+{_NAME})*):(?P<text> .*(?:\n     .*|\n(?=\n     ))*)"
_RAISES = re.compile(r"^Raises:\n(?:    .*\n?|\n(?=    ))+", re.M)
_ARGUMENTS = re.compile(r"^Args:\n(?P<entries>(?:    .*\n?|\n(?=    ))+)", re.M)


class GroupedArguments(Extension):
    """Rewrites docstrings before they are read."""

    def on_function(self, *, func: Any, **_: Any) -> None:
        """Take a function's apart."""
        _take_apart(func)

    def on_class(self, *, cls: Any, **_: Any) -> None:
        """Take a class's apart."""
        _take_apart(cls)


def _take_apart(found: Any) -> None:
    if found.docstring is None:
        return
    takes_options = any(each.kind is ParameterKind.var_keyword for each in found.parameters)
    known = {each.name for each in found.parameters} if takes_options else None

    def section(arguments: re.Match[str]) -> str:
        own, options = "", ""
        for entry in re.finditer(_ENTRY, arguments["entries"], re.M):
            for name in re.split(r",\s+", entry["names"]):
                line = f"    {name}:{entry['text']}\n"
                if known is None or name.lstrip("*") in known:
                    own += line
                else:
                    options += line
        return (own and f"Args:\n{own}\n") + (options and f"Other Parameters:\n{options}\n")

    text = _ARGUMENTS.sub(section, found.docstring.value)
    found.docstring.value = _RAISES.sub(lambda raises: re.sub(_ENTRY, _apart, raises[0], flags=re.M), text)


def _apart(entry: re.Match[str]) -> str:
    return "\n".join(f"    {name}:{entry['text'].rstrip()}" for name in re.split(r",\s+", entry["names"])) + "\n"
