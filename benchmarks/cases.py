"""What is measured: the cases of the quick, the standard and the full set, sized to the device.

    for case in cases("standard", methods=("lora", "dora"), device="cuda", half="bf16"):

A case is one method at one shape, in one precision and one mode; every implementation of it is
timed side by side.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

import torch


class Precision(NamedTuple):
    """Dtypes of a case, and what tables call them."""

    dtype: torch.dtype
    adapter_dtype: torch.dtype
    autocast: bool
    text: str


_BF16, _FP16, _FP32 = torch.bfloat16, torch.float16, torch.float32

PRECISIONS = {
    "bf16-autocast": Precision(_BF16, _FP32, True, "bf16 base, fp32 adapters, autocast"),
    "bf16-fp32": Precision(_BF16, _FP32, False, "bf16 base, fp32 adapters, no autocast"),
    "bf16": Precision(_BF16, _BF16, False, "all bf16"),
    "fp16-autocast": Precision(_FP16, _FP32, True, "fp16 base, fp32 adapters, autocast"),
    "fp16-fp32": Precision(_FP16, _FP32, False, "fp16 base, fp32 adapters, no autocast"),
    "fp16": Precision(_FP16, _FP16, False, "all fp16"),
    "fp32": Precision(_FP32, _FP32, False, "all fp32"),
}
"""Name → dtypes; `...-autocast` is PEFT's default and what Trainer runs."""

SHAPES = {
    "smollm2-135m.q": (576, 576),
    "smollm2-135m.up": (576, 1536),
    "smollm2-135m.down": (1536, 576),
    "qwen2.5-0.5b.up": (896, 4864),
    "vit-l.qkv": (1024, 3072),
    "vit-l.fc1": (1024, 4096),
    "sdxl.attention": (1280, 1280),
    "sdxl.cross-k": (2048, 1280),
    "llama3.2-1b.q": (2048, 2048),
    "llama3-8b.q": (4096, 4096),
    "llama3-8b.k": (4096, 1024),
    "llama3-8b.up": (4096, 14336),
    "llama3-8b.down": (14336, 4096),
    "mistral-24b.up": (5120, 32768),
    "qwen2.5-14b.up": (5120, 13824),
    "llama3-70b.q": (8192, 8192),
    "llama3-70b.down": (28672, 8192),
}
"""Model and projection → K in-features, N out-features."""

MIXTURES = ("moe", "goat")
"""Methods with experts."""
REFLECTIONS = ("ether", "ether-both", "ether-plus", "ether-plus-both")
"""Methods without a rank: blocks of reflections, of the input side or of both."""

SETS = ("quick", "standard", "full")
FORWARD, BOTH = "forward", "forward+backward"


@dataclass(frozen=True)
class Case:
    """One adapted linear layer.

    Args:
        method: Key of benchmarks.layer.methods.METHODS.
        shape: Where K and N come from; free text.
        T, K, N, r: Tokens, in-features, out-features, rank (of a mixture: of each expert; of
            reflections 0).
        precision: Key of PRECISIONS.
        mode: FORWARD (no gradients: inference, prefill) or BOTH (with dx).
        dropout_p: On the low-rank branch's input.
        E: Experts, for methods that have them.
        k: How many of them a token chooses.
        n_blocks: Of each side, for methods that reflect.
        compiled: Whether torch.compile's rivals run: they take long to build.
    """

    method: str
    shape: str
    T: int
    K: int
    N: int
    r: int
    precision: str
    mode: str = BOTH
    dropout_p: float = 0.0
    E: int | None = None
    k: int | None = None
    n_blocks: int | None = None
    compiled: bool = False

    @property
    def key(self) -> str:
        """What tells this case from every other, in words."""
        dropout = f" p={self.dropout_p:g}" if self.dropout_p else ""
        experts = f" E={self.E} k={self.k}" if self.E else ""
        inner = f"n={self.n_blocks}" if self.n_blocks else f"r={self.r}{experts}"
        sizes = f"T={self.T} K={self.K} N={self.N} {inner}"
        return f"{self.method} {sizes} {self.precision}{dropout} {self.mode}"

    @property
    def work(self) -> float:
        """Multiply-adds of the frozen linear: what a progress bar weighs cases by."""
        return self.T * self.K * self.N * (2.0 if self.mode == BOTH else 1.0)

    def columns(self) -> dict[str, Any]:
        """Return the record's columns that say what was measured."""
        narrow, wide, *_ = PRECISIONS[self.precision]
        dtypes = {"dtype": str(narrow).removeprefix("torch."), "adapter_dtype": str(wide).removeprefix("torch.")}
        facts = asdict(self)
        del facts["compiled"]
        return facts | dtypes


