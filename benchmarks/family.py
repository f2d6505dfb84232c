"""The family of bounded adapters, rung by rung: LoRA → DeLoRA and ETHER+ → DeLoRA, each trained on
one task.

    python -m benchmarks.family [--steps 300]

A small network learns a task in full and is frozen. Then each rung of docs/family.md adapts it to a
second task, whose targets differ by a rotation of the input. The table shows the loss before and
after, the largest ‖ΔW‖_F of its three layers as a part of the bound which that rung keeps, and the
largest such part at any step.
"""

import argparse
import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from delora_kernels import functional as F
from delora_kernels.nn import DeLoRALinear, EtherLinear, EtherPlusLinear, LoRALinear

R = 8


class Multiplicative(nn.Module):
    """ΔW = (λ / r) Σ_i ± b̂_i â_iᵀ W: what lies between ETHER+ and DeLoRA, from `delora_factors`
    and `lora_linear`.

    Args:
        linear: The frozen layer, `[N, K]`.
        pairs: Pairs of terms, which cancel at the start.
        relaxed: b_i is a vector of its own; else it is a_i, as in ETHER+.
    """

    sign: Tensor

    def __init__(self, linear: nn.Linear, pairs: int, relaxed: bool) -> None:
        super().__init__()
        self.linear = linear
        start = torch.randn(pairs, linear.out_features)
        self.A = nn.Parameter(torch.cat([start, start]))
        self.B = nn.Parameter(torch.randn(pairs, linear.out_features).repeat(2, 1)) if relaxed else None
        self.lam = nn.Parameter(torch.full((), 2.0 if pairs == 1 else 1.0))
        self.register_buffer("sign", torch.tensor([1.0, -1.0]).repeat_interleave(pairs))

    def forward(self, x: Tensor) -> Tensor:
        """x (W + ΔW)ᵀ + bias."""
        left = self.A if self.B is None else self.B
        A, B = F.delora_factors(self.A, (left * self.sign[:, None]).T, self.lam, 1.0)  # unit vectors, times λ / r
        return F.lora_linear(x, self.linear.weight, A @ self.linear.weight, B, bias=self.linear.bias)


def scaled_by_one(linear: nn.Linear) -> nn.Module:
    """DeLoRA before its weight-norm scaling: n = 1."""
    module = DeLoRALinear.from_linear(linear, r=R, lam=4.0, weight_norm="frobenius")
    module.weight_norm.fill_(1.0)
    return module


@functools.cache
def spectral(linear: nn.Linear) -> float:
    """‖W‖₂, by which a product with the frozen W can stretch a norm."""
    return float(torch.linalg.matrix_norm(linear.weight, 2))


class Rung(NamedTuple):
    """One method: how it is made of a frozen layer, and the bound of ‖ΔW‖_F, from its module and
    the layer.

    In `formula` λ stands for its absolute value.
    """

    name: str
    make: Callable[[nn.Linear], nn.Module]
    bound: Callable[[nn.Module, nn.Linear], float]
    formula: str


def _lam(module: nn.Module) -> float:
    return abs(module.lam.item())  # type: ignore[operator]


RUNGS = (
    Rung("LoRA", lambda w: LoRALinear.from_linear(w, R), lambda m, w: math.inf, "none"),
    Rung("+ normalisation and bound", scaled_by_one, lambda m, w: _lam(m), "λ"),
    Rung(
        "+ weight-norm scaling = DeLoRA",
        lambda w: DeLoRALinear.from_linear(w, r=R, lam=0.5, weight_norm="frobenius"),
        lambda m, w: _lam(m) * float(w.weight.norm()),
        "λ ‖W‖_F",
    ),
    Rung("ETHER", lambda w: EtherLinear.from_linear(w, side="output"), lambda m, w: 2 * spectral(w), "2 ‖W‖₂"),
    Rung(
        "ETHER+",
        lambda w: EtherPlusLinear.from_linear(w, side="output"),
        lambda m, w: math.sqrt(2) * spectral(w),
        "√2 ‖W‖₂",
    ),
    Rung(
        "+ controllable scale",
        lambda w: Multiplicative(w, 1, relaxed=False),
        lambda m, w: _lam(m) / math.sqrt(2) * spectral(w),
        "λ ‖W‖₂ / √2",
    ),
    Rung(
        "+ rank",
        lambda w: Multiplicative(w, R // 2, relaxed=False),
        lambda m, w: _lam(m) * spectral(w),
        "λ ‖W‖₂",
    ),
    Rung(
        "+ relaxed vectors",
        lambda w: Multiplicative(w, R // 2, relaxed=True),
        lambda m, w: _lam(m) * spectral(w),
        "λ ‖W‖₂",
    ),
    Rung(
        "+ additive = DeLoRA",
        lambda w: DeLoRALinear.from_linear(w, r=R, lam=0.5, weight_norm="frobenius", start="frozen_paper"),
        lambda m, w: (_lam(m) + float(m.frozen_lam)) * float(w.weight.norm()),  # type: ignore[arg-type]
        "(λ + λ₀) ‖W‖_F",
    ),
)


def network() -> nn.Sequential:
    """Three linears: 16 → 64 → 64 → 4."""
    return nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 4))


