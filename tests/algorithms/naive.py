"""The objective once more, from the papers, in loops over Python numbers; shares no code with what it checks.

Log-probabilities and entropies may be complex: with the imaginary part of one of them a tiny h, the imaginary part of
the result over h is the derivative by it, exact to rounding.
"""

from __future__ import annotations

import cmath
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from hybrid_rl.algo import AlgoConfig
from hybrid_rl.algorithms import Tokens, token_weights

Rows = list[list[Any]]
STEP = 1e-30
MAX_LENGTH = 7


@dataclass(frozen=True)
class Case:
    """A mini-batch: for each sequence, a list over its tokens."""

    advantages: list[float]
    logprobs: Rows
    old: Rows
    rollout: Rows
    reference: Rows
    entropy: Rows

    def tokens(self, aggregation: str, dtype: torch.dtype = torch.float64) -> Tokens:
        lengths_N = torch.tensor([len(row) for row in self.logprobs])
        sequence_T = torch.arange(len(lengths_N)).repeat_interleave(lengths_N)
        weights_N = token_weights(lengths_N.to(dtype), aggregation, MAX_LENGTH)
        return Tokens(
            logprobs_T=flat(self.logprobs, dtype).requires_grad_(),
            old_logprobs_T=flat(self.old, dtype),
            rollout_logprobs_T=flat(self.rollout, dtype),
            advantages_T=torch.tensor(self.advantages, dtype=dtype)[sequence_T],
            weights_T=weights_N[sequence_T],
            sequence_T=sequence_T,
            sequences=len(lengths_N),
            reference_logprobs_T=flat(self.reference, dtype),
            entropy_T=flat(self.entropy, dtype).requires_grad_(),
        )


