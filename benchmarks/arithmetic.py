"""What no implementation of a method can leave out: its products and sums alone, over the frozen
ones.

    bare = Bare(model, "lora", tokens)  # PEFT's model: its layers' weights and factors
    bare.products(); bare.step()  # a step's frozen products; these, the method's own and AdamW

Nothing is between the calls of torch but a loop over layers: no autograd, no modules, no checks.
Layers of one x make one product with all their A, and dx is one buffer. Where a product can be laid
out in several ways, or a formula has several forms, the fastest on this machine is taken. Memory is
as in a model: each layer has its own W, x and factors, and a result is used right after it was
written.
"""

import math
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.layer.methods import METHODS

Way = Callable[[], Any]
_TRIALS = 7


class Bare:
    """The products of one training step of a model whose linears all carry one adapter.

    Args:
        model: PEFT's; its frozen weights are used as they are, its factors copied.
        method: "lora", "dora" or "delora".
        tokens: What a step sees, int64 `[sequences, tokens]`.
    """

    def __init__(self, model: Any, method: str, tokens: Tensor) -> None:
        fastest = Fastest()
        self.groups = [
            Group([Layer(layer, method) for layer in layers], tokens.numel(), fastest)
            for layers in siblings(model, tokens)
        ]
        trained = [tensor for group in self.groups for layer in group.layers for tensor in layer.trained]
        self.arithmetic()  # the choice of ways
        self.optimizer = torch.optim.AdamW(trained, lr=0.0, fused=True)

    def products(self) -> None:
        """Run y = x Wᵀ and dx = dy W of all layers, dx of siblings added up as autograd does."""
        for group in self.groups:
            for layer in group.layers:
                torch.mm(group.x, layer.weight.t(), out=layer.y)
        for group in reversed(self.groups):
            for number, layer in enumerate(group.layers):
                torch.mm(layer.dy, layer.weight, out=group.more if number else group.dx)
                if number:
                    group.dx += group.more

    def arithmetic(self) -> None:
        """Run them with what the method adds."""
        for group in self.groups:
            group.forward()
        for group in reversed(self.groups):
            group.backward()

    def step(self) -> None:
        """Run all of it, and AdamW."""
        self.arithmetic()
        self.optimizer.step()


def siblings(model: Any, tokens: Tensor) -> list[list[Any]]:
    """Return the adapter layers of a model in the order of their calls, those that are given one x
    together.
    """
    found: list[list[Any]] = []
    seen: list[Tensor] = []

    def note(layer: Any, args: tuple[Tensor, ...]) -> None:
        if not seen or seen[-1] is not args[0]:
            seen.append(args[0])
            found.append([])
        found[-1].append(layer)

    hooks = [layer.register_forward_pre_hook(note) for layer in model.modules() if hasattr(layer, "base_layer")]
    with torch.no_grad():
        model(input_ids=tokens)
    for hook in hooks:
        hook.remove()
    return found


class Fastest:
    """Which of several ways to the same result is the fastest: timed once for each kind."""

    def __init__(self) -> None:
        self.chosen: dict[Any, int] = {}

    def __call__(self, kind: Any, *ways: Way) -> None:
        if kind not in self.chosen:
            spent = [math.inf] * len(ways)
            for _ in range(_TRIALS):
                for number, way in enumerate(ways):
                    began = time.perf_counter()
                    way()
                    if torch.cuda.is_available():
                        torch.cuda.synchronize()
                    spent[number] = min(spent[number], time.perf_counter() - began)
            self.chosen[kind] = spent.index(min(spent))
        ways[self.chosen[kind]]()


