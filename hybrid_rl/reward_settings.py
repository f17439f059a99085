"""Settings of rewards and of held-out evaluation. Imports nothing heavy."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from hybrid_rl.settings import Positive, PositiveInt, Settings


class RewardSpec(Settings):
    plugin: str
    """`module:function`, `path/to/file.py:function`, or a name that an installed package offers under
    `hybrid_rl.rewards`. See docs/rewards.md."""
    name: str = ""
    """What metrics and files call it; `plugin` by default."""
    weight: float | dict[Annotated[int, Field(ge=0)], float] = 1.0
    """Factor of this reward in the sum; or by step, as in `{0: 1.0, 100: 0.0}`, in a straight line between the steps
    named."""
    arguments: dict[str, Any] = {}
    """Further arguments of the function, or of the class's constructor."""
    gate: float | None = None
    """Least score that a completion needs for the rewards listed after this one to be asked about it."""
    when: dict[str, Any] = {}
    """Column -> the value, or list of values, of the problems that this reward is for; all by default."""
    on_failure: Literal["drop", "zero", "stop"] = "drop"
    """What a failed call means: the completion is not trained on; its score is 0; the run stops. Counted either way."""

    @model_validator(mode="after")
    def _named(self) -> RewardSpec:
        self.name = self.name or self.plugin
        if isinstance(self.weight, dict) and not self.weight:
            raise ValueError(f"weight of {self.name} by step names no step; give one, as in {{0: 1.0}}")
        if [] in self.when.values():
            raise ValueError(f"when of {self.name} is for no problem at all: a list of values is empty")
        try:
            json.dumps(self.arguments)
        except TypeError as error:
            raise ValueError(f"arguments of {self.name}: {error}; write it as text") from None
        return self

    def weight_at(self, step: int) -> float:
        """Its factor at a step, the nearest named one's before the first and after the last of them."""
        if not isinstance(self.weight, dict):
            return self.weight
        named = sorted(self.weight)
        before, after = (
            max((s for s in named if s <= step), default=named[0]),
            min((s for s in named if s >= step), default=named[-1]),
        )
        low, high = self.weight[before], self.weight[after]
        return low if before == after else low + (high - low) * (step - before) / (after - before)

    def asks_about(self, columns: Mapping[str, Any]) -> bool:
        """Whether this reward is for a problem with these columns."""
        return all(columns.get(name) in _listed(wanted) for name, wanted in self.when.items())


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


class RewardConfig(Settings):
    timeout: Positive = 30.0
    """Seconds that one completion's score may take, or a whole group's where a reward takes it at once. Also of one
    answer of `rollout.environment`."""
    workers: PositiveInt = 2
    """Reward processes on each node; as many again on the driver's for `rollout.environment`."""
    memory_mib: Annotated[int, Field(ge=256)] = 4096
    """Memory that one of them may take, with all that it starts."""


class EvalConfig(Settings):
    every: Annotated[int, Field(ge=0)] = 0
    """Steps between held-out evaluations. 0: only before and after."""
    reward: str | dict[str, str] | None = None
    """Name of the reward that measures accuracy, or set of `data.eval` -> its reward; the first by default."""
    right_from: float = 1.0
    """Least score of a completion that pass@k and maj@k take for right."""
    k: Annotated[int, Field(ge=0)] = 4
    """Samples a problem for mean@k, pass@k and maj@k, at `sampling.temperature`. 0: greedy only."""
