"""The public functions: check the arguments, settle dtypes, seed and backend, run the one autograd Function.

Every function takes x `[..., K]`, a frozen weight `[N, K]` in nn.Linear's layout and small factors in any float dtype.
Each gradient has the dtype of its tensor. Without autocast x and weight share one dtype; factors may be wider (PEFT's
float32 adapters on a bf16 base), the low-rank branch then runs in the wider dtype. Under torch.autocast x and weight
are cast as nn.Linear casts them and the branch runs in autocast's dtype. Outputs are deterministic; second derivatives
and torch.func transforms are refused: `delora_kernels.reference` has the linear functions in plain torch for those.
"""

from collections.abc import Sequence

from torch import Tensor

from delora_kernels import adapted_linear, backends, moe_linear, reflected_linear
from delora_kernels.call import Call
from delora_kernels.calls import (
    delora_call,
    dora_call,
    ether_call,
    ether_plus_call,
    factors_call,
    lora_call,
    moe_lora_call,
)
from delora_kernels.fold import Fold
from delora_kernels.routing import RouterStats


def lora_linear(
    x: Tensor,
    weight: Tensor,
    A: Tensor,
    B: Tensor,
    scale: float = 1.0,
    bias: Tensor | None = None,
    *,
    ranks: Sequence[int] | None = None,
    dropout_p: float | Sequence[float] = 0.0,
    seed: int | Tensor | None = None,
) -> Tensor:
    """A frozen linear with a low-rank update.

        y = x Wᵀ + scale · drop(x) Aᵀ Bᵀ + bias

    rsLoRA is scale = alpha / √r. Several adapters are one of their summed rank, A and B stacked.

    Args:
        x: Input, `[..., K]`.
        weight: Frozen weight W, `[N, K]`; gets a gradient only if it requires one.
        A: `[r, K]`.
        B: `[N, r]`.
        scale: Factor s of the update, usually alpha / r.
        bias: `[N]` or None.
        ranks: Ranks of the adapters stacked in A's rows and B's columns, each with its own dropout mask; None: one.
        dropout_p: Probability of dropping an element of the branch's input, in [0, 1); one for each of `ranks`, or one
            for all.
        seed: Int or 0-d int64 tensor on x's device that fixes the dropout mask (seed + i that of adapter i); None draws
            from torch's generator.

    Returns:
        y, `[..., N]`, in weight's dtype (autocast's dtype under autocast).

    Raises:
        TypeError, ValueError: an argument does not fit; the text names it and the remedy.
        RuntimeError: the requested backend can't take the call.

    Source: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models" (arXiv:2106.09685), eq. 3.
    """
    return _run(lora_call(x, weight, A, B, scale, bias, ranks=ranks, dropout_p=dropout_p, seed=seed), x)


def dora_linear(
    x: Tensor,
    weight: Tensor,
    A: Tensor,
    B: Tensor,
    magnitude: Tensor,
    scale: float = 1.0,
    bias: Tensor | None = None,
    *,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    dropout: str = "peft",
    saved: str = "private",
) -> Tensor:
    """A frozen linear whose updated weight rows are rescaled to learned magnitudes.

        y = c ⊙ (x Wᵀ + scale · x Aᵀ Bᵀ) + bias,   c = magnitude / ‖W + scale · B A‖ by rows, the norm detached

    A row of zero norm has c = 0: its output is the bias and no gradient passes through it.

    Args:
        x: Input, `[..., K]`.
        weight: Frozen weight W, `[N, K]`; gets a gradient only if it requires one.
        A: `[r, K]`.
        B: `[N, r]`.
        magnitude: m, `[N]`.
        scale: Factor s of the update, usually alpha / r.
        bias: `[N]` or None.
        dropout_p: Probability of dropping an element, in [0, 1).
        seed: Int or 0-d int64 tensor on x's device that fixes the dropout mask; None draws from torch's generator.
        dropout: "peft": with x' = drop(x), y = (x − x') Wᵀ + c ⊙ (x' Wᵀ + scale · x' Aᵀ Bᵀ) + bias, two frozen GEMMs.
            "branch": only the low-rank branch sees drop(x), one frozen GEMM.
        saved: "private": backward keeps a `[T, N]` tensor of its own. "output": it keeps y, which costs nothing where
            the consumer keeps y too; y must then not be modified in place (autograd refuses), there may be no bias and
            no two-term dropout, and an exactly zero magnitude gets no gradient.

    Returns:
        y, `[..., N]`, in weight's dtype (autocast's dtype under autocast).

    Raises:
        TypeError, ValueError: an argument does not fit; the text names it and the remedy.
        RuntimeError: the requested backend can't take the call.

    Source: Liu et al., "DoRA: Weight-Decomposed Low-Rank Adaptation" (arXiv:2402.09353), eq. 5 and section 4.3.
    """
    call = dora_call(
        x, weight, A, B, magnitude, scale, bias, dropout_p=dropout_p, seed=seed, dropout=dropout, saved=saved
    )
    return _run(call, x)


