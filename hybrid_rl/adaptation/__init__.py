"""Plan -> model: which parameters train, and how."""

from hybrid_rl.adaptation.adapters import Adapter, Factors, LowRank
from hybrid_rl.adaptation.apply import AdaptedModel, apply_plan, remove_adapters, weight_named
from hybrid_rl.adaptation.groups import PARTS, ParameterGroup, parameter_groups
from hybrid_rl.adaptation.stored import WEIGHTS, Start, read_start, read_weights, write_weights

__all__ = [
    "PARTS",
    "WEIGHTS",
    "AdaptedModel",
    "Adapter",
    "Factors",
    "LowRank",
    "ParameterGroup",
    "Start",
    "apply_plan",
    "parameter_groups",
    "read_start",
    "read_weights",
    "remove_adapters",
    "weight_named",
    "write_weights",
]
