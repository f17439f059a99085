"""Hybrid-RL: reinforcement learning with verifiable rewards that fully fine-tunes the few modules that need it."""

from __future__ import annotations

from importlib import import_module
from typing import Any

_PUBLIC = {
    "AdaptationPlan": "hybrid_rl.plan",
    "Config": "hybrid_rl.config",
    "apply_plan": "hybrid_rl.adaptation",
    "load_config": "hybrid_rl.config_file",
    "rank_modules": "trainers.rank",
    "register_advantage": "hybrid_rl.algorithms",
    "register_loss": "hybrid_rl.algorithms",
    "register_score": "hybrid_rl.scoring",
}

__all__ = [
    "AdaptationPlan",
    "Config",
    "apply_plan",
    "load_config",
    "rank_modules",
    "register_advantage",
    "register_loss",
    "register_score",
]


def __getattr__(name: str) -> Any:
    """Import on first use, so that reading a configuration does not import torch."""
    if name not in _PUBLIC:
        raise AttributeError(f"module 'hybrid_rl' has no attribute {name!r}")
    return getattr(import_module(_PUBLIC[name]), name)
