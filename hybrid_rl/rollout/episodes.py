"""From prompts to completions of one turn or, with an environment, of many.

Without an environment, a completion is what the pool answers. With one, the policy's turn that ends by itself (`stop`)
is answered; the answer is appended, and the policy goes on. Tokens of earlier turns stay as they were sampled, the
end-of-sequence token or stop string at their end included; an answer is tokenised by itself, without special tokens
added (but any that it names are read as such), and nothing is tokenised again. So learner and engine read the same.

Answers count towards `Sampling.max_tokens`, the limit of the whole completion; `Sampling.max_seconds` is a turn's. An
episode that the environment would go on with, but for that limit or `rollout.max_turns`, ends as `length`, without the
answer; one whose environment fails ends as `environment`. So a completion always ends with a token of the policy.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, field, replace
from itertools import count
from typing import Any

from hybrid_rl.plugins import Failure
from hybrid_rl.plugins.processes import GIVE_UP_AFTER
from hybrid_rl.rollout.environment import Environment
from hybrid_rl.rollout.pool import RolloutPool, prompt_seed
from hybrid_rl.types import Completion, Prompt, Request, Sampling

logger = logging.getLogger(__name__)
_ANSWER_SECONDS = 0.05
"""Longest that an answer of the environment waits while engines work."""


@dataclass(eq=False)
class _Group:
    """A prompt and its completions, as they end."""

    prompt: Prompt
    sampling: Sampling
    seed: int
    ended: list[Completion | None]
    told: bool = False
    """Whether `Episodes.ended` has named it."""


@dataclass(eq=False)
class _Episode:
    """One completion that may go on."""

    group: _Group
    index: int
    done: Completion
    """What there is of it."""
    turns: list[str] = field(default_factory=list)
    answer: tuple[int, ...] = ()
    """The environment's, which the turn under way follows."""


