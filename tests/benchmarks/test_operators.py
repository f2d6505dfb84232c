"""The table of operators: every product and pass has its role, and the part that is gone is what it
says.
"""

from typing import Any

import pytest

pytest.importorskip("transformers")

from benchmarks import operators
from benchmarks.model_cases import SMALL, ModelCase

SIZES: dict[str, Any] = SMALL | {"hidden": 48, "intermediate": 80, "heads": 3, "kv_heads": 1, "vocabulary": 64}
SIZES |= {"blocks": 1, "batch": 2, "sequence": 8, "r": 2, "limit_mib": None}


def test_operators_of_a_block() -> None:
    """DoRA on seven linears: y and dx of the frozen ones and of ours, and ours runs together."""
    rows = operators.measure(ModelCase("dora", precision="fp32", **SIZES), rounds=2)
    calls = {
        (name, role): sum(row["calls"] for row in rows if (row["impl"], row["role"]) == (name, role))
        for name in ("frozen", "peft", "addmm", "dk", "arithmetic")
        for role in operators.ROLES
    }
    for name in ("frozen", "addmm", "dk", "arithmetic"):
        assert calls[name, "products"] == 14, name
    assert calls["frozen", "thin"] == 0
    # h and dA of four groups; W + s·BA, the rank term, dv and dB of seven layers; dx's of four
    assert calls["dk", "thin"] == calls["arithmetic", "thin"] == 2 * 4 + 4 * 7 + 4
    assert calls["peft", "passes"] > calls["dk", "passes"] > calls["frozen", "passes"]
    assert operators.table(rows).row_count == len(operators.ROLES) + 3
    assert operators.shapes_table(rows, 3).row_count == 3


def test_roles() -> None:
    assert operators.role_of(("aten::mm", ((64, 48), (48, 80))), small=6, large=256) == "products"
    assert operators.role_of(("aten::addmm_", ((64, 48), (64, 6), (6, 48))), small=6, large=256) == "thin"
    assert operators.role_of(("aten::mul", ((16, 16), (16,))), small=6, large=256) == "passes"
    assert operators.role_of(("aten::mul", ((15, 17), (16,))), small=6, large=256) == "rest"
    assert operators.role_of(("aten::empty", ()), small=6, large=256) == "rest"
    assert operators.role_of(operators.BETWEEN, small=6, large=256) == "between"


def test_part_gone_leaves_products_out() -> None:
    spent = {
        "frozen": {"products": 10.0, "thin": 0.0, "passes": 2.0, "rest": 0.0, "between": 1.0},
        "peft": {"products": 50.0, "thin": 4.0, "passes": 7.0, "rest": 1.0, "between": 3.0},
        "dk": {"products": 90.0, "thin": 3.0, "passes": 1.0, "rest": 0.5, "between": 2.0},
    }
    assert operators.part_gone(spent, "dk", "products", "between") == 1 - 2.5 / 10
    assert operators.part_gone(spent, "dk", "products") == 1 - 3.5 / 12