def loss_of(model: nn.Module, x: Tensor, target: Tensor) -> Tensor:
    """Return the mean squared error."""
    return nn.functional.mse_loss(model(x), target)


@torch.no_grad()
def parts_of_bounds(rung: Rung, adapted: nn.Sequential, frozen: nn.Sequential) -> list[float]:
    """‖ΔW‖_F of every layer over its bound; ΔW is what the layer does to an identity matrix."""
    parts = []
    for module, linear in zip(adapted, frozen, strict=True):
        if isinstance(linear, nn.Linear):
            eye = torch.eye(linear.in_features)
            parts.append(float((module(eye) - linear(eye)).norm()) / rung.bound(module, linear))
    return parts


def train(model: nn.Module, x: Tensor, target: Tensor, steps: int, after: Callable[[], None] = lambda: None) -> None:
    """Full-batch Adam on what asks for gradients; `after` every step."""
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        loss_of(model, x, target).backward()
        optimizer.step()
        after()


class Task(NamedTuple):
    """A network that has learned one task, and the data of another: x, and what is wanted of it."""

    frozen: nn.Sequential
    x: Tensor
    target: Tensor


def task(steps: int) -> Task:
    """Return the first task learned in `steps` steps; in the second a rotation of the input."""
    teacher, x = network(), torch.randn(512, 16)
    rotation = torch.linalg.qr(torch.randn(16, 16)).Q
    with torch.no_grad():
        first, second = 10 * teacher(x), 10 * teacher(x @ rotation)
    frozen = network()
    train(frozen, x, first, steps)
    return Task(frozen.requires_grad_(False), x, second)


class Outcome(NamedTuple):
    """What became of a rung: its losses, and ‖ΔW‖_F over the bound, the largest layer's at the end
    and at any step.
    """

    start: float
    loss: float
    part: float
    most: float
    numbers: int


def climb(rung: Rung, given: Task, steps: int) -> Outcome:
    """Adapt a copy of the frozen network by one rung."""
    frozen, x, target = given
    adapted = nn.Sequential(*(rung.make(m) if isinstance(m, nn.Linear) else m for m in frozen))
    start, seen = loss_of(adapted, x, target).item(), parts_of_bounds(rung, adapted, frozen)
    train(adapted, x, target, steps, lambda: seen.extend(parts_of_bounds(rung, adapted, frozen)))
    numbers = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    part = max(parts_of_bounds(rung, adapted, frozen))
    return Outcome(start, loss_of(adapted, x, target).item(), part, max(seen), numbers)


def main() -> None:
    """Train the network, then every rung; print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300, help="of each rung [%(default)s]")
    options = parser.parse_args()
    torch.manual_seed(0)
    given = task(300)
    print(f"second task, not adapted: loss {loss_of(*given).item():.4f}\n")
    print("| rung | bound of ‖ΔW‖_F | numbers trained | loss, start | loss, end | ‖ΔW‖_F / bound | most at any step |")
    print("| --- | --- | ---: | ---: | ---: | ---: | ---: |")
    for rung in tqdm(RUNGS, leave=False, disable=None):
        torch.manual_seed(0)
        found = climb(rung, given, options.steps)
        parts = ("", "") if rung.formula == "none" else (f"{found.part:.2f}", f"{found.most:.2f}")
        cells = (rung.name, rung.formula, found.numbers, f"{found.start:.3f}", f"{found.loss:.3f}", *parts)
        tqdm.write(f"| {' | '.join(map(str, cells))} |")


if __name__ == "__main__":
    main()