class Episodes:
    """Completions of prompts, many at a time.

    It works only while `poll` runs, but for the environment, which answers in the background. Nobody else
    may use the pool's `submit` and `take_finished`.
    """

    def __init__(
        self, pool: RolloutPool, *, environment: Environment | None = None, tokenizer: Any = None, max_turns: int = 1
    ) -> None:
        """`tokenizer` is the policy's, which an environment needs; `max_turns` is the policy's turns."""
        self._pool, self._environment, self._tokenizer, self._max_turns = pool, environment, tokenizer, max_turns
        self._numbers = count()
        self._groups: dict[str, list[_Group]] = {}
        """Tag -> what was submitted under it and not taken, in order."""
        self._asked: dict[str, _Group | _Episode] = {}
        """Request id -> what it begins or goes on with."""
        self._answers: dict[Future[Any], _Episode] = {}
        self._answered = False
        self._noted: set[str] = set()
        self.faults: dict[str, int] = dict.fromkeys(
            ("environment_error", "environment_timeout", "environment_crash"), 0
        )
        """Completions so far that ended because the environment failed, by how."""

    def submit(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        tag: str = "",
        *,
        first: bool = False,
        ready: Mapping[str, Sequence[Completion]] = {},
    ) -> None:
        """Begin `sampling.n` completions of each prompt. `take_next` of the same tag has them. `ready`: by prompt's id,
        completions that have ended already."""
        nothing = [None] * sampling.n
        groups = [
            _Group(p, sampling, prompt_seed(sampling.seed, p.id), list(ready.get(p.id, nothing))) for p in prompts
        ]
        self._groups.setdefault(tag, []).extend(groups)
        begun = [group for group in groups if None in group.ended]
        requests = [
            Request(f"{tag}/{g.prompt.id}#{next(self._numbers)}", g.prompt.token_ids, sampling, g.seed) for g in begun
        ]
        self._asked |= {r.id: g for r, g in zip(requests, begun, strict=True)}
        self._pool.submit(requests, first=first)

    def poll(self, seconds: float) -> None:
        """Let engines and environment work; returns after about `seconds`, or once something was finished."""
        if self._answers and not self._pool.unfinished:
            wait(self._answers, timeout=seconds, return_when=FIRST_COMPLETED)
        else:
            self._pool.poll(min(seconds, _ANSWER_SECONDS) if self._answers else seconds)
        for name, completions in self._pool.take_finished().items():
            self._receive(self._asked.pop(name), completions)
        further = [self._go_on(answer) for answer in list(self._answers) if answer.done()]
        self._pool.submit([request for request in further if request is not None])

    def take_next(self, count: int, tag: str = "") -> list[tuple[Prompt, tuple[Completion, ...]]]:
        """The first `count` prompts submitted under `tag` and not taken yet, with their completions; nothing before all
        of these have ended."""
        groups = self._groups.get(tag, [])
        if len(groups) < count or any(None in g.ended for g in groups[:count]):
            return []
        self._groups[tag] = groups[count:]
        return [(g.prompt, tuple(c for c in g.ended if c is not None)) for g in groups[:count]]

    def ended(self, tag: str = "") -> list[tuple[Prompt, tuple[Completion, ...]]]:
        """Prompts submitted under `tag` whose completions have all ended, in any order, each told once. `take_next` has
        them all the same."""
        new = [g for g in self._groups.get(tag, []) if not g.told and None not in g.ended]
        for group in new:
            group.told = True
        return [(g.prompt, tuple(c for c in g.ended if c is not None)) for g in new]

    def not_taken(self, tag: str = "") -> list[tuple[str, tuple[Completion, ...]]]:
        """By id, prompts submitted under `tag` whose completions have all ended, and `take_next` has not given."""
        done = [g for g in self._groups.get(tag, []) if None not in g.ended]
        return [(g.prompt.id, tuple(c for c in g.ended if c is not None)) for g in done]

    def forget(self, tag: str) -> None:
        """A tag that is used no more."""
        self._groups.pop(tag, None)

    def unfinished(self, tag: str = "") -> int:
        """Prompts submitted under `tag` of which a completion has not ended."""
        return sum(None in g.ended for g in self._groups.get(tag, []))

    def _receive(self, asked: _Group | _Episode, completions: tuple[Completion, ...]) -> None:
        """Take a turn's end: of all completions of a group, or of one that went on."""
        if isinstance(asked, _Episode):
            (turn,) = completions
            asked.done = _joined(asked.done, asked.answer, turn)
            self._turn_over(asked, turn)
        elif self._environment is None:
            asked.ended[:] = completions
        else:
            for i, turn in enumerate(completions):
                self._turn_over(_Episode(asked, i, turn), turn)

    def _turn_over(self, episode: _Episode, turn: Completion) -> None:
        if turn.finish_reason != "stop":
            self._end(episode, turn.finish_reason)
            return
        assert self._environment is not None
        start = len(episode.done.token_ids) - len(turn.token_ids)
        before, whole = self._text(episode.done.token_ids[:start]), self._text(episode.done.token_ids)
        # Not the turn decoded by itself, which some tokenizers begin without its space; nor the engine's text, which
        # lacks the stop string.
        episode.turns.append(whole.removeprefix(before) if whole.startswith(before) else self._text(turn.token_ids))
        self._answers[self._environment.ask(episode.group.prompt, episode.turns)] = episode

    def _go_on(self, asked: Future[Any]) -> Request | None:
        """Take the environment's answer. Returns the request for the policy's next turn, if there is to be one."""
        assert self._environment is not None
        episode, answer = self._answers.pop(asked), self._environment.answer(asked)
        if isinstance(answer, Failure):
            self._note(answer)
            return self._end(episode, "environment")
        self._answered = True
        ids = () if answer is None else tuple(self._tokenizer(answer, add_special_tokens=False)["input_ids"])
        if answer is None or not ids:
            return self._end(episode, "stop")
        group, turn = episode.group, len(episode.turns) // 2 + 1
        left = group.sampling.max_tokens - len(episode.done.token_ids) - len(ids)
        if turn == self._max_turns or left < 1:
            return self._end(episode, "length")
        episode.turns.append(answer)
        episode.answer = ids
        request = Request(
            f"{group.prompt.id}#{next(self._numbers)}",
            (*group.prompt.token_ids, *episode.done.token_ids, *ids),
            replace(group.sampling, n=1, max_tokens=left),
            prompt_seed(group.seed, f"{episode.index}/{turn}"),
        )
        self._asked[request.id] = episode
        return request

    def _end(self, episode: _Episode, reason: str) -> None:
        done = replace(episode.done, finish_reason=reason)
        if done.given:
            done = replace(done, text=self._text(done.token_ids))
        episode.group.ended[episode.index] = done

    def _note(self, failure: Failure) -> None:
        """Count it. Raises `RuntimeError` if the environment has never answered: it is broken."""
        assert self._environment is not None
        self.faults[f"environment_{failure.kind}"] += 1
        if failure.detail not in self._noted:  # faults/environment_* has how often
            self._noted.add(failure.detail)
            logger.warning("rollout.environment: %s", failure.detail)
        if not self._answered and sum(self.faults.values()) >= GIVE_UP_AFTER:
            raise RuntimeError(f"rollout.environment={self._environment.spec} never answered; {failure.detail}")

    def _text(self, token_ids: Sequence[int]) -> str:
        return self._tokenizer.decode(token_ids, skip_special_tokens=True)


def _joined(done: Completion, answer: tuple[int, ...], turn: Completion) -> Completion:
    """A completion with an answer of the environment and the policy's next turn; without both if that has no token."""
    if not turn.token_ids:
        return done
    start = len(done.token_ids)
    end = start + len(answer)
    newest = done.later_versions[-1][1] if done.later_versions else done.weight_version
    changed = () if turn.weight_version == newest else ((end, turn.weight_version),)
    return replace(
        done,
        token_ids=(*done.token_ids, *answer, *turn.token_ids),
        logprobs=(*done.logprobs, *(0.0 for _ in answer), *turn.logprobs),
        later_versions=(*done.later_versions, *changed, *((end + at, v) for at, v in turn.later_versions)),
        given=(*done.given, (start, end)),
    )
