"""What the ops of `ops.py` take together, as small tuples: inside Python one argument, in a schema
their fields in a row.

Where a compiler traces, each float is given: of one that is a default it makes an input of the
graph.

Letters: T tokens, K in-features, N out-features, R total rank, r trainable rank, E experts. `acc`
is float64 for float64 tensors and float32 for everything else.
"""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor


class Strength(NamedTuple):
    """DeLoRA's normalisation of a pair of factors; without λ (LoRA, DoRA) there is none.

    Args:
        lam: λ, one element.
        weight_norm: n, [K] or 0-d.
        eps: Lower clamp of the norms.
    """

    lam: Tensor | None = None
    weight_norm: Tensor | None = None
    eps: float = 0.0


class Start(NamedTuple):
    """DeLoRA's frozen start, which is subtracted.

    Args:
        frozen_A, frozen_B: [R₀, K], [N, R₀].
        frozen_lam: λ₀, one element; None: the live λ scales the start too.
    """

    frozen_A: Tensor | None = None
    frozen_B: Tensor | None = None
    frozen_lam: Tensor | None = None


class Folded(NamedTuple):
    """What a fold took and found, for its gradients.

    Args:
        A, B: The trainable factors, [r, K], [N, r].
        a, b: The norms of the rows of A and of the columns of B (acc), those of a frozen start
            behind.
        frozen_B: [N, R₀] where the live λ scales the frozen start too and dλ is wanted.
    """

    A: Tensor
    B: Tensor
    a: Tensor
    b: Tensor
    frozen_B: Tensor | None = None


class Masks(NamedTuple):
    """The dropout masks of the low-rank branch's input.

    Args:
        ranks: How the rows of Â are divided among masks; empty: one mask for all.
        dropout_p: For each mask the probability of dropping an element, in [0, 1).
        seed: int64, [masks], or 0-d where `ranks` is empty; None: nothing drops.
    """

    ranks: Sequence[int] = ()
    dropout_p: Sequence[float] = (0.0,)
    seed: Tensor | None = None


class RankTerm(NamedTuple):
    """The rank-R term of a frozen GEMM's output, scale · h B̂ᵀ.

    Args:
        h, B_hat: [T, R], [N, R].
        scale: Its factor.
    """

    h: Tensor
    B_hat: Tensor
    scale: float = 1.0


class TermGradients(NamedTuple):
    """What the gradients of a `RankTerm` need of it.

    Args:
        h: None: dB̂ is not wanted.
        B_hat: None: dv is not wanted.
        scale: The term's factor.
    """

    h: Tensor | None
    B_hat: Tensor | None
    scale: float = 1.0


class Rescaling(NamedTuple):
    """DoRA's column scale of u, and the dropout of PEFT's two-term form.

    Args:
        c: [N] (acc), or None for 1.
        scaled: c ⊙ W as row_norm wrote it, or None; only where nothing is kept or dropped.
        keep: Whether the tensor is kept from which Σ_t dy ⊙ u can be found.
        dropout_p: Probability of dropping an element of u's input; above 0 for PEFT's two-term
            form.
        seed: int64, 0-d, of that dropout, or None.
    """

    c: Tensor | None = None
    scaled: Tensor | None = None
    keep: bool = False
    dropout_p: float = 0.0
    seed: Tensor | None = None


class Rescaled(NamedTuple):
    """What the gradients of a rescaled u need.

    Args:
        c: As in `Rescaling`.
        kept: What expand kept; or with `kept_is_y` any [T, N] tensor that stands for c ⊙ u; None:
            no dm.
        kept_is_y: Which of them it is.
        divisor: [N]: the norm, or with `kept_is_y` the magnitude.
    """

    c: Tensor | None = None
    kept: Tensor | None = None
    kept_is_y: bool = False
    divisor: Tensor | None = None


class Frozen(NamedTuple):
    """What the frozen linear gives to dx: (dy ⊙ c) W.

    Args:
        weight: [N, K]; None: dx is not wanted.
        c: [N] (acc), or None for 1.
        two_term: PEFT's DoRA with dropout: the part with c passes through the branch's mask, the
            rest does not.
    """

    weight: Tensor | None
    c: Tensor | None = None
    two_term: bool = False


class Branch(NamedTuple):
    """The low-rank branch seen from its input: dx's term scale · dv Â, and dÂ = scale · dvᵀ
    drop(x).

    Args:
        dv: [T, R].
        A_hat: [R, K]; needed for dx.
        x: [T, K]; None: dÂ is not wanted.
        r: How many of dv's columns dÂ has.
        scale: Factor of both.
    """

    dv: Tensor
    A_hat: Tensor | None
    x: Tensor | None
    r: int
    scale: float = 1.0


class ExpertFactors(NamedTuple):
    """The factors of a mixture; None for what is not there or needs no stacking.

    Args:
        A: [R, K], the experts' rows.
        router: G, [E, K].
        frozen_A, frozen_B: A⁰ [R₀, K] and B⁰ [E₀, N, r₀], the subtracted pairs.
        B: [E, N, r].
        residual: γ [E₀].
    """

    A: Tensor | None
    router: Tensor | None
    frozen_A: Tensor | None
    B: Tensor
    frozen_B: Tensor | None
    residual: Tensor | None


class Gating(NamedTuple):
    """How a mixture's experts stand in h, and what they are weighed with.

    Args:
        experts: E.
        rank: Columns of u for each expert.
        renormalize: Whether a router's kept probabilities are divided by their sum.
        shared: Whether `rank` columns serve all experts.
        scale: s [E] (acc).
        token_share: [T] (acc), the tokens' weights in the statistics, 0: not counted; None: all
            count alike.
    """

    experts: int
    rank: int
    renormalize: bool
    shared: bool
    scale: Tensor
    token_share: Tensor | None = None

    def passed(self, columns: int, logits: int) -> int:
        """How many of h's columns stand behind u and the logits."""
        return columns - (self.rank if self.shared else self.experts * self.rank) - logits


class Gated(NamedTuple):
    """What a gating left, and the gradients of its statistics.

    Args:
        h: [T, C], [u | logits | rest], or with `given` [u | rest].
        w: [T, E] (acc), the weights.
        given: Whether they are the caller's gates.
        dP, dz: Gradients of the mean probability [E] and of the mean logsumexp² [1] (acc).
        need_scale: Whether ds is wanted.
    """

    h: Tensor
    w: Tensor
    given: bool
    dP: Tensor
    dz: Tensor
    need_scale: bool
