"""Calling a reward plugin. Runs in a reward process, never in the trainer's."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from hybrid_rl.plugins import call


def call_plugin(
    spec: str, prompts: Sequence[Any], completions: Sequence[Any], columns: Mapping[str, Sequence[Any]]
) -> list[float | None]:
    """Score completions. TRL's convention: keyword arguments, one list each; `None` means not applicable.

    Raises `ValueError` if the plugin returns another number of scores than completions, or a score that is not finite.
    """
    lists = {name: list(values) for name, values in columns.items()}
    scores = call(spec, {"prompts": list(prompts), **lists, "completions": list(completions)})
    scores = [None if score is None else float(score) for score in scores]
    if len(scores) != len(completions):
        raise ValueError(f"{spec} returned {len(scores)} scores for {len(completions)} completions")
    if any(score is not None and not math.isfinite(score) for score in scores):
        raise ValueError(f"{spec} returned a score that is not finite")
    return scores
