"""All claims, in the order in which they are studied."""

from benchmarks.claims import cost, delora_bound, delora_ladder, delora_long, delora_rate, text_scores, weight_norms
from benchmarks.claims.claim import Claim

CLAIMS: dict[str, Claim] = {
    module.CLAIM.name: module.CLAIM
    for module in (delora_rate, delora_long, delora_bound, delora_ladder, weight_norms, cost, text_scores)
}
