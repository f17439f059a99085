"""Scored groups -> what the learner trains on."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from hybrid_rl.algorithms import decoupled, find_advantage, has_signal, overlong_penalty, tells_apart, token_weights
from hybrid_rl.config import Config, FullConfig, LoraConfig, RewardSpec
from hybrid_rl.learner.batching import sampled
from hybrid_rl.types import FAILURES, Outcome, ScoredGroup, TrainBatch, TrainSequence


@dataclass(frozen=True)
class Assembled:
    """Sequences with their advantages, and what was left out."""

    sequences: list[TrainSequence]
    """Those that count in the loss's means; what has no gradient among them is not computed."""
    advantages: list[list[float]]
    """Of every completion of every group; 0 where it is not trained on."""
    zero_variance_groups: int
    """Groups whose rewards are all equal before penalties, or of which fewer than two completions have one."""
    penalties: Mapping[str, float]
    """Mean taken from the rewards, by cause."""
    dropped_tokens: Mapping[str, int]
    """Sampled tokens that are not trained on, by cause."""


def assemble(
    groups: Sequence[ScoredGroup],
    config: Config,
    divergences: Sequence[Sequence[float]] | None = None,
    *,
    step: int = 1,
) -> Assembled:
    """Shape the rewards, compute the advantages, and leave out what `algo` says. Rewards weigh as at `step`.

    The overlong penalty goes by all tokens of a completion, as its limit does. `divergences` are each completion's from
    the base policy, where `algo.kl_in=reward`.
    """
    algo, limit = config.algo, config.sampling.max_completion_length
    if not groups:
        return Assembled([], [], 0, {}, {})
    rewards_P_G, valid_P_G = _rewards(groups)
    signal_P = groups_with_signal(groups, config, step)
    penalties: dict[str, torch.Tensor] = {}
    if algo.overlong_buffer:
        lengths_P_G = torch.tensor([[len(c.token_ids) for c in g.completions] for g in groups])
        buffer = round(algo.overlong_buffer * limit)
        penalties["overlong"] = -overlong_penalty(lengths_P_G, limit, buffer, algo.overlong_penalty)
    if divergences is not None:
        penalties["kl"] = algo.kl_coef * torch.tensor(divergences)
    if algo.reward_aggregation == "normalize_then_sum":
        penalty_P_G = sum(penalties.values(), torch.zeros_like(rewards_P_G))
        advantages_P_G = decoupled(*_each(groups, config, step), penalty_P_G).tolist()
    else:
        rewards_P_G = rewards_P_G - sum(penalties.values())
        advantages_P_G = find_advantage(algo.advantage)(rewards_P_G, valid_P_G).tolist()

    sequences: list[TrainSequence] = []
    dropped: Counter[str] = Counter()
    for p, group in enumerate(groups):
        for g, completion in enumerate(group.completions):
            teaches = TrainSequence(
                group.prompt.token_ids,
                completion.token_ids,
                completion.logprobs,
                advantages_P_G[p][g],
                given=completion.given,
            )
            why = None
            if group.rewards_G[g] is None:
                why = "unscored"
            elif not signal_P[p] and algo.zero_variance != "count":
                why = "zero_variance"
            elif algo.overlong_filter and completion.truncated:
                why = "overlong"
                # Counts as a completion without tokens.
                sequences.append(replace(teaches, completion_ids=(), rollout_logprobs=(), advantage=0.0, given=()))
            else:
                sequences.append(teaches)
                if teaches.advantage == 0 and not algo.trains_without_advantage:
                    why = "zero_variance" if not signal_P[p] else "zero_advantage"
            if why is not None:
                dropped[why] += len(sampled(completion))
                advantages_P_G[p][g] = 0.0
    means = {name: float(p[valid_P_G].mean()) if valid_P_G.any() else 0.0 for name, p in penalties.items()}
    return Assembled(sequences, advantages_P_G, signal_P.count(False), means, dropped)


def groups_with_signal(groups: Sequence[ScoredGroup], config: Config, step: int) -> list[bool]:
    """Which groups have at least two rewards, not all equal: their sums or, where each is normalised, any of them that
    weighs anything at `step`."""
    if config.algo.reward_aggregation == "sum_then_normalize":
        return has_signal(*_rewards(groups)).tolist()
    return tells_apart(*_each(groups, config, step)).tolist()


def _rewards(groups: Sequence[ScoredGroup]) -> tuple[torch.Tensor, torch.Tensor]:
    """Rewards [P, G], 0 where there is none, and where there is one."""
    rewards_P_G = torch.tensor([[math.nan if r is None else r for r in g.rewards_G] for g in groups])
    return rewards_P_G.nan_to_num(0.0), ~rewards_P_G.isnan()


