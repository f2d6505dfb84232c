"""docs/claims.md: the tables between its marks, and the figures, made of a record alone."""

import re
from collections.abc import Sequence
from pathlib import Path

from benchmarks.claims.claim import Claim
from benchmarks.claims.record import Record
from benchmarks.claims.rules import Rules
from benchmarks.claims.task import Problem


def table(claim: Claim, record: Record, rules: Rules) -> str:
    """Return one claim's table in Markdown."""
    rows = [f"| {' | '.join(line)} |" for line in claim.lines(record, rules)]
    head = ["| claim | paper | here, with its 95 % interval | at this size |", "| --- | --- | --- | --- |"]
    return "\n".join([*head, *rows])


def block(claim: Claim, record: Record, rules: Rules, figure: bool) -> str:
    """Return what stands between a claim's marks: its table, and its figure if there is one."""
    picture = f"\n\n![{claim.title}](claims/{claim.name}.png)" * figure
    return f"{_begin(claim)}\n{table(claim, record, rules)}{picture}\n{_END}"


def _begin(claim: Claim) -> str:
    return f"<!-- claim: {claim.name} -->"


_END = "<!-- end of claim -->"


def filled(text: str, claims: Sequence[Claim], record: Record, rules: Rules, folder: Path) -> str:
    """Return the page with each claim's block made anew.

    Args:
        text: the page.
        claims: whose marks it has; others are left alone.
        record, rules: what they are judged by.
        folder: where the figures lie.
    """
    for claim in claims:
        made = block(claim, record, rules, (folder / f"{claim.name}.png").exists())
        pattern = re.escape(_begin(claim)) + ".*?" + re.escape(_END)
        text = re.sub(pattern, lambda _, made=made: made, text, flags=re.DOTALL)  # type: ignore[misc]
    return text


def page_text(page: Path) -> str:
    """Return what stands in the page that is to be filled."""
    try:
        return page.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no text"
        raise Problem(f"--page {page} can't be read: {reason}") from None


def write(page: Path, claims: Sequence[Claim], record: Record, rules: Rules) -> None:
    """Draw the figures beside the page, and fill it."""
    text = page_text(page)
    folder = page.parent / "claims"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for claim in claims:
            if (figure := claim.draw(record, rules)) is not None:
                figure.savefig(folder / f"{claim.name}.png", dpi=110)
        page.write_text(filled(text, claims, record, rules, folder), encoding="utf-8")
    except OSError as error:
        raise Problem(f"--page {page} or its figures can't be written: {error.strerror}") from None
