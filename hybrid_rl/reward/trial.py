"""A reward on completions that exist already: asked in the processes and by the rules of a run, without the run."""

from __future__ import annotations

import math
import os
import random
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from hybrid_rl.config import RewardConfig, RewardSpec
from hybrid_rl.plugins.processes import GIVE_UP_AFTER
from hybrid_rl.reward.given import given, wants_chat
from hybrid_rl.reward.host import RewardHost
from hybrid_rl.types import Outcome


@dataclass(frozen=True)
class Row:
    """One completion and what a plugin may be told of it."""

    place: str
    """Where it was found, for people: `line 3`."""
    group: int
    """Completions of the same number answer the same prompt."""
    prompt: str | None
    """As the policy saw it; `None` where that is not known, and plugins are not given one."""
    completion: str
    columns: Mapping[str, Any]
    """The data's row. Where it has a `prompt`, that is what chat messages are made of, as in a run."""
    finish_reason: str = "stop"
    completion_ids: Sequence[int] | None = None


@dataclass(frozen=True)
class Found:
    """What can be said of a plugin before it is called."""

    missing: list[str]
    """Columns that it wants and is not given."""
    parameters: dict[str, bool]
    """What it names -> whether it needs it."""


@dataclass(frozen=True)
class Call:
    """One call of the plugin, with all that its failures made necessary."""

    rows: tuple[int, ...]
    """Indices of what was scored."""
    seconds: float


@dataclass(frozen=True)
class Verdict:
    """What a reward said of some rows."""

    outcomes: list[Outcome]
    """One a row."""
    calls: list[Call]
    seconds: float
    whole_groups: bool
    """Whether a call was of all completions of a prompt, not of one."""
    not_asked: int = 0
    """Rows that count as `timeout` without a call: the plugin never answered, and the rest was not waited for."""

    def count(self, kind: str) -> int:
        """Outcomes of a kind."""
        return sum(outcome.kind == kind for outcome in self.outcomes)

    @property
    def scores(self) -> list[float]:
        """Those there are."""
        return [outcome.score for outcome in self.outcomes if outcome.score is not None]

    @property
    def metrics(self) -> dict[str, float]:
        """Means of what the plugin measured (`log_metric`) over the completions it measured it on, as in a run."""
        found: dict[str, list[float]] = {}
        for outcome in self.outcomes:
            for name, value in outcome.metrics.items():
                found.setdefault(name, []).append(value)
        return {name: sum(values) / len(values) for name, values in found.items()}

    def quantile(self, share: float) -> float:
        """Seconds within which that share of the calls was done; 0 without calls."""
        ordered = sorted(call.seconds for call in self.calls)
        return ordered[max(0, math.ceil(share * len(ordered)) - 1)] if ordered else 0.0


@dataclass
class _Work:
    """What the threads of one `score` share."""

    outcomes: list[Outcome | None]
    calls: list[Call] = field(default_factory=list)
    not_asked: int = 0


class Trial(RewardHost):
    """One reward, in processes of its own. Close it."""

    def __init__(self, spec: RewardSpec, settings: RewardConfig, *, chat: bool = False) -> None:
        """`chat`: as `data.chat`, prompts and completions are handed over as chat messages."""
        super().__init__([spec], settings, [os.getcwd()])
        self.spec = spec
        self._workers = settings.workers
        self._chat = wants_chat(spec.plugin, chat)
        self._whole_groups = True
        self._late = 0
        """Calls in a row that took too long, since the start; -1 once there was another outcome."""
        self._why_late = ""
        self._guard = threading.Lock()

    def examine(self, columns: Collection[str]) -> Found:
        """Import the plugin, here and for all workers to come. Raises `ValueError` with the reason if it cannot be, or
        does not take its arguments."""
        with self._lock:
            found = self._check(0, sorted(columns))
            self._whole_groups = not found["piecewise"]
            if not found["missing"]:
                self._make_ready(0, found)
        return Found(found["missing"], found["parameters"])

    def score_rows(self, rows: Sequence[Row], done: Callable[[int], object] = lambda count: None) -> Verdict:
        """What the reward says of each; `done` is told of completions as they are scored. The rows of a call have the
        same columns.

        A plugin that takes completions one by one is asked about each by itself, and its calls are timed so. Calls are
        made in a shuffled order: where the first `GIVE_UP_AFTER` calls all time out, so will the rest.
        """
        work = _Work([None] * len(rows))
        calls = self._calls(rows, work)
        random.Random(0).shuffle(calls)
        started = time.perf_counter()
        threads = ThreadPoolExecutor(self._workers, thread_name_prefix="trial")
        try:
            for count in threads.map(lambda indices: self._ask(rows, indices, work), calls):
                done(count)
        finally:
            threads.shutdown(wait=False, cancel_futures=True)
        outcomes = [outcome for outcome in work.outcomes if outcome is not None]
        return Verdict(outcomes, work.calls, time.perf_counter() - started, self._whole_groups, work.not_asked)

    def _calls(self, rows: Sequence[Row], work: _Work) -> list[tuple[int, ...]]:
        """Indices of the rows by call. What the reward would not be asked about in a run is settled at once."""
        groups: dict[int, list[int]] = {}
        for i, row in enumerate(rows):
            if row.finish_reason == "environment":
                work.outcomes[i] = Outcome("not_applicable", None, "its environment failed")
            elif not self.spec.asks_about(row.columns):
                work.outcomes[i] = Outcome("not_applicable", None, "not for this problem")
            else:
                groups.setdefault(row.group if self._whole_groups else i, []).append(i)
        return [tuple(indices) for indices in groups.values()]

    def _ask(self, rows: Sequence[Row], indices: tuple[int, ...], work: _Work) -> int:
        if self._late >= GIVE_UP_AFTER:
            outcomes = [Outcome("timeout", None, self._why_late)] * len(indices)
            with self._guard:
                work.not_asked += len(indices)
        else:
            started = time.perf_counter()
            outcomes = self.score(0, self._given([rows[i] for i in indices]))
            with self._guard:
                work.calls.append(Call(indices, time.perf_counter() - started))
                if any(outcome.kind != "timeout" for outcome in outcomes):
                    self._late = -1
                elif self._late >= 0:
                    self._late += 1
                    self._why_late = outcomes[-1].detail
        for i, outcome in zip(indices, outcomes, strict=True):
            work.outcomes[i] = outcome
        return len(indices)

    def _given(self, rows: Sequence[Row]) -> dict[str, list[Any]]:
        prompts = [row.prompt for row in rows if row.prompt is not None]
        ids = [row.completion_ids for row in rows if row.completion_ids is not None]
        return given(
            [row.columns for row in rows],
            prompts if len(prompts) == len(rows) else None,
            [row.completion for row in rows],
            [row.finish_reason for row in rows],
            ids if len(ids) == len(rows) else None,
            chat=self._chat,
        )
