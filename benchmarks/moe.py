"""One mixture of LoRA experts on this machine's CPU: ours, our plain LoRA of its whole rank, and rivals.

    python -m benchmarks.moe [-T 1024] [-K 2048] [-N 2048] [-E 8] [-r 4] [-k 2] [--rounds 30]

Medians of interleaved forward and backward passes in float32, dx included, and the bytes kept for backward.
"""

import argparse
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from benchmarks.goat_loop import goat_loop
from benchmarks.machine import machine_info
from benchmarks.memory import MIB, kept_bytes
from benchmarks.timing import Budget, CpuClock, interleaved
from delora_kernels import functional as F

SCALE = 2.0


def forwards(options: Any) -> tuple[dict[str, Callable[[], Tensor]], list[Tensor], Tensor]:
    """impl → forward pass, the tensors that get gradients, and the frozen weight."""
    T, K, N, E, r, k = (getattr(options, name) for name in "TKNErk")
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).div_(K**0.5)

    weight = normal(N, K)
    x = (normal(T, K) * K**0.5).requires_grad_()
    A, B, router = (tensor.requires_grad_() for tensor in (normal(E, r, K), normal(E, N, r), normal(E, K)))
    A_list = [tensor.detach().clone().requires_grad_() for tensor in A]
    B_list = [tensor.detach().clone().requires_grad_() for tensor in B]
    A_flat = A.detach().flatten(0, 1).clone().requires_grad_()
    B_flat = B.detach().transpose(0, 1).flatten(1).clone().requires_grad_()

    def dense() -> Tensor:
        probabilities = linear(x, router).softmax(1)
        values, chosen = probabilities.topk(k, dim=1)
        w = torch.zeros_like(probabilities).scatter(1, chosen, values / values.sum(1, keepdim=True))
        h = torch.einsum("tk,erk->ter", x, A) * (SCALE * w).unsqueeze(2)
        return linear(x, weight) + torch.einsum("ter,enr->tn", h, B)

    passes: dict[str, Callable[[], Tensor]] = {
        "frozen": lambda: linear(x, weight),
        "dk": lambda: F.moe_lora_linear(x, weight, A, B, router, top_k=k, scale=SCALE)[0],
        "dk-lora": lambda: F.lora_linear(x, weight, A_flat, B_flat, SCALE),
        "goat-eager": lambda: goat_loop(x, weight, A_list, B_list, router, k, SCALE)[0],
        "dense-einsum": dense,
    }
    if options.compile:
        passes["dense-compile"] = torch.compile(dense)
    return passes, [x, A, B, router, *A_list, *B_list, A_flat, B_flat], weight


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in {"T": 1024, "K": 2048, "N": 2048, "E": 8, "r": 4, "k": 2}.items():
        parser.add_argument(f"-{name}", type=int, default=value, help=f"default: {value}")
    parser.add_argument("--rounds", type=int, default=30, help="default: 30")
    parser.add_argument("--threads", type=int, default=2, help="default: 2")
    parser.add_argument("--compile", action="store_true", help="also the dense form under torch.compile")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    passes, trained, weight = forwards(options)
    dy = torch.randn(options.T, options.N, generator=torch.Generator().manual_seed(1))

    def both_ways(forward: Callable[[], Tensor]) -> Callable[[], None]:
        def run() -> None:
            forward().backward(dy)
            for tensor in trained:
                tensor.grad = None

        return run

    budget = Budget(0, options.rounds, options.rounds)
    times = interleaved({impl: both_ways(forward) for impl, forward in passes.items()}, CpuClock(), budget)
    machine = machine_info("cpu")
    print(f"{machine['cpu']}, {options.threads} threads, torch {machine['torch']}, commit {machine['commit']}")
    print(" ".join(f"{name}={getattr(options, name)}" for name in "TKNErk"), "float32, forward + backward")
    print(f"{'impl':<14} {'ms':>8} {'p20':>8} {'p80':>8} {'/frozen':>8} {'/dk':>6} {'kept MiB':>9}")
    for impl, spent in times.items():
        kept = kept_bytes(passes[impl], [*trained, weight]) / MIB
        ratios = (spent.median_ms / times["frozen"].median_ms, spent.median_ms / times["dk"].median_ms)
        numbers = (spent.median_ms, spent.p20_ms, spent.p80_ms)
        columns = "".join(f" {number:8.1f}" for number in numbers)
        print(f"{impl:<14}{columns} {ratios[0]:8.2f} {ratios[1]:6.2f} {kept:9.2f}")


if __name__ == "__main__":
    main()
