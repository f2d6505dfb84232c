"""The U-Net of `python -m benchmarks.diffusion`: PEFT's numbers, fewer bytes."""

import pytest

pytest.importorskip("diffusers", reason="diffusers is not installed (make test-diffusers)")

from benchmarks import diffusion
from benchmarks.memory import kept_bytes


def test_unet() -> None:
    case = diffusion.unet_case("dora", 2, "cpu", widths=(16, 32), side=8)
    y = {name: case.call(module) for name, module in case.modules.items()}
    assert (y["dk"] - y["peft"]).abs().max() <= 1e-4 * y["peft"].abs().max()
    kept = {
        name: kept_bytes(lambda module=module: case.call(module), [*case.inputs, *module.parameters()])
        for name, module in case.modules.items()
    }
    assert kept["frozen"] < kept["dk"] < kept["peft"]
