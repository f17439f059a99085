"""Prompts answered by the policy and scored, each as soon as its last completion has ended."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from itertools import count

from hybrid_rl.reward import RewardPool, Scored, Verdicts
from hybrid_rl.rollout import Episodes
from hybrid_rl.types import Completion, Prompt, Sampling


@dataclass(frozen=True)
class Answered:
    """A prompt with its completions, which may still be being scored."""

    prompt: Prompt
    completions: tuple[Completion, ...]
    verdicts: Future[Verdicts]


class Answers:
    """Completions of prompts with what the rewards say of them. It works only while `poll` or `generate` runs, but for
    the rewards, which are computed in the background."""

    def __init__(self, episodes: Episodes, rewards: RewardPool) -> None:
        self._episodes, self._rewards = episodes, rewards
        self._numbers = count()
        self._only: dict[str, str | None] = {}
        self._verdicts: dict[tuple[str, str], Future[Verdicts]] = {}

    def submit(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        tag: str,
        *,
        only: str | None = None,
        first: bool = False,
        ready: Mapping[str, Sequence[Completion]] = {},
    ) -> None:
        """Begin `sampling.n` completions of each prompt, to be scored by all rewards or by `only` one. `take_next` of
        the same tag has them. Prompts of a tag have different ids; those of `ready` have been completed before."""
        self._only[tag] = only
        self._episodes.submit(prompts, sampling, tag, first=first, ready=ready)

    def poll(self, seconds: float) -> None:
        """Let the engines work; returns after about `seconds`, or once something was finished."""
        self._episodes.poll(seconds)
        for tag, only in self._only.items():
            for prompt, completions in self._episodes.ended(tag):
                self._verdicts[tag, prompt.id] = self._rewards.submit(prompt, completions, only)

    def take_next(self, count: int, tag: str) -> list[Answered]:
        """The first `count` prompts submitted under `tag` and not taken yet; nothing before all are answered."""
        taken = self._episodes.take_next(count, tag)
        return [Answered(prompt, done, self._verdicts.pop((tag, prompt.id))) for prompt, done in taken]

    def ended(self, tag: str) -> list[tuple[str, tuple[Completion, ...]]]:
        """By id, prompts submitted under `tag` and not taken whose completions have all ended."""
        return self._episodes.not_taken(tag)

    def unfinished(self, tag: str) -> int:
        """Prompts submitted under `tag` that are not answered."""
        return self._episodes.unfinished(tag)

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling, *, only: str | None = None) -> list[Answered]:
        """All prompts answered, in order. What else was submitted goes on meanwhile, and stays."""
        tag = f"generate-{next(self._numbers)}"
        self.submit(prompts, sampling, tag, only=only, first=True)  # the caller waits
        while self.unfinished(tag):
            self.poll(1.0)
        answered = self.take_next(len(prompts), tag)
        self._episodes.forget(tag)
        del self._only[tag]
        return answered

    def scored(self, answered: Sequence[Answered], step: int = 1) -> Scored:
        """Wait for the rewards, and combine them as at `step`. Raises `RewardFailed` as `reward.combine` does."""
        verdicts = [each.verdicts.result() for each in answered]
        return self._rewards.combine([a.prompt for a in answered], [a.completions for a in answered], verdicts, step)