class Layer:
    """One layer's tensors, and the results they go to."""

    def __init__(self, layer: Any, method: str) -> None:
        made = METHODS[method].in_peft(layer)
        self.method, self.weight = method, layer.base_layer.weight.detach()
        self.A, self.B = (made[name].detach().clone() for name in "AB")
        self.vector: Any = made.get("magnitude", made.get("lam"))
        self.trained = [self.A, self.B]
        if self.vector is not None:
            self.vector = self.vector.detach().clone()
            self.trained.append(self.vector)
        for tensor in self.trained[1:]:
            tensor.grad = torch.zeros_like(tensor)  # A's is the group's
        self.scale = 1.0 if method == "delora" else float(layer.scaling["default"])
        self.A_hat, self.B_hat = (self.A, self.B) if method != "delora" else map(torch.empty_like, (self.A, self.B))
        self.weight_norm: Any = made.get("weight_norm")
        self.square = self.weight.square().sum(1)  # of a frozen weight: known
        self.norm, self.c = torch.ones_like(self.square), torch.ones_like(self.square)
        self.a = self.b = self.A.new_empty(0)
        self.updated = torch.empty_like(self.weight) if method == "dora" else None

    def allot(self, tokens: int) -> None:
        """Make room for what a step writes."""
        like = self.weight.new_empty
        self.y, self.dy = (like(tokens, len(self.weight)) for _ in range(2))
        self.kept = like(tokens, len(self.weight)) if self.method == "dora" else self.y
        self.dy.normal_()
        self.turned_dB = like(self.B.t().shape)
        self.small = torch.empty_like(self.B)


class Group:
    """Layers of one x."""

    def __init__(self, layers: Sequence[Layer], tokens: int, fastest: Fastest) -> None:
        self.layers, self.fastest = layers, fastest
        for layer in layers:
            layer.allot(tokens)
        K, R = layers[0].weight.shape[1], sum(len(layer.A) for layer in layers)
        like = layers[0].weight.new_empty
        self.x, self.dx, self.more = (like(tokens, K) for _ in range(3))
        self.x.normal_()
        self.A = like(R, K) if len(layers) > 1 else layers[0].A_hat
        self.dA, self.turned_dA, self.h, self.dv = like(R, K), like(K, R), like(tokens, R), like(tokens, R)
        self.dA_parts = self.dA.split([len(layer.A) for layer in layers])
        for layer, part in zip(layers, self.dA_parts, strict=True):
            layer.A.grad = like(part.shape) if layer.method == "delora" else part
        self.shape = (tokens, K, tuple(len(layer.weight) for layer in layers))

    def forward(self) -> None:
        """Compute h of all, then each y."""
        fastest, x, h = self.fastest, self.x, self.h
        for layer in self.layers:
            _fold(layer)
        A = self.A
        if len(self.layers) > 1:
            torch.cat([layer.A_hat for layer in self.layers], out=A)
        fastest(("h", self.shape), lambda: torch.mm(x, A.t(), out=h), lambda: h.copy_(torch.mm(A, x.t()).t()))
        for layer, own in zip(self.layers, self._parts(h), strict=True):
            if layer.method != "dora":
                torch.mm(x, layer.weight.t(), out=layer.y)
                layer.y.addmm_(own, layer.B_hat.t(), alpha=layer.scale)
                continue
            torch.mm(x, layer.weight.t(), out=layer.kept)
            fastest(("norm", layer.weight.shape), partial(_norm, layer), partial(_norm_by_squares, layer))
            torch.div(layer.vector, layer.norm, out=layer.c)
            torch.addmm(layer.kept, own, layer.B.t(), alpha=layer.scale, out=layer.y).mul_(layer.c)

    def backward(self) -> None:
        """Compute dv and dB of each, then dA and dx of all."""
        fastest, dv, dA, turned, x = self.fastest, self.dv, self.dA, self.turned_dA, self.x
        for number, (layer, h, own) in enumerate(zip(self.layers, self._parts(self.h), self._parts(dv), strict=True)):
            self._factors(layer, h, own)
            left, right = layer.dy, layer.weight
            if layer.method == "dora":
                narrow = len(left) <= right.shape[1]
                left, right = (left * layer.c, right) if narrow else (left, right * layer.c[:, None])
            if number:
                self.dx.addmm_(left, right)
            else:
                torch.mm(left, right, out=self.dx)
        fastest(
            ("dA", self.shape),
            lambda: torch.mm(dv.t(), x, out=dA),
            lambda: dA.copy_(torch.mm(x.t(), dv, out=turned).t()),
        )
        self.dx.addmm_(dv, self.A)
        for layer, part in zip(self.layers, self.dA_parts, strict=True):
            _unfold(layer, part)

    def _factors(self, layer: Layer, h: Tensor, dv: Tensor) -> None:
        B, dB, dy, scale = layer.B_hat, layer.B.grad, layer.dy, layer.scale
        if layer.method == "dora":
            B = torch.mul(layer.B, layer.c[:, None], out=layer.small)
        self.fastest(
            ("dv", dy.shape),
            lambda: dv.addmm_(dy, B, beta=0, alpha=scale),
            lambda: dv.copy_(torch.mm(dy, B).mul_(scale)),
        )
        assert dB is not None
        self.fastest(
            ("dB", dy.shape),
            lambda: dB.addmm_(dy.t(), h, beta=0, alpha=scale),
            lambda: dB.copy_(layer.turned_dB.addmm_(h.t(), dy, beta=0, alpha=scale).t()),
        )
        if layer.method == "dora":
            ways = [partial(_dots, layer, rows) for rows in (64, 256, len(dy))]
            self.fastest(("dm", dy.shape), *ways)
            layer.vector.grad.add_((dB * layer.B).sum(1)).div_(layer.norm)
            dB *= layer.c[:, None]

    def _parts(self, matrix: Tensor) -> tuple[Tensor, ...]:
        return matrix.split([len(layer.A) for layer in self.layers], dim=1)


