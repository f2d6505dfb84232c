"""Random arguments for every op of ops.py, each variant that autograd/ asks for."""

from collections.abc import Callable, Iterator, Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor

from delora_kernels import ops
from delora_kernels.dtypes import accumulate_dtype
from delora_kernels.testing.draw import Draw
from delora_kernels.testing.methods.ether import blocks_of
from delora_kernels.testing.methods.grouped import EXPERTS, offsets_of
from delora_kernels.testing.methods.lora import DROPOUT_P, STACKED_P, stacked_ranks
from delora_kernels.testing.methods.moe import TOP_K, routed
from delora_kernels.testing.ops import formulas
from delora_kernels.testing.problem import moved

SCALE = 1.75
"""Factor of the rank-R term; exact in every dtype, so that it costs nobody a rounding."""

Arguments = dict[str, Any]
Variants = Iterator[Arguments]

NO_DROPOUT: Arguments = {"dropout_p": 0.0, "seed": None}
NO_MASKS: Arguments = {"ranks": [], "dropout_p": [0.0], "seed": None}


def arguments(name: str, values: Mapping[str, Any]) -> list[Any]:
    """Return the arguments of an op's function, from values by their names in its schema."""
    return ops.packed(name, [values[field] for field in fields(name)])


@cache
def fields(name: str) -> list[str]:
    """Return the names in an op's schema, but for the backend."""
    schema = getattr(getattr(torch.ops, ops.NAMESPACE), name).default._schema
    return [argument.name for argument in schema.arguments if argument.name != "backend"]


class OpDraw:
    """Random arguments of ops, in the dtypes in which autograd/ passes them.

    Args:
        T, K, N, R: Tokens, in-features, out-features, rank.
        dtype: Of x, weight, bias, y and their gradients.
        rank_dtype: Of factors and every [T, R] tensor.
        device: Where the tensors live.
        seed: Of the numbers and of dropout masks.
    """

    def __init__(
        self,
        T: int,
        K: int,
        N: int,
        R: int,
        dtype: torch.dtype,
        rank_dtype: torch.dtype,
        device: str | torch.device,
        seed: int,
    ) -> None:
        self.T, self.K, self.N, self.R = T, K, N, R
        self._draw, self._device = Draw(T, K, N, R, seed), device
        self._dtype, self.rank_dtype = dtype, rank_dtype
        seed_tensor = torch.tensor(seed, dtype=torch.int64, device=device)
        self.dropout: Arguments = {"dropout_p": DROPOUT_P, "seed": seed_tensor}
        ranks = stacked_ranks(R)
        seeds, probabilities = seed_tensor + torch.arange(len(ranks), device=device), list(STACKED_P[: len(ranks)])
        self.one_mask: Arguments = {"ranks": [], "dropout_p": [DROPOUT_P], "seed": seed_tensor}
        self.masks: Arguments = {"ranks": list(ranks), "dropout_p": probabilities, "seed": seeds}

    def base(self, *shape: int) -> Tensor:
        """As x, weight, bias, y."""
        return self._draw.normal(*shape).to(self._device, self._dtype)

    def small(self, *shape: int) -> Tensor:
        """As the factors and every [T, R] tensor."""
        return self._draw.normal(*shape).to(self._device, self.rank_dtype)

    def routed(self) -> tuple[Tensor, Tensor]:
        """As x, and a router [E, K] whose logits on it are far enough apart."""
        made = routed(self._draw, {"x": self._draw.normal(self.T, self.K)})
        return made["x"].to(self._device, self._dtype), made["router"].to(self._device, self.rank_dtype)

    def mask_of_first(self, columns: int, others: int) -> Arguments:
        """One mask for the first columns of h; the others see x itself."""
        seeds = self.dropout["seed"] + torch.arange(2, device=self._device)
        return {"ranks": [columns, others], "dropout_p": [DROPOUT_P, 0.0], "seed": seeds}

    def acc(self, *shape: int) -> Tensor:
        """As norms, c and the gradients of Â and B̂."""
        return self._draw.normal(*shape).to(self._device, accumulate_dtype(self._dtype))


def _fold(d: OpDraw) -> Variants:
    for dtype in (torch.float64,) if d.rank_dtype == torch.float64 else (torch.bfloat16, torch.float16):
        plain: Arguments = {"A": d.small(d.R, d.K), "B": d.small(d.N, d.R), "eps": 0.0, "dtype": dtype}
        absent = ("lam", "weight_norm", "frozen_A", "frozen_B", "frozen_lam")
        yield plain | dict.fromkeys(absent)
    yield from _normalising_fold(d)


