"""What a person sees of a mixture's router.

report.py   expert_report: how routers used their experts, which are dead
watch.py    watch_experts: the same over several forward passes
"""

from delora_kernels.functional.router_stats import RouterStats
from delora_kernels.routing.report import expert_report
from delora_kernels.routing.watch import watch_experts

__all__ = ["RouterStats", "expert_report", "watch_experts"]
