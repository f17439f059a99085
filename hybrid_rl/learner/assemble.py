"""Scored groups -> what the learner trains on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from hybrid_rl.algorithms import group_normalised, has_signal
from hybrid_rl.config import LearnerConfig
from hybrid_rl.types import ScoredGroup, StepStats, TrainBatch, TrainSequence

NO_UPDATE = StepStats(
    dict.fromkeys(
        (
            *("policy/loss", "policy/clip_fraction", "policy/rollout_kl", "tokens/trained"),
            *("policy/rollout_logprob_diff", "policy/rollout_logprob_diff_max", "grad_norm/full", "grad_norm/lora"),
        ),
        0.0,
    ),
    {},
)
"""Of a step on which no group had a signal, so that nothing was trained."""


@dataclass(frozen=True)
class Assembled:
    """Sequences that teach something, and what was left out."""

    sequences: list[TrainSequence]
    advantages: list[list[float]]
    """Of every completion of every group; 0 where it is not trained on."""
    zero_variance_groups: int
    """Groups dropped because all their rewards are equal, or fewer than two have one."""
    unscored: int
    """Completions of the kept groups dropped because they have no reward."""


def assemble(groups: Sequence[ScoredGroup]) -> Assembled:
    """Advantages within each group; groups without signal and completions without a reward or tokens are dropped.

    The loss is a mean over what is kept, so a step with few informative groups moves the policy as far as one with
    many; TRL counts the others as zeros.
    """
    if not groups:
        return Assembled([], [], 0, 0)
    rewards_P_G = torch.tensor([[math.nan if r is None else r for r in g.rewards_G] for g in groups])
    valid_P_G = ~rewards_P_G.isnan()
    rewards_P_G = rewards_P_G.nan_to_num(0.0)
    kept_P = has_signal(rewards_P_G, valid_P_G).tolist()
    advantages_P_G = group_normalised(rewards_P_G, valid_P_G).tolist()
    sequences, unscored = [], 0
    for p, group in enumerate(groups):
        if not kept_P[p]:
            advantages_P_G[p] = [0.0] * len(group.completions)
            continue
        for g, completion in enumerate(group.completions):
            if group.rewards_G[g] is None:
                unscored += 1
            elif completion.token_ids:
                sequences.append(
                    TrainSequence(
                        group.prompt.token_ids, completion.token_ids, completion.logprobs, advantages_P_G[p][g]
                    )
                )
    return Assembled(sequences, advantages_P_G, len(kept_P) - sum(kept_P), unscored)


def mini_batches(sequences: Sequence[TrainSequence], count: int, lr_scale: float) -> TrainBatch:
    """Deal sequences to `count` mini-batches of near-equal size; ones that stay empty are left out."""
    dealt = [tuple(sequences[i::count]) for i in range(count)]
    return TrainBatch(tuple(m for m in dealt if m), lr_scale)


def lr_scale(step: int, steps: int, settings: LearnerConfig) -> float:
    """Factor of both learning rates at step `step` of `steps`, counted from 1: linear warm-up, then the schedule."""
    if step <= settings.warmup_steps:
        return step / settings.warmup_steps
    if settings.schedule == "constant":
        return 1.0
    done = (step - settings.warmup_steps - 1) / max(1, steps - settings.warmup_steps)
    return 1 - done if settings.schedule == "linear" else (1 + math.cos(math.pi * done)) / 2


def reward_metrics(groups: Sequence[ScoredGroup], data: Assembled) -> dict[str, float]:
    """What a step's rollouts earned, and how long they were."""
    completions = [c for group in groups for c in group.completions]
    metrics = {
        "reward/mean": _mean([r for g in groups for r in g.rewards_G]),
        "reward/zero_variance_groups": data.zero_variance_groups,
        "reward/unscored": sum(r is None for g in groups for r in g.rewards_G),
        "tokens/generated": sum(len(c.token_ids) for c in completions),
        "completions/mean_length": _mean([len(c.token_ids) for c in completions]),
        "completions/truncated": _mean([c.finish_reason == "length" for c in completions]),
    }
    for plugin in groups[0].parts:
        metrics[f"reward/{plugin}/mean"] = _mean([r for g in groups for r in g.parts[plugin]])
    return metrics


def _mean(values: Sequence[float | None]) -> float:
    present = [v for v in values if v is not None]
    return sum(present) / len(present) if present else 0.0