def _normalising_fold(d: OpDraw) -> Variants:
    made: Arguments = {"A": d.small(d.R, d.K), "B": d.small(d.N, d.R), "lam": d.small(1)}
    made |= {"weight_norm": d.small(d.K).abs(), "frozen_A": None, "frozen_B": None, "frozen_lam": None}
    made |= {"eps": 1e-4, "dtype": d.rank_dtype}
    yield made
    start = {"frozen_A": d.small(d.R + 1, d.K), "frozen_B": d.small(d.N, d.R + 1), "eps": 0.0}
    yield made | start
    yield made | start | {"frozen_lam": d.small(), "lam": d.small(), "weight_norm": d.small().abs()}
    norms = made["A"].double().norm(dim=1)
    between = float(norms.min() + norms.max()) / 2 if d.R > 1 else 2 * float(norms)
    yield made | {"eps": between}  # some of A's rows are clamped, and of B's columns


def _stack_factors(d: OpDraw) -> Variants:
    """B alone; an A that all experts share; a router; a start of another number of experts and
    another rank.
    """
    E, r = 3, d.R
    made: Arguments = {"B": d.small(E, d.N, r), **dict.fromkeys(("A", "router", "frozen_A", "frozen_B", "residual"))}
    narrow = torch.float64 if d.rank_dtype == torch.float64 else torch.bfloat16
    yield made | {"dtype": d.rank_dtype}
    yield made | {"A": d.small(r, d.K), "dtype": narrow}
    made |= {"A": d.small(E * r, d.K), "router": d.small(E, d.K), "dtype": d.rank_dtype}
    yield made
    yield made | {"A": made["A"].t().contiguous().t(), "B": made["B"].mT.contiguous().mT, "dtype": narrow}
    start = {"frozen_A": d.small(2 * (r + 1), d.K), "frozen_B": d.small(2, d.N, r + 1)}
    yield made | start | {"residual": d.acc(2)}
    yield made | start | {"residual": d.acc(2), "A": None, "router": None, "dtype": narrow}


def _fold_backward(d: OpDraw) -> Variants:
    for made in _normalising_fold(d):
        wide = moved(made, accumulate_dtype(d.rank_dtype))
        _, _, a, b = formulas.fold(*arguments("fold", wide))
        given: Arguments = {name: made[name] for name in ("A", "B", "lam", "weight_norm", "eps")} | {"a": a, "b": b}
        given["frozen_B"] = made["frozen_B"] if made["frozen_lam"] is None else None
        grads = {"dA_hat": d.acc(d.R, d.K), "dB_hat": d.acc(d.N, 0 if b is None else len(b))}
        yield grads | given
    yield grads | given | {"dA_hat": None}
    yield grads | given | {"dB_hat": None}


def _row_norm(d: OpDraw) -> Variants:
    made: Arguments = {"weight": d.base(d.N, d.K), "A_hat": d.small(d.R, d.K), "B_hat": d.small(d.N, d.R)}
    made |= {"scale": SCALE, "magnitude": None, "scaled": False}
    yield made
    for scaled in (False, True):
        yield made | {"magnitude": d.small(d.N), "scaled": scaled}
    yield made | {"weight": d.base(d.K, d.N).t(), "magnitude": d.small(d.N), "scaled": True}
    E = EXPERTS
    experts = made | {"A_hat": d.small(E, d.R, d.K), "B_hat": d.small(d.N, d.R, E).permute(2, 0, 1)}
    yield experts | {"weight": d.base(E, d.N, d.K)}
    yield experts | {"weight": d.base(E, d.K, d.N).mT, "magnitude": d.small(E, d.N)}


def _project(d: OpDraw) -> Variants:
    made: Arguments = {"x": d.base(d.T, d.K), "A_hat": d.small(d.R, d.K)}
    for masks in (NO_MASKS, d.one_mask, d.masks):
        yield made | masks


def _expand(d: OpDraw) -> Variants:
    made: Arguments = {"x": d.base(d.T, d.K), "weight": d.base(d.N, d.K), "bias": None, "h": d.small(d.T, d.R)}
    made |= {"B_hat": d.small(d.N, d.R), "scale": SCALE, "c": None, "scaled": None, "keep": False} | NO_DROPOUT
    yield made
    yield made | {"bias": d.base(d.N)}
    for keep in (False, True):
        yield made | {"c": d.acc(d.N), "keep": keep}
        yield made | {"c": d.acc(d.N), "keep": keep, "bias": d.base(d.N)} | d.dropout
    c = d.acc(d.N)
    yield made | {"c": c, "scaled": (c[:, None] * made["weight"]).to(made["weight"].dtype), "bias": d.base(d.N)}