def flat(rows: Rows, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.tensor([x for row in rows for x in row], dtype=dtype)


def random_case(rng: random.Random, sequences: int | None = None, longest: int = 4) -> Case:
    """Ragged, with empty sequences; now and then all are empty, or an advantage is 0."""
    n = sequences or rng.randint(1, 4)
    lengths = [0] * n if rng.random() < 0.03 else [rng.randint(0, longest) for _ in range(n)]
    old = [[-3 * rng.random() for _ in range(length)] for length in lengths]

    def near(spread: float) -> Rows:
        return [[x + rng.gauss(0, spread) for x in row] for row in old]

    return Case(
        advantages=[rng.choice([0, 1, 1, 1, 1]) * rng.gauss(0, 1) for _ in range(n)],
        logprobs=near(0.4),
        old=old,
        rollout=near(0.3),
        reference=near(0.5),
        entropy=[[3 * rng.random() for _ in row] for row in old],
    )


def random_algo(rng: random.Random, **fixed: Any) -> AlgoConfig:
    clip_high = rng.uniform(0.05, 1)
    values = {
        "loss": rng.choice(["clip", "gspo", "gspo_token", "cispo", "sapo"]),
        "clip_low": rng.uniform(0.05, 0.5),
        "clip_high": clip_high,
        "dual_clip": rng.choice([None, 1 + clip_high + rng.uniform(0.01, 0.5)]),
        "sapo_temperature_positive": rng.uniform(0.5, 2),
        "sapo_temperature_negative": rng.uniform(0.5, 2),
        "aggregation": rng.choice(
            ["sequence_mean_token_mean", "token_mean", "sequence_mean_token_sum", "constant_length"]
        ),
        "kl_coef": rng.choice([0, 0.3]),
        "kl_estimator": rng.choice(["k1", "k2", "k3"]),
        "kl_in": rng.choice(["loss", "loss", "reward"]),
        "entropy_coef": rng.choice([0, 0.2]),
        "mismatch": rng.choice(["none", "truncate", "mask"]),
        "mismatch_level": rng.choice(["token", "sequence", "geometric"]),
        "mismatch_min": rng.choice([0, 0.8]),
        "mismatch_max": rng.uniform(1.05, 2),
        "off_policy_mask": rng.choice([None, rng.uniform(0.01, 0.3)]),
    }
    return AlgoConfig(**(values | fixed))


@dataclass
class Counts:
    low: int = 0
    high: int = 0
    mismatch_dropped: int = 0
    off_policy_dropped: int = 0


def objective(case: Case, algo: AlgoConfig, counts: Counts | None = None, frozen: Rows | None = None) -> Any:
    """The number that is minimised. `frozen`: the policy's log-probabilities where they carry no gradient."""
    counts = counts or Counts()
    held = frozen or [[x.real for x in row] for row in case.logprobs]
    losses = []
    for i, advantage in enumerate(case.advantages):
        new, still = case.logprobs[i], held[i]
        length = len(new)
        row = []
        for t in range(length):
            ratio = cmath.exp(new[t] - case.old[i][t])
            if algo.loss in ("gspo", "gspo_token"):
                of_sequence = new if algo.loss == "gspo" else still
                ratio = cmath.exp(sum(of_sequence[u] - case.old[i][u] for u in range(length)) / length)
            if algo.loss == "gspo_token":
                ratio = ratio * cmath.exp(new[t]) / math.exp(still[t])
            if algo.loss == "cispo":
                weight = math.exp(still[t] - case.old[i][t])
                counts.high += weight > 1 + algo.clip_high
                loss = -min(weight, 1 + algo.clip_high) * advantage * new[t]
            elif algo.loss == "sapo":
                tau = algo.sapo_temperature_positive if advantage > 0 else algo.sapo_temperature_negative
                loss = -advantage * (4 / tau) / (1 + cmath.exp(-tau * (ratio - 1)))
            else:
                loss = _clipped(ratio, advantage, algo, counts)
            loss *= _mismatch(case, i, t, algo, counts)
            drift = sum(case.rollout[i][u] - still[u] for u in range(length)) / length
            if algo.off_policy_mask is not None and advantage < 0 and drift > algo.off_policy_mask:
                counts.off_policy_dropped += 1
                loss = 0
            if algo.kl_in == "loss":
                loss += algo.kl_coef * divergence(algo.kl_estimator, new[t], case.reference[i][t])
            row.append(loss - algo.entropy_coef * case.entropy[i][t])
        losses.append(row)
    tokens = sum(len(row) for row in losses)
    if algo.aggregation == "token_mean":
        return sum(sum(row) for row in losses) / tokens if tokens else 0
    if algo.aggregation == "sequence_mean_token_mean":
        return sum(sum(row) / len(row) for row in losses if row) / len(losses)
    total = sum(sum(row) for row in losses) / len(losses)
    return total / MAX_LENGTH if algo.aggregation == "constant_length" else total


def _clipped(ratio: complex, advantage: float, algo: AlgoConfig, counts: Counts) -> complex:
    """Case by case: where the clip acts, the gain is a constant."""
    low, high = 1 - algo.clip_low, 1 + algo.clip_high
    if advantage > 0 and ratio.real > high:
        counts.high += 1
        return -high * advantage + 0j
    if advantage < 0 and ratio.real < low:
        counts.low += 1
        return -low * advantage + 0j
    if advantage < 0 and algo.dual_clip is not None and ratio.real > algo.dual_clip:
        counts.high += 1
        return -algo.dual_clip * advantage + 0j
    return -ratio * advantage


def _mismatch(case: Case, i: int, t: int, algo: AlgoConfig, counts: Counts) -> float:
    if algo.mismatch == "none":
        return 1
    ratios = [math.exp(a - b) for a, b in zip(case.old[i], case.rollout[i], strict=True)]
    ratio = ratios[t] if algo.mismatch_level == "token" else math.prod(ratios)
    if algo.mismatch_level == "geometric":
        ratio **= 1 / len(ratios)
    if algo.mismatch == "truncate":
        return min(max(ratio, algo.mismatch_min), algo.mismatch_max)
    if algo.mismatch_min <= ratio <= algo.mismatch_max:
        return ratio
    counts.mismatch_dropped += 1
    return 0


def divergence(estimator: str, new: complex, reference: float) -> complex:
    inverse = cmath.exp(reference) / cmath.exp(new)
    log = new - reference
    return {"k1": log, "k2": log * log / 2, "k3": inverse + log - 1}[estimator]


def gradient(case: Case, algo: AlgoConfig, field: str = "logprobs") -> list[float]:
    """By each entry of `field`, flat."""
    return [complex(objective(moved, algo)).imag / STEP for moved in _moved(case, field, 1j * STEP)]


def differences(case: Case, algo: AlgoConfig, h: float) -> list[float]:
    """The gradient by the log-probabilities as central differences."""
    pairs = zip(_moved(case, "logprobs", h), _moved(case, "logprobs", -h), strict=True)
    values = [[complex(objective(x, algo, frozen=case.logprobs)).real for x in pair] for pair in pairs]
    return [(up - down) / (2 * h) for up, down in values]


def _moved(case: Case, field: str, step: complex) -> Iterator[Case]:
    """The case with `step` added to one entry of `field` after the other."""
    rows: Rows = getattr(case, field)
    for i, row in enumerate(rows):
        for t in range(len(row)):
            changed = [*row[:t], row[t] + step, *row[t + 1 :]]
            yield replace(case, **{field: [*rows[:i], changed, *rows[i + 1 :]]})
