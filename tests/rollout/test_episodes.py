"""Episodes of many turns: what is sampled, what is given, limits, and environments that misbehave."""

from __future__ import annotations

import textwrap
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hybrid_rl.config import ConfigError, RewardConfig
from hybrid_rl.rollout import Episodes
from hybrid_rl.rollout.environment import Environment
from hybrid_rl.rollout.pool import prompt_seed
from hybrid_rl.types import Completion, Prompt, Request, Sampling
from tests.rollout.answering import generate

SAMPLING = Sampling(n=2, temperature=1.0, top_p=1.0, max_tokens=12, stop=(), seed=5)
EOS = 0

ENVIRONMENTS = """
    import os, time

    def echo(turns):
        return f"<{turns[-1]}>"

    async def asynchronous(turns, answer):
        return None if len(turns) > 1 else answer

    def words(turns, answer, **columns):
        return f"[{answer}{len(turns)}]" if "b" not in turns[-1] else None

    def slow(turns):
        time.sleep(0.5)
        return None

    def hangs(turns):
        time.sleep(3600) if "b" in turns[-1] else None

    def crashes(turns):
        os._exit(3) if "b" in turns[-1] else None

    def raises(turns):
        return {"a": None}[turns[-1]]

    def not_text(turns):
        return 3 if "b" in turns[-1] else None

    def long(turns):
        return "x" * 100

    def empty(turns):
        return ""

    def wants(turns, nothing):
        return None
"""


class Letters:
    """A tokenizer of letters, a token each; the end of a sequence is special."""

    def decode(self, ids: Sequence[int], skip_special_tokens: bool) -> str:
        assert skip_special_tokens
        return "".join(chr(i) for i in ids if i != EOS)

    def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
        assert not add_special_tokens
        return {"input_ids": [ord(c) for c in text]}


class FakePool:
    """Answers requests in reverse, one a poll, each turn being what `policy` says and the end of a sequence."""

    def __init__(self, policy: Any = lambda request, index: "ab"[index]) -> None:
        self.policy, self.version = policy, 3
        self.asked: list[Request] = []
        self.waits: list[float] = []
        self._queue: list[Request] = []
        self._finished: dict[str, tuple[Completion, ...]] = {}

    @property
    def unfinished(self) -> int:
        return len(self._queue)

    def submit(self, requests: Sequence[Request], *, first: bool = False) -> None:
        assert len({r.id for r in [*self.asked, *requests]}) == len(self.asked) + len(requests)
        self.asked += requests
        self._queue += requests

    def poll(self, seconds: float) -> None:
        self.waits.append(seconds)
        if self._queue:
            request = self._queue.pop()
            self._finished[request.id] = tuple(self._turn(request, i) for i in range(request.sampling.n))

    def take_finished(self) -> dict[str, tuple[Completion, ...]]:
        finished, self._finished = self._finished, {}
        return finished

    def _turn(self, request: Request, index: int) -> Completion:
        said = self.policy(request, index)
        if isinstance(said, Completion):
            return said
        ids = (*map(ord, said), EOS)
        cut = ids[: request.sampling.max_tokens]
        logprobs = tuple(-0.1 * (i + 1) for i in range(len(cut)))
        return Completion("engine", cut, logprobs, "stop" if cut == ids else "length", self.version)


def prompts(*texts: str) -> list[Prompt]:
    return [Prompt(f"0/{i}", t, tuple(map(ord, t)), {"prompt": t, "answer": "42"}) for i, t in enumerate(texts)]


@pytest.fixture
def episodes(tmp_path: Path):
    """Make `Episodes` on a fake pool and one of the environments above."""
    path = tmp_path / "mine.py"
    path.write_text(textwrap.dedent(ENVIRONMENTS))
    started: list[Environment] = []

    def make(function: str, pool: FakePool, *, max_turns: int = 4, timeout: float = 10.0) -> Episodes:
        started.append(Environment(f"{path}:{function}", RewardConfig(timeout=timeout, workers=1)))
        started[-1].check(["prompt", "answer"])
        return Episodes(pool, environment=started[-1], tokenizer=Letters(), max_turns=max_turns)  # type: ignore[arg-type]

    yield make
    for environment in started:
        environment.close()


def text_of(ids: Sequence[int]) -> str:
    return "".join(chr(i) if i != EOS else "." for i in ids)


def test_without_an_environment_it_gives_what_the_pool_gives():
    made: list[Completion] = []

    def policy(request: Request, index: int) -> Completion:
        made.append(Completion("t", (7, index), (-1.0, -2.0), "stop", 0, ((1, 1),)))
        return made[-1]

    pool = FakePool(policy)
    groups = generate(Episodes(pool), prompts("p", "q", "r"), SAMPLING)  # type: ignore[arg-type]
    assert [id(c) for g in reversed(groups) for c in g] == [id(c) for c in made], "the very objects"
    assert [r.seed for r in pool.asked] == [prompt_seed(5, f"0/{i}") for i in range(3)]
    assert {r.sampling for r in pool.asked} == {SAMPLING}