def delora_linear(
    x: Tensor,
    weight: Tensor,
    A: Tensor,
    B: Tensor,
    lam: Tensor | float,
    weight_norm: Tensor | float,
    bias: Tensor | None = None,
    *,
    frozen_A: Tensor | None = None,
    frozen_B: Tensor | None = None,
    frozen_lam: Tensor | float | None = None,
    eps: float = 1e-4,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
) -> Tensor:
    """A frozen linear with a normalised low-rank update of bounded norm: angle and strength learn apart.

        y = x Wᵀ + drop(x) Âᵀ B̂ᵀ + bias,   Â = diag(1/‖A_i‖) A diag(n),   B̂ = B diag(λ / (r ‖B_i‖))

    With a frozen start (A₀, B₀) the pair's own update, scaled by λ₀, is subtracted. ‖ΔW‖_F ≤ λ max n (PEFT's form).

    Args:
        x: Input, `[..., K]`.
        weight: Frozen weight W, `[N, K]`; gets a gradient only if it requires one.
        A: `[r, K]`; only its rows' directions matter.
        B: `[N, r]`; only its columns' directions matter.
        lam: λ, the strength; a number, or a 0-d or `[1]` tensor.
        weight_norm: n, a constant: `[K]`, one value for each input column (PEFT and the authors' code), or a number or
            0-d tensor (the paper's ‖W‖).
        bias: `[N]` or None.
        frozen_A: A₀, `[r₀, K]`, a constant, or None.
        frozen_B: B₀, `[N, r₀]`, a constant, or None.
        frozen_lam: λ₀ of the frozen start (the paper), or None: the live λ (the authors' code).
        eps: Lower clamp of the norms, which then get no gradient (PEFT: 1e-4); 0: no clamp, and a factor of length 0
            contributes nothing.
        dropout_p: Probability of dropping an element of the branch's input, in [0, 1).
        seed: Int or 0-d int64 tensor on x's device that fixes the dropout mask; None draws from torch's generator.

    Returns:
        y, `[..., N]`, in weight's dtype (autocast's dtype under autocast).

    Raises:
        TypeError, ValueError: an argument does not fit; the text names it and the remedy.
        RuntimeError: the requested backend can't take the call.

    Source: Bini et al., "Decoupling Angles and Strength in Low-rank Adaptation" (arXiv:2503.18225), eqs. 5-9.
    """
    call = delora_call(
        x,
        weight,
        A,
        B,
        lam,
        weight_norm,
        bias,
        frozen_A=frozen_A,
        frozen_B=frozen_B,
        frozen_lam=frozen_lam,
        eps=eps,
        dropout_p=dropout_p,
        seed=seed,
    )
    return _run(call, x)


def delora_factors(
    A: Tensor, B: Tensor, lam: Tensor | float, weight_norm: Tensor | float, *, eps: float = 1e-4
) -> tuple[Tensor, Tensor]:
    """DeLoRA's normalised update as a plain low-rank pair, which `lora_linear` takes with scale 1.

        Â = diag(1/‖A_i‖) A diag(n),   B̂ = B diag(λ / (r ‖B_i‖)),   ΔW = B̂ Â

    Args:
        A: `[r, K]`.
        B: `[N, r]`.
        lam: λ; a number, or a 0-d or `[1]` tensor.
        weight_norm: n, a constant: `[K]`, or a number or 0-d tensor.
        eps: Lower clamp of the norms, which then get no gradient (PEFT: 1e-4); 0: no clamp, and a factor of length 0
            contributes nothing.

    Returns:
        Â `[r, K]` and B̂ `[N, r]`, in the wider dtype of A and B, computed in float32 or wider; differentiable once.

    Raises:
        TypeError, ValueError: an argument does not fit; the text names it and the remedy.

    Source: Bini et al., "Decoupling Angles and Strength in Low-rank Adaptation" (arXiv:2503.18225), eqs. 5-8.
    """
    lam, weight_norm, eps = factors_call(A, B, lam, weight_norm, eps)
    A_hat, B_hat = Fold.apply(A, B, lam, weight_norm, eps, backends.requested() or "eager")
    return A_hat, B_hat


