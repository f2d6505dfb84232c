"""Which experts modules compute what experts_block.py computes: those of Transformers'
`use_experts_implementation`, whose forward is recognised exactly.

The decorator hands a call to the function that the model's configuration names. Two that come with
Transformers are the block's formula for every module (`grouped_mm`, `batched_mm`); "eager" is the
forward that each model family wrote for itself, which is compared, statement by statement, with
those that have been read. Whatever is not one of these is not ours to replace.
"""

import ast
import hashlib
import inspect
import textwrap
from collections.abc import Callable
from typing import Any

from torch import nn

try:
    from transformers.integrations import moe
except ImportError:  # a Transformers before this interface: there are no such modules
    moe = None  # type: ignore[assignment]

READ = {
    "fe24abe534064038": "chunked",  # Qwen3-MoE, Mixtral, DeepSeek, Granite and 50 families more
    "02d841dd901211cb": "own gate",  # DeepSeek V4, MiniMax M3 and others, whose gate clamps
    "c87ddac0d57a2396": "chunked",  # Aria: weights lie transposed
    "4a979044d76a30f4": "own gate",  # gpt-oss: transposed, biases, gate and up interleaved
    "95f24794455762db": "own gate",  # Inkling 2, which sums in float32
    "ff67dcfd2ed096b4": "chunked",  # Muse Spark: a norm behind each expert
    "aba29b3754f5fb4d": "ungated",  # Nemotron-H
}
"""Fingerprint of an eager forward that has been read → how it treats gate and up: "chunked", which
is the decorator's default, or by the module's own method, or there is no gate.
"""

QUANTISED = {
    "integrations.mxfp4.Mxfp4GptOssExperts": ("MXFP4", "Mxfp4Config"),
    "integrations.finegrained_fp8.FP8Experts": ("FP8", "FineGrainedFP8Config"),
}
"""Transformers' modules for quantised experts → what they hold, and the configuration that loads it
dense.
"""


def why_not_known(experts: nn.Module) -> str | None:
    """Say why a module is no experts module whose forward is known, or None if it is."""
    kind, config = type(experts), experts.__dict__.get("config")
    return _why_not(kind, getattr(config, "_experts_implementation", None))


def computes_by_weight_dtype(experts: nn.Module) -> bool:
    """Whether x is cast to the weights' dtype, also under autocast: as Transformers' grouped GEMM
    does, and nobody else.
    """
    return getattr(experts.__dict__.get("config"), "_experts_implementation", None) == "grouped_mm"


def is_quantised(experts: nn.Module) -> bool:
    """Whether a module is one of Transformers' for quantised experts."""
    return _name(type(experts)) in QUANTISED


def _name(kind: Any) -> str:
    module = kind.__module__.removeprefix("transformers.").removeprefix("models.")
    return f"{module}.{kind.__qualname__}"


def _why_not(kind: Any, implementation: Any) -> str | None:
    """Judge a class under the implementation that its configuration names."""
    name = _name(kind)
    if name in QUANTISED:
        stored, configuration = QUANTISED[name]
        return (
            f"its experts are stored in {stored} ({kind.__qualname__}), which is not read here: load it with "
            f"quantization_config={configuration}(dequantize=True), for 4 bits in load_with_quantized_experts"
        )
    if moe is None or getattr(kind.forward, "__code__", None) is not _DECORATED:
        return f"the module that holds its parameter is {name}, no experts module of Transformers that is known"
    cells = zip(kind.forward.__code__.co_freevars, kind.forward.__closure__ or (), strict=True)
    held = {variable: cell.cell_contents for variable, cell in cells}
    original = held["original_forward"]
    function = original if implementation is None else held["experts_interface"].get(implementation, original)
    if function in (moe.grouped_mm_experts_forward, moe.batched_mm_experts_forward):
        return None
    if function is not original:
        return f"its experts implementation is {implementation!r}, which is not known"
    form = READ.get(fingerprint(original))
    if form is None:
        return f"the eager forward of {name} is not known"
    if form == "chunked" and kind._apply_gate is not moe._default_apply_gate:
        return f"{name} has a gate of its own, which its eager forward does not call"
    return None


# Reading sources is nothing that torch.compile could trace.
_why_not._dynamo_marked_constant = True  # type: ignore[attr-defined]


def fingerprint(function: Callable[..., Any]) -> str:
    """Return a digest of a function's statements: comments, docstring, layout and annotations are
    no part of it.
    """
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, SyntaxError, TypeError):
        return ""
    (node,) = tree.body
    return fingerprint_of(node) if isinstance(node, ast.FunctionDef) else ""


def fingerprint_of(node: ast.FunctionDef) -> str:
    """Return the same of a definition that is parsed already."""
    for argument in ast.walk(node.args):
        if isinstance(argument, ast.arg):
            argument.annotation = None
    body = node.body[1:] if ast.get_docstring(node) is not None else node.body
    text = "\n".join([ast.unparse(node.args), *map(ast.unparse, body)])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _decorated() -> Any:
    """Return the code that the decorator gives to the forward of every class."""
    if moe is None:
        return object()

    class Empty(nn.Module):
        def forward(self) -> None:
            return None

    return moe.use_experts_implementation(Empty).forward.__code__


_DECORATED = _decorated()
