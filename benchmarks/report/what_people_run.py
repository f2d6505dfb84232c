"""README's one table: a row for what somebody trains, with what a CPU's records say of it, and "not
measured" where there is none.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.record import load
from benchmarks.report.by_case import Impls, Key, by_case, name_of, peft_of

HEAD = "| you train | time, of PEFT's or the authors' | MiB kept for backward | on a GPU |\n| --- | ---: | ---: | --- |"
NOT_MEASURED = "not measured"
METHODS = ("lora", "dora", "delora")


def table(
    single: Path,
    small_model: Path,
    whole_model: Path,
    mixture: Path,
    reflection: Path,
    stored: Path | None = None,
    experts: Path | None = None,
) -> str:
    """Return the table.

    Args:
        single: A record with one layer of each method, in 16 bits under autocast, of two shapes:
            one timed, one weighed.
        small_model: One with a small Llama, trained in float32 without checkpointing.
        whole_model: One of `make demo`.
        mixture: One with GOAT beside its authors' loop.
        reflection: One with ETHER+ beside its authors' form.
        stored: One of `benchmarks.stored_bases`, with nf4; None: not measured.
        experts: One of `benchmarks.experts`; None: not measured.
    """
    rows = [*_layers(single), *_models(small_model), _demo(whole_model)]
    rows += _stored(stored) if stored is not None else [_row("LoRA, DoRA or DeLoRA on nf4", *[NOT_MEASURED] * 2)]
    rows += _experts(experts) if experts is not None else [_row("LoRA on experts", *[NOT_MEASURED] * 2)]
    rows.append(_first(mixture, "goat", "goat-eager", lambda key: key.r == 4 and key.E == 8))
    rows.append(_first(reflection, "ether-plus", "authors", lambda key: key.n_blocks == 1))
    return "\n".join([HEAD, *rows])


def _layers(path: Path) -> Iterator[str]:
    cases = by_case(load(path)["rows"])
    for method in METHODS:
        times, weights = (_pair(cases, method, column) for column in ("median_ms", "peak_mib"))
        yield _row(f"{name_of(method)}: one layer, bf16 base, autocast", _part(*times), _kept(*weights))


def _pair(cases: dict[Key, Impls], method: str, column: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """PEFT's row and ours of the method's first case under autocast that has this column."""
    for key, impls in cases.items():
        peft, ours = peft_of(impls), impls.get("dk")
        if key.method == method and key.precision == "bf16-autocast" and key.backward and peft and ours:
            if peft.get(column) and ours.get(column):
                return peft, ours
    raise ValueError(f"the record has no {column} of {method} under autocast")


def _models(path: Path) -> Iterator[str]:
    for key, impls in by_case(load(path)["rows"], kind="model").items():
        if not key.checkpointing:
            peft, ours = impls["peft"], impls["dk"]
            yield _row(
                f"{name_of(key.method)}: a Llama of {ours['blocks']} blocks, all fp32, steps of {key.T} tokens",
                _part(peft, ours),
                _kept(peft, ours),
            )


def _demo(path: Path) -> str:
    record = json.loads(path.read_text(encoding="utf-8"))
    eager, fused, config = record["runs"]["eager"], record["runs"]["fused"], record["config"]
    tokens = config["batch_size"] * config["seq_len"]
    part, kept = f"{fused['median_ms'] / eager['median_ms']:.2f}", f"{eager['kept_mib']:.0f} → {fused['kept_mib']:.0f}"
    return _row(f"{name_of(config['method'])}: SmolLM2-135M, bf16, steps of {tokens} tokens", part, kept)


def _stored(path: Path) -> Iterator[str]:
    rows = [row for row in json.loads(path.read_text(encoding="utf-8"))["rows"] if row["form"] == "nf4"]
    for method in METHODS:
        own = {row["impl"]: row for row in rows if row["method"] == method}
        what = f"{name_of(method)}: one layer on an nf4 base, {own['dk']['dtype']}, {own['dk']['T']} tokens"
        yield _row(what, _part(own["peft"], own["dk"]), _kept(own["peft"], own["dk"]))


def _experts(path: Path) -> Iterator[str]:
    """Yield a row for each number of tokens, evenly routed, of the first number of experts."""
    rows = [row for row in json.loads(path.read_text(encoding="utf-8"))["rows"] if not row["skewed"]]
    E = rows[0]["E"]
    for T in dict.fromkeys(row["T"] for row in rows if row["E"] == E):
        own = {row["impl"]: row for row in rows if (row["E"], row["T"]) == (E, T)}
        if "peft" in own:
            what = f"LoRA: {E} experts of a Qwen3-MoE block, fp32, {T} tokens"
            yield _row(what, _part(own["peft"], own["dk"]), _kept(own["peft"], own["dk"]))


def _first(path: Path, method: str, authors: str, wanted: Callable[[Key], bool]) -> str:
    for key, impls in by_case(load(path)["rows"]).items():
        if key.method == method and key.backward and wanted(key) and authors in impls:
            theirs, ours = impls[authors], impls["dk"]
            text = f"{name_of(method)}: one layer, {key.precision}, over the authors' form"
            return _row(text, _part(theirs, ours), _kept(theirs, ours))
    raise ValueError(f"{path.name} has no {method} beside {authors}")


def _part(theirs: dict[str, Any], ours: dict[str, Any]) -> str:
    return f"{ours['median_ms'] / theirs['median_ms']:.2f}"


def _kept(theirs: dict[str, Any], ours: dict[str, Any]) -> str:
    return f"{theirs['saved_mib']:.1f} → {ours['saved_mib']:.1f}"


def _row(what: str, part: str, kept: str) -> str:
    return f"| {what} | {part} | {kept} | {NOT_MEASURED} |"
