"""How export_lora refuses a layer that its file can't hold: its name, what it is, a remedy."""

from typing import NoReturn

from delora_kernels import checks

FUNCTION = "export_lora"

MERGE = "merge the adapter (merge_and_unload; diffusers: fuse_lora, unload_lora) and save the whole model instead"


def refuse(name: str, got: str, remedy: str = MERGE, expected: str = "a low-rank term on a plain linear") -> NoReturn:
    """Raise the error of a layer that is no low-rank term."""
    raise checks.fail(ValueError, FUNCTION, f"layer {name!r}", expected, got, remedy)
