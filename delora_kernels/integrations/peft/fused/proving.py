"""The kernels that a model's layers will call prove themselves before training, and every rank of a
distributed run takes the weakest result.

Which kernels those are depends on a layer's method, rank class, dtypes, dropout and device: a model
has a handful. On a CPU, or where a backend is asked for, an automatic choice has nothing to prove.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from delora_kernels.call import AnyCall
from delora_kernels.diagnostics import proof
from delora_kernels.diagnostics.proof import Proof
from delora_kernels.diagnostics.taken import anything_to_prove, candidates, taken
from delora_kernels.integrations.peft.fused.expected_calls import calls_of
from delora_kernels.integrations.peft.verdict import State, Verdict


def prove_kernels(layers: Iterable[list[AnyCall]], device_type: str, requested_too: bool) -> tuple[Proof, ...]:
    """Prove the kernels of these calls: of each kind the first backend that is right, and those
    that were tried before it.

    Args:
        layers: The calls of each.
        device_type: Of the model. Ranks of a distributed run agree wherever there may be kernels on
            it, also where one of them has no such layer.
        requested_too: Whether the kernels of a backend that is asked for are proved as well; calls
            take them whatever comes of it.
    """
    if not anything_to_prove(device_type, requested_too):
        return ()
    kinds = {proof.kind_of(call): call for calls in layers for call in calls}
    work = [(call, names) for call in kinds.values() if (names := candidates(call, requested_too))]
    found: dict[tuple[str, tuple[Any, ...]], Proof] = {}
    proof.ask_again()
    with tqdm(work, desc="proving kernels", unit="kind", leave=False, disable=None) as bar:
        for call, names in bar:
            for name in names:
                found[name, proof.kind_of(call)] = made = proof.proof_of(name, call)
                if made.reason is None:
                    break
    proof.agree()
    return tuple(proof.proof_of(name, kinds[kind]) for name, kind in found)


def calls_by_layer(
    judged: Mapping[str, tuple[nn.Module, Verdict]], outer: Mapping[nn.Module, nn.Module]
) -> dict[str, list[AnyCall]]:
    """Return the calls of every layer by its name.

    Args:
        judged: Qualified name → layer and how it runs.
        outer: Each wrapper of experts → the outermost one around it.
    """
    return {name: calls_of(layer, verdict, outer.get(layer)) for name, (layer, verdict) in judged.items()}


def backend_of(verdict: Verdict, calls: list[AnyCall]) -> str | None:
    """Return the backend that takes a layer's calls, as things stand; None: it is not known."""
    if verdict.state == State.RANK_TERM:
        return "eager"
    return taken(calls[0]) if calls else None


def is_in_a_graph() -> bool:
    """Whether a CUDA graph is being captured, or this is a backward pass: no moment for proofs."""
    captured = torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
    return captured or torch._C._current_graph_task_id() != -1
