"""Completions are scored while others are sampled, and come back in the order in which their prompts were submitted."""

from __future__ import annotations

from concurrent.futures import Future
from typing import Any

from hybrid_rl.answers import Answers
from hybrid_rl.reward.combine import combine
from hybrid_rl.rollout import Episodes
from hybrid_rl.types import Outcome
from tests.rollout.test_episodes import SAMPLING, FakePool, prompts


class _Rewards:
    """Notes when it is asked, and by which rewards; ends nothing before it is told to."""

    def __init__(self, pool: FakePool) -> None:
        self._pool = pool
        self.asked: list[tuple[str, str | None, int]] = []
        self.verdicts: list[Future[Any]] = []

    def submit(self, prompt: Any, completions: Any, only: str | None) -> Future[Any]:
        self.asked.append((prompt.text, only, self._pool.unfinished))
        self.verdicts.append(Future())
        return self.verdicts[-1]

    def combine(self, asked: Any, completions: Any, verdicts: Any, step: int) -> Any:
        return combine(asked, completions, verdicts, [], step)


def test_each_group_is_scored_as_soon_as_it_has_ended():
    pool = FakePool()  # answers the last request first, one a poll
    rewards: Any = _Rewards(pool)
    answers = Answers(Episodes(pool), rewards)  # type: ignore[arg-type]
    answers.submit(prompts("p", "q", "r"), SAMPLING, "train", only="accuracy")
    answers.poll(0.0)
    assert rewards.asked == [("r", "accuracy", 2)], "two are still being sampled"
    assert answers.take_next(1, "train") == [], "the first has not ended"
    beside = answers.generate(prompts("s"), SAMPLING)
    assert [a.prompt.text for a in beside] == ["s"]
    while answers.unfinished("train"):
        answers.poll(0.0)
    taken = answers.take_next(3, "train")
    assert [a.prompt.text for a in taken] == ["p", "q", "r"]
    assert sorted(text for text, _, _ in rewards.asked) == ["p", "q", "r", "s"], "each once"
    assert not any(a.verdicts.done() for a in taken), "what is sampled need not wait for what is scored"
    for verdict in rewards.verdicts:
        verdict.set_result({"accuracy": (Outcome("score", 1.0),) * 2})
    assert [g.prompt.text for g in answers.scored(taken).groups] == ["p", "q", "r"]
