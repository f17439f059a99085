"""The math reward, and the runtime under plugins that misbehave."""

from __future__ import annotations

import dataclasses
import multiprocessing
import textwrap
import time
from pathlib import Path

import pytest

from hybrid_rl.cluster.inline import ThisProcess
from hybrid_rl.config import ConfigError, RewardConfig, RewardSpec
from hybrid_rl.reward import RewardPool
from hybrid_rl.types import Completion, Prompt
from rewards.math import accuracy, last_boxed

HOSTILE = """
    import os, re, time

    def good(completions, answer, **columns):
        return [float(c == a) for c, a in zip(completions, answer)]

    def no_extras(completions, answer):
        return [1.0] * len(completions)

    async def asynchronous(completions, prompts, **columns):
        return [float(p == "p") for p in prompts]

    def hangs(completions, **columns):
        if "bad" in completions:
            time.sleep(3600)
        return [1.0] * len(completions)

    def hangs_in_c(completions, **columns):
        if "bad" in completions:
            re.match(r"(a+)+$", "a" * 64 + "b")
        return [1.0] * len(completions)

    def crashes(completions, **columns):
        if "bad" in completions:
            os._exit(3)
        return [1.0] * len(completions)

    def raises(completions, **columns):
        if "bad" in completions:
            raise KeyError("boom")
        return [1.0] * len(completions)

    def not_finite(completions, **columns):
        return [float("nan") if c == "bad" else 1.0 for c in completions]

    def too_few(completions, **columns):
        return [1.0]

    def always_raises(completions, **columns):
        raise RuntimeError("broken plugin")

    def not_applicable(completions, **columns):
        return [None if c == "bad" else 0.5 for c in completions]
"""


@pytest.fixture
def plugin(tmp_path: Path) -> str:
    path = tmp_path / "mine.py"
    path.write_text(textwrap.dedent(HOSTILE))
    return str(path)


def completion(text: str) -> Completion:
    return Completion(text, (1,), (0.0,), "stop", 0)


PROMPTS = [Prompt(str(i), "p", (1,), {"prompt": "p", "answer": "a"}) for i in range(2)]
GROUPS = [[completion("a"), completion("bad"), completion("b")], [completion("a"), completion("c"), completion("a")]]


def score(*specs: tuple[str, float], timeout: float = 2.0):
    pool = RewardPool([RewardSpec(plugin=p, weight=w) for p, w in specs], RewardConfig(timeout=timeout), ThisProcess())
    try:
        pool.check(["answer", "prompt"])
        return pool.score(PROMPTS, GROUPS)
    finally:
        pool.close()


def test_rewards_are_weighted_and_summed(plugin: str):
    result = score((f"{plugin}:good", 1.0), (f"{plugin}:no_extras", 0.5), (f"{plugin}:asynchronous", 2.0))
    assert [g.rewards_G for g in result.groups] == [(3.5, 2.5, 2.5), (3.5, 2.5, 3.5)]
    assert result.groups[0].scores(f"{plugin}:good") == (1.0, 0.0, 0.0)
    assert sum(result.faults.values()) == 0


@pytest.mark.parametrize(
    ("function", "fault"),
    [
        ("hangs", "timeout"),
        ("hangs_in_c", "timeout"),
        ("crashes", "crash"),
        ("raises", "error"),
        ("not_finite", "error"),
    ],
)
def test_one_bad_completion_costs_only_itself(plugin: str, function: str, fault: str):
    result = score((f"{plugin}:{function}", 1.0))
    assert [g.rewards_G for g in result.groups] == [(1.0, None, 1.0), (1.0, 1.0, 1.0)]
    assert {kind: n for kind, n in result.faults.items() if n} == {fault: 1}


def test_not_applicable_is_no_fault(plugin: str):
    result = score((f"{plugin}:not_applicable", 1.0))
    assert result.groups[0].rewards_G == (0.5, None, 0.5)
    assert sum(result.faults.values()) == 0


def test_a_plugin_that_always_fails_stops_the_run_with_its_error(plugin: str):
    with pytest.raises(RuntimeError, match="RuntimeError: broken plugin"):
        score((f"{plugin}:always_raises", 1.0))


