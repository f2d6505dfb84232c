"""Two ranks prove their kernels; those of one are wrong."""

import peft_models
import pytest
import stand_in_backends
from stand_in_backends import wrong

import delora_kernels as dk
from delora_kernels.backends import eager
from delora_kernels.diagnostics import proof


def accelerate(rank: int, seed: int, strict: bool) -> list[str | None]:
    """The backend and the reasons of the report; with `strict`, what is raised."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(proof, "SIZES", proof.SIZES[1:])
        stand_ins = stand_in_backends.put_in_place(patch)
        if rank == 1:
            stand_ins["triton"].expand = wrong(eager.expand, 0, 1.1)
        stand_ins["cuda"].supports = lambda call: "not on these ranks"
        model = peft_models.model("lora", seed)
        try:
            report = dk.accelerate(model, strict)
        except RuntimeError as error:
            return [str(error).splitlines()[0]]
        return [report.backend, *[each.reason for each in report.proofs]]
