"""A policy without a learner: the base model with a plan applied and trained weights from a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from hybrid_rl.adaptation import AdaptedModel, apply_plan, read_weights
from hybrid_rl.config import ModelConfig
from hybrid_rl.plan import AdaptationPlan


def load_policy(model: ModelConfig, plan: AdaptationPlan, weights: Path) -> AdaptedModel:
    """The policy in fp32 on the CPU.

    Raises `ValueError` if `weights` (`adaptation.WEIGHTS`) is not of this plan.
    """
    adapted = apply_plan(load_base(model), plan)
    read_weights(adapted, weights)
    return adapted


def load_base(model: ModelConfig) -> Any:
    """The base model in fp32 on the CPU."""
    base: Any = AutoModelForCausalLM.from_pretrained(
        model.path, dtype=torch.float32, trust_remote_code=model.trust_remote_code
    )
    return base.eval()