def test_turns_and_answers_follow_each_other(episodes: Any):
    """The first completion says a, is answered twice, then says b."""

    def policy(request: Request, index: int) -> str:
        return "b" if "3" in text_of(request.prompt_ids) or index else "a"

    pool = FakePool(policy)
    ((first, second),) = generate(episodes("words", pool), prompts("p"), replace(SAMPLING, max_tokens=15))
    assert text_of(first.token_ids) == "a.[421]a.[423]b"
    assert first.text == "a[421]a[423]b"
    assert (first.given, first.finish_reason) == (((2, 7), (9, 14)), "length")
    assert first.logprobs == (-0.1, -0.2, *[0.0] * 5, -0.1, -0.2, *[0.0] * 5, -0.1)
    assert (second.text, second.given, second.token_ids) == ("engine", (), (ord("b"), EOS))


def test_continuations_are_seeded_and_limited(episodes: Any):
    pool = FakePool(lambda request, index: "a")
    groups = generate(episodes("echo", pool, max_turns=3), prompts("p", "q"), replace(SAMPLING, max_tokens=30))
    assert {c.text for g in groups for c in g} == {"a<a>a<a>a"}
    assert {c.finish_reason for g in groups for c in g} == {"length"}, "the environment would have gone on"
    first, further = pool.asked[:2], pool.asked[2:]
    assert {r.sampling.n for r in further} == {1}
    assert {(text_of(r.prompt_ids)[1:], r.sampling.max_tokens) for r in further} == {("a.<a>", 25), ("a.<a>a.<a>", 20)}
    assert {r.seed for r in further} == {
        prompt_seed(r.seed, f"{index}/{turn}") for r in first for index in (0, 1) for turn in (1, 2)
    }


@pytest.mark.parametrize("function", ["long", "empty"])
def test_an_answer_that_leaves_no_room_or_is_none_ends_the_episode(episodes: Any, function: str):
    ((first, _),) = generate(episodes(function, FakePool()), prompts("p"), SAMPLING)
    assert (first.text, first.given) == ("engine", ())
    assert first.finish_reason == ("length" if function == "long" else "stop")


@pytest.mark.parametrize("limit", [5, 6])
def test_an_answer_is_appended_if_one_more_token_fits(episodes: Any, limit: int):
    pool = FakePool(lambda request, index: "a")
    ((first, _),) = generate(episodes("echo", pool), prompts("p"), replace(SAMPLING, max_tokens=limit))
    assert text_of(first.token_ids) == ("a." if limit == 5 else "a.<a>a")
    assert len(pool.asked) == (1 if limit == 5 else 3)
    assert first.finish_reason == "length"


@pytest.mark.parametrize("reason", ["length", "time"])
def test_only_a_turn_that_ended_by_itself_is_answered(episodes: Any, reason: str):
    cut = Completion("a", (97,), (-1.0,), reason, 0)
    made = episodes("echo", FakePool(lambda request, index: cut))
    assert generate(made, prompts("p"), SAMPLING) == [[cut, cut]]


def test_a_continuation_without_tokens_takes_the_answer_with_it(episodes: Any):
    pool = FakePool(lambda request, index: Completion("", (), (), "time", 3) if request.sampling.n == 1 else "a")
    ((first, _),) = generate(episodes("echo", pool), prompts("p"), SAMPLING)
    assert (text_of(first.token_ids), first.given, first.finish_reason) == ("a.", (), "time")


def test_versions_are_those_of_the_tokens(episodes: Any):
    turns = [
        Completion("", (97, 98), (-1.0, -1.0), "stop", 4, ((1, 5),)),
        Completion("", (99,), (-1.0,), "stop", 5),
        Completion("", (99, 100), (-1.0, -1.0), "stop", 6, ((1, 8),)),
    ]
    pool = FakePool(lambda request, index: turns[len(pool.asked) - 1])
    ((only,),) = generate(episodes("asynchronous", pool), prompts("p"), replace(SAMPLING, n=1))
    assert (only.weight_version, only.later_versions) == (4, ((1, 5),))
    pool.asked.clear()
    ((only,),) = generate(episodes("echo", pool, max_turns=3), prompts("p"), replace(SAMPLING, n=1, max_tokens=99))
    assert text_of(only.token_ids) == "ab<ab>c<c>cd"
    assert (only.weight_version, only.later_versions) == (4, ((1, 5), (10, 6), (11, 8)))