def cases(which: str, methods: tuple[str, ...], device: str, half: str) -> Iterator[Case]:
    """Return the layers of a set.

    Args:
        which: One of SETS.
        methods: Keys of METHODS.
        device: "cpu", "cuda", ...
        half: "bf16", "fp16", or "fp32" where the device has no faster dtype.
    """
    base = half if half == "fp32" else f"{half}-autocast"
    gpu = device.startswith("cuda")
    for method in methods:
        if method in MIXTURES:
            yield from _mixtures(which, method, base, gpu)
        elif method in REFLECTIONS:
            yield from _reflections(which, method, base, gpu)
        elif which == "quick":
            yield from _quick(method, base, gpu)
        elif which == "standard":
            yield from _standard(method, base, gpu)
        else:
            yield from _full(method, base)


def _case(method: str, shape: str, T: int, r: int, precision: str, **others: Any) -> Case:
    return Case(method, shape, T, *SHAPES[shape], r, precision, **others)


def _hub(
    method: str, shape: str, precision: str, hub: tuple[int, int], tokens: tuple[int, ...], ranks: tuple[int, ...]
) -> Iterator[Case]:
    """Scaling from a hub (T, r): every T at its r, every r at its T, inference, dropout."""
    T, r = hub
    centre = _case(method, shape, T, r, precision)
    yield replace(centre, compiled=True)
    yield from (replace(centre, T=other) for other in tokens if other != T)
    yield from (replace(centre, r=other) for other in ranks if other != r)
    yield replace(centre, mode=FORWARD)
    yield replace(centre, dropout_p=0.1)


def _quick(method: str, precision: str, gpu: bool) -> Iterator[Case]:
    if gpu:
        yield from _hub(method, "llama3-8b.q", precision, (4096, 16), (512, 16384), (64,))
        yield from (_case(method, shape, 4096, 16, precision) for shape in ("llama3-8b.up", "llama3-8b.down"))
    else:
        yield from _hub(method, "smollm2-135m.up", precision, (256, 16), (64, 1024), (4, 64))
        yield from (_case(method, shape, 256, 16, precision) for shape in ("smollm2-135m.q", "smollm2-135m.down"))


def _standard(method: str, precision: str, gpu: bool) -> Iterator[Case]:
    if not gpu:
        yield from _hub(method, "qwen2.5-0.5b.up", precision, (1024, 16), (256, 4096), (4, 64, 256))
        others = ("smollm2-135m.q", "smollm2-135m.up", "smollm2-135m.down", "vit-l.qkv", "sdxl.attention")
        yield from (_case(method, shape, 1024, 16, precision) for shape in others)
        return
    yield from _hub(method, "llama3-8b.q", precision, (8192, 16), (512, 2048, 32768), (4, 64, 256))
    yield from (
        _case(method, name, 8192, 16, precision)
        for name in SHAPES
        if name.startswith(("llama3", "qwen2.5-14b")) and name != "llama3-8b.q"
    )
    narrow = precision.removesuffix("-autocast")
    yield from (_case(method, name, 8192, 16, narrow) for name in ("llama3-8b.q", "llama3-8b.down", "llama3-70b.q"))
    yield _case(method, "llama3-8b.q", 8192, 16, f"{narrow}-fp32")