def _each(groups: Sequence[ScoredGroup], config: Config, step: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Scores of every reward [K, P, G], where there are any that count, and the rewards' weights [K] at `step`."""
    parts = [_scores(groups, spec) for spec in config.rewards]
    scores_K_P_G, valid_K_P_G = (torch.stack(tensors) for tensors in zip(*parts, strict=True))
    weights_K = torch.tensor([spec.weight_at(step) for spec in config.rewards])
    return scores_K_P_G, valid_K_P_G & _rewards(groups)[1], weights_K


def _scores(groups: Sequence[ScoredGroup], spec: RewardSpec) -> tuple[torch.Tensor, torch.Tensor]:
    """One reward's scores [P, G], and where there is one; a failure counts 0 where `on_failure` says so."""
    zero = 0.0 if spec.on_failure == "zero" else None
    rows = [[zero if o.failed else o.score for o in group.outcomes[spec.name]] for group in groups]
    scores_P_G = torch.tensor([[math.nan if s is None else s for s in row] for row in rows])
    return scores_P_G.nan_to_num(0.0), ~scores_P_G.isnan()


def mini_batches(
    sequences: Sequence[TrainSequence], config: Config, lr_scale: Mapping[str, float], step: int
) -> TrainBatch:
    """Deal sequences to mini-batches of near-equal size, and weigh their tokens; ones without a gradient are left out,
    and mini-batches that stay empty."""
    count, algo = config.batch.mini_batches, config.algo
    dealt = [weigh(sequences[i::count], algo.aggregation, config.sampling.max_completion_length) for i in range(count)]
    kept = [tuple(s for s in m if s.completion_ids and (s.advantage or algo.trains_without_advantage)) for m in dealt]
    return TrainBatch(tuple(m for m in kept if m), lr_scale, step)


def weigh(sequences: Sequence[TrainSequence], aggregation: str, max_length: int = 1) -> list[TrainSequence]:
    """The sequences of one mini-batch, each with the weight of its tokens, of which those sampled count."""
    lengths_N = torch.tensor([len(sampled(s)) for s in sequences], dtype=torch.float64)
    weights = token_weights(lengths_N, aggregation, max_length).tolist()
    return [replace(s, weight=w) for s, w in zip(sequences, weights, strict=True)]


def lr_scales(step: int, config: Config) -> dict[str, float]:
    """Factor of each part's learning rate at `step`, counted from 1: linear warm-up, then the schedule."""
    return {"full": _lr_scale(step, config, config.full), "lora": _lr_scale(step, config, config.lora)}


def _lr_scale(step: int, config: Config, part: FullConfig | LoraConfig) -> float:
    warmup = config.learner.warmup_steps if part.warmup_steps is None else part.warmup_steps
    schedule = part.schedule or config.learner.schedule
    if step <= warmup:
        return step / warmup
    if schedule == "constant":
        return 1.0
    done = (step - warmup - 1) / max(1, config.steps - warmup)
    return 1 - done if schedule == "linear" else (1 + math.cos(math.pi * done)) / 2


def reward_metrics(groups: Sequence[ScoredGroup], data: Assembled) -> dict[str, float]:
    """What a step's rollouts earned, how long they were, and what of them is not trained on."""
    completions = [c for group in groups for c in group.completions]
    lengths = [len(sampled(c)) for c in completions]
    metrics = {
        "reward/mean": _mean([r for g in groups for r in g.rewards_G]),
        "reward/zero_variance_groups": data.zero_variance_groups,
        "reward/unscored": sum(r is None for g in groups for r in g.rewards_G),
        "tokens/generated": sum(lengths),
        "tokens/given": sum(len(c.token_ids) for c in completions) - sum(lengths),
        "completions/mean_length": _mean(lengths),
        "completions/mean_turns": _mean([1 + len(c.given) for c in completions]),
        "completions/truncated": _mean([c.truncated for c in completions]),
        "completions/out_of_time": _mean([c.finish_reason == "time" for c in completions]),
    }
    for name in groups[0].outcomes:
        metrics |= _outcome_metrics(name, [o for g in groups for o in g.outcomes[name]])
    for name in ("unscored", "zero_variance", "zero_advantage", "overlong"):
        metrics[f"tokens/dropped_{name}"] = data.dropped_tokens.get(name, 0)
    metrics |= {f"reward/{name}_penalty": value for name, value in data.penalties.items()}
    advantages = torch.tensor([a for row in data.advantages for a in row])
    for percent in (5, 25, 50, 75, 95):
        metrics[f"policy/advantage_p{percent:02d}"] = float(advantages.quantile(percent / 100))
    return metrics


def _outcome_metrics(name: str, outcomes: Sequence[Outcome]) -> dict[str, float]:
    """A reward's mean, how often it gave none and why, and means of what its plugin measured."""
    measured = dict.fromkeys(key for o in outcomes for key in o.metrics)
    metrics = {f"reward/{name}/{key}": _mean([o.metrics.get(key) for o in outcomes]) for key in measured}
    if any(o.score is not None for o in outcomes):
        metrics[f"reward/{name}/mean"] = _mean([o.score for o in outcomes])
    for kind in ("not_applicable", *FAILURES):
        metrics[f"reward/{name}/{kind}"] = sum(o.kind == kind for o in outcomes)
    return metrics


def _mean(values: Sequence[float | None]) -> float:
    present = [v for v in values if v is not None]
    return sum(present) / len(present) if present else 0.0
