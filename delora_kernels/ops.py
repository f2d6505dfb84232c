"""Schemas of the primitive ops and their fakes: the contract every backend meets.

An op is one stage of the equation in docs/math.md, on 2-D tensors, with no autograd of its own:
the Functions of autograd/ decide which of them run in which order. Letters: T tokens, K in-features, N out-features,
R total rank, r trainable rank, E experts. `acc` is float64 for float64 tensors and float32 for everything else.

Every op is registered as torch.ops.delora_kernels.<name>, and is a function of this module; `stages` gives the kernels
straight where nothing stands in between. The last argument of every op names the backend that runs it, so that a
backward pass runs on the backend of its forward pass, also after `use_backend` has been left and in a compiled graph.
"""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from delora_kernels import backends
from delora_kernels.dtypes import accumulate_dtype

NAMESPACE = "delora_kernels"
_library = torch.library.Library(NAMESPACE, "DEF")
_OPS: dict[str, Any] = {}

Outputs = Tensor | tuple[Tensor, ...]


_PLAIN = (Tensor, torch.nn.Parameter, type(None))


def stages(backend: str, tensors: Iterable[Tensor | None]) -> Any:
    """The ops of one backend, each without its last argument: its kernels themselves, or where a compiler, tracer,
    dispatch mode or tensor subclass must see the calls, the registered ops.

    Autograd does not see the kernels: this is for the inside of an autograd Function, with autocast off.
    """
    if (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._get_tracing_state() is not None
    ):
        return _registered[backend]
    for tensor in tensors:
        if type(tensor) not in _PLAIN:
            return _registered[backend]
    return backends.loaded[backend]  # the call's choice has loaded it


def registered(backend: str) -> Any:
    """The registered ops of one backend, each without its last argument: whoever takes part in dispatch sees them."""
    return _registered[backend]


class _Registered:
    """The registered ops with the name of a backend as their last argument."""

    def __init__(self, backend: str) -> None:
        for name, op in _OPS.items():
            setattr(self, name, partial(_call, op, backend))
        self.wants_scaled = partial(_wants_scaled, backend)


def _call(op: Any, backend: str, *args: Any) -> Any:
    return op(*args, backend)


def _wants_scaled(backend: str, x: Tensor, weight: Tensor) -> bool:
    return bool(backends.load(backend).wants_scaled(x, weight))


def _register(schema: str, fake: Callable[..., Outputs]) -> Any:
    name = schema.split("(", 1)[0]
    _library.define(schema)
    op = getattr(getattr(torch.ops, NAMESPACE), name)

    def run(*args: Any) -> Outputs:
        kernel = getattr(backends.load(args[-1]), name)
        device = next(arg.device.type for arg in args if isinstance(arg, Tensor))
        if torch.is_autocast_enabled(device):  # the stages choose every dtype themselves
            with torch.autocast(device, enabled=False):
                return kernel(*args[:-1])
        return kernel(*args[:-1])

    def refuse_autograd(*args: Any) -> Outputs:
        if torch.is_grad_enabled() and any(isinstance(arg, Tensor) and arg.requires_grad for arg in args):
            raise RuntimeError(
                f"{NAMESPACE}::{name} has no autograd formula of its own: call the functions of "
                "delora_kernels.functional, or delora_kernels.reference for second derivatives"
            )
        with torch._C._AutoDispatchBelowAutograd():
            return op.default(*args)

    _library.impl(name, run, "CompositeExplicitAutograd")
    _library.impl(name, refuse_autograd, "Autograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", lambda *args: fake(*args[:-1]))
    _OPS[name] = op.default
    return op.default


def _acc(like: Tensor, *shape: Any) -> Tensor:
    return like.new_empty(shape, dtype=accumulate_dtype(like.dtype))


def _fold_fake(
    A: Tensor,
    B: Tensor,
    lam: Tensor | None,
    weight_norm: Tensor | None,
    frozen_A: Tensor | None,
    frozen_B: Tensor | None,
    frozen_lam: Tensor | None,
    eps: float,
    dtype: torch.dtype,
) -> Outputs:
    R = A.shape[0] + (0 if frozen_A is None else frozen_A.shape[0])
    A_hat, norms = A.new_empty((R, A.shape[1]), dtype=dtype), 0 if lam is None else R
    return A_hat, B.new_empty((B.shape[0], R), dtype=dtype), _acc(A_hat, norms), _acc(A_hat, norms)


