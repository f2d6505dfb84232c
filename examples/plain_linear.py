"""Adapt your own model of nn.Linear layers without PEFT: DeLoRA modules, a learning rate for λ,
training, merging.

    python examples/plain_linear.py

A small network learns one task in full. Then it is frozen, and DeLoRA modules in the place of its
linears learn a second task, whose targets differ by a rotation of the input. At the end the
adapters are merged into the weights.
"""

import torch
from torch import Tensor, nn

from delora_kernels.nn import AdapterLinear, DeLoRALinear, lambda_parameter_groups

STEPS = 200


def network() -> nn.Sequential:
    """Three linears: 16 → 64 → 64 → 4."""
    return nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 4))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, target: Tensor) -> None:
    """Plain full-batch training: the adapters need nothing of their own."""
    for _ in range(STEPS):
        nn.functional.mse_loss(model(x), target).backward()
        optimizer.step()
        optimizer.zero_grad()


def add_adapters(model: nn.Module, r: int) -> None:
    """Freeze `model` and put a DeLoRALinear around the weight of each of its linears."""
    model.requires_grad_(False)
    for name, child in list(model.named_children()):
        if isinstance(child, nn.Linear):
            # "frozen_live" is the authors' start; "zero" is PEFT's, "frozen_paper" the paper's
            setattr(model, name, DeLoRALinear.from_linear(child, r=r, lam=4.0, start="frozen_live"))
        else:
            add_adapters(child, r)


@torch.no_grad()
def loss(model: nn.Module, x: Tensor, target: Tensor) -> float:
    """Return the mean squared error."""
    return nn.functional.mse_loss(model(x), target).item()


def main() -> None:
    """Learn, adapt, merge; print the errors."""
    torch.manual_seed(0)
    teacher, x = network(), torch.randn(512, 16)
    rotation = torch.linalg.qr(torch.randn(16, 16)).Q
    with torch.no_grad():
        first, second = 10 * teacher(x), 10 * teacher(x @ rotation)

    model = network()
    train(model, torch.optim.AdamW(model.parameters(), lr=3e-3), x, first)
    print(f"first task, all weights trained: loss {loss(model, x, first):.4f}")

    print(f"second task, before adapting: loss {loss(model, x, second):.4f}")
    add_adapters(model, r=8)
    # λ is one number a layer and wants a learning rate of its own
    groups = lambda_parameter_groups(model, lr=1e-2, lam_lr=5e-2)
    count = sum(parameter.numel() for group in groups for parameter in group["params"])
    train(model, torch.optim.AdamW(groups), x, second)
    print(f"second task, {count} adapter parameters trained: loss {loss(model, x, second):.4f}")
    adapters = [module for module in model.modules() if isinstance(module, AdapterLinear)]
    print("lambda of each layer:", ", ".join(f"{module.lam.item():.2f}" for module in adapters))

    with torch.no_grad():
        before = model(x)
        for module in adapters:
            module.merge()  # in place; unmerge() brings the weight back, bit for bit
        difference = ((model(x) - before).abs().max() / before.abs().max()).item()
        print(f"merged, largest relative difference: {difference:.1e}")
        for module in adapters:
            module.unmerge()
        print(f"unmerged, the same bits: {torch.equal(model(x), before)}")


if __name__ == "__main__":
    main()