def _expand_backward(d: OpDraw) -> Variants:
    made: Arguments = {"dy": d.base(d.T, d.N), "h": d.small(d.T, d.R), "B_hat": d.small(d.N, d.R), "scale": SCALE}
    made |= {"c": None, "kept": None, "kept_is_y": False, "divisor": None, "need_bias": True}
    yield made
    yield made | {"h": None, "need_bias": False}
    yield made | {"B_hat": None, "need_bias": False}
    yield made | {"c": d.acc(d.N)}
    made["divisor"] = 1 + d.acc(d.N).abs()
    made["divisor"][-1] = 0.0
    yield made | {"c": d.acc(d.N), "kept": d.base(d.T, d.N), "kept_is_y": True}
    base = {"x": d.base(d.T, d.K), "weight": d.base(d.N, d.K)}  # `kept` is then what the backend's expand keeps
    yield made | base | {"c": d.acc(d.N)} | NO_DROPOUT
    yield made | base | {"c": d.acc(d.N)} | d.dropout


def _input_backward(d: OpDraw) -> Variants:
    made: Arguments = {"dy": d.base(d.T, d.N), "weight": d.base(d.N, d.K), "dv": d.small(d.T, d.R)}
    made |= {"A_hat": d.small(d.R, d.K), "x": d.base(d.T, d.K), "r": d.R, "scale": SCALE, "c": None, "two_term": False}
    for c in (None, d.acc(d.N)):
        for masks in (NO_MASKS, d.one_mask, d.masks):
            yield made | {"c": c} | masks
    yield made | {"c": d.acc(d.N), "two_term": True} | d.one_mask
    yield made | {"x": None} | d.one_mask
    yield made | {"weight": None, "A_hat": None} | d.one_mask
    wider = {"dv": d.small(d.T, d.R + 2), "A_hat": d.small(d.R + 2, d.K)}  # a frozen start behind what trains
    for masks in (NO_MASKS, d.one_mask):
        yield made | wider | masks


def _weight_grad(d: OpDraw) -> Variants:
    made: Arguments = {"dy": d.base(d.T, d.N), "x": d.base(d.T, d.K)}
    yield made | {"c": None} | NO_DROPOUT
    yield made | {"c": d.acc(d.N)} | NO_DROPOUT
    yield made | {"c": d.acc(d.N)} | d.dropout


