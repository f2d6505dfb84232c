"""The studies of DoRA's and GOAT's claims: what is measured, by hand; verdicts that change with
their record; the files' machinery on drawn data.
"""

import math
from typing import Any

import pytest
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("peft")

from benchmarks.claims import digits, dora_pattern, dora_rank, goat_experts, goat_gap
from benchmarks.claims.claim import study
from benchmarks.claims.record import Record
from benchmarks.claims.rows import adapted
from benchmarks.claims.rules import CANNOT_TELL, DOES_NOT, HOLDS, SMOKE, Rules
from benchmarks.claims.sweep import Sweep
from benchmarks.claims.watches import Seen, changes, delta, experts, layers

torch.set_num_threads(1)

RULES = Rules("drawn-1", (1, 2, 3), (101,), 4, 2, 2, (-12, -8, -4), (-4, -2, 0, 2, 4), 4)


def swept(best: dict[tuple[str, int], float]) -> Record:
    """A record of sweeps whose score falls on both sides of q = -8 from `best`; nothing is
    trained.
    """
    record = Record(None)
    for (row, rank), value in best.items():
        while wanted := [run for run in Sweep(record, RULES, row, rank).runs if run not in record]:
            for run in wanted:
                score = value - 0.01 * abs(run.q + 8) + 0.001 * (run.seed % 3)
                record.add(run, {"validation": [score], "test": [score], "watched": {"norms": [0.1], "bound": 0.5}})
    return record


def verdicts(claim: Any, record: Record) -> dict[str, str]:
    return {line.claimed: line.verdict for line in claim.lines(record, RULES)}