def test_a_column_that_a_plugin_needs_must_be_there(plugin: str):
    pool = RewardPool([RewardSpec(plugin=f"{plugin}:good")], RewardConfig(), ThisProcess())
    try:
        with pytest.raises(ConfigError, match="needs the column 'answer'"):
            pool.check(["prompt"])
    finally:
        pool.close()


def test_a_failed_check_is_no_zero_beside_another_reward(plugin: str):
    result = score((f"{plugin}:raises", 1.0), (f"{plugin}:no_extras", 0.5))
    assert [g.rewards_G for g in result.groups] == [(1.5, None, 1.5), (1.5, 1.5, 1.5)]
    with pytest.raises(RuntimeError, match="always_raises failed on every completion"):
        score((f"{plugin}:no_extras", 0.5), (f"{plugin}:always_raises", 1.0))


def test_a_plugin_that_always_hangs_does_not_hold_the_run_for_hours(plugin: str):
    groups = [[completion("bad") for _ in range(8)] for _ in range(4)]
    prompts = [Prompt(str(i), "p", (1,), {"prompt": "p"}) for i in range(4)]
    pool = RewardPool([RewardSpec(plugin=f"{plugin}:hangs")], RewardConfig(timeout=0.3), ThisProcess())
    started = time.monotonic()
    try:
        with pytest.raises(RuntimeError, match=r"took more than reward\.timeout"):
            pool.score(prompts, groups)
    finally:
        pool.close()
    assert time.monotonic() - started < 60


def test_a_completion_whose_environment_failed_has_no_reward(plugin: str):
    cut = dataclasses.replace(completion("a"), finish_reason="environment")
    pool = RewardPool([RewardSpec(plugin=f"{plugin}:good")], RewardConfig(), ThisProcess())
    try:
        (group,) = pool.score(PROMPTS[:1], [[cut, completion("a")]]).groups
        assert pool.score(PROMPTS[:1], [[cut, cut]]).groups[0].rewards_G == (None, None)
    finally:
        pool.close()
    assert group.rewards_G == (None, 1.0)
    assert group.scores(f"{plugin}:good") == (None, 1.0), "and counts as unscored in an evaluation too"


def test_workers_killed_while_idle_are_replaced(plugin: str):
    pool = RewardPool([RewardSpec(plugin=f"{plugin}:good")], RewardConfig(), ThisProcess())
    try:
        first = pool.score(PROMPTS, GROUPS).groups
        for worker in multiprocessing.active_children():
            worker.kill()
        time.sleep(1)
        assert pool.score(PROMPTS, GROUPS).groups == first
    finally:
        pool.close()


@pytest.mark.parametrize("spec", ["nowhere.py:f", "rewards.math:nothing", "no_such_module:f", "no colon"])
def test_plugins_that_cannot_be_loaded_are_refused(spec: str):
    pool = RewardPool([RewardSpec(plugin=spec)], RewardConfig(), ThisProcess())
    try:
        with pytest.raises(ConfigError, match="cannot be loaded"):
            pool.check(["answer"])
    finally:
        pool.close()


@pytest.mark.parametrize(
    ("text", "gold", "expected"),
    [
        ("\\boxed{42}", "42", 1.0),
        ("\\boxed{41}", "42", 0.0),
        ("\\boxed{ -042 }", "-42", 1.0),
        ("\\boxed{-42}", "42", 0.0),
        ("first \\boxed{1}, then \\boxed{42}", "42", 1.0),
        ("\\boxed{42}, no: \\boxed{1}", "42", 0.0),
        ("\\boxed{\\frac{1}{2}}", "0.5", 1.0),
        ("\\boxed{1,234}", "1234", 1.0),
        ("so the answer is 42", "42", 1.0),
        ("nothing to see", "42", 0.0),
        ("\\boxed{42", "42", 0.0),
        ("", "42", 0.0),
    ],
)
def test_math_accuracy(text: str, gold: str, expected: float):
    assert accuracy([text], answer=[gold]) == [expected]
    assert accuracy([[{"role": "assistant", "content": text}]], answer=[gold]) == [expected]


def test_the_last_complete_box_counts():
    assert last_boxed("\\boxed{a} \\boxed{\\frac{1}{2}} \\boxed{open") == "\\frac{1}{2}"
    assert last_boxed("none") is None
