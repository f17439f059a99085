"""Plan -> model: which parameters train, and how."""

from hybrid_rl.adaptation.apply import AdaptedModel, LoraPair, apply_plan, remove_adapters, weight_named
from hybrid_rl.adaptation.groups import PARTS, ParameterGroup, parameter_groups

__all__ = [
    "PARTS",
    "AdaptedModel",
    "LoraPair",
    "ParameterGroup",
    "apply_plan",
    "parameter_groups",
    "remove_adapters",
    "weight_named",
]
