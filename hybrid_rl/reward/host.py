"""The reward processes of one node. A plain class: the cluster puts one on each node."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Mapping, Sequence
from typing import Any

from hybrid_rl.config import ConfigError, RewardConfig, RewardSpec
from hybrid_rl.plugins import Failure, PluginProcesses, late
from hybrid_rl.reward import plugin
from hybrid_rl.reward.given import taken
from hybrid_rl.types import Outcome

logger = logging.getLogger(__name__)
_TOO_FEW = Failure("crash", "gave fewer answers than it was asked for")
_EARLY_SECONDS = 0.5
"""Before the limit, that an asynchronous plugin's calls are given up one by one: what the others gave can still be
told. At most a tenth of the limit."""
_TRIES = 4
"""Completions that are scored by themselves after a group failed, before a plugin that has never answered is taken not
to answer for the rest of the group either; and those that may then hang in a row before any."""


class RewardHost:
    """Calls plugins for any number of threads, as many at a time as there are processes."""

    def __init__(self, specs: Sequence[RewardSpec], settings: RewardConfig, paths: Sequence[str] = ()) -> None:
        """`paths`: where else modules of plugins are looked for."""
        self._specs, self._timeout = list(specs), settings.timeout
        self._arguments = [json.dumps(spec.arguments) for spec in specs]
        self._processes = PluginProcesses(
            workers=settings.workers,
            timeout=settings.timeout,
            memory_mib=settings.memory_mib,
            modules=[plugin.__name__],
            paths=paths,
        )
        self._ways: dict[int, Mapping[str, Any]] = {}
        self._answered: set[int] = set()
        self._parted: set[int] = set()
        """Rewards of which was said that they are asked about completions by themselves."""
        self._lock = threading.Lock()

    def check(self, columns: Sequence[str], ahead: bool = True) -> dict[str, Any]:
        """Import every plugin; with `ahead`, also for all workers to come. Returns each reward's arguments, defaults
        included. Raises `ConfigError` if a plugin cannot be imported, takes no such arguments, or wants a column that
        is not there."""
        settings: dict[str, Any] = {}
        with self._lock:
            for k, spec in enumerate(self._specs):
                try:
                    found = self._check(k, columns)
                except ValueError as error:
                    raise ConfigError(f"rewards: plugin {spec.plugin!r} cannot be loaded: {error}") from None
                if found["missing"]:
                    raise ConfigError(
                        f"rewards: plugin {spec.plugin!r} needs the column {found['missing'][0]!r}; the data has "
                        f"{sorted(columns)}. Map one to it with data.columns, or give it under arguments"
                    )
                settings[spec.name] = found["settings"]
                if ahead:
                    self._make_ready(k, found)
        return settings

    def score(self, k: int, group: Mapping[str, Sequence[Any]]) -> list[Outcome]:
        """Outcomes of the completions of one prompt with the k-th reward; `group` as `plugin.score` has it.

        What fails on a group as a whole is called again for each completion by itself, so that one bad completion costs
        only itself; unless the plugin says that it needs them all. Where several of these hang in a row, the rest
        of the group is not waited for.
        """
        size = len(group["completions"])
        try:
            with self._lock:  # processes that were started again have not imported it
                way = self._ways.get(k) or self._make_ready(k, self._check(k, ()))
        except ValueError as error:
            return [self._failed(k, Failure("error", f"cannot be loaded: {error}"))] * size
        group = taken(group, way["takes"])
        first = (plugin.check, self._specs[k].plugin, self._arguments[k], ())
        outcomes: list[Outcome] = []
        alone, failed, hung = False, 0, 0
        early = self._timeout - min(_EARLY_SECONDS, self._timeout / 10)
        while (done := len(outcomes)) < size:
            end = done + 1 if alone else size
            part = {name: values[done:end] for name, values in group.items()}
            asked = (self._specs[k].plugin, self._arguments[k], part, early)
            answer = self._processes.run(plugin.score, *asked, first=first)
            outcomes += [self._outcome(k, value) for value in answer.values[: end - done]]
            if not all(outcome.failed for outcome in outcomes):
                self._answered.add(k)
            hung = hung + 1 if alone and answer.failure is not None and answer.failure.kind == "timeout" else 0
            if len(outcomes) == end or (answer.doubtful and answer.values):
                continue  # a process that answered for others before it ended may have ended because of them
            failure = self._failed(k, answer.failure or _TOO_FEW)
            if way["whole"]:
                outcomes += [failure] * (size - len(outcomes))
            elif way["piecewise"] or end - done == 1:
                outcomes.append(failure)
                failed += 1
                if hung >= _TRIES or (failed >= _TRIES and k not in self._answered):
                    outcomes += [failure] * (size - len(outcomes))
            else:
                alone = True
                self._say_parted(k, way, failure)
        return outcomes

    def close(self) -> None:
        self._processes.close()

    def _check(self, k: int, columns: Sequence[str]) -> Mapping[str, Any]:
        return self._processes.check(plugin.check, self._specs[k].plugin, self._arguments[k], list(columns))

    def _make_ready(self, k: int, found: Mapping[str, Any]) -> Mapping[str, Any]:
        self._processes.preload(self._specs[k].plugin, plugin.ENTRY_POINTS)
        self._ways[k] = found
        return found

    def _say_parted(self, k: int, way: Mapping[str, Any], failure: Outcome) -> None:
        with self._lock:
            if way["single"] or k in self._parted:
                return
            self._parted.add(k)
        logger.warning(
            "reward %s: %s; a group that it fails on is asked about again, one completion at a time. If its scores "
            "compare completions, give the function the attribute independent = False (docs/rewards.md, Limits)",
            self._specs[k].name,
            failure.detail,
        )

    def _outcome(self, k: int, value: Any) -> Outcome:
        """Anything can have written what a process says."""
        try:
            extra, metrics = dict(value["extra"]), {name: float(each) for name, each in value["metrics"].items()}
            if "error" in value:
                return Outcome("error", None, f"{self._specs[k].name} raised {value['error']}", extra, metrics)
            if "timeout" in value:
                return Outcome("timeout", None, f"{self._specs[k].name} {late(self._timeout)}", extra, metrics)
            if value["score"] is None:
                return Outcome("not_applicable", None, "", extra, metrics)
            return Outcome("score", float(value["score"]), "", extra, metrics)
        except (TypeError, ValueError, KeyError, AttributeError):
            return self._failed(k, Failure("crash", "gave no answer that can be read"))

    def _failed(self, k: int, failure: Failure) -> Outcome:
        return Outcome(failure.kind, None, f"{self._specs[k].name} {failure.said}")
