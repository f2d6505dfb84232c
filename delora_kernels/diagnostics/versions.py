"""The versions of other software that this library is made for, and where an installed one lies
among them.

The table is the only place with these ranges; README, docs/versions.md and setup.py are tested
against it.
"""

import platform
import sys
from collections.abc import Mapping
from importlib import metadata
from typing import NamedTuple

from packaging.specifiers import SpecifierSet
from packaging.version import InvalidVersion, Version

TESTED = "tested"
NEWER = "newer than tested"
OLDER = "older than supported"
PRE_RELEASE = "an untested pre-release"
MISSING = "missing"


class Supported(NamedTuple):
    """The supported range of one piece of software.

    Args:
        name: As people write it.
        oldest: The oldest version that is supported; what setup.py asks for.
        newest: The newest version that the tests ran with; "3.13" stands for every 3.13.x.
        ran: The releases that the tests ran with; "2.13" stands for every 2.13.x.
        distributions: The names under which package indexes have it; none for Python itself.
    """

    name: str
    oldest: str
    newest: str
    ran: tuple[str, ...]
    distributions: tuple[str, ...] = ()


TABLE: Mapping[str, Supported] = {
    "python": Supported("Python", "3.10", "3.13", ("3.10", "3.11", "3.13")),
    "torch": Supported("PyTorch", "2.7", "2.15", ("2.7", "2.13", "2.15"), ("torch",)),
    "triton": Supported(
        "Triton",
        "3.3",
        "3.9",
        ("3.3", "3.7", "3.9"),
        ("triton", "pytorch-triton", "triton-windows", "pytorch-triton-rocm", "triton-rocm"),
    ),
    "peft": Supported("PEFT", "0.18", "0.21.2", ("0.18.0", "0.21.2"), ("peft",)),
    "transformers": Supported("Transformers", "4.56", "5.23", ("4.56", "5.23"), ("transformers",)),
}


def installed(name: str) -> str | None:
    """Return the version of the software `name`, a key of TABLE, or None; nothing is imported for
    it.

    What is imported already says it itself: it may come from a checkout that stands before the
    installed one.
    """
    if name == "python":
        return platform.python_version()
    version = getattr(sys.modules.get(name), "__version__", None)
    return version if isinstance(version, str) else version_of(*TABLE[name].distributions)


def version_of(*distributions: str) -> str | None:
    """Return the version of the first of these distributions that is installed, or None."""
    for distribution in distributions:
        try:
            return metadata.version(distribution)
        except metadata.PackageNotFoundError:
            continue
    return None


def status(name: str, version: str | None) -> str:
    """Where a version lies: TESTED, NEWER, OLDER, PRE_RELEASE or MISSING.

    Every release from the oldest supported to the newest tested one counts as tested.

    Args:
        name: A key of TABLE.
        version: As `installed` gives it; a local part such as "+cpu" is left out of account.
    """
    if version is None:
        return MISSING
    try:
        found = Version(version)
    except InvalidVersion:
        return PRE_RELEASE
    newest = Version(TABLE[name].newest)
    if found < Version(TABLE[name].oldest):
        return OLDER
    if found.release[: len(newest.release)] > newest.release:
        return NEWER
    return PRE_RELEASE if found.is_prerelease else TESTED


def describe(name: str, version: str | None) -> str:
    """Return the version and where it lies, as a report shows it: "0.25.0 (newer than the tested
    0.21.2)".
    """
    state = status(name, version)
    if state == TESTED and not any(SpecifierSet(f"=={ran}.*").contains(str(version), True) for ran in TABLE[name].ran):
        return f"{version} (supported, but the tests ran with {', '.join(TABLE[name].ran)})"
    return "not installed" if state == MISSING else f"{version} ({in_words(name, state)})"


def in_words(name: str, state: str) -> str:
    """Say where a version lies, with the bound that it passes: "newer than the tested 0.21.2".

    Args:
        name: A key of TABLE.
        state: What `status` gave.
    """
    bounds = {
        NEWER: f"newer than the tested {TABLE[name].newest}",
        OLDER: f"older than the supported {TABLE[name].oldest}",
    }
    return bounds.get(state, state)


def as_markdown() -> str:
    """Return the table as README.md and docs/versions.md show it."""
    rows = [f"| {row.name} | {row.oldest} | {row.newest} |" for row in TABLE.values()]
    return "\n".join(["| | oldest supported | newest tested |", "| --- | --- | --- |", *rows])