fold = _register(
    "fold(Tensor A, Tensor B, Tensor? lam, Tensor? weight_norm, Tensor? frozen_A, Tensor? frozen_B,"
    " Tensor? frozen_lam, float eps, ScalarType dtype, str backend) -> (Tensor, Tensor, Tensor, Tensor)",
    _fold_fake,
)
"""DeLoRA's normalisation, O(R(K+N)): → Â [R, K], B̂ [N, R] in `dtype`, row norms a [R], column norms b [R] (acc).

Â = diag(1/max(a, eps)) A diag(n),  B̂ = B diag(λ / (r max(b, eps))); a frozen start is stacked behind with −λ.
Without λ (LoRA, DoRA) nothing is normalised: the factors are cast, and the norms have size 0.
"""


def _fold_backward_fake(dA_hat: Tensor | None, dB_hat: Tensor | None, A: Tensor, B: Tensor, *_: Any) -> Outputs:
    dA = A.new_empty(0 if dA_hat is None else A.shape)
    dB = B.new_empty(0 if dB_hat is None else B.shape)
    return dA, dB, _acc(B, 0) if dB_hat is None else dB_hat.new_empty(1)


fold_backward = _register(
    "fold_backward(Tensor? dA_hat, Tensor? dB_hat, Tensor A, Tensor B, Tensor lam, Tensor weight_norm,"
    " Tensor? frozen_B, Tensor a, Tensor b, float eps, str backend) -> (Tensor, Tensor, Tensor)",
    _fold_backward_fake,
)
"""The inverse of fold for gradients: dÂ [r, K], dB̂ [N, R] (acc) → dA, dB in the factors' dtypes, dλ [1] (acc).

dA_i ⟂ A_i and dB_i ⟂ B_i wherever the clamp is not active. `frozen_B` is passed where the live λ scales the frozen
start too and dλ is wanted. A gradient that is None gives an output of size 0.
"""

row_norm = _register(
    "row_norm(Tensor weight, Tensor A_hat, Tensor B_hat, float scale, Tensor? magnitude, bool scaled, str backend)"
    " -> (Tensor, Tensor, Tensor)",
    lambda weight, A_hat, B_hat, scale, magnitude, scaled: (
        _acc(weight, weight.shape[0]),
        _acc(weight, 0 if magnitude is None else weight.shape[0]),
        weight.new_empty(weight.shape if scaled else 0),
    ),
)
"""DoRA's norm ‖W_o + scale · B̂_o Â‖₂ of every row o, c = m / ‖·‖ (0 where the norm is 0), both [N] (acc), and if
`scaled` c ⊙ W [N, K] in W's dtype; without a magnitude m the last two have size 0. B̂Â is never materialised whole.
"""

project = _register(
    "project(Tensor x, Tensor A_hat, int[] ranks, float[] dropout_p, Tensor? seed, str backend) -> Tensor",
    lambda x, A_hat, ranks, dropout_p, seed: A_hat.new_empty((x.shape[0], A_hat.shape[0])),
)
"""h = drop(x) Âᵀ → [T, R] in Â's dtype; reads x once.

`ranks` divides Â's rows among stacked adapters, each with its own mask, probability and seed (int64 [masks]);
empty: one mask for all, and `seed` is 0-d.
"""

expand = _register(
    "expand(Tensor x, Tensor weight, Tensor? bias, Tensor h, Tensor B_hat, float scale, Tensor? c, Tensor? scaled,"
    " bool keep, float dropout_p, Tensor? seed, str backend) -> (Tensor, Tensor)",
    lambda x, weight, bias, h, B_hat, scale, c, scaled, keep, dropout_p, seed: (
        x.new_empty((x.shape[0], weight.shape[0])),
        x.new_empty((x.shape[0], weight.shape[0]) if keep else 0),
    ),
)
"""y = c ⊙ u + bias with u = x Wᵀ + scale · h B̂ᵀ → y [T, N], and if `keep` (else size 0) the [T, N] tensor from which
the same backend's expand_backward finds Σ_t dy ⊙ u: u, or x Wᵀ alone. `scaled` is row_norm's c ⊙ W or None, and may
be given where nothing is kept or dropped.

dropout_p > 0 asks for PEFT's two-term DoRA: u is computed from drop(x), and y = (x − drop(x)) Wᵀ + c ⊙ u + bias.
"""

