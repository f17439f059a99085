"""Rewards in killable processes: a plugin can hang, crash or raise, and the run goes on.

A prompt's whole group is scored in one call. If that call fails, its completions are scored one by one, so that one bad
completion costs only itself. A completion without a score is left out of training and counted, never scored 0.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from hybrid_rl.config import RewardConfig, RewardSpec
from hybrid_rl.plugins import GIVE_UP_AFTER, Failure, PluginProcesses
from hybrid_rl.reward.plugin import call_plugin
from hybrid_rl.types import Completion, Prompt, ScoredGroup

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Scored:
    """Groups with their rewards, and what went wrong on the way."""

    groups: list[ScoredGroup]
    faults: Mapping[str, int]
    """`timeout`, `error`, `crash` -> completions without a score for that reason."""


class RewardPool:
    """Worker processes that call the reward plugins."""

    def __init__(self, specs: Sequence[RewardSpec], settings: RewardConfig, *, chat: bool = False) -> None:
        """`chat`: completions and prompts are handed to the plugins as chat messages, as TRL does."""
        self._specs = list(specs)
        self._chat = chat
        self._processes = PluginProcesses(
            [spec.plugin for spec in specs], workers=settings.workers, timeout=settings.timeout
        )

    def check(self, columns: Sequence[str]) -> None:
        """Import every plugin, in a worker. Raises `ConfigError` if one is missing or wants a column that is not."""
        for spec in self._specs:
            self._processes.check(spec.plugin, ["completions", "prompts", *columns], setting="rewards")

    def score(self, prompts: Sequence[Prompt], groups: Sequence[Sequence[Completion]]) -> Scored:
        """Score every completion with every plugin. A completion on which any plugin failed has no reward, nor has one
        whose environment failed, which no plugin is called with.

        Raises `RuntimeError` if a plugin failed on every completion: it is broken.
        """
        kept = [[j for j, c in enumerate(g) if c.finish_reason != "environment"] for g in groups]
        asked = [i for i, indices in enumerate(kept) if indices]
        faults = {"timeout": 0, "error": 0, "crash": 0}
        tables: dict[str, list[list[float | Failure | None]]] = {}
        for plugin in (spec.plugin for spec in self._specs):
            table = tables[plugin] = [[None] * len(g) for g in groups]
            answers = self._score_with(
                plugin, [prompts[i] for i in asked], [[groups[i][j] for j in kept[i]] for i in asked]
            )
            for i, row in zip(asked, answers, strict=True):
                for j, score in zip(kept[i], row, strict=True):
                    table[i][j] = score
                    if isinstance(score, Failure):
                        faults[score.kind] += 1
            failures = [entry for row in table for entry in row if isinstance(entry, Failure)]
            if failures and len(failures) == _count(groups):
                raise RuntimeError(f"{plugin} failed on every completion; the last time: {failures[-1].detail}")
        scored = []
        for i, (prompt, group) in enumerate(zip(prompts, groups, strict=True)):
            rewards_G = tuple(self._total([tables[s.plugin][i][j] for s in self._specs]) for j in range(len(group)))
            parts = {p: tuple(None if isinstance(e, Failure) else e for e in t[i]) for p, t in tables.items()}
            scored.append(ScoredGroup(prompt, tuple(group), rewards_G, parts))
        return Scored(scored, faults)

    def close(self) -> None:
        self._processes.close()

    def _score_with(
        self, plugin: str, prompts: Sequence[Prompt], groups: Sequence[Sequence[Completion]]
    ) -> list[list[float | Failure | None]]:
        """Each group's scores; the completions of a group whose call failed are scored one by one."""
        scores: list[list[float | Failure | None]] = []
        again: list[tuple[int, int]] = []
        for i, outcome in enumerate(self._call(plugin, list(zip(prompts, groups, strict=True)))):
            failed = isinstance(outcome, Failure)
            scores.append([outcome] * len(groups[i]) if failed else list(outcome))
            again += [(i, j) for j in range(len(groups[i]))] if failed else []
        alone = self._call(
            plugin, [(prompts[i], [groups[i][j]]) for i, j in again], give_up=len(again) == _count(groups)
        )
        for (i, j), outcome in zip(again, alone, strict=True):
            scores[i][j] = outcome if isinstance(outcome, Failure) else outcome[0]
        failures = [entry for row in scores for entry in row if isinstance(entry, Failure)]
        if failures:
            logger.warning("%s: %d completions without a score (%s)", plugin, len(failures), failures[-1].detail)
        return scores

    def _call(
        self, plugin: str, calls: Sequence[tuple[Prompt, Sequence[Completion]]], *, give_up: bool = False
    ) -> list[list[float | None] | Failure]:
        """Run all calls at once over the workers. `give_up`: after the first few have all failed, take the rest for
        failed too, instead of waiting for each one's time limit."""
        futures = [self._schedule(plugin, prompt, group) for prompt, group in calls]
        outcomes: list[list[float | None] | Failure] = []
        for future in futures:
            hopeless = give_up and len(outcomes) >= GIVE_UP_AFTER and all(isinstance(o, Failure) for o in outcomes)
            if hopeless:
                future.cancel()
                outcomes.append(outcomes[-1])
            else:
                outcomes.append(self._processes.outcome(plugin, future))
        return outcomes

    def _schedule(self, plugin: str, prompt: Prompt, group: Sequence[Completion]) -> Future[Any]:
        size = len(group)
        columns = {name: [value] * size for name, value in prompt.columns.items() if name != "prompt"}
        prompts: list[Any] = [self._as_prompt(prompt)] * size
        completions = [self._as_completion(completion) for completion in group]
        return self._processes.schedule(call_plugin, plugin, prompts, completions, columns)

    def _as_prompt(self, prompt: Prompt) -> Any:
        return [{"role": "user", "content": prompt.columns["prompt"]}] if self._chat else prompt.text

    def _as_completion(self, completion: Completion) -> Any:
        return [{"role": "assistant", "content": completion.text}] if self._chat else completion.text

    def _total(self, scores: Sequence[float | Failure | None]) -> float | None:
        """Weighted sum over the rewards that apply; `None` where none does, or where any failed."""
        if any(isinstance(s, Failure) for s in scores):
            return None
        terms = [spec.weight * s for spec, s in zip(self._specs, scores, strict=True) if isinstance(s, float)]
        return sum(terms) if terms else None


def _count(groups: Sequence[Sequence[Completion]]) -> int:
    return sum(len(group) for group in groups)
