"""Generation beside training: how far ahead it may be, that order and data do not depend on timing, and whole runs."""

from __future__ import annotations

import random
from collections import deque
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from hybrid_rl.answers import Answered
from hybrid_rl.config import ConfigError
from hybrid_rl.config_file import parse_config
from hybrid_rl.data import PromptSource
from hybrid_rl.reward import Scored
from hybrid_rl.run_directory import read_metrics
from hybrid_rl.step_clock import StepClock
from hybrid_rl.types import Completion, Prompt, Sampling, ScoredGroup
from tests.trainers.test_grpo import check_rows, inline, learnable, timeless  # noqa: F401
from trainers import grpo
from trainers.async_grpo import Overlapped
from trainers.grpo import train
from trainers.step import staleness_metrics

STEPS = 12
PROMPTS = [Prompt(str(i), "", (i,), {}) for i in range(1000)]


class _Answers:
    """Stands in for `Answers`: a prompt is finished after a random number of polls, under the version at its start."""

    def __init__(self, seed: int) -> None:
        self._random, self.version, self._open = random.Random(seed), 0, deque()
        self.most = self.drawn = 0

    def submit(self, prompts: list[Prompt], sampling: Sampling, tag: str, ready: dict[str, Any]) -> None:
        for p in prompts:
            sampled = p.id not in ready
            self._open.append(
                [p, self._random.randrange(8), self.version] if sampled else [p, 0, ready[p.id][0].weight_version]
            )
        self.most, self.drawn = max(self.most, len(self._open)), self.drawn + len(prompts)

    def ended(self, tag: str) -> list[tuple[str, Any]]:
        return [(p.id, (Completion("", (1,), (0.0,), "stop", v),) * 2) for p, polls, v in self._open if polls <= 0]

    def poll(self, seconds: float) -> None:
        for entry in self._open:
            entry[1] -= 1

    def unfinished(self, tag: str) -> int:
        return sum(polls > 0 for _, polls, _ in self._open)

    def take_next(self, count: int, tag: str) -> list[Answered]:
        first = [self._open[i] for i in range(min(count, len(self._open)))]
        if len(first) < count or any(polls > 0 for _, polls, _ in first):
            return []
        for _ in first:
            self._open.popleft()
        done: Future[Any] = Future()
        done.set_result({})
        return [Answered(p, (Completion("", (1,), (0.0,), "stop", v),) * 2, done) for p, _, v in first]

    def scored(self, answered: list[Answered], step: int) -> Scored:
        """Every third prompt's completions earn the same."""
        assert step == self.version + 1
        rewards = [(1.0, float(int(a.prompt.id.rpartition("/")[2]) % 3 == 0)) for a in answered]
        return Scored([ScoredGroup(a.prompt, a.completions, r, {}) for a, r in zip(answered, rewards, strict=True)], {})


class _Training:
    """Is over after some looks at it."""

    name = "learner-0"

    def __init__(self, polls: int) -> None:
        self._left = polls

    def ready(self, timeout: float) -> bool:
        self._left -= 1
        return self._left < 0

    def result(self, timeout: float | None = None) -> None: ...


@pytest.mark.parametrize("algorithm", ["grpo", "dapo"])
@pytest.mark.parametrize("ahead", [0, 1, 3])
@pytest.mark.parametrize("seed", range(5))
def test_no_token_is_staler_than_allowed_and_prompts_keep_their_order(ahead: int, algorithm: str, seed: int):
    tree = {"model": {"path": "m"}, "data": {"train": "a.json", "eval": "a.json"}, "algorithm": algorithm}
    config = parse_config(tree | {"async": {"max_staleness": ahead}, "batch": {"prompts": 4, "num_generations": 2}})
    answers = _Answers(seed)
    workplace: Any = SimpleNamespace(answers=answers)
    source = Overlapped(config, workplace, PromptSource(PROMPTS, 0), STEPS)
    used, stalest = [], 0
    for version in range(STEPS):
        rollouts = source.next(version + 1, StepClock())
        for group in rollouts.groups:
            used.append(group.prompt.id)
            stalest = max(stalest, version - group.completions[0].weight_version)
        assert source.position == len(used)
        source.during(_Training(polls=random.Random(seed + version).randrange(6)))
        answers.version += 1
        source.synced()
    source.close()
    assert used == [p.id for p in PromptSource(PROMPTS, 0).take(len(used))], "in the order of drawing, none twice"
    assert stalest == ahead or (algorithm == "dapo" and stalest <= ahead)
    assert answers.most <= 4 * (ahead + 1), "nothing queues up"
    assert answers.drawn == len(used), "nothing is drawn that no step uses"


@pytest.mark.parametrize("seed", range(5))
def test_what_waited_when_the_run_stopped_is_trained_on_and_not_sampled_again(seed: int):
    tree = {"model": {"path": "m"}, "data": {"train": "a.json", "eval": "a.json"}}
    config = parse_config(tree | {"async": {"max_staleness": 2}, "batch": {"prompts": 4, "num_generations": 2}})
    answers, used, kept = _Answers(seed), [], 0
    workplace: Any = SimpleNamespace(answers=answers)
    source = Overlapped(config, workplace, PromptSource(PROMPTS, 0), STEPS)
    for version in range(STEPS):
        waiting, position = dict(source.waiting()), source.position
        if version % 3 == 2:  # the run ends here, and is resumed
            workplace.answers = answers = _Answers(seed + version)
            answers.version = version
            source = Overlapped(config, workplace, PromptSource(PROMPTS, 0, position), STEPS - version, waiting)
            assert source.position == position
        for group in source.next(version + 1, StepClock()).groups:
            used.append(group.prompt.id)
            if version % 3 == 2 and group.prompt.id in waiting:
                kept += 1
                assert group.completions == waiting[group.prompt.id]
        source.during(_Training(polls=random.Random(seed + version).randrange(20)))
        answers.version += 1
        source.synced()
    assert used == [p.id for p in PromptSource(PROMPTS, 0).take(len(used))]
    assert kept


