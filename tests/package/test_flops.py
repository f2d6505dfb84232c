"""FLOP counters see what the fused ops compute: what PEFT's own layer computes, less what it computes in vain."""

import pytest
from fused_calls import both, leaves_of
from reference_calls import VARIANTS, Maker
from torch.utils.flop_counter import FlopCounterMode

from delora_kernels import flops

flops.register()
flops.register()

T, K, N, R = 12, 20, 16, 3


@pytest.mark.parametrize("dropout_seed", [None, 3])
@pytest.mark.parametrize("variant", VARIANTS)
def test_flops(variant: str, dropout_seed: int | None, seed: int) -> None:
    arguments = Maker(seed).arguments(variant, T, K, N, R)
    fused, _ = both(variant, arguments, dropout_seed)
    with FlopCounterMode(display=False) as counter:
        fused(**leaves_of(arguments, ("x", "A", "B"))).sum().backward()
    r = 2 * R + 1 if variant in ("delora_authors", "delora_paper") else R
    frozen = 2 if variant == "dora_peft" and dropout_seed is not None else 1
    forward = 2 * T * (frozen * N * K + r * K + r * N) + (2 * N * r * K if variant.startswith("dora") else 0)
    backward = 2 * T * (frozen * N * K + r * K + 2 * r * N + R * K)
    assert counter.get_total_flops() == forward + backward


def test_flops_of_a_trained_base(seed: int) -> None:
    arguments = Maker(seed).arguments("lora", T, K, N, R)
    fused, _ = both("lora", arguments, None)
    with FlopCounterMode(display=False) as counter:
        fused(**leaves_of(arguments, ("weight",))).sum().backward()
    assert counter.get_total_flops() == 2 * T * (2 * N * K + R * K + R * N)


def test_torch_counts_the_reference_alike(seed: int) -> None:
    """LoRA's fused count is torch's own count of the plain formula."""
    arguments = Maker(seed).arguments("lora", T, K, N, R)
    counts = []
    for function in both("lora", arguments, None):
        with FlopCounterMode(display=False) as counter:
            function(**leaves_of(arguments, ("x", "A", "B"))).sum().backward()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1]
    assert counts[0] > 0
