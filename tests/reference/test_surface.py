"""The reference's names, arguments and defaults, and what it imports."""

import ast
import inspect
import pathlib

from delora_kernels import reference

SIGNATURES = """
lora_linear x weight A B scale=1.0 bias=None ranks=None dropout_mask=None
lora_weight weight A B scale=1.0
dora_linear x weight A B magnitude scale=1.0 bias=None dropout_mask=None dropout=peft
dora_weight weight A B magnitude scale=1.0
delora_linear x weight A B lam weight_norm bias=None frozen_A=None frozen_B=None frozen_lam=None \
eps=0.0001 dropout_mask=None
delora_factors A B lam weight_norm eps=0.0001
delora_weight weight A B lam weight_norm frozen_A=None frozen_B=None frozen_lam=None eps=0.0001
ether_linear x weight u=None bias=None u_out=None blocks=paper
ether_plus_linear x weight u=None v=None bias=None u_out=None v_out=None blocks=paper
ether_weight weight u=None u_out=None blocks=paper
ether_plus_weight weight u=None v=None u_out=None v_out=None blocks=paper
ether_qkv_linear x weight u rows bias=None
lora_linear_by_sample x weight A B adapters scale=1.0 bias=None
moe_lora_linear x weight A B router=None gates=None adapter_ids=None top_k=None renormalize=True scale=1.0 \
bias=None token_mask=None frozen_A=None frozen_B=None residual=1.0 magnitude=None dropout_mask=None
moe_lora_linear_dense x weight A B router=None gates=None adapter_ids=None top_k=None renormalize=True scale=1.0 \
bias=None token_mask=None frozen_A=None frozen_B=None residual=1.0 magnitude=None dropout_mask=None
grouped_lora_linear x weight A B offsets scale=1.0 bias=None dropout_mask=None
grouped_lora_linear_dense x weight A B offsets scale=1.0 bias=None dropout_mask=None
grouped_dora_linear x weight A B magnitude offsets scale=1.0 bias=None dropout_mask=None
grouped_dora_linear_dense x weight A B magnitude offsets scale=1.0 bias=None dropout_mask=None
grouped_dora_weight weight A B magnitude scale=1.0
grouped_delora_linear x weight A B lam weight_norm offsets bias=None eps=0.0001 dropout_mask=None
grouped_delora_weight weight A B lam weight_norm eps=0.0001
grouped_lora_weight weight A B scale=1.0
RouterStats fraction probability z top_k
"""


def test_names_and_defaults() -> None:
    lines = []
    for name in reference.__all__:
        arguments = inspect.signature(getattr(reference, name)).parameters.values()
        lines.append(
            " ".join([name, *(p.name if p.default is p.empty else f"{p.name}={p.default}" for p in arguments)])
        )
    listed = SIGNATURES.strip().splitlines()
    assert sorted(lines) == sorted(listed), f"SIGNATURES: {sorted({*lines} ^ {*listed})}"


def test_reference_imports_nothing_of_the_rest() -> None:
    folder = pathlib.Path(reference.__file__).parent
    nodes = [node for path in folder.glob("*.py") for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))]
    imported = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module or "." for node in nodes if isinstance(node, ast.ImportFrom)}
    ours = {"torch", "collections.abc", "typing"}
    others = {n for n in imported - ours if not n.startswith("delora_kernels.reference.")}
    assert others == set()
