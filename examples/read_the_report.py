"""Read what accelerate() did: which layers run fused, which do not and why, now and when a call
changes it.

    python examples/read_the_report.py

The model has layers of each kind: fused; of a kind that is not fused, DoRA on a convolution with
groups; with a hook.
"""

import logging
import sys

import peft
import torch
from torch import nn

import delora_kernels as dk


class Model(nn.Module):
    """Token table, a convolution over neighbours, two linears, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(50, 16)
        self.mix = nn.Conv1d(16, 16, 3, padding=1, groups=2)
        self.up = nn.Linear(16, 32)
        self.down = nn.Linear(32, 16)
        self.head = nn.Linear(16, 50)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Logits `[B, T, 50]` of token ids `[B, T]`."""
        mixed = self.mix(self.table(ids).mT).mT
        logits: torch.Tensor = self.head(self.down(self.up(mixed).relu()))
        return logits


def main() -> None:
    """Print the report in its three forms, then what a call says."""
    # what is decided at a call is logged: once for each reason, by the logger delora_kernels and
    # those below it
    logging.basicConfig(stream=sys.stdout, format="log %(levelname)s %(name)s: %(message)s")
    torch.manual_seed(0)
    targets = ["mix", "up", "down", "head"]
    model = peft.get_peft_model(Model(), peft.LoraConfig(r=4, target_modules=targets, use_dora=True))
    down = model.base_model.model.down
    handle = down.base_layer.register_forward_hook(lambda *_: None)

    print("== strict=True raises, before anything is changed, unless every layer can be fused")
    try:
        dk.accelerate(model, strict=True)
    except RuntimeError as error:
        print(error)

    print("\n== as text")
    report = dk.accelerate(model)
    print(report)

    print("\n== as data")
    for layer in report.layers:
        print(f"{layer.name}: {layer.method}, {'fused' if layer.fused else layer.reason}")

    print("\n== nothing is fixed for good: the hook is gone, so the layer is fused from its next call on")
    handle.remove()
    print(dk.accelerate(model))

    print("\n== what runs PEFT's own forward is logged, once for each reason: also a layer that a call finds changed")
    ids = torch.randint(50, (2, 8))
    before = model(ids)
    down.lora_B["default"].register_forward_hook(lambda module, args, output: output)  # harmless, but who knows
    after = model(ids)
    model(ids)
    print(f"the result is the same: largest difference {(after - before).abs().max().item():.1e}")

    print("\n== which backend a call takes")
    layer = model.base_model.model.up
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    print(dk.explain(dk.functional.lora_linear, torch.randn(8, 16), layer.base_layer.weight, A, B))

    print(f"\nrestored {dk.restore(model)} layers")


if __name__ == "__main__":
    main()
