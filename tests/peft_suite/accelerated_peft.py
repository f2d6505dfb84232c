"""pytest plugin: PEFT's own tests with every adapter accelerated as soon as it is injected.
Outcomes must not change.

    git clone https://github.com/huggingface/peft && cd peft    # its tests import diffusers too
    export PYTHONPATH=src:HERE            # HERE: this folder
    suite="python -m pytest -o addopts= -p accelerated_peft tests/test_custom_models.py -k lora"
    $suite --outcomes plain.json
    $suite --outcomes fused.json --accelerate
    python HERE/accelerated_peft.py plain.json fused.json

The last line prints what differs, and how many layers and calls were fused; its exit status is 1 if
anything differs.
"""

import functools
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

counts: Counter[str] = Counter()
outcomes: dict[str, str] = {}


def pytest_addoption(parser: pytest.Parser) -> None:
    """The plugin's options."""
    parser.addoption("--accelerate", action="store_true", help="accelerate every adapter that is injected")
    parser.addoption("--outcomes", type=Path, required=True, help="write each test's outcome here, as JSON")


def pytest_configure(config: pytest.Config) -> None:
    """Wrap what get_peft_model, add_adapter, load_adapter and inject_adapter_in_model all reach."""
    import delora_kernels  # noqa: F401, so that both ways see the same imports

    if config.getoption("--accelerate"):
        _accelerate_what_is_injected()
        _count_fused_calls()


def _accelerate_what_is_injected() -> None:
    from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer

    import delora_kernels as dk

    inject = BaseTuner.inject_adapter

    @functools.wraps(inject)
    def injected_and_accelerated(self: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
        result = inject(self, model, *args, **kwargs)
        if any(isinstance(module, BaseTunerLayer) for module in model.modules()):
            report = dk.accelerate(model)
            counts.update({"layers fused": len(report.fused), "layers declined": len(report.declined)})
        return result

    BaseTuner.inject_adapter = injected_and_accelerated


def _count_fused_calls() -> None:
    from delora_kernels.autograd import function

    run = function.run

    def counted(kind: Any, call: Any, *rest: Any) -> Any:
        counts[f"calls of {call.options.method}"] += 1
        return run(kind, call, *rest)

    function.run = counted


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: Any) -> Any:
    """Note each test's outcome; errors of fixtures count too."""
    report = (yield).get_result()
    if report.when == "call" or report.outcome != "passed":
        expected = "x" if hasattr(report, "wasxfail") else ""
        outcomes[item.nodeid] = f"{expected}{report.outcome}" + ("" if report.when == "call" else f" in {report.when}")


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Write what was noted."""
    text = json.dumps({"outcomes": outcomes, "counts": counts}, indent=1)
    session.config.getoption("--outcomes").write_text(text, encoding="utf-8")


def main(plain: str, fused: str) -> int:
    """Compare two files of outcomes."""
    before, after = (json.loads(Path(file).read_text(encoding="utf-8")) for file in (plain, fused))
    names = sorted(before["outcomes"] | after["outcomes"])
    changed = [name for name in names if before["outcomes"].get(name) != after["outcomes"].get(name)]
    for name in changed:
        print(f"{before['outcomes'].get(name)} -> {after['outcomes'].get(name)}: {name}")
    print(f"{len(names)} tests, {dict(Counter(before['outcomes'].values()))}; {len(changed)} outcomes changed")
    print(", ".join(f"{count} {what}" for what, count in after["counts"].items()))
    return 1 if changed else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