def _dots(layer: Layer, rows: int) -> None:
    """Σ dy ⊙ x Wᵀ over tokens, some rows at a time."""
    total = layer.vector.grad.zero_()
    for dy, kept in zip(layer.dy.split(rows), layer.kept.split(rows), strict=True):
        total += (dy * kept).sum(0)


def _fold(layer: Layer) -> None:
    """DeLoRA's Â and B̂."""
    if layer.method == "delora":
        layer.a, layer.b = torch.linalg.vector_norm(layer.A, dim=1), torch.linalg.vector_norm(layer.B, dim=0)
        torch.div(layer.A, layer.a[:, None], out=layer.A_hat).mul_(layer.weight_norm)
        torch.mul(layer.B, layer.vector / len(layer.A) / layer.b, out=layer.B_hat)


def _unfold(layer: Layer, dA_hat: Tensor) -> None:
    """Bring dÂ and dB̂ to A, B and λ; ⟨dÂ, Â⟩ is ⟨dB̂, B̂⟩, a rank at a time."""
    if layer.method != "delora":
        return
    dB: Any = layer.B.grad
    a, b, lam = layer.a, layer.b, layer.vector / len(layer.A)
    along = (dB * layer.B).sum(0).div_(b)
    torch.sum(along, 0, keepdim=True, out=layer.vector.grad).div_(len(layer.A))
    along *= lam
    torch.mul(dA_hat, layer.weight_norm, out=layer.A.grad).div_(a[:, None])
    layer.A.grad.addcmul_(layer.A, (along / a.square())[:, None], value=-1)  # type: ignore[union-attr]
    dB.mul_(lam / b).addcmul_(layer.B, along / b.square(), value=-1)


def _norm(layer: Layer) -> None:
    """‖W + s · BA‖ by rows, as it stands."""
    torch.addmm(layer.weight, layer.B, layer.A, alpha=layer.scale, out=layer.updated)
    torch.linalg.vector_norm(layer.updated, dim=1, out=layer.norm)


def _norm_by_squares(layer: Layer) -> None:
    """‖W‖² + 2s ⟨W, BA⟩ + s² ‖BA‖², the first of which is known of a frozen W."""
    B, scale = layer.B, layer.scale
    inner = torch.mm(layer.weight, layer.A.t())
    inner.addmm_(B, layer.A @ layer.A.t(), beta=2 * scale, alpha=scale**2)
    torch.add(layer.square, (inner * B).sum(1), out=layer.norm).sqrt_()
