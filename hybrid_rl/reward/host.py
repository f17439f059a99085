"""The reward processes of one node. A plain class: the cluster puts one on each node."""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping, Sequence
from typing import Any

from hybrid_rl.config import ConfigError, RewardConfig, RewardSpec
from hybrid_rl.plugins import Failure, PluginProcesses
from hybrid_rl.reward import plugin
from hybrid_rl.types import Outcome

_TRIES = 4
"""Completions that are scored by themselves after a group failed, before a plugin that has never answered is taken not
to answer for the rest of the group either."""


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
        self._piecewise: dict[int, bool] = {}
        self._answered: set[int] = set()
        self._lock = threading.Lock()

    def check(self, columns: Sequence[str], ahead: bool = True) -> None:
        """Import every plugin; with `ahead`, also for all workers to come. Raises `ConfigError` if one cannot be, takes
        no such arguments, or wants a column that is not there."""
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
            if not ahead:
                continue
            first = (plugin.check, spec.plugin, self._arguments[k], ())
            self._processes.preload(spec.plugin, plugin.ENTRY_POINTS, first)

    def score(self, k: int, group: Mapping[str, Sequence[Any]]) -> list[Outcome]:
        """Outcomes of the completions of one prompt with the k-th reward; `group` as `plugin.score` has it.

        What fails on a group as a whole is called again for each completion by itself, so that one bad completion costs
        only itself.
        """
        size = len(group["completions"])
        try:
            piecewise = self._piecewise.get(k)
            if piecewise is None:
                piecewise = self._check(k, ())["piecewise"]
        except ValueError as error:
            return [self._failed(k, Failure("error", f"cannot be loaded: {error}"))] * size
        outcomes: list[Outcome] = []
        failed_alone = 0
        while len(outcomes) < size:
            alone = bool(outcomes) and not piecewise
            rest = {
                name: values[len(outcomes) : len(outcomes) + 1 if alone else None] for name, values in group.items()
            }
            left = len(rest["completions"])
            answer = self._processes.run(plugin.score, self._specs[k].plugin, self._arguments[k], rest, self._timeout)
            outcomes += [self._outcome(k, value) for value in answer.values[:left]]
            if not all(o.failed for o in outcomes):
                self._answered.add(k)
            if answer.failure is None:
                continue
            if piecewise or left == 1:
                outcomes.append(self._failed(k, answer.failure))
                failed_alone += 1
            else:
                outcomes += self.score(k, {name: values[:1] for name, values in rest.items()})
                failed_alone += outcomes[-1].failed
            if failed_alone >= _TRIES and k not in self._answered:
                outcomes += [outcomes[-1]] * (size - len(outcomes))
        return outcomes

    def close(self) -> None:
        self._processes.close()

    def _check(self, k: int, columns: Sequence[str]) -> Mapping[str, Any]:
        found = self._processes.check(plugin.check, self._specs[k].plugin, self._arguments[k], list(columns))
        with self._lock:
            self._piecewise[k] = found["piecewise"]
        return found

    def _outcome(self, k: int, value: Mapping[str, Any]) -> Outcome:
        extra, metrics = value["extra"], value["metrics"]
        if "error" in value:
            return Outcome("error", None, f"{self._specs[k].name} raised {value['error']}", extra, metrics)
        if "timeout" in value:
            late = f"{self._specs[k].name} took more than reward.timeout={self._timeout:g} s"
            return Outcome("timeout", None, late, extra, metrics)
        score = value["score"]
        return Outcome("not_applicable" if score is None else "score", score, "", extra, metrics)

    def _failed(self, k: int, failure: Failure) -> Outcome:
        said = f"raised {failure.detail}" if failure.kind == "error" else failure.detail
        return Outcome(failure.kind, None, f"{self._specs[k].name} {said}")
