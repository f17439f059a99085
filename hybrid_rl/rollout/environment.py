"""What answers the policy between its turns: a plain function of what was said so far, in processes of its own.

    def respond(turns, **columns):
        ...

It gets, by name, those of these that it takes: `turns`, the texts written so far, the policy's and its own in turn, the
policy's first and last; and the row's columns, `prompt` among them. It returns the text to append, or `None` when the
episode is over. It keeps nothing between calls, which may be made in any of several processes.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any

from hybrid_rl.config import RewardConfig
from hybrid_rl.plugins import Failure, PluginProcesses, call
from hybrid_rl.types import Prompt


class Environment:
    """Worker processes that call the function of `rollout.environment`, `reward.timeout` seconds a call at most."""

    def __init__(self, spec: str, settings: RewardConfig) -> None:
        self.spec = spec
        self._processes = PluginProcesses([spec], workers=settings.workers, timeout=settings.timeout)

    def check(self, columns: Sequence[str]) -> None:
        """Import the function, in a worker. Raises `ConfigError` if it is missing or wants a column that is not."""
        self._processes.check(self.spec, ["turns", *columns], setting="rollout.environment")

    def ask(self, prompt: Prompt, turns: Sequence[str]) -> Future[Any]:
        """Begin a call; `answer` tells its outcome."""
        return self._processes.schedule(call, self.spec, {**prompt.columns, "turns": list(turns)})

    def answer(self, asked: Future[Any]) -> str | Failure | None:
        """The text that a call returned, `None` where the episode is over, or why there is neither."""
        found = self._processes.outcome(self.spec, asked)
        if found is None or isinstance(found, str | Failure):
            return found
        return Failure("error", f"{self.spec} returned {type(found).__name__}, neither text nor None")

    def close(self) -> None:
        self._processes.close()