expand_backward = _register(
    "expand_backward(Tensor dy, Tensor? h, Tensor? B_hat, float scale, Tensor? c, Tensor? kept,"
    " bool kept_is_y, Tensor? divisor, bool need_bias, str backend) -> (Tensor, Tensor, Tensor, Tensor)",
    lambda dy, h, B_hat, scale, c, kept, kept_is_y, divisor, need_bias: (
        dy.new_empty(0) if B_hat is None else B_hat.new_empty((dy.shape[0], B_hat.shape[1])),
        _acc(dy, 0) if h is None else _acc(h, dy.shape[1], h.shape[1]),
        _acc(dy, 0 if kept is None else dy.shape[1]),
        _acc(dy, dy.shape[1] if need_bias else 0),
    ),
)
"""All that one read of dy gives: dv = dy (c ⊙ B̂) [T, R], dB̂ = scale · c ⊙ (dyᵀ h) [N, R] (acc),
dm = Σ_t dy ⊙ u / divisor [N] (acc), 0 where the divisor is 0, and Σ_t dy [N] (acc). What is not asked for (B̂, h, kept
None; need_bias False) has size 0.

`kept` is what expand kept (h and B̂ must then be given) and `divisor` the norm [N]; or with `kept_is_y` any [T, N]
tensor that stands for c ⊙ u, and the divisor m.
"""

input_backward = _register(
    "input_backward(Tensor dy, Tensor? weight, Tensor dv, Tensor? A_hat, Tensor? x, int r, float scale, Tensor? c,"
    " int[] ranks, float[] dropout_p, Tensor? seed, bool two_term, str backend) -> (Tensor, Tensor)",
    lambda dy, weight, dv, A_hat, x, r, scale, c, ranks, dropout_p, seed, two_term: (
        dy.new_empty(0 if weight is None else (dy.shape[0], weight.shape[1])),
        _acc(dv, 0) if x is None else _acc(dv, r, x.shape[1]),
    ),
)
"""dx = (dy ⊙ c) W + drop(scale · dv Â) → [T, K] in dy's dtype, accumulated in one buffer, and
dÂ = scale · dvᵀ drop(x) of the first r columns of dv → [r, K] (acc); reads x once; masks as in project.

Without a weight dx, without x dÂ has size 0.
`two_term`: dx = dy W + drop((dy ⊙ (c − 1)) W + scale · dv Â), the gradient of PEFT's DoRA with dropout.
"""

weight_grad = _register(
    "weight_grad(Tensor dy, Tensor x, Tensor? c, float dropout_p, Tensor? seed, str backend) -> Tensor",
    lambda dy, x, c, dropout_p, seed: dy.new_empty((dy.shape[1], x.shape[1])),
)
"""dW = c ⊙ (dyᵀ x) → [N, K] in dy's dtype, for a base that trains too.

dropout_p > 0 (PEFT's two-term DoRA): dyᵀ (x − drop(x)) + c ⊙ (dyᵀ drop(x)).
"""


def _stack_factors_fake(
    A: Tensor | None,
    router: Tensor | None,
    frozen_A: Tensor | None,
    B: Tensor,
    frozen_B: Tensor | None,
    residual: Tensor | None,
    dtype: torch.dtype,
) -> Outputs:
    parts = [part for part in (A, router, frozen_A) if part is not None]
    columns = sum(each.shape[0] * each.shape[2] for each in (B, frozen_B) if each is not None)
    rows = (sum(part.shape[0] for part in parts), parts[0].shape[1]) if parts else 0
    return B.new_empty(rows, dtype=dtype), B.new_empty((B.shape[1], columns), dtype=dtype)


stack_factors = _register(
    "stack_factors(Tensor? A, Tensor? router, Tensor? frozen_A, Tensor B, Tensor? frozen_B, Tensor? residual,"
    " ScalarType dtype, str backend) -> (Tensor, Tensor)",
    _stack_factors_fake,
)
"""A mixture's factors side by side, in `dtype`: [A; G; A⁰] of A [R, K], the router [E, K], frozen_A [R₀, K], those that
are given (size 0 if none is), and [B | −γ B⁰], [N, E r + E₀ r₀], of B [E, N, r], frozen_B [E₀, N, r₀], residual γ [E₀].
"""


def _project_route_fake(
    x: Tensor,
    A_hat: Tensor,
    ranks: Any,
    dropout_p: Any,
    seed: Tensor | None,
    gates: Tensor | None,
    scale: Tensor,
    token_share: Tensor | None,
    experts: int,
    rank: int,
    top_k: int,
    renormalize: bool,
    shared: bool,
) -> Outputs:
    T, columns = x.shape[0], A_hat.shape[0]
    passed = columns - (rank if shared else experts * rank) - (experts if gates is None else 0)
    h, v = (A_hat.new_empty((T, width)) for width in (columns, experts * rank + passed))
    w = _acc(h, T, experts) if gates is None else _acc(h, 0)
    return h, v, w, _acc(h, experts), _acc(h, experts), _acc(h, 1)


