"""What `make test` does with its variables."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(shutil.which("make") is None, reason="there is no make")
def test_a_method_is_never_lost_behind_a_k_of_the_callers() -> None:
    def says(*arguments: str) -> str:
        done = subprocess.run(["make", "-n", "test", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
        return done.stderr if done.returncode else done.stdout

    assert "-k 'dora' tests/nn" in says("METHOD=dora", "ARGS=tests/nn")
    assert "tests/nn -k merge" in says("ARGS=tests/nn -k merge")
    for k in ("-k merge", "-kmerge"):
        assert 'write METHOD="dora and ..."' in says("METHOD=dora", f"ARGS=tests/nn {k}")