def test_staleness_is_counted_by_token():
    completions = (
        Completion("", (1, 2, 3, 4), (0.0,) * 4, "stop", 3, later_versions=((1, 4), (3, 5))),
        Completion("", (1, 2, 3, 4), (0.0,) * 4, "stop", 5, given=((1, 3),)),
    )
    metrics = staleness_metrics([ScoredGroup(PROMPTS[0], completions, (1.0, 0.0), {})], version=5)
    assert metrics == {
        **{"staleness/mean": pytest.approx((2 + 1 + 1 + 0 + 0 + 0) / 6), "staleness/max": 2, "staleness/mixed": 0.5},
        **{"staleness/share_0": 0.5, "staleness/share_1": pytest.approx(2 / 6), "staleness/share_2": 1 / 6},
    }


def settings(**changes: Any):
    return parse_config({"model": {"path": "m"}, "data": {"train": "a.json", "eval": "a.json"}, **changes})


def test_importance_is_corrected_by_default_where_completions_may_be_stale():
    assert settings().algo.mismatch == "none"
    stale = {"async": {"max_staleness": 1}}
    assert settings(**stale).algo.mismatch == "truncate"
    assert settings(**stale, algo={"mismatch": "none"}).algo.mismatch == "none"
    assert settings(**stale, algo={"old_logprobs": "rollout"}).algo.mismatch == "none", "the ratio corrects"
    resolved = settings(**stale).model_dump(mode="json")
    assert parse_config(resolved) == settings(**stale), "a run's own settings say the same"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"async": {"in_flight": "wait"}}, "async.in_flight=wait does nothing with async.max_staleness=0"),
        (
            {"async": {"max_staleness": 1}, "cluster": {"placement": "colocate"}, "rollout": {"engines": 2}},
            "engines that work while the learner",
        ),
        ({"async": {"max_staleness": -1}}, "async.max_staleness=-1"),
        ({"async": {"max_staleness": 1}, "cluster": {"backend": "inline"}, "learner": {"world_size": 1}}, "at a time"),
        ({"cluster": {"placement": "colocate"}, "rollout": {"engines": 3}}, "rollout.engines=3 shares a GPU"),
        ({"sync": {"transport": "directory"}}, "sync.transport=directory needs sync.directory"),
    ],
)
def test_settings_that_cannot_be_are_refused(changes: dict, message: str):
    with pytest.raises(ConfigError, match=message):
        settings(**changes)


def test_without_staleness_it_is_the_synchronous_trainer_bit_for_bit(
    learnable: dict,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    tree = {"steps": 3, "algorithm": "dapo", "sampling": {"max_completion_length": 8}}
    synchronous = train(parse_config(inline(learnable, tmp_path / "sync", **tree)), name="sync")
    monkeypatch.setattr(grpo, "InTurn", partial(Overlapped, steps=3))
    overlapped = train(parse_config(inline(learnable, tmp_path / "async", **tree)), name="async")
    assert timeless(read_metrics(overlapped.metrics)) == timeless(read_metrics(synchronous.metrics))
    ours, theirs = (load_file(r.checkpoints / "step_000003/weights.safetensors") for r in (overlapped, synchronous))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_run_ahead_of_its_weights_resumes_and_verifies_every_sync(learnable: dict):  # noqa: F811
    """Two engines and one learner rank as Ray actors."""
    learnable |= {"steps": 6, "async": {"max_staleness": 2}, "learner": {"world_size": 1}}
    learnable |= {"rollout": {"engine": "transformers", "engines": 2}, "checkpoint": {"every": 2}}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("trainers.grpo.assemble", _stop_at(5))
        with pytest.raises(KeyboardInterrupt):
            train(parse_config(learnable), name="ahead")
    run = train(parse_config(learnable), name="ahead", resume=True)
    rows = read_metrics(run.metrics)
    check_rows(rows, 6)
    assert all(row["sync/verified_engines"] == 2 for row in rows)
    assert 0 < max(row["staleness/max"] for row in rows) <= 2
    assert all(sum(v for k, v in row.items() if k.startswith("staleness/share")) == pytest.approx(1) for row in rows)
    ids = [line.split('"prompt_id": "')[1].split('"')[0] for f in sorted(run.rollouts.iterdir()) for line in f.open()]
    assert len(ids) == 6 * 16
    assert len(set(ids)) == 6 * 4, "no prompt was lost or used twice"


def _stop_at(call: int) -> Any:
    from hybrid_rl.learner.assemble import assemble

    calls = iter(range(1, call + 1))

    def assembled(*arguments: Any, **named: Any) -> Any:
        if next(calls) == call:
            raise KeyboardInterrupt
        return assemble(*arguments, **named)

    return assembled