project_route = _register(
    "project_route(Tensor x, Tensor A_hat, int[] ranks, float[] dropout_p, Tensor? seed, Tensor? gates, Tensor scale,"
    " Tensor? token_share, int experts, int rank, int top_k, bool renormalize, bool shared, str backend)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _project_route_fake,
)
"""A mixture's project, and its gating in rank space: h = [u | logits | rest] as `project` finds it, then
v = [w_te · s_e · u_te | rest] in h's dtype, w [T, E] (acc), and sums over tokens (acc): chosen f [E], mean probability
P [E], mean logsumexp² [1].

u has `rank` columns for each of `experts`, or with `shared` `rank` columns for all. w is the softmax of the logits
(`experts` columns), zero but for the `top_k` largest (the lowest index wins ties), with `renormalize` divided by its
sum; or `gates` [T, E] (acc), then h has no logits, and the third result has size 0. Where w is 0, v is 0, whatever u.
`scale` is s [E] (acc); `token_share` [T] (acc) weighs the tokens in f, P and z, 0: not counted; None: all alike.
"""


def _expand_route_backward_fake(
    dy: Tensor,
    v: Tensor | None,
    B_hat: Tensor,
    need_bias: bool,
    h: Tensor,
    w: Tensor,
    scale: Tensor,
    token_share: Tensor | None,
    dP: Tensor,
    dz: Tensor,
    need_scale: bool,
    given: bool,
    experts: int,
    *_: Any,
) -> Outputs:
    return (
        torch.empty_like(h),
        _acc(dy, 0) if v is None else _acc(v, dy.shape[1], v.shape[1]),
        _acc(dy, dy.shape[1] if need_bias else 0),
        _acc(h, *w.shape) if given else _acc(h, 0),
        _acc(h, experts if need_scale else 0),
    )


expand_route_backward = _register(
    "expand_route_backward(Tensor dy, Tensor? v, Tensor B_hat, bool need_bias, Tensor h, Tensor w, Tensor scale,"
    " Tensor? token_share, Tensor dP, Tensor dz, bool need_scale, bool given, int experts, int rank, bool renormalize,"
    " bool shared, str backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _expand_route_backward_fake,
)
"""Of a mixture, expand's backward and the gating's: with dv = dy B̂, and dP [E] and dz [1] of the mean probability and
mean logsumexp², → dh = [du | dlogits | drest] in h's layout and dtype, dB̂ = dyᵀ v [N, R] (acc; size 0 without v),
Σ_t dy [N] (acc; size 0 unless `need_bias`), d gates [T, E] (acc; size 0 unless `given`), ds [E] (acc; size 0 unless
`need_scale`).

w is the one that project_route found, or with `given` its `gates`. An expert with w = 0 gets no du and no ds.
"""


def _reflected_acc(x: Tensor, u: Tensor, *shape: Any) -> Tensor:
    return u.new_empty(shape, dtype=accumulate_dtype(torch.promote_types(x.dtype, u.dtype)))


reflect = _register(
    "reflect(Tensor x, Tensor u, Tensor? v, Tensor? bias, str backend) -> Tensor",
    lambda x, u, v, bias: x.new_empty(x.shape),
)
"""Every block of x's columns reflected, x − 2 (x·û) û, or with v x − (x·û) û + (x·v̂) v̂, + bias → [T, C] in x's dtype,
from one read of x.

u, v are [blocks, C / blocks], û = u / ‖u‖, computed in acc of the wider of x and u; a vector of length 0 does nothing.
"""

reflect_backward = _register(
    "reflect_backward(Tensor dy, Tensor x, Tensor u, Tensor? v, bool need_dx, str backend) -> (Tensor, Tensor, Tensor)",
    lambda dy, x, u, v, need_dx: (
        dy.new_empty(dy.shape if need_dx else 0),
        _reflected_acc(x, u, *u.shape),
        _reflected_acc(x, u, *(0,) if v is None else u.shape),
    ),
)
"""dx [T, C] in dy's dtype (size 0 unless `need_dx`), du and dv [blocks, C / blocks] (acc; dv of size 0 without v), from
one read of dy and of x.

du_i ⟂ u_i and dv_i ⟂ v_i; a vector of length 0 has gradient 0. dx alone is reflect of dy: a reflection is symmetric.
"""

dropout_mask = _register(
    "dropout_mask(int T, int K, float dropout_p, Tensor seed, str backend) -> Tensor",
    lambda T, K, dropout_p, seed: seed.new_empty((T, K), dtype=torch.bool),
)
"""The elements of a [T, K] input that dropout keeps, as the other ops decide them from the same seed."""

NAMES = tuple(_OPS)
"""Every op of the contract."""

_registered = {backend: _Registered(backend) for backend in backends.NAMES}
