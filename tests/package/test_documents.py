"""What pages say, held to the code. README and the recipes: every block of Python runs, every
command is one, and the output that is shown is what is printed; docs/differences.md: the tests and
the switches that it names exist; docs/api: every public name has its place.
"""

import ast
import contextlib
import gc
import importlib.util
import inspect
import io
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from pages import ROOT, Block, blocks, run, small_models

import delora_kernels
from delora_kernels import __main__ as command_line

pytest.importorskip("peft")
pytest.importorskip("transformers")

RECIPES = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs/recipes").glob("*.md"))
PAGES = ["README.md", *RECIPES]
LIBRARIES = {"docs/recipes/trl.md": ("trl", "datasets"), "docs/recipes/trainer.md": ("accelerate",)}


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty folder, no network, one thread."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def python_blocks(page: str) -> list[Block]:
    return [block for block in blocks(page) if block.language == "python"]


@pytest.mark.usefixtures("elsewhere")
def test_readme_runs_and_prints_what_it_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first block on a model with SmolLM2-135M's layers and names, narrow; the second one,
    which measures, on two of its layers.
    """
    first, second = python_blocks("README.md")
    small_models(monkeypatch, num_hidden_layers=30)
    names: dict[str, Any] = {}
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        run("README.md", first, names)
    (shown,) = (block.text for block in blocks("README.md") if block.language == "text")
    assert printed.getvalue() == shown
    small_models(monkeypatch)
    run("README.md", first._replace(text=first.text.replace("bfloat16", "float32")), names)
    with contextlib.redirect_stdout(printed):
        run("README.md", second, names)
    assert re.search(r"^delora-kernels +\d", printed.getvalue(), re.M)


def test_readme_is_short() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 130
    assert "not measured" in text
    assert (
        text.index("```python")
        < text.index("make demo")
        < text.index("| you train |")
        < text.index("**It won't help**")
    )


@pytest.mark.usefixtures("elsewhere")
@pytest.mark.parametrize("page", [page for page in RECIPES if python_blocks(page)])
def test_recipes_run(page: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every block, in the order of the page and in one namespace."""
    for library in LIBRARIES.get(page, ()):
        pytest.importorskip(library)
    small_models(monkeypatch)
    torch.manual_seed(0)
    names: dict[str, Any] = {}
    ran = 0
    for block in python_blocks(page):
        if block.needs:
            pytest.importorskip(*block.needs.split())
        if block.not_run is None:
            run(page, block, names)
            ran += 1
    assert ran or page == "docs/recipes/qlora.md"
    names.clear()
    gc.collect()


def test_what_is_not_run_compiles_and_says_why() -> None:
    left_out = {page: [block for block in python_blocks(page) if block.not_run] for page in PAGES}
    assert {page for page, found in left_out.items() if found} == {
        f"docs/recipes/{name}.md" for name in ("qlora", "liger-unsloth", "diffusers-vit")
    }
    for page, found in left_out.items():
        for block in found:
            compile(block.text, f"{page}:{block.line}", "exec")


@pytest.mark.parametrize("page", [*PAGES, "docs/using.md", "docs/api/command-line.md", "docs/install.md"])
def test_commands_are_commands(page: str) -> None:
    """make's targets, modules of the repository, and the options of this library's command line."""
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)
    found = 0
    for block in blocks(page):
        for line in block.text.splitlines() if block.language == "bash" else ():
            for command in line.partition("#")[0].split("&&"):
                words = shlex.split(command)
                if words[:1] == ["make"]:
                    assert words[1] in targets, line
                elif words[:2] == ["python", "-m"] and words[2] == "delora_kernels":
                    command_line._parser().parse_args(words[3:])
                elif words[:2] == ["python", "-m"]:
                    assert importlib.util.find_spec(words[2]) is not None, line
                else:
                    continue
                found += 1
    assert found or page in RECIPES


def rows_of_differences() -> list[list[str]]:
    """The cells of the tables of docs/differences.md."""
    lines = (ROOT / "docs/differences.md").read_text(encoding="utf-8").splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| ")]
    return [row for row in rows if row[0] not in ("what", "---")]


def test_differences_are_whole() -> None:
    rows = rows_of_differences()
    assert len(rows) > 25
    assert {len(row) for row in rows} == {5}
    assert len({row[0] for row in rows}) == len(rows)
    untested = [row[0] for row in rows if "::" not in row[3]]
    assert untested == ["few tokens a step, small layers; generating token by token"]


@pytest.mark.parametrize("named", sorted({row[3].strip("`") for row in rows_of_differences() if "::" in row[3]}))
def test_a_difference_has_its_test(named: str) -> None:
    file, _, name = named.partition("::")
    defined = {node.name for node in ast.parse((ROOT / file).read_text(encoding="utf-8")).body if hasattr(node, "name")}
    assert name in defined


@pytest.mark.parametrize("switch", sorted({row[4].strip("`") for row in rows_of_differences() if row[4]}))
def test_a_difference_has_its_switch(switch: str) -> None:
    """A call of a public name with arguments that it takes, or a variable that the package
    reads.
    """
    variable = re.fullmatch(r"(DELORA_KERNELS_\w+)=(\w+)", switch)
    if variable:
        sources = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "delora_kernels").rglob("*.py"))
        assert f'"{variable[1]}"' in sources
        return
    call = ast.parse(switch, mode="eval").body
    assert isinstance(call, ast.Call)
    path = ast.unparse(call.func).split(".")
    assert path[0] == "dk"
    found: Any = delora_kernels
    for name in path[1:]:
        found = getattr(found, name)
    signature = inspect.signature(found)
    signature.bind(*call.args, **{str(keyword.arg): None for keyword in call.keywords})


def test_every_public_name_is_on_a_page_of_the_api() -> None:
    modules = ("delora_kernels", *(f"delora_kernels.{name}" for name in ("functional", "nn", "bases", "reference")))
    shown = {
        name for path in (ROOT / "docs/api").glob("*.md") for name in re.findall(r"^::: (\S+)", path.read_text(), re.M)
    }
    public = {f"{module}.{name}" for module in modules for name in importlib.import_module(module).__all__}
    pages = {*modules, "delora_kernels.__version__", "delora_kernels.flops"}  # a page each, a string, its one function
    assert shown == public - pages | {"delora_kernels.flops.register"}
