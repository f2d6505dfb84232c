"""The methods: what each adds to x, W, A and B, and the PEFT layer that holds the same tensors.

A new method is one entry: its function in delora_kernels.functional and .reference (of the same
name and arguments), its further arguments, and PEFT's layer if there is one. Rivals written here
find their form in `addmm`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.cases import PRECISIONS, Case
from benchmarks.layer import mixtures

SCALE = mixtures.SCALE
"""LoRA's alpha / r, as in alpha = 2 r."""

Inputs = dict[str, Any]


@dataclass(frozen=True)
class Method:
    """One adapter method.

    Args:
        name: Key in METHODS.
        title: What tables call it.
        function: Name in delora_kernels.functional and delora_kernels.reference.
        arguments: (draw, inputs so far) → its arguments beyond x, weight, A, B, or in their place;
            None takes one away.
        trained: Names of the arguments that get gradients, beside x.
        peft_config: (r, dropout_p) → PEFT's configuration for a module named "0"; None: PEFT has no
            such method.
        in_peft: PEFT's layer → name of each argument that is a tensor of it → that tensor.
    """

    name: str
    title: str
    function: str
    arguments: Callable[["Draw", Inputs], Inputs]
    trained: tuple[str, ...]
    peft_config: Callable[[int, float], Any] | None = None
    in_peft: Callable[[Any], dict[str, Tensor]] = lambda layer: {}


class Draw:
    """Random numbers for a case on the device itself, from one seed."""

    def __init__(self, case: Case, device: str, seed: int) -> None:
        self.case, self.device = case, device
        self._generator = torch.Generator(device).manual_seed(seed)

    def normal(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Draw standard normal numbers."""
        return torch.randn(shape, device=self.device, generator=self._generator).to(dtype)


def inputs(case: Case, device: str, seed: int) -> Inputs:
    """x [T, K], weight [N, K], A [r, K], B [N, r], what the method adds, and grad_out [T, N]: all
    random.
    """
    draw, (dtype, adapter_dtype, *_) = Draw(case, device, seed), PRECISIONS[case.precision]
    T, K, N, r = case.T, case.K, case.N, case.r
    made: Inputs = {
        "x": draw.normal(T, K, dtype=dtype),
        "weight": (draw.normal(N, K) / K**0.5).to(dtype),
        "A": (draw.normal(r, K) / K**0.5).to(adapter_dtype),
        "B": (draw.normal(N, r) / K**0.5).to(adapter_dtype),
    }
    made |= METHODS[case.method].arguments(draw, made)
    made["grad_out"] = draw.normal(T, N, dtype=dtype)
    return {name: value for name, value in made.items() if value is not None}


def _lora(draw: Draw, made: Inputs) -> Inputs:
    return {"scale": SCALE}


def _dora(draw: Draw, made: Inputs) -> Inputs:
    """Magnitudes near the row norms, where training keeps them."""
    norm, like = made["weight"].float().norm(dim=1), made["A"]
    return {"scale": SCALE, "magnitude": (norm * (1 + 0.1 * draw.normal(len(norm)))).to(like.dtype)}


def _delora(draw: Draw, made: Inputs) -> Inputs:
    lam = torch.full((1,), 2.0, device=draw.device, dtype=made["A"].dtype)
    return {"lam": lam, "weight_norm": made["weight"].norm(dim=0).to(lam.dtype)}


def _moe(draw: Draw, made: Inputs) -> Inputs:
    return mixtures.experts(draw.case, draw.normal, made)


def _goat(draw: Draw, made: Inputs) -> Inputs:
    return mixtures.goat(draw.case, draw.normal, made)


def _reflections(draw: Draw, made: Inputs) -> Inputs:
    """Return the vectors that the method trains, [n_blocks, K / n_blocks] or [n_blocks, N /
    n_blocks], and no factors.
    """
    case, n = draw.case, draw.case.n_blocks or 1
    sides = {name: case.N if name.endswith("_out") else case.K for name in METHODS[case.method].trained}
    vectors = {name: draw.normal(n, C // n, dtype=made["A"].dtype) for name, C in sides.items()}
    return {"A": None, "B": None} | vectors


def _lora_config(r: int, dropout_p: float, use_dora: bool = False) -> Any:
    import peft

    options: dict[str, Any] = {
        "lora_alpha": SCALE * r,
        "lora_dropout": dropout_p,
        "use_dora": use_dora,
        "init_lora_weights": False,
    }
    return peft.LoraConfig(r=r, target_modules=["0"], **options)


def _dora_config(r: int, dropout_p: float) -> Any:
    return _lora_config(r, dropout_p, use_dora=True)


def _delora_config(r: int, dropout_p: float) -> Any:
    import peft

    return peft.DeloraConfig(r=r, module_dropout=dropout_p, target_modules=["0"], init_weights=False)


def _in_lora(layer: Any) -> dict[str, Tensor]:
    return {"A": layer.lora_A["default"].weight, "B": layer.lora_B["default"].weight}


def _in_dora(layer: Any) -> dict[str, Tensor]:
    return _in_lora(layer) | {"magnitude": layer.lora_magnitude_vector["default"].weight}


def _in_delora(layer: Any) -> dict[str, Tensor]:
    held = {"A": layer.delora_A, "B": layer.delora_B, "lam": layer.delora_lambda, "weight_norm": layer.delora_w_norm}
    return {name: tensors["default"] for name, tensors in held.items()}


_VECTORS = ("u", "v", "u_out", "v_out")

METHODS = {
    method.name: method
    for method in (
        Method("lora", "LoRA", "lora_linear", _lora, ("A", "B"), _lora_config, _in_lora),
        Method("dora", "DoRA", "dora_linear", _dora, ("A", "B", "magnitude"), _dora_config, _in_dora),
        Method("delora", "DeLoRA", "delora_linear", _delora, ("A", "B", "lam"), _delora_config, _in_delora),
        Method("moe", "mixture of LoRA experts", "moe_lora_linear", _moe, ("A", "B", "router")),
        Method("goat", "GOAT", "moe_lora_linear", _goat, ("A", "B", "router")),
        Method("ether", "ETHER", "ether_linear", _reflections, ("u",)),
        Method("ether-both", "ETHER, both sides", "ether_linear", _reflections, ("u", "u_out")),
        Method("ether-plus", "ETHER+", "ether_plus_linear", _reflections, _VECTORS[:2]),
        Method("ether-plus-both", "ETHER+, both sides", "ether_plus_linear", _reflections, _VECTORS),
    )
}


def peft_layer(case: Case, made: Inputs) -> Any:
    """PEFT's layer in training mode, holding the very tensors of `made`."""
    import peft

    method, precision = METHODS[case.method], PRECISIONS[case.precision]
    assert method.peft_config is not None
    linear = nn.utils.skip_init(
        nn.Linear, case.K, case.N, bias=False, device=made["weight"].device, dtype=precision.dtype
    )
    linear.weight = nn.Parameter(made["weight"], requires_grad=False)
    wide = precision.adapter_dtype != precision.dtype
    config = method.peft_config(case.r, case.dropout_p)
    layer = peft.get_peft_model(nn.Sequential(linear), config, autocast_adapter_dtype=wide).base_model.model[0]
    with torch.no_grad():
        for name, tensor in method.in_peft(layer).items():
            tensor.data = made[name]
    return layer