@pytest.mark.parametrize("row", ["full", "dora"])
def test_changes_are_those_of_the_layers_output(row: str, seed: int) -> None:
    frozen = digits.smoke(1).model
    model = adapted(row, frozen, 4, seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    seen = Seen(model, frozen, digits.smoke(1))
    found = changes(seen)
    assert list(found) == list(layers(seen))
    for name, (layer, linear) in layers(seen).items():
        W = linear.weight.double()
        moved = W + delta(layer, linear).double()
        magnitude = (moved.norm(dim=1) - W.norm(dim=1)).abs().mean()
        direction = (1 - torch.nn.functional.cosine_similarity(moved, W)).mean()
        wanted = [magnitude, direction, (moved - W).norm(), W.norm()]
        assert found[name] == pytest.approx([float(value) for value in wanted], rel=1e-4)


def test_experts_by_a_router_that_always_takes_the_same(seed: int) -> None:
    """Weights that are 0 leave a tie, which gives every token the first two experts: two are
    dead.
    """
    frozen = digits.smoke(1).model
    model = adapted("goat", frozen, 4, seed)
    for name, parameter in model.named_parameters():
        if "gating" in name or "router" in name:
            parameter.data.zero_()
    found = experts(Seen(model, frozen, digits.smoke(1)))
    assert (found["experts"], found["dead"], found["farthest"]) == (24, 12, 1.0)
    assert sorted(found["shares"]) == [0.0, 0.0, 2.0, 2.0]
    assert found["balance"] == pytest.approx(1.0)  # f (2, 2, 0, 0)/4 against an even P
    assert model.training


def with_changes(slopes: dict[str, float]) -> Record:
    """Sweeps, and runs in which ΔM goes with ΔD by a slope for each method, over layers and steps;
    the seed bends it a little.
    """
    record = swept({(row, 4): 0.9 for row in dora_pattern.METHODS})
    for row, slope in slopes.items():
        sweep = Sweep(record, RULES, row)
        for seed in RULES.seeds:
            found = []
            for step in range(len(dora_pattern.marks(RULES))):
                at = {}
                for place, kind in enumerate(("query", "key", "value", "out", "up", "down")):
                    d = 1.0 + 0.1 * place + 0.02 * step
                    bend = 0.005 * math.sin(7 * place + step + seed)
                    at[f"blocks.0.{kind}"] = [3.0 + slope * d + bend, d, 1.0, 2.0]
                found.append(at)
            record.add(dora_pattern.run(sweep, seed), {"watched": {"changes": found}})
    return record


def test_dora_pattern_judges_signs_and_distances() -> None:
    assert dora_pattern.marks(RULES) == (1, 2, 3, 4)
    record = with_changes({"full": -0.5, "lora": 0.5, "dora": -0.4, "delora": 0.5})
    found = verdicts(dora_pattern, record)
    assert [verdict for claim, verdict in found.items() if "DeLoRA" not in claim] == [HOLDS] * 10
    assert {verdict for claim, verdict in found.items() if "DeLoRA" in claim} == {DOES_NOT}
    assert dora_pattern.draw(record, RULES) is not None
    found = verdicts(dora_pattern, with_changes({"full": 0.5, "lora": -0.5, "dora": 0.5, "delora": -0.5}))
    signs = {claim: verdict for claim, verdict in found.items() if "ΔD and ΔM" in claim}
    assert set(signs.values()) == {DOES_NOT}
    found = verdicts(dora_pattern, with_changes({"lora": 0.5}))
    assert sum(verdict == HOLDS for verdict in found.values()) == 2
    assert sum(verdict.startswith(f"{CANNOT_TELL}: incomplete") for verdict in found.values()) == 10
    lora = Sweep(record, RULES, "lora")
    by_hand = torch.tensor([[row.direction, row.magnitude] for row in dora_pattern.changes(lora, 1).rows]).T
    (whole,) = (dora_pattern.correlation(lora, 1, dora_pattern.Points("", ("",), "all")),)
    assert whole == pytest.approx(float(torch.corrcoef(by_hand)[0, 1]), abs=1e-6)


def test_dora_rank_judges_each_rank() -> None:
    assert dora_rank.ranks(RULES) == [4, 2, 1]
    best = {("lora", 4): 0.80, ("lora", 2): 0.70, ("lora", 1): 0.50}
    record = swept(best | {("dora", 4): 0.85, ("dora", 2): 0.84, ("dora", 1): 0.70})
    assert set(verdicts(dora_rank, record).values()) == {HOLDS}
    assert dora_rank.draw(record, RULES) is not None
    record = swept(best | {("dora", 4): 0.75, ("dora", 2): 0.60, ("dora", 1): 0.40})
    assert set(verdicts(dora_rank, record).values()) == {DOES_NOT}
    found = verdicts(dora_rank, swept({key: value for key, value in best.items() if key[1] == 4}))
    assert all(verdict.startswith(CANNOT_TELL) for verdict in found.values())


def test_goat_gap_at_its_own_rate_and_at_full_fine_tunings() -> None:
    scores = dict(zip(goat_gap.METHODS, (0.90, 0.70, 0.75, 0.80, 0.80, 0.89), strict=True))
    record = swept({(row, 4): value for row, value in scores.items()})
    found = verdicts(goat_gap, record)
    for at in ("each at its own rate", "both at full fine-tuning's rate"):
        assert {verdict for claim, verdict in found.items() if at in claim} == {HOLDS}
    assert found["GOAT scores no less than full fine-tuning"] == HOLDS
    (first,) = (line.ours for line in goat_gap.lines(record, RULES) if "no less" in line.claimed)
    assert first.endswith("closes 95% of LoRA's gap")  # 0.19 of 0.2
    assert goat_gap.draw(record, RULES) is not None
    worse = verdicts(goat_gap, swept({(row, 4): 1.7 - value for row, value in scores.items()}))
    assert worse.pop("GOAT scores no less than full fine-tuning") == HOLDS
    assert set(worse.values()) == {DOES_NOT}
    below = verdicts(goat_gap, swept({(row, 4): value for row, value in (scores | {"full": 0.95}).items()}))
    assert below["GOAT scores no less than full fine-tuning"] == DOES_NOT


def test_a_dead_expert_shows() -> None:
    record = swept({("goat", 4): 0.9, ("mixture", 4): 0.9})
    for row in goat_experts.METHODS:
        for seed in RULES.seeds:
            mark: dict[str, Any] = {"balance": 1.0, "experts": 8, "dead": 0, "farthest": 0.3}
            mark["shares"] = [1.05, 0.95, 1.0, 1.0]
            found = [dict(mark) for _ in goat_experts.marks(RULES)]
            if row == "mixture" and seed == 2:
                found[1]["dead"] = 1
            if row == "mixture":
                found[-1]["shares"] = [1.4, 0.6, 1.0, 1.0]
            record.add(goat_experts.run(Sweep(record, RULES, row), seed), {"watched": {"experts": found}})
    assert list(verdicts(goat_experts, record).values()) == [HOLDS, HOLDS, DOES_NOT, DOES_NOT]
    assert goat_experts.draw(record, RULES) is not None


def test_smoke(monkeypatch: pytest.MonkeyPatch) -> None:
    """The two claims that watch runs, trained on drawn data, of one method each."""
    monkeypatch.setattr(dora_pattern, "METHODS", ("dora",))
    monkeypatch.setattr(goat_experts, "METHODS", ("goat",))
    record = Record(None)
    study([dora_pattern.CLAIM, goat_experts.CLAIM], record, SMOKE)
    assert not any("incomplete" in line.verdict for line in goat_experts.lines(record, SMOKE))
    dora, goat = (Sweep(record, SMOKE, row) for row in ("dora", "goat"))
    for seed in SMOKE.seeds:
        measured = dora_pattern.changes(dora, seed)
        assert len(measured.rows) == 6 * len(dora_pattern.marks(SMOKE))
        assert all(row.update_norm > 0 for row in measured.rows)
        counted = record[goat_experts.run(goat, seed)]["watched"]["experts"]
        assert all(sum(mark["shares"]) == pytest.approx(4) for mark in counted)
    assert dora_pattern.draw(record, SMOKE) is not None
