"""Estimates against enumeration and closed forms, AURAC on curves whose area is known, and whole evaluations."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from concurrent.futures import Future
from itertools import combinations, pairwise, product
from typing import Any

import pytest

from hybrid_rl.answers import Answered
from hybrid_rl.config_file import parse_config
from hybrid_rl.evaluate import aurac, evaluate, interval, majority, pass_at_k
from hybrid_rl.reward.combine import Scored, combine
from hybrid_rl.types import Completion, Outcome, Prompt, Sampling

RANKS = (1, 2, 4, 8, 16, 32)


@pytest.mark.parametrize("log", [False, True])
def test_aurac_of_a_constant_is_the_constant(log: bool):
    assert aurac(RANKS, [0.4] * 6, log=log) == pytest.approx(0.4)
    assert aurac([3], [0.7], log=log) == 0.7
    assert aurac([4, 6], [0.2, 0.6], log=log) == pytest.approx(0.4)


def test_aurac_of_a_line_is_its_middle():
    """Of one in the rank, and of one in its logarithm."""
    assert aurac(RANKS, [0.02 * r for r in RANKS], log=False) == pytest.approx(0.02 * 33 / 2)
    assert aurac(RANKS, [0.1 + 0.15 * math.log2(r) for r in RANKS], log=True) == pytest.approx(0.1 + 0.15 * 5 / 2)
    # Over doublings, the mean of their trapezoids.
    accuracies = [0.1, 0.5, 0.4, 0.6, 0.9, 0.8]
    mean = sum((a + b) / 2 for a, b in pairwise(accuracies)) / 5
    assert aurac(RANKS, accuracies, log=True) == pytest.approx(mean)


def test_aurac_weighs_ranks_by_their_distance():
    assert aurac([1, 2, 10], [0.0, 0.0, 1.0], log=False) == pytest.approx(4 / 9)
    assert aurac([1, 2, 8], [0.0, 0.0, 1.0], log=True) == pytest.approx(1 / 3)


@pytest.mark.parametrize("samples", [1, 2, 5, 8])
def test_pass_at_k_is_the_mean_over_all_choices_of_k(samples: int):
    for right in range(samples + 1):
        scores = [i < right for i in range(samples)]
        for k in range(1, samples + 1):
            chosen = [any(choice) for choice in combinations(scores, k)]
            assert pass_at_k(samples, right, k) == pytest.approx(sum(chosen) / len(chosen))


def test_pass_at_k_is_unbiased():
    """Over all outcomes of four samples, its mean is the chance that two samples are not both wrong; the plain estimate
    `1 - (1 - right / samples) ** k` falls short of it."""
    chance, k, samples = 0.3, 2, 4
    mean = plain = 0.0
    for outcome in product([0, 1], repeat=samples):
        weight = math.prod(chance if right else 1 - chance for right in outcome)
        mean += weight * pass_at_k(samples, sum(outcome), k)
        plain += weight * (1 - (1 - sum(outcome) / samples) ** k)
    assert mean == pytest.approx(1 - (1 - chance) ** k)
    assert plain < mean - 0.01


def test_the_majority_votes_with_answers_alone():
    assert majority(["4", "4", "5"], [True, True, False]) == 1
    assert majority(["4", "5", "5"], [True, False, False]) == 0
    assert majority(["4", "5"], [True, False]) == 0.5, "a tie is broken by lot"
    assert majority(["", "", "4"], [False, False, True]) == 1, "no answer is no vote"
    assert majority(["", ""], [False, False]) == 0


def test_intervals_hold_what_they_should():
    low, high = interval([1.0] * 8 + [0.0] * 2)
    z, n, p = 1.959964, 10, 0.8
    middle, half = (
        (p + z**2 / (2 * n)) / (1 + z**2 / n),
        z / (1 + z**2 / n) * math.sqrt(p * 0.2 / n + z**2 / (4 * n**2)),
    )
    assert (low, high) == pytest.approx((middle - half, middle + half), abs=1e-4), "Wilson's"
    assert interval([1.0] * 5)[0] < 1, "five of five do not prove everything"
    draw = random.Random(1)
    values = [draw.gauss(0, 1) for _ in range(400)]
    mean, error = sum(values) / 400, 1.96 * math.sqrt(sum(v * v for v in values) / 400) / 20
    assert interval(values) == pytest.approx((mean - error, mean + error), abs=0.02)
    assert interval(values) == interval(values)


class _Answers:
    """Answers of which the first is right and extracted as `7`; later ones differ from problem to problem."""

    def __init__(self, config: Any) -> None:
        self._config = config
        self.asked: list[tuple[int, str | None]] = []

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling, *, only: str | None) -> list[Answered]:
        self.asked.append((sampling.n, only))
        answered = []
        for p, prompt in enumerate(prompts):
            done: Future[Any] = Future()
            rows = [(i == 0 or (p + i) % 3 == 0, i) for i in range(sampling.n)]
            outcomes = [Outcome("score", float(r), extra={"extracted": "7" if r else f"no {i}"}) for r, i in rows]
            if prompt.id.endswith("/1") and sampling.n > 1:
                outcomes[1] = Outcome("timeout", None, "slow")
            done.set_result({only: tuple(outcomes)})
            ends = ["length" if prompt.id.endswith("/2") else "stop"] * sampling.n
            answered.append(Answered(prompt, tuple(Completion("", (1,), (0.0,), end, 0) for end in ends), done))
        return answered

    def scored(self, answered: Sequence[Answered]) -> Scored:
        done = [each.verdicts.result() for each in answered]
        specs = self._config.rewards
        return combine([a.prompt for a in answered], [a.completions for a in answered], done, specs, 1)


def test_each_data_set_is_measured_by_itself():
    tree = {"model": {"path": "m"}, "data": {"train": "a", "eval": {"one": "b", "two": "c"}}, "eval": {"k": 4}}
    tree["rewards"] = [{"plugin": "m:style"}, {"plugin": "m:right", "name": "right"}]
    config = parse_config({**tree, "eval": {"k": 4, "reward": "right"}})
    sets = {name: [Prompt(f"{name}/{i}", "", (1,), {}) for i in range(n)] for name, n in (("one", 3), ("two", 1))}
    answers: Any = _Answers(config)
    found = evaluate(answers, sets, config)
    assert answers.asked == [(1, "right"), (4, "right")], "only the reward that measures accuracy is asked"
    metrics = {name.removeprefix("eval/"): value for name, value in found.metrics.items()}
    assert metrics["one/accuracy"] == metrics["accuracy"] == 1
    assert metrics["one/truncated"] == pytest.approx(1 / 3)
    assert metrics["truncated"] == pytest.approx(1 / 6), "the mean over sets, however large they are"
    # Right samples of the problems: {0, 3}; {0, 2}, of which 1 has no score; {0, 1}; then {0, 3} again.
    assert metrics["one/mean_at_k"] == metrics["two/mean_at_k"] == pytest.approx(0.5)
    assert metrics["one/pass_at_2"] == pytest.approx(pass_at_k(4, 2, 2))
    assert metrics["one/pass_at_4"] == metrics["one/maj_at_k"] == 1
    assert metrics["one/unscored"] == metrics["unscored"] == 1, "a count, which is summed"
    assert metrics["two/ci/accuracy_low"] < 1
    assert not any(name.startswith("ci/") for name in metrics), "of several sets' means there is no interval"
    assert [len(found.greedy), len(found.sampled)] == [4, 4]
