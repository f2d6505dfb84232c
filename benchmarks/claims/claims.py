"""All claims, in the order in which they are studied."""

from benchmarks.claims import (
    cost,
    delora_bound,
    delora_ladder,
    delora_long,
    delora_rate,
    dora_pattern,
    dora_rank,
    goat_experts,
    goat_gap,
    text_scores,
    weight_norms,
)
from benchmarks.claims.claim import Claim

_FILES = (
    delora_rate,
    delora_long,
    delora_bound,
    dora_pattern,
    goat_experts,
    delora_ladder,
    dora_rank,
    goat_gap,
    weight_norms,
    cost,
    text_scores,
)

CLAIMS: dict[str, Claim] = {module.CLAIM.name: module.CLAIM for module in _FILES}
