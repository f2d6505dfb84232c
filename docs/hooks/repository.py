"""Pages of the site that lie outside docs/: a Markdown file of the repository that a page links to
becomes a page, a source file its listing, a folder the list of its files, a record a download.

mkdocs checks links between pages alone, so with this every relative link of the documentation is
checked when the site is built strictly.
"""

import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[2]
FOLDER = "repository"
LINK = re.compile(r"(?P<open>\]\(|<img src=\")(?P<target>[^)\s\"#]+)(?P<anchor>#[^)\s\"]*)?(?=[)\s\"])")
FENCE = re.compile(r"^(```|~~~).*?^\1", re.M | re.S)
_LANGUAGES = {".py": "python", ".yml": "yaml", ".sh": "bash", ".cu": "cpp", ".h": "cpp", ".cff": "yaml"}
_AS_THEY_ARE = (".md", ".json", ".png", ".svg")
_HIDDEN = {"__pycache__", "hooks"}


ALWAYS = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "benchmarks/README.md")
"""In mkdocs.yml's navigation, whether a page links to them or not."""


def on_files(files: Files, config: Any) -> Files:
    """Add what pages link to, and what that links to."""
    waiting = [ROOT / name for name in ALWAYS]
    for file in files.documentation_pages():
        waiting += _linked(Path(file.abs_src_path or ""))
    done: set[Path] = set()
    while waiting:
        path = waiting.pop()
        if path in done or not path.exists():
            continue
        done.add(path)
        files.append(_added(path, config))
        if path.suffix == ".md":
            waiting += _linked(path)
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Point the links of a page at where the site has their targets."""
    here = _path_of(page.file.src_uri)
    if here.suffix != ".md":
        return markdown

    def moved(link: re.Match[str]) -> str:
        target = _target(here, link["target"])
        if target is None or not target.exists():
            return link[0]  # mkdocs says so
        uri = os.path.relpath(_uri_of(target), PurePosixPath(page.file.src_uri).parent)
        return link["open"] + uri + (link["anchor"] or "")

    return _outside_fences(markdown, moved)


def _linked(page: Path) -> Iterator[Path]:
    """Yield the files and folders outside docs/ that a page links to."""
    for link in LINK.finditer(FENCE.sub("", page.read_text(encoding="utf-8"))):
        target = _target(page, link["target"])
        if target is not None and not _in_docs(target):
            yield target


def _outside_fences(text: str, change: Callable[[re.Match[str]], str]) -> str:
    kept, parts = 0, []
    for fence in FENCE.finditer(text):
        parts += [LINK.sub(change, text[kept : fence.start()]), fence[0]]
        kept = fence.end()
    return "".join([*parts, LINK.sub(change, text[kept:])])


def _target(page: Path, link: str) -> Path | None:
    """Return what a link of a page means in the repository; None for one to somewhere else."""
    if "://" in link or link.startswith(("mailto:", "/")):
        return None
    path = Path(os.path.normpath(page.parent / link))
    return path if path.is_relative_to(ROOT) else None


def _in_docs(path: Path) -> bool:
    return path.is_relative_to(ROOT / "docs") and path.is_file()


def _path_of(uri: str) -> Path:
    """Return the file that a page of the site is made of."""
    return ROOT / uri.removeprefix(FOLDER + "/") if uri.startswith(FOLDER + "/") else ROOT / "docs" / uri


def _uri_of(path: Path) -> str:
    """Return where the site has a file, or a folder, of the repository."""
    if _in_docs(path):
        return path.relative_to(ROOT / "docs").as_posix()
    names = [name.lstrip(".") for name in path.relative_to(ROOT).parts]  # mkdocs leaves hidden ones out
    uri = "/".join([FOLDER, *names])
    if path.is_dir():
        return f"{uri}/README.md" if (path / "README.md").exists() else f"{uri}/files.md"
    return uri if path.suffix in _AS_THEY_ARE else f"{uri}.md"


def _added(path: Path, config: Any) -> File:
    uri = _uri_of(path)
    if uri.endswith("/README.md") and path.is_dir():
        path /= "README.md"
    if path.is_dir():
        return File.generated(config, uri, content=_folder(path))
    if path.suffix in _AS_THEY_ARE:
        return File.generated(config, uri, abs_src_path=str(path))
    return File.generated(config, uri, content=_listing(path))


def _listing(path: Path) -> str:
    name = path.relative_to(ROOT).as_posix()
    return f"# `{name}`\n\n````{_LANGUAGES.get(path.suffix, 'text')}\n{path.read_text(encoding='utf-8')}\n````\n"


def _folder(path: Path) -> str:
    inside = sorted(each.name + "/" * each.is_dir() for each in path.iterdir() if each.name not in _HIDDEN)
    lines = "\n".join(f"* `{name}`" for name in inside)
    return f"# `{path.relative_to(ROOT).as_posix()}/`\n\n{lines}\n"
