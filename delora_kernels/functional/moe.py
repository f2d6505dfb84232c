"""moe_lora_linear: a mixture of low-rank experts, routed or with given gates; GOAT's residual,
DoRA's magnitude.
"""

from typing import Any

from torch import Tensor

from delora_kernels import checks
from delora_kernels.autograd import function
from delora_kernels.autograd.low_rank import AdaptedLinear
from delora_kernels.autograd.mixture import MoELinear, ZeroGradient
from delora_kernels.call import Call, MoECall
from delora_kernels.functional.common import exporting, low_rank_call, run
from delora_kernels.functional.moe_arguments import moe_lora_call
from delora_kernels.functional.router_stats import RouterStats


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
    magnitude: Tensor | None = None,
    dropout_p: float = 0.0,
    dropout: str = "shared",
    seed: int | Tensor | None = None,
    balance_coef: float | Tensor = 0.0,
    z_coef: float | Tensor = 0.0,
) -> tuple[Tensor, RouterStats]:
    """Apply a frozen linear with a mixture of low-rank experts, weighed for every token by a
    router.

        y_t = W x_t + Σ_e w_te · s_e · B_e A_e drop(x_t) + bias − Σ_j γ_j · B⁰_j A⁰_j x_t
        w_t = softmax(G x_t), zero but for the top_k largest, divided by their sum

    All experts run side by side as one factor of rank E · r: the router's columns ride in the
    projection, the gating is done in rank space, and nothing is sorted. With top_k=None the softmax
    is dense (LoRAMoE; with one A, HydraLoRA). With a magnitude m, DoRA over the mixture, y but for
    the bias is multiplied by

        c = m / ‖W + 1/E Σ_e s_e B_e A_e − Σ_j γ_j B⁰_j A⁰_j‖ by rows, a constant but for m;

    a row of zero norm has c = 0.

    Args:
        x: Input, `[..., K]`; T tokens.
        weight: Frozen weight W, `[N, K]`; gets a gradient only if it requires one.
        A: `[E, r, K]`, or `[r, K]`: one that all experts share.
        B: `[E, N, r]`.
        router: G, `[E, K]`; sees x undropped. Its logits come in the branch's dtype (under autocast
            autocast's, as from nn.Linear); softmax, choice and weights are float32 or wider.
        gates: w itself, `[..., E]`, in place of a router; differentiable, also where 0. An expert
            with gate 0 adds nothing to y, even if it is not finite.
        adapter_ids: `[...]`, int64 or int32: the one expert of each token, in place of a router; −1
            (or any number that is no expert's): none.
        top_k: Experts that a router keeps for each token, from 1 to E; the lowest index wins ties;
            None: all.
        renormalize: Divide the kept probabilities by their sum (GOAT, MixLoRA, MoLA).
        scale: s, a number, or `[E]`, which may require a gradient.
        bias: `[N]` or None.
        token_mask: `[...]`, bool: the tokens that count in `RouterStats`, such as those that are no
            padding; None: all. It leaves y as it is.
        frozen_A: A⁰, `[J, r₀, K]`, a constant, or None.
        frozen_B: B⁰, `[J, N, r₀]`, a constant, or None: with A⁰ the update that is subtracted
            (GOAT's residual).
        residual: γ, a number or `[J]`, a constant.
        magnitude: m, `[N]`, or None: nothing is rescaled. The norm is that of the mean gate, 1/E
            for every expert, however the gates are had.
        dropout_p: Probability of dropping an element of the experts' input, in [0, 1).
        dropout: "shared": all experts see one mask, x is read once. "independent": each has a mask
            of its own, as in the authors' code, at the price of E masked reads of x.
        seed: Int or 0-d int64 tensor on x's device that fixes the masks; None draws from torch's
            generator.
        balance_coef: Backward adds the gradient of balance_coef · balance_loss("code") of itself,
            once for each backward pass through y, whatever scales the loss. A number, or a 0-d
            tensor, which is read in backward. A program that is exported has plain torch's
            backward, without it: there, add the loss yourself.
        z_coef: The same of z_coef · z.

    Returns:
        y, `[..., N]`, in weight's dtype (autocast's dtype under autocast), and the `RouterStats`,
        whose losses are differentiable. With one expert and a router, w is 1 and the router is not
        run: `z` is 0.

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
        magnitude=magnitude,
        dropout_p=dropout_p,
        dropout=dropout,
        seed=seed,
        balance_coef=balance_coef,
        z_coef=z_coef,
    )
    k = 1 if adapter_ids is not None else call.options.top_k
    alone = router is not None and B.shape[0] == 1
    if alone and not isinstance(scale, Tensor) and frozen_A is None and magnitude is None:
        lora = _of_one_expert(call, float(scale))
        any_token = call.scale.new_full((1,), 1.0 if call.x.shape[0] > 0 else 0.0)
        counted = any_token if call.token_share is None else call.token_share.sum().reshape(1)
        y = run(AdaptedLinear, lora, x.shape)[0]
        return y, RouterStats(counted, counted.clone(), call.scale.new_zeros(()), 1)
    y, fraction, probability, z = run(MoELinear, _without_router(call) if alone else call, x.shape)
    return y, RouterStats(fraction, probability, z.reshape(()), k)


def moe_rank_term(x: Tensor, N: int, **mixture: Any) -> tuple[Tensor, RouterStats]:
    """Compute what a mixture adds to the output of a base that has run already, `[..., N]`, and its
    `RouterStats`: `moe_lora_linear` on a weight of zeros, without its GEMM.

    Args:
        x: The base's input, `[..., K]`.
        N: The base's out-features.
        **mixture: As for `moe_lora_linear`.
    """
    if mixture.get("magnitude") is not None:
        remedy = "call moe_lora_linear with the weight"
        raise checks.fail(ValueError, "moe_rank_term", "magnitude", "None", "a tensor", remedy)
    zeros = x.new_zeros(1, 1).expand(N, x.shape[-1])
    if exporting() or mixture["B"].shape[0] == 1:
        return moe_lora_linear(x, zeros, **mixture)
    call = moe_lora_call(x, zeros, **mixture)
    y, fraction, probability, z = function.run(MoELinear, call._replace(weight=zeros[:, :0]), "eager", x.shape)
    return y, RouterStats(fraction, probability, z.reshape(()), call.options.top_k)


def _of_one_expert(call: MoECall, scale: float) -> Call:
    """Make the call of LoRA that a mixture of one expert is; its router, which is not run, gets a
    gradient of zeros.
    """
    A = call.A if call.A.dim() == 2 else call.A[0]
    A = A if exporting() else ZeroGradient.apply(A, call.router)
    seed = None if call.seed is None else call.seed[0]
    drawn: Any = {"dropout_p": call.options.dropout_p[:1], "seed": seed, "scale": scale}
    return low_rank_call("lora_linear", call.x, call.weight, call.bias, A, call.B[0], **drawn)


def _without_router(call: MoECall) -> MoECall:
    """Return the call of one expert with a given gate of 1; its router gets a gradient of zeros
    too.
    """
    A = call.A if exporting() else ZeroGradient.apply(call.A, call.router)
    gates = call.scale.new_ones(call.x.shape[0], 1)
    ranks, dropout_p, seed = call.options.ranks, call.options.dropout_p, call.seed
    if ranks:  # the last is of what is not dropped, the router's row in it
        ranks = (*ranks[:-1], ranks[-1] - 1) if ranks[-1] > 1 else ranks[:-1]
        dropout_p, seed = dropout_p[: len(ranks)], None if seed is None else seed[: len(ranks)]
    options = call.options._replace(ranks=ranks, dropout_p=dropout_p)
    return call._replace(A=A, router=None, gates=gates, seed=seed, options=options)