def test_stop_strings_and_spaces_are_in_what_the_environment_sees(episodes: Any):
    """The engine's text lacks the stop string, and a turn decoded by itself might lack its space."""

    class Spaced(Letters):
        def decode(self, ids: Sequence[int], skip_special_tokens: bool) -> str:
            return super().decode(ids, skip_special_tokens).removeprefix(" ")

    made = episodes("echo", FakePool(lambda request, index: " a!"), max_turns=2)
    made._tokenizer = Spaced()
    ((first, _),) = generate(made, prompts("p"), replace(SAMPLING, max_tokens=30))
    assert first.text == "a!<a!> a!"
    made = episodes("echo", FakePool(lambda request, index: " a!"), max_turns=3)
    made._tokenizer = Spaced()
    ((first, _),) = generate(made, prompts("p"), replace(SAMPLING, max_tokens=30))
    assert first.text == "a!<a!> a!< a!> a!"


@pytest.mark.parametrize(
    ("function", "fault"),
    [("hangs", "timeout"), ("crashes", "crash"), ("raises", "error"), ("not_text", "error")],
)
def test_an_environment_that_fails_costs_only_the_completion_and_is_counted(episodes: Any, function: str, fault: str):
    made = episodes(function, FakePool(), timeout=1.0)
    groups = generate(made, prompts("p", "q"), SAMPLING)
    assert [[c.finish_reason for c in g] for g in groups] == [["stop", "environment"]] * 2
    assert [[text_of(c.token_ids) for c in g] for g in groups] == [["a.", "b."]] * 2
    assert {name: n for name, n in made.faults.items() if n} == {f"environment_{fault}": 2}


def test_an_environment_that_never_answers_ends_the_run(episodes: Any):
    made = episodes("raises", FakePool(lambda request, index: "b"))
    with pytest.raises(RuntimeError, match=r"rollout\.environment=.*raises never answered; .*KeyError"):
        generate(made, prompts(*"pqrstu"), SAMPLING)


def test_engines_go_on_while_the_environment_thinks(episodes: Any):
    pool = FakePool()
    made = episodes("slow", pool)
    made.submit(prompts("p", "q", "r"), replace(SAMPLING, n=1), "train")
    started = time.monotonic()
    while pool.unfinished:
        made.poll(1.0)
    assert time.monotonic() - started < 0.4
    assert pool.waits[0] == 1.0
    assert max(pool.waits[1:]) < 0.1, "an answer does not wait for the engines"
    assert made.unfinished("train") == 3
    assert made.take_next(1, "train") == []
    while made.unfinished("train"):
        made.poll(1.0)
    assert [p.text for p, _ in made.take_next(3, "train")] == ["p", "q", "r"]


def test_what_has_ended_before_is_not_asked_for():
    pool = FakePool()
    episodes, both = Episodes(pool), prompts("p", "q")  # type: ignore[arg-type]
    first = {p.id: tuple(done) for p, done in zip(both, generate(episodes, both, SAMPLING), strict=True)}
    ready = {both[0].id: first[both[0].id]}
    episodes.submit(both, SAMPLING, "again", ready=ready)
    assert episodes.not_taken("again") == list(ready.items())
    assert [(p.id, done) for p, done in episodes.ended("again")] == list(ready.items())
    while episodes.unfinished("again"):
        episodes.poll(0.0)
    assert {p.id: done for p, done in episodes.take_next(2, "again")} == first
    assert [r.prompt_ids for r in pool.asked] == [both[i].token_ids for i in (0, 1, 1)]


def test_generate_leaves_alone_what_else_is_under_way():
    """Requests are answered last first, so that what was submitted before is still there, then done, then taken."""
    pool = FakePool()
    made = Episodes(pool)  # type: ignore[arg-type]
    made.submit(prompts("p", "q", "r"), SAMPLING, "train")
    made.poll(0.0)
    assert made.unfinished("train") == 2
    assert made.take_next(1, "train") == [], "the last is done, the first is not"
    ((completion, _),) = generate(made, prompts("p"), SAMPLING)
    assert text_of(completion.token_ids) == "a."
    assert made.unfinished("train") == 2
    made.submit(prompts("s"), SAMPLING, "train")
    while made.unfinished("train"):
        made.poll(0.0)
    assert [[p.text for p, _ in made.take_next(2, "train")] for _ in range(2)] == [["p", "q"], ["r", "s"]]
    assert made.take_next(1, "train") == []


@pytest.mark.parametrize(
    ("spec", "message"),
    [("nowhere.py:f", "does not exist"), ("configs.nothing:f", "cannot be loaded"), ("no colon", "not of the form")],
)
def test_environments_that_cannot_be_loaded_are_refused(spec: str, message: str):
    environment = Environment(spec, RewardConfig())
    try:
        with pytest.raises(ConfigError, match=rf"rollout\.environment: .*{message}"):
            environment.check(["answer"])
    finally:
        environment.close()


def test_an_environment_that_wants_what_the_data_lacks_is_refused(episodes: Any):
    with pytest.raises(ConfigError, match=r"rollout\.environment: .* needs the column 'nothing'"):
        episodes("wants", FakePool())
