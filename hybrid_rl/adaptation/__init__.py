"""Plan -> model: which parameters train, and how."""

from hybrid_rl.adaptation.apply import AdaptedModel, LoraPair, apply_plan, remove_adapters, weight_named

__all__ = ["AdaptedModel", "LoraPair", "apply_plan", "remove_adapters", "weight_named"]
