"""Every reason that the code gives has a code, every code its row in the documentation, and none of
them goes.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import delora_kernels as dk
from delora_kernels.diagnostics import reasons
from delora_kernels.diagnostics.reason import Reason

PACKAGE = Path(dk.__file__).parent
DOCUMENT = PACKAGE.parent / "docs" / "reasons.md"

CODES = """
adapters-disabled adapter-merged no-active-adapter several-adapters lora-variant adapter-bias input-cast-off scaling
dropout adapter-parts dora-cache layer-class patched hooks base-class no-plain-tensor sharded meta-device device
peft-version packed-weight-unreadable packed-weight-broken base-quantises-input base-not-compared base-check-raised
experts-unknown experts-parametrized experts-parameters call-arguments input-kind input-dtype transforms
backend-not-here backend-not-for-cpu backend-limits kernels-wrong kernels-unproved
base-check-later base-own-forward delora-on-stored-base convolution experts-stored bypassed
dora-on-stored-base another-library multihead-attention
"""
"""The list as it was released: it is only ever continued."""

WHERE = ("bases", "backends", "integrations/peft/fused", "integrations/peft/verdict.py", "dispatch.py")

PARTS = {
    "{} reads {}, as in no tested version",
    "{} is off by {} of its maximum",
    "checking it raised {}: {}",
    "its torchao weight {}",
    "which can't be read expert by expert: {}: {}",
    "which reads otherwise expert by expert than in a slice",
}
"""What is put into a reason, or made of what stands elsewhere."""


def templates(node: ast.expr | None) -> Iterator[str]:
    """The texts that an expression may give, `{}` for what is put in."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield node.value
    elif isinstance(node, ast.JoinedStr):
        yield "".join(str(part.value) if isinstance(part, ast.Constant) else "{}" for part in node.values)
    elif isinstance(node, ast.IfExp):
        yield from templates(node.body)
        yield from templates(node.orelse)
    elif isinstance(node, ast.BoolOp):
        for value in node.values:
            yield from templates(value)
    elif isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        ends = list(templates(node.right))
        yield from (start + end for start in templates(node.left) for end in ends)
    elif isinstance(node, ast.DictComp):
        yield from templates(node.value)
    elif isinstance(node, ast.List | ast.Tuple):
        for element in node.elts:
            yield from templates(element)
    elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("NotLocal", "Broken", "LayerReport", "Verdict"):
        for argument in node.args:
            yield from templates(argument)


def reasons_of(file: Path) -> Iterator[str]:
    """The reasons that a file gives: what functions return that return a reason or something
    else, and constants of a sentence.
    """
    tree = ast.parse(file.read_text(encoding="utf-8"))
    for function in ast.walk(tree):
        if isinstance(function, ast.FunctionDef) and _gives_reasons(function):
            for node in ast.walk(function):
                if isinstance(node, ast.Return):
                    yield from templates(node.value)
    for node in tree.body:
        if isinstance(node, ast.Assign) and file.name in ("verdict.py", "swap.py"):
            yield from templates(node.value)


def _gives_reasons(function: ast.FunctionDef) -> bool:
    returns = ast.unparse(function.returns).replace("'", "") if function.returns is not None else ""
    kinds = {kind.strip() for kind in returns.split("|")}
    union = len(kinds) > 1 and bool(kinds & {"str", "NotLocal"})
    return union or returns in ("list[str]", "LayerReport", "Verdict", "Mapping[str, str | None]")


def found() -> set[str]:
    files = [file for where in WHERE for file in sorted((PACKAGE / where).rglob("*.py")) or [PACKAGE / where]]
    texts = {text for file in files for text in reasons_of(file)}
    return {text for text in texts if " " in text or "=" in text} - PARTS


def test_every_reason_of_the_code_has_a_code() -> None:
    listed = {text for reason in reasons.REASONS for text in reason.texts}
    missing = found() - listed
    assert not missing, f"without a code in diagnostics/reasons.py: {sorted(missing)}"
    assert len(found()) > 60  # it reads what it is to read


@pytest.mark.parametrize("reason", reasons.REASONS, ids=lambda reason: str(reason.code))
def test_a_text_has_its_code_whatever_is_put_in(reason: Reason) -> None:
    for text in reason.texts:
        for word in ("x", "lora_A", "torch.float16", "peft.tuners.lora.layer.Linear", "[2, 3]", "a, b", "two\nlines"):
            assert reasons.code_of(text.replace("{}", word)) == reason.code


def test_what_is_not_on_the_list() -> None:
    assert reasons.code_of("the codebook of this base is on holiday") == reasons.OTHER


def test_the_list_only_grows() -> None:
    codes = [reason.code for reason in reasons.REASONS]
    assert set(CODES.split()) <= set(codes), "a released code has gone"
    assert set(codes) <= set(CODES.split()), "add the new code here"
    assert len(set(codes)) == len(codes)
    assert reasons.OTHER not in codes
    texts = [text for reason in reasons.REASONS for text in reason.texts]
    assert len(set(texts)) == len(texts)


def test_the_document_is_the_list() -> None:
    assert reasons.as_markdown() in DOCUMENT.read_text(encoding="utf-8")
