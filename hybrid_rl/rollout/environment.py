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

from hybrid_rl.config import ConfigError, RewardConfig
from hybrid_rl.plugins import Answer, Failure, PluginProcesses
from hybrid_rl.plugins.transcript import needs, respond
from hybrid_rl.types import Prompt


class Environment:
    """Worker processes that call the function of `rollout.environment`, `reward.timeout` seconds a call at most."""

    def __init__(self, spec: str, settings: RewardConfig) -> None:
        self.spec = spec
        self._processes = PluginProcesses(
            workers=settings.workers,
            timeout=settings.timeout,
            memory_mib=settings.memory_mib,
            modules=[respond.__module__],
        )

    def check(self, columns: Sequence[str]) -> None:
        """Import the function, in a worker. Raises `ConfigError` if it is missing or wants a column that is not."""
        try:
            missing = self._processes.check(needs, self.spec, ["turns", *columns])
        except ValueError as error:
            raise ConfigError(f"rollout.environment: plugin {self.spec!r} cannot be loaded: {error}") from None
        if missing:
            raise ConfigError(
                f"rollout.environment: plugin {self.spec!r} needs the column {missing[0]!r}; the data has "
                f"{sorted(columns)}. Map one to it with data.columns"
            )
        self._processes.preload(self.spec)

    def ask(self, prompt: Prompt, turns: Sequence[str]) -> Future[Answer]:
        """Begin a call; `answer` tells its outcome."""
        return self._processes.schedule(respond, self.spec, {**prompt.columns, "turns": list(turns)})

    def answer(self, asked: Future[Answer]) -> str | Failure | None:
        """The text that a call returned, `None` where the episode is over, or why there is neither."""
        answer = asked.result()
        if answer.failure is not None:
            return Failure(answer.failure.kind, f"{self.spec} {answer.failure.said}")
        return answer.values[0]

    def close(self) -> None:
        self._processes.close()
