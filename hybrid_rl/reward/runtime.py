"""Rewards in killable processes: a plugin can hang, crash or raise, and the run goes on.

A prompt's whole group is scored in one call. If that call fails, its completions are scored one by one, so that one bad
completion costs only itself. A completion without a score is left out of training and counted, never scored 0.
"""

from __future__ import annotations

import logging
import multiprocessing
from collections.abc import Mapping, Sequence
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import dataclass, field
from typing import Any

from pebble import ProcessExpired, ProcessPool

from hybrid_rl.config import ConfigError, RewardConfig, RewardSpec
from hybrid_rl.reward.plugin import call_plugin, missing_columns
from hybrid_rl.types import Completion, Prompt, ScoredGroup

logger = logging.getLogger(__name__)
START_SECONDS = 120.0
"""Longest that importing a plugin may take."""


@dataclass(frozen=True)
class Scored:
    """Groups with their rewards, and what went wrong on the way."""

    groups: list[ScoredGroup]
    faults: Mapping[str, int]
    """`timeout`, `error`, `crash` -> completions without a score for that reason."""


@dataclass
class _Faults:
    counts: dict[str, int] = field(default_factory=lambda: {"timeout": 0, "error": 0, "crash": 0})
    last: str = ""

    def add(self, kind: str, detail: str) -> None:
        self.counts[kind] += 1
        self.last = f"{kind}: {detail}"


class RewardPool:
    """Worker processes that call the reward plugins."""

    def __init__(self, specs: Sequence[RewardSpec], settings: RewardConfig, *, chat: bool = False) -> None:
        """`chat`: completions and prompts are handed to the plugins as chat messages, as TRL does."""
        self._specs = list(specs)
        self._timeout = settings.timeout
        self._chat = chat
        # Not fork: the driver has threads, and a plugin must not see its memory.
        self._pool = ProcessPool(max_workers=settings.workers, context=multiprocessing.get_context("spawn"))

    def check(self, columns: Sequence[str]) -> None:
        """Import every plugin, in a worker. Raises `ConfigError` if one is missing or wants a column that is not."""
        for spec in self._specs:
            try:
                missing = self._pool.schedule(
                    missing_columns, args=(spec.plugin, list(columns)), timeout=START_SECONDS
                ).result()
            except (Exception, ProcessExpired) as error:
                raise ConfigError(f"rewards: plugin {spec.plugin!r} cannot be loaded: {error}") from None
            if missing:
                raise ConfigError(
                    f"rewards: plugin {spec.plugin!r} needs the column {missing[0]!r}; the data has {sorted(columns)}. "
                    "Map one to it with data.columns"
                )

    def score(self, prompts: Sequence[Prompt], groups: Sequence[Sequence[Completion]]) -> Scored:
        """Score every completion with every plugin.

        Raises `RuntimeError` if not one completion got a score from a plugin that failed: the plugin is broken.
        """
        faults = _Faults()
        parts = {spec.plugin: self._score_with(spec.plugin, prompts, groups, faults) for spec in self._specs}
        scored = []
        for i, (prompt, group) in enumerate(zip(prompts, groups, strict=True)):
            rows = {spec.plugin: tuple(parts[spec.plugin][i]) for spec in self._specs}
            totals = tuple(self._total([rows[s.plugin][j] for s in self._specs]) for j in range(len(group)))
            scored.append(ScoredGroup(prompt, tuple(group), totals, rows))
        failed = sum(faults.counts.values())
        if failed:
            logger.warning("%d completions got no reward (%s)", failed, faults.last)
        if failed and all(reward is None for group in scored for reward in group.rewards_G):
            raise RuntimeError(f"no completion could be scored; the last failure was {faults.last}")
        return Scored(scored, faults.counts)

    def close(self) -> None:
        self._pool.stop()
        self._pool.join()

    def _score_with(
        self, plugin: str, prompts: Sequence[Prompt], groups: Sequence[Sequence[Completion]], faults: _Faults
    ) -> list[list[float | None]]:
        calls = [self._schedule(plugin, p, group) for p, group in zip(prompts, groups, strict=True)]
        scores: list[list[float | None]] = []
        for prompt, group, call in zip(prompts, groups, calls, strict=True):
            try:
                scores.append(call.result())
            except (Exception, ProcessExpired):
                scores.append([self._score_alone(plugin, prompt, completion, faults) for completion in group])
        return scores

    def _score_alone(self, plugin: str, prompt: Prompt, completion: Completion, faults: _Faults) -> float | None:
        try:
            return self._schedule(plugin, prompt, [completion]).result()[0]
        except FutureTimeout:
            faults.add("timeout", f"{plugin} took more than reward.timeout={self._timeout} s")
        except ProcessExpired as crash:
            faults.add("crash", f"the process of {plugin} ended with status {crash.exitcode}")
        except Exception as error:  # whatever the user's code raises
            faults.add("error", f"{plugin} raised {type(error).__name__}: {error}")
        return None

    def _schedule(self, plugin: str, prompt: Prompt, group: Sequence[Completion]) -> Any:
        size = len(group)
        columns = {name: [value] * size for name, value in prompt.columns.items() if name != "prompt"}
        prompts: list[Any] = [self._as_prompt(prompt)] * size
        completions = [self._as_completion(completion) for completion in group]
        return self._pool.schedule(call_plugin, args=(plugin, prompts, completions, columns), timeout=self._timeout)

    def _as_prompt(self, prompt: Prompt) -> Any:
        return [{"role": "user", "content": prompt.columns["prompt"]}] if self._chat else prompt.text

    def _as_completion(self, completion: Completion) -> Any:
        return [{"role": "assistant", "content": completion.text}] if self._chat else completion.text

    def _total(self, scores: Sequence[float | None]) -> float | None:
        """Weighted sum over the rewards that apply; `None` where none does."""
        terms = [spec.weight * s for spec, s in zip(self._specs, scores, strict=True) if s is not None]
        return sum(terms) if terms else None