def moe_lora_linear(
    x: Tensor,
    weight: Tensor,
    A: Tensor,
    B: Tensor,
    router: Tensor | None = None,
    *,
    gates: Tensor | None = None,
    adapter_ids: Tensor | None = None,
    top_k: int | None = None,
    renormalize: bool = True,
    scale: float | Tensor = 1.0,
    bias: Tensor | None = None,
    token_mask: Tensor | None = None,
    frozen_A: Tensor | None = None,
    frozen_B: Tensor | None = None,
    residual: float | Tensor = 1.0,
    dropout_p: float = 0.0,
    dropout: str = "shared",
    seed: int | Tensor | None = None,
    balance_coef: float | Tensor = 0.0,
    z_coef: float | Tensor = 0.0,
) -> tuple[Tensor, RouterStats]:
    """A frozen linear with a mixture of low-rank experts, weighed for every token by a router.

        y_t = W x_t + Σ_e w_te · s_e · B_e A_e drop(x_t) + bias − Σ_j γ_j · B⁰_j A⁰_j x_t
        w_t = softmax(G x_t), zero but for the top_k largest, divided by their sum

    All experts run side by side as one factor of rank E · r: the router's columns ride in the projection, the gating is
    done in rank space, and nothing is sorted. With top_k=None the softmax is dense (LoRAMoE; with one A, HydraLoRA).

    Args:
        x: Input, `[..., K]`; T tokens.
        weight: Frozen weight W, `[N, K]`; gets a gradient only if it requires one.
        A: `[E, r, K]`, or `[r, K]`: one that all experts share.
        B: `[E, N, r]`.
        router: G, `[E, K]`; sees x undropped. Its logits come in the branch's dtype (under autocast autocast's, as from
            nn.Linear); softmax, choice and weights are float32 or wider.
        gates: w itself, `[..., E]`, in place of a router; differentiable, also where 0. An expert with gate 0 adds
            nothing to y, even if it is not finite.
        adapter_ids: `[...]`, int64 or int32: the one expert of each token, in place of a router; −1 (or any number that
            is no expert's): none.
        top_k: Experts that a router keeps for each token, from 1 to E; the lowest index wins ties; None: all.
        renormalize: Divide the kept probabilities by their sum (GOAT, MixLoRA, MoLA).
        scale: s, a number, or `[E]`, which may require a gradient.
        bias: `[N]` or None.
        token_mask: `[...]`, bool: the tokens that count in `RouterStats`, such as those that are no padding; None: all.
            It leaves y as it is.
        frozen_A: A⁰, `[J, r₀, K]`, a constant, or None.
        frozen_B: B⁰, `[J, N, r₀]`, a constant, or None: with A⁰ the update that is subtracted (GOAT's residual).
        residual: γ, a number or `[J]`, a constant.
        dropout_p: Probability of dropping an element of the experts' input, in [0, 1).
        dropout: "shared": all experts see one mask, x is read once. "independent": each has a mask of its own, as in
            the authors' code, at the price of E masked reads of x.
        seed: Int or 0-d int64 tensor on x's device that fixes the masks; None draws from torch's generator.
        balance_coef: Backward adds the gradient of balance_coef · balance_loss("code") of itself, once for each
            backward pass through y, whatever scales the loss. A number, or a 0-d tensor, which is read in backward.
        z_coef: The same of z_coef · z.

    Returns:
        y, `[..., N]`, in weight's dtype (autocast's dtype under autocast), and the `RouterStats`, whose losses are
        differentiable. With one expert and a router, w is 1 and the router is not run: `z` is 0.

    Raises:
        TypeError, ValueError: an argument does not fit; the text names it and the remedy.
        RuntimeError: the requested backend can't take the call.

    Source: Fan et al., "Make LoRA Great Again" (arXiv:2502.16894), equation 10; Facico/GOAT-PEFT,
    `goat/peta/src/goat/layer.py`.
    """
    call = moe_lora_call(
        x,
        weight,
        A,
        B,
        router,
        gates=gates,
        adapter_ids=adapter_ids,
        top_k=top_k,
        renormalize=renormalize,
        scale=scale,
        bias=bias,
        token_mask=token_mask,
        frozen_A=frozen_A,
        frozen_B=frozen_B,
        residual=residual,
        dropout_p=dropout_p,
        dropout=dropout,
        seed=seed,
        balance_coef=balance_coef,
        z_coef=z_coef,
    )
    k = 1 if adapter_ids is not None else call.options.top_k
    if router is not None and B.shape[0] == 1 and not isinstance(scale, Tensor) and frozen_A is None:
        A = moe_linear.ZeroGradient.apply(A if A.dim() == 2 else A[0], router)
        y = lora_linear(x, weight, A, B[0], scale, bias, dropout_p=dropout_p, seed=seed)
        any_token = call.scale.new_full((1,), float(call.x.shape[0] > 0))
        counted = any_token if call.token_share is None else call.token_share.sum().reshape(1)
        return y, RouterStats(counted, counted.clone(), call.scale.new_zeros(()), 1)
    found = moe_linear.run(call)
    return _shaped(found.y, x), RouterStats(found.fraction, found.probability, found.z.reshape(()), k)


