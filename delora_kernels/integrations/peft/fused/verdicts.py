"""Which kinds of the installed PEFT's layers can be fused: a look-up, which torch.compile can
trace.

`layer_check.py` fills it where PEFT's version is not a tested one.
"""

METHODS = ("lora", "dora", "delora")
"""The kinds of PEFT layers that can be fused; rsLoRA is a "lora"."""

reasons: dict[str, str | None] = dict.fromkeys(METHODS)
"""Kind → why its layers must run PEFT's own forward, or None: they can be fused."""

against_experts: list[str] = []
"""Why adapters on the experts of expert models must run PEFT's own forward; empty: they can be
fused.
"""
