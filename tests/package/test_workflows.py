"""Files that GitHub and pre-commit read: what they name exists, and a release keeps no secret."""

import re
from typing import Any

import pytest
from package_source import ROOT

from delora_kernels.diagnostics import versions

yaml = pytest.importorskip("yaml")

WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))
FORMS = sorted((ROOT / ".github/ISSUE_TEMPLATE").glob("[0-9]*.yml"))
pytestmark = pytest.mark.skipif(not WORKFLOWS, reason="the sdist has no .github")


def read(name: str) -> dict[str, Any]:
    """A workflow as GitHub reads it; YAML takes its key `on` for True."""
    found = yaml.safe_load((ROOT / ".github/workflows" / name).read_text(encoding="utf-8"))
    return {"on" if key is True else key: value for key, value in found.items()}


def steps(workflow: dict[str, Any]) -> list[dict[str, Any]]:
    return [step for job in workflow["jobs"].values() for step in job.get("steps", ())]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_what_a_workflow_names_exists(path: Any) -> None:
    """make's targets, this library's Pythons, other workflows; permissions are named, actions have
    a version.
    """
    workflow = read(path.name)
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))
    matrices = [job.get("strategy", {}).get("matrix", {}) for job in workflow["jobs"].values()]
    named = {target for matrix in matrices for target in matrix.get("target", ())}
    named |= {found for step in steps(workflow) for found in re.findall(r"make ([\w-]+)", step.get("run", ""))}
    assert named <= targets
    pythons = {python for matrix in matrices for python in matrix.get("python", ())}
    pythons |= {
        str(step["with"]["python-version"]) for step in steps(workflow) if "python-version" in step.get("with", {})
    }
    table = versions.TABLE["python"]
    ours = [f"3.{minor}" for minor in range(int(table.oldest[2:]), int(table.newest[2:]) + 1)]
    assert {python for python in pythons if "{{" not in python} <= set(ours)
    for job in workflow["jobs"].values():
        if "uses" in job:
            assert (ROOT / job["uses"]).exists()
    assert all("@" in step["uses"] for step in steps(workflow) if "uses" in step)


def test_ci_runs_on_every_push_what_ci_run_runs() -> None:
    """The parts of .ci/run, but for nvcc's, which no runner has."""
    local = set(re.findall(r"^make ([\w-]+)", (ROOT / ".ci/run").read_text(encoding="utf-8"), re.M))
    tests = read("tests.yml")
    remote = set(tests["jobs"]["part"]["strategy"]["matrix"]["target"]) | {"test", "docs"}
    assert remote == local
    assert any(step.get("run") == "make docs" for step in steps(read("docs.yml")))


def test_a_release_is_checked_and_keeps_no_secret() -> None:
    release = read("release.yml")
    assert release["on"] == {"push": {"tags": ["v*"]}}
    assert release["jobs"]["wheels"]["needs"] == "version"
    publish = release["jobs"]["publish"]
    assert (publish["needs"], publish["permissions"], publish["environment"]) == (
        "wheels",
        {"id-token": "write"},
        "pypi",
    )
    text = "".join(path.read_text(encoding="utf-8") for path in WORKFLOWS)
    assert "secrets." not in text
    assert "password" not in text
    line = (ROOT / "delora_kernels/version.py").read_text(encoding="utf-8")
    assert re.search(r'^__version__ = "[\d.]+"$', line, re.M), "as release.yml looks for it"


@pytest.mark.parametrize("path", FORMS, ids=lambda path: path.stem)
def test_issue_forms(path: Any) -> None:
    form = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert form["name"]
    assert form["description"]
    ids = [part["id"] for part in form["body"]]
    assert len(set(ids)) == len(ids)
    assert any(part.get("validations", {}).get("required") for part in form["body"])
    assert {part["type"] for part in form["body"]} <= {"textarea", "input", "dropdown", "markdown", "checkboxes"}


def test_pre_commit_runs_what_make_lint_runs() -> None:
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"][0]["hooks"]
    ran = {re.sub(r" --\S+", "", hook["entry"]) for hook in hooks}
    lint = re.search(r"^lint:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)
    assert lint is not None
    wanted = [line.strip().replace("$(PY)", ".venv/bin/python") for line in lint[1].splitlines()]
    assert ran == {re.sub(r" (--\S+|\.)(?= |$)", "", line) for line in wanted}
