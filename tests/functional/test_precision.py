"""Rounding errors against float64, next to those of PEFT's eager layer on the same inputs.

For the output and each gradient: max |a − b| / max |b|, ours over PEFT's; geometric mean over 200
random cases ≤ 1.02 (DoRA's dm ≤ 1.1). Worst case ≤ 2 by root mean square (the largest of a few
hundred errors is a matter of luck). dλ is one number, which luck makes right or wrong on either
side: its errors, as parts of ‖dy‖ ‖∂y/∂λ‖, are pooled over the cases, and the ratio of their root
mean squares may exceed 1.02 by no more than three standard errors of that ratio.
"""

import copy
import math
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import delora_kernels as dk
from delora_kernels import reference

LAYERS, DRAWS = 10, 20
CASES = LAYERS * DRAWS
MODES = [
    (torch.bfloat16, "adapters in x's dtype"),
    (torch.bfloat16, "autocast"),
    (torch.float16, "adapters in x's dtype"),
    (torch.float16, "autocast"),
]


class RandomLayer:
    """A PEFT layer of random shape, x and the base in `dtype`, and its fused copy that shares the
    parameters; `draw` fills both, x and dy with other numbers; and the float64 truth about them.
    """

    def __init__(self, method: str, dtype: torch.dtype, narrow_adapters: bool, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.K, self.N = self.integer(48, 128), self.integer(48, 128)
        base = nn.Sequential(nn.Linear(self.K, self.N, bias=bool(self.integer(0, 1)))).to(dtype)
        self.method, self.dtype, r = method, dtype, self.integer(4, 16)
        if method == "delora":
            config: Any = peft.DeloraConfig(r=r, init_weights=False, target_modules=["0"])
        else:
            options = {"lora_alpha": self.integer(1, 32), "use_dora": method == "dora", "target_modules": ["0"]}
            config = peft.LoraConfig(r=r, init_lora_weights=False, **options)
        model = peft.get_peft_model(base, config, autocast_adapter_dtype=not narrow_adapters)
        self.theirs: Any = model.base_model.model[0]
        shared = {id(t): t for t in (*self.theirs.parameters(), *self.theirs.buffers())}
        self.ours: Any = copy.deepcopy(self.theirs, shared)
        dk.accelerate(self.ours, strict=True)

    def integer(self, least: int, most: int) -> int:
        return int(torch.randint(least, most + 1, (), generator=self.generator))

    @torch.no_grad()
    def draw(self) -> None:
        """As nn.Linear starts; what PEFT computes of W and the factors follows."""
        layer, random = self.theirs, self.generator
        T, W = self.integer(48, 80), layer.base_layer.weight
        for name, tensor in layer.named_parameters():
            if "lambda" in name:
                tensor.fill_(self.integer(1, 15))
            elif "magnitude" not in name:
                limit = (tensor.shape[1] if tensor.dim() == 2 else self.K) ** -0.5
                tensor.copy_(torch.empty(tensor.shape).uniform_(-limit, limit, generator=random))
        if self.method == "dora":
            update = layer.get_delta_weight("default").float()
            norm = (W.float() + update).norm(dim=1)
            layer.lora_magnitude_vector["default"].weight.copy_(norm * (0.5 + torch.rand(self.N, generator=random)))
        elif self.method == "delora":
            layer.delora_w_norm["default"].copy_(W.norm(dim=0))
        self.x = torch.randn(T, self.K, generator=random).to(self.dtype)
        self.dy = torch.randn(T, self.N, generator=random).to(self.dtype)

    def run(self, layer: Any, autocast: torch.dtype | None) -> dict[str, Tensor]:
        """y and every gradient from the layer, PEFT's or ours."""
        layer.zero_grad(set_to_none=True)
        x = self.x.clone().requires_grad_()
        with torch.autocast("cpu", autocast, enabled=autocast is not None):
            y = layer(x)
        y.backward(self.dy)
        grads = {name: p.grad for name, p in layer.named_parameters() if p.requires_grad}
        return {"y": y.detach(), "x": x.grad} | grads

    def truth(self) -> tuple[dict[str, Tensor], dict[str, float]]:
        """The same in float64 from the reference, and each one's scale."""
        leaves = {"x": self.x} | {name: p for name, p in self.theirs.named_parameters() if p.requires_grad}
        leaves = {name: p.detach().double().requires_grad_() for name, p in leaves.items()}
        x, (A, B, *last) = leaves["x"], [p for name, p in leaves.items() if name != "x"]
        W, bias = (
            None if t is None else t.double() for t in (self.theirs.base_layer.weight, self.theirs.base_layer.bias)
        )
        if self.method == "delora":
            n = self.theirs.delora_w_norm["default"].double()
            y = reference.delora_linear(x, W, A, B, last[0], n, bias)
        elif self.method == "dora":
            y = reference.dora_linear(x, W, A, B, last[0], self.theirs.scaling["default"], bias)
        else:
            y = reference.lora_linear(x, W, A, B, self.theirs.scaling["default"], bias)
        grads = torch.autograd.grad(y, list(leaves.values()), self.dy.double())
        results = {"y": y.detach()} | dict(zip(leaves, grads, strict=True))
        scales = {name: float(value.abs().max()) for name, value in results.items()}
        if self.method == "delora":
            branch = reference.delora_linear(x, torch.zeros_like(W), A, B, last[0], n)
            scales["delora_lambda.default"] = float(self.dy.double().norm() * branch.detach().norm() / last[0].detach())
        return results, scales


def random_cases(
    method: str, dtype: torch.dtype, narrow_adapters: bool, seed: int, layers: int, draws: int
) -> Iterator[RandomLayer]:
    """Layers of random shapes, each with one draw of numbers after another: to make a layer takes
    longer than to run it.
    """
    for index in range(layers):
        made = RandomLayer(method, dtype, narrow_adapters, seed + index)
        for _ in range(draws):
            made.draw()
            yield made


def errors(method: str, dtype: torch.dtype, mode: str, seed: int) -> Iterator[dict[str, list[tuple[float, float]]]]:
    """For each case, tensor → (our error, PEFT's), as the largest and as the root mean square of
    its entries.
    """
    autocast = dtype if mode == "autocast" else None
    for made in random_cases(method, dtype, autocast is None, seed, LAYERS, DRAWS):
        truth, scales = made.truth()
        sides = [made.run(layer, autocast) for layer in (made.ours, made.theirs)]
        differences = {n: [side[n].double() - value for side in sides] for n, value in truth.items()}
        yield {
            name: [
                (float(a.abs().max()) / scales[name], float(b.abs().max()) / scales[name]),
                (float(a.square().mean().sqrt()), float(b.square().mean().sqrt())),
            ]
            for name, (a, b) in differences.items()
        }


def pooled_ratio(pairs: list[tuple[float, float]]) -> tuple[float, float]:
    """The ratio of root mean squares, and its standard error by the jackknife."""
    squares = torch.tensor(pairs, dtype=torch.float64).square()
    ratio = float((squares[:, 0].sum() / squares[:, 1].sum()).sqrt())
    without_one = squares.sum(0) - squares
    left_out = (without_one[:, 0] / without_one[:, 1]).sqrt()
    return ratio, float((left_out - left_out.mean()).square().sum().mul(1 - 1 / len(pairs)).sqrt())


def test_pooled_ratio_knows_its_spread(seed: int) -> None:
    """Two noises of the same size: 1 lies within four standard errors; twice the size is seen to
    be.
    """
    torch.manual_seed(seed)
    pairs = torch.randn(CASES, 2, dtype=torch.float64).abs()
    ratio, standard_error = pooled_ratio([(a, b) for a, b in pairs.tolist()])
    assert abs(ratio - 1) <= 4 * standard_error <= 0.6
    assert pooled_ratio([(2 * a, b) for a, b in pairs.tolist()])[0] == pytest.approx(2 * ratio)


@pytest.mark.parametrize(("dtype", "mode"), MODES, ids=str)
@pytest.mark.parametrize("method", ["lora", "dora", "delora"])
def test_never_worse_than_peft(method: str, dtype: torch.dtype, mode: str, seed: int) -> None:
    largest, mean_square = defaultdict(list), defaultdict(list)
    for case in errors(method, dtype, mode, seed):
        for name, (by_largest, by_mean_square) in case.items():
            largest[name].append(by_largest)
            mean_square[name].append(by_mean_square)
    assert len(largest) == (4 if method == "lora" else 5)
    for name, pairs in largest.items():
        assert all(math.isfinite(error) for pair in pairs for error in pair), name
        if "lambda" in name:
            ratio, standard_error = pooled_ratio(pairs)
            assert ratio <= 1.02 + 3 * standard_error, name
            continue
        log_ratios = [math.log(ours / theirs) for ours, theirs in pairs]
        assert math.exp(math.fsum(log_ratios) / CASES) <= (1.1 if "magnitude" in name else 1.02), name
        assert max(ours / theirs for ours, theirs in mean_square[name]) <= 2, name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", ["lora", "dora", "delora"])
def test_float32_adapters_without_autocast_get_float32_gradients(method: str, dtype: torch.dtype, seed: int) -> None:
    """PEFT's default on a half-precision base: the branch runs in float32, and so accurate are dA,
    dB, dλ and dm.
    """
    for made in random_cases(method, dtype, False, seed, layers=5, draws=4):
        truth, scales = made.truth()
        ours = made.run(made.ours, None)
        for name, value in truth.items():
            error = float((ours[name].double() - value).abs().max()) / scales[name]
            # y, dx and what DoRA keeps are rounded to dtype, twice at most
            limit = torch.finfo(dtype).eps * 2 if name in ("y", "x") or "magnitude" in name else 2e-4
            assert error <= limit, (name, error)