def _full(method: str, precision: str) -> Iterator[Case]:
    narrow = precision.removesuffix("-autocast")
    precisions = [precision] if precision == "fp32" else [precision, narrow, f"{narrow}-fp32", "fp32"]
    for shape in SHAPES:
        for T in (512, 2048, 8192, 32768, 65536):
            for r in (4, 8, 16, 32, 64, 128, 256):
                yield _case(method, shape, T, r, precision, compiled=(T, r) == (8192, 16))
        for other in precisions[1:]:
            yield _case(method, shape, 8192, 16, other)
        yield _case(method, shape, 8192, 16, precision, mode=FORWARD)
        yield _case(method, shape, 8192, 16, precision, dropout_p=0.1)


def _place(which: str, gpu: bool) -> tuple[str, int]:
    """Shape and T that mixtures and reflections are varied around."""
    if gpu:
        return "llama3-8b.q", 8192
    return ("smollm2-135m.up", 256) if which == "quick" else ("llama3.2-1b.q", 1024)


def _mixtures(which: str, method: str, precision: str, gpu: bool) -> Iterator[Case]:
    """Eight experts of rank 4, two for a token, then other ranks (16 for `benchmarks.report`'s
    check), E and k.
    """
    shape, T = _place(which, gpu)
    centre = _case(method, shape, T, 4, precision, E=8, k=2)
    yield replace(centre, compiled=which != "quick")
    if which == "quick" and method != MIXTURES[0]:
        return
    yield from (replace(centre, r=r) for r in (1, 2, 16))
    yield replace(centre, mode=FORWARD)
    if which == "quick":
        return
    yield replace(centre, dropout_p=0.05)
    if which == "standard":
        yield from (replace(centre, E=E) for E in (2, 4, 16, 32))
        if gpu:
            yield from (replace(centre, T=other) for other in (512, 2048, 32768))
            yield replace(centre, precision=precision.removesuffix("-autocast"))
            yield from (_case(method, name, T, 4, precision, E=8, k=2) for name in ("llama3-8b.up", "llama3-8b.down"))
        return
    sweep = ((E, k, r) for E in (2, 4, 8, 16, 32, 64) for k in (1, 2, 4, E) for r in (1, 2, 4, 8, 16, 32))
    fits = dict.fromkeys((E, k, r) for E, k, r in sweep if k <= E and E * (r + 1) <= 512)
    yield from (replace(centre, E=E, k=k, r=r) for E, k, r in fits if (E, k) != (8, 2) or r in (8, 32))
    for name in SHAPES:
        yield from (_case(method, name, other, 4, precision, E=8, k=2) for other in (512, 8192, 32768) if name != shape)


def _reflections(which: str, method: str, precision: str, gpu: bool) -> Iterator[Case]:
    """One block a side, where the authors' code computes what the paper says, then other n, T,
    shapes, inference.
    """
    shape, T = _place(which, gpu)
    centre = _case(method, shape, T, 0, precision, n_blocks=1)
    yield centre
    if which == "quick" and method != REFLECTIONS[-1]:
        return
    yield from (replace(centre, n_blocks=n) for n in (4, 32))
    yield replace(centre, mode=FORWARD)
    if which == "quick":
        return
    if which == "standard":
        tokens = (512, 2048, 32768) if gpu else (256, 4096)
        others = ("llama3-8b.up", "llama3-8b.down") if gpu else ("smollm2-135m.down", "vit-l.qkv")
        yield from (replace(centre, T=other) for other in tokens)
        yield from (_case(method, name, T, 0, precision, n_blocks=1) for name in others)
        if precision != "fp32":  # on a CPU the figures of `benchmarks.report`'s check are float32's
            yield replace(centre, precision=precision.removesuffix("-autocast") if gpu else "fp32")
        return
    for name in SHAPES:
        swept = ((other, n) for other in (512, 8192, 32768) for n in (1, 4, 32) if (name, other) != (shape, T))
        yield from (_case(method, name, other, 0, precision, n_blocks=n) for other, n in swept)
