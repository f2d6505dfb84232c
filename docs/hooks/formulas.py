"""Formulas of the pages as MathML, made when the site is built: nothing is loaded from elsewhere,
and no script runs to show them.
"""

import html
import re
from typing import Any

from latex2mathml.converter import convert

_FORMULA = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.S)
_KNOWN = {"{aligned}": "{align*}", r"\top": r"\mathsf{T}"}
"""What the converter does not know or browsers set badly → the same in other words."""


def on_page_content(content: str, page: Any, **_: Any) -> str:
    """Replace each formula of a page's HTML."""

    def formula(found: re.Match[str]) -> str:
        latex = html.unescape(found[3]).strip()
        for word, known in _KNOWN.items():
            latex = latex.replace(word, known)
        try:
            return convert(latex, display="block" if found[2] == "[" else "inline")
        except Exception as error:  # the converter's own errors have no common class
            raise ValueError(f"{page.file.src_uri}: a formula that can't be shown, {latex!r}: {error!r}") from error

    return _FORMULA.sub(formula, content)
