"""The pool under faults: engines that die at any call. The engines are fakes, to die on cue."""

from __future__ import annotations

from typing import Any

import pytest

from hybrid_rl.rollout import RolloutPool
from hybrid_rl.types import Completion, Prompt, Receipt, Sampling, WorkerDied

SAMPLING = Sampling(1, 1.0, 1.0, 4, (), 5)
PROMPTS = [Prompt(f"0/{i}", "", (i,), {}) for i in range(7)]


class FakeEngine:
    """Answers with its weight version, the prompt and the seed; dies at the calls it is told to."""

    def __init__(self, name: str, dies_at: set[int]) -> None:
        self.name, self.version, self._dies_at, self._calls, self._dead = name, 0, dies_at, 0, False

    def submit(self, method: str, /, *args: Any, **kwargs: Any) -> Any:
        if self._dead:
            raise WorkerDied(self.name)
        self._calls += 1
        self._dead = self._calls in self._dies_at
        return _FakePending(None if self._dead else getattr(self, method)(*args), self.name)

    def kill(self) -> None:
        self._dead = True

    def info(self) -> dict:
        return {}

    def apply_update(self, version: int) -> Receipt:
        self.version = version
        return Receipt(self.name, version, {})

    def generate(self, prompts: list, sampling: Sampling, seeds: list[int]) -> list:
        return [
            [Completion("", (*prompt, seed), (0.0, 0.0), "stop", self.version)]
            for prompt, seed in zip(prompts, seeds, strict=True)
        ]


class _FakePending:
    def __init__(self, value: Any, name: str) -> None:
        self._value, self._name = value, name

    def result(self, timeout: float | None = None) -> Any:
        if self._value is None:
            raise WorkerDied(self._name)
        return self._value


def make(deaths: list[set[int]], max_restarts: int = 5, engines: int = 2) -> tuple[RolloutPool, list[FakeEngine]]:
    """`deaths[i]`: calls at which the i-th engine ever started dies."""
    started: list[FakeEngine] = []

    def spawn(index: int) -> Any:
        started.append(FakeEngine(f"engine-{index}", deaths[len(started)] if len(started) < len(deaths) else set()))
        return started[-1]

    def verify(receipts: Any) -> int:
        return len(list(receipts))

    return RolloutPool(spawn, engines, max_restarts=max_restarts, timeout=1, verify=verify), started


def test_prompts_are_shared_out_and_come_back_in_order():
    pool, started = make([])
    groups = pool.generate(PROMPTS, SAMPLING)
    assert [g[0].token_ids[0] for g in groups] == list(range(7))
    assert len(started) == 2
    one, _ = make([], engines=1)
    assert one.generate(PROMPTS, SAMPLING) == groups, "the number of engines does not change what is sampled"


@pytest.mark.parametrize("deaths", [[{2}], [set(), {2}], [{2}, {2}], [{2}, set(), {1}, {2}]])
def test_a_dead_engine_loses_no_prompt_and_its_replacement_has_the_weights(deaths: list[set[int]]):
    pool, started = make(deaths)
    assert pool.update(4, 4) == 2
    groups = pool.generate(PROMPTS, SAMPLING)
    assert [(g[0].weight_version, g[0].token_ids[0]) for g in groups] == [(4, i) for i in range(7)]
    assert pool.restarts == len(started) - 2 > 0
    healthy, _ = make([])
    healthy.update(4, 4)
    assert groups == healthy.generate(PROMPTS, SAMPLING), "a death does not change what is sampled"


def test_an_engine_that_dies_in_an_update_gets_the_new_weights():
    pool, started = make([{2}])
    pool.update(1, 1)
    assert pool.update(2, 2) == 2
    assert [e.version for e in started] == [1, 2, 2]


def test_engines_that_keep_dying_end_the_run():
    pool, _ = make([{1}] * 50, max_restarts=3)
    with pytest.raises(RuntimeError, match=r"rollout\.max_restarts"):
        pool.generate(PROMPTS, SAMPLING)


def test_an_engine_that_missed_an_update_is_noticed():
    pool, started = make([])
    pool.update(1, 1)
    started[1].version = 0
    with pytest.raises(RuntimeError, match="version 0, the policy's is 1"):
        pool.generate(PROMPTS, SAMPLING)