def ether_linear(
    x: Tensor,
    weight: Tensor,
    u: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    u_out: Tensor | None = None,
    blocks: str = "paper",
) -> Tensor:
    """A frozen linear between block reflections: multiplicative, and at a fixed distance from the start.

        y = H_out W H_in x + bias,   H = blockdiag(I − 2 û_i û_iᵀ),   û = u / ‖u‖

    ‖H_i − I‖_F = 2 for every block, whatever u. The reflections act on activations: one read and one write of x, and
    of y; no matrix H, no W' and no gradient of W is made. A vector of length 0 reflects nothing and gets no gradient.

    Args:
        x: Input, `[..., K]`.
        weight: Frozen weight W, `[N, K]`; gets a gradient only if it requires one.
        u: `[blocks, K / blocks]`, one vector for each block of x's features; None: x is not reflected.
        bias: `[N]` or None.
        u_out: `[blocks, N / blocks]`, the same for the output; None: it is not reflected.
        blocks: "paper": as above. "official": what the authors' code computes for more than one block of u, where block
            i of W's rows meets H_i in each of its column blocks; it makes W' and its gradient.

    Returns:
        y, `[..., N]`, in weight's dtype (autocast's dtype under autocast).

    Raises:
        TypeError, ValueError: an argument does not fit; the text names it and the remedy.
        RuntimeError: the requested backend can't take the call.

    Source: Bini et al., "ETHER: Efficient Finetuning of Large-Scale Models with Hyperplane Reflections"
    (arXiv:2405.20271); mwbini/ether, `ether-instruct/lit_gpt/ether.py`.
    """
    return _shaped(reflected_linear.run(ether_call(x, weight, u, bias, u_out=u_out, blocks=blocks)), x)


def ether_plus_linear(
    x: Tensor,
    weight: Tensor,
    u: Tensor | None = None,
    v: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    u_out: Tensor | None = None,
    v_out: Tensor | None = None,
    blocks: str = "paper",
) -> Tensor:
    """A frozen linear between relaxed block reflections, which can be the identity.

        y = H_out W H_in x + bias,   H = blockdiag(I − û_i û_iᵀ + v̂_i v̂_iᵀ),   û = u / ‖u‖, v̂ = v / ‖v‖

    ‖H_i − I‖_F ≤ √2 for every block; 0 where v = ±u.

    Args:
        x: Input, `[..., K]`.
        weight: Frozen weight W, `[N, K]`; gets a gradient only if it requires one.
        u, v: `[blocks, K / blocks]`, two vectors for each block of x's features; both None: x stays as it is.
        bias: `[N]` or None.
        u_out, v_out: `[blocks, N / blocks]`, the same for the output; both None: it stays as it is.
        blocks: "paper" or "official", as in `ether_linear`.

    Returns:
        y, `[..., N]`, in weight's dtype (autocast's dtype under autocast).

    Raises:
        TypeError, ValueError: an argument does not fit; the text names it and the remedy.
        RuntimeError: the requested backend can't take the call.

    Source: Bini et al. (arXiv:2405.20271), ETHER+; mwbini/ether, `ether-instruct/lit_gpt/ether.py`.
    """
    call = ether_plus_call(x, weight, u, v, bias, u_out=u_out, v_out=v_out, blocks=blocks)
    return _shaped(reflected_linear.run(call), x)


def _run(call: Call, x: Tensor) -> Tensor:
    return _shaped(adapted_linear.run(call), x)


def _shaped(y: Tensor, x: Tensor) -> Tensor:
    return y if x.dim() == 2 else y.view(*x.shape[:-1], y.shape[-1])


backends.load("eager")