def _project_route(d: OpDraw) -> Variants:
    """Every way to weigh, with and without columns that are passed on, one u for all experts or one
    for each, masks.
    """
    x, router = d.routed()
    E, K = router.shape
    u, rest = d.small(E * d.R, K), d.small(2, K)
    made: Arguments = {"x": x, "A_hat": torch.cat([u, router]), "gates": None, "scale": d.acc(E), "token_share": None}
    made |= {"experts": E, "rank": d.R, "top_k": min(TOP_K, E), "renormalize": True, "shared": False} | NO_MASKS
    yield made
    yield made | {"renormalize": False}
    yield made | {"top_k": 1}
    yield made | {"top_k": E}
    share = (torch.arange(d.T, device=x.device) % 3 != 1).to(made["scale"]) / max(1, d.T - (d.T + 1) // 3)
    yield made | {"token_share": share, "A_hat": torch.cat([u, router, rest])}
    yield made | {"shared": True, "A_hat": torch.cat([u[: d.R], router, rest])}
    yield made | {"A_hat": torch.cat([u, router, rest])} | d.mask_of_first(E * d.R, E + 2)
    gates = d.acc(d.T, E)
    gates[:, 1:] = torch.where(gates[:, 1:].abs() < 0.3, 0.0, gates[:, 1:])
    given = made | {"gates": gates}
    yield given | {"A_hat": u}
    yield given | {"A_hat": torch.cat([u[: d.R], rest]), "shared": True, "token_share": share}
    yield given | {"A_hat": torch.cat([u, rest])} | d.mask_of_first(E * d.R, 2)


def _expand_route_backward(d: OpDraw) -> Variants:
    for i, made in enumerate(_project_route(d)):
        if made["seed"] is not None:
            continue
        wide = moved(made, accumulate_dtype(d.rank_dtype))
        h, v, w, *_ = formulas.project_route(*arguments("project_route", wide))
        assert h is not None
        assert v is not None
        kept = ("scale", "token_share", "experts", "rank", "renormalize", "shared")
        E, given = made["experts"], made["gates"] is not None
        yield {name: made[name] for name in kept} | {
            "dy": d.base(d.T, d.N),
            "v": None if i == 1 else v.to(d.rank_dtype),
            "B_hat": d.small(d.N, v.shape[1]),
            "need_bias": i % 2 == 0,
            "h": h.to(d.rank_dtype),
            "w": made["gates"] if w is None else w,
            "dP": d.acc(E),
            "dz": d.acc(1),
            "need_scale": i % 3 != 1,
            "given": given,
        }


def _reflect(d: OpDraw) -> Variants:
    """One block, several, blocks of two; a block whose vector has no length; with and without v and
    a bias.
    """
    blocks = {1, blocks_of(d.K, d.R), blocks_of(d.K, d.K)}
    for n in sorted(blocks):
        made: Arguments = {"x": d.base(d.T, d.K), "u": d.small(n, d.K // n), "v": None, "bias": None}
        yield made
        yield made | {"v": d.small(n, d.K // n), "bias": d.base(d.K)}
    for name in ("u", "v"):
        zeroed = made | {"v": d.small(n, d.K // n)}
        zeroed[name] = zeroed[name].clone()
        zeroed[name][-1] = 0.0
        yield zeroed


def _reflect_backward(d: OpDraw) -> Variants:
    for variant in _reflect(d):
        made = {name: variant[name] for name in ("x", "u", "v")}
        yield made | {"dy": d.base(d.T, d.K), "need_dx": True}
    yield made | {"dy": d.base(d.T, d.K), "need_dx": False}


def _grouped(d: OpDraw) -> Arguments:
    E = EXPERTS
    made = {"weight": d.base(E, d.N, d.K), "A_hat": d.small(E, d.R, d.K), "B_hat": d.small(E, d.N, d.R)}
    return made | {"scale": SCALE, "offsets": offsets_of(d.T).to(made["weight"].device)} | NO_DROPOUT


def _grouped_linear(d: OpDraw) -> Variants:
    """With and without factors and bias; weights that lie transposed; int32 offsets; factors across
    experts.
    """
    made = _grouped(d) | {"x": d.base(d.T, d.K), "bias": None}
    yield made
    yield made | {"bias": d.base(EXPERTS, d.N), "offsets": made["offsets"].to(torch.int32)}
    transposed = {"weight": d.base(EXPERTS, d.K, d.N).mT, "B_hat": d.small(d.N, d.R, EXPERTS).permute(2, 0, 1)}
    yield made | transposed
    yield made | {"A_hat": None, "B_hat": None, "bias": d.base(EXPERTS, d.N)}
    yield made | d.dropout


def _grouped_backward(d: OpDraw) -> Variants:
    """All that can be wanted; each gradient alone; the frozen linears; weights that lie
    transposed.
    """
    made = _grouped(d) | {"dy": d.base(d.T, d.N), "x": d.base(d.T, d.K), "h": d.small(d.T, d.R), "need_bias": True}
    yield made
    nothing: Arguments = dict.fromkeys(("x", "h", "weight", "A_hat", "B_hat")) | {"need_bias": False}
    for wanted in (("weight", "A_hat", "B_hat"), ("x", "B_hat"), ("h",), ("need_bias",), ("weight",)):
        yield made | {name: value for name, value in nothing.items() if name not in wanted}
    yield made | {"weight": d.base(EXPERTS, d.K, d.N).mT, "need_bias": False}
    yield made | d.dropout


def _grouped_weight_grad(d: OpDraw) -> Variants:
    made = _grouped(d)
    for offsets in (made["offsets"], made["offsets"].to(torch.int32)):
        yield {"dy": d.base(d.T, d.N), "x": d.base(d.T, d.K), "offsets": offsets}


OPS: Mapping[str, tuple[Callable[[OpDraw], Variants], tuple[str | None, ...]]] = {
    "fold": (_fold, ("A_hat", "B_hat", "a", "b")),
    "fold_backward": (_fold_backward, ("dA", "dB", "dlam")),
    "stack_factors": (_stack_factors, ("rows", "columns")),
    "row_norm": (_row_norm, ("norm", "c", "scaled")),
    "project": (_project, ("h",)),
    "expand": (_expand, ("y", None)),
    "expand_backward": (_expand_backward, ("dv", "dB_hat", "dm", "dy_sum")),
    "input_backward": (_input_backward, ("dx", "dA_hat")),
    "weight_grad": (_weight_grad, ("dW",)),
    "project_route": (_project_route, ("h", "v", "w", "fraction", "probability", "z")),
    "expand_route_backward": (_expand_route_backward, ("dh", "dB_hat", "dy_sum", "dgates", "dscale")),
    "reflect": (_reflect, ("y",)),
    "reflect_backward": (_reflect_backward, ("dx", "du", "dv")),
    "grouped_linear": (_grouped_linear, ("y", "h")),
    "grouped_backward": (_grouped_backward, ("dx", "dA", "dB", "dbias")),
    "grouped_weight_grad": (_grouped_weight_grad, ("dW",)),
}
"""Op → what draws its variants, and its results by name; None: a tensor whose meaning is the
backend's own affair.

dropout_mask is random by contract: `testing.dropout` judges it.
"""
