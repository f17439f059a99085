"""The scores by name, and what each may look at.

A score is a function of all candidates at once, so that it may compare them; `per_module` makes one of a function of a
single candidate. `plan.score` names one that is registered here, one that an installed package offers under the entry
point group `hybrid_rl.scores`, or a function as `module:function`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import wraps
from typing import Literal

from torch import Tensor

from hybrid_rl.components import Weight
from hybrid_rl.config import ConfigError, PlanConfig
from hybrid_rl.registry import Registry
from hybrid_rl.scoring.view import View

Needs = Literal["structure", "weights", "gradients", "updates"]
"""What must be gathered before a score can be computed, from free to dear: names and shapes; the base weights;
gradients of the base policy on its own rollouts; gradients along a short probe."""
Kind = Literal["gradient", "direction"]
ENTRY_POINTS = "hybrid_rl.scores"


@dataclass(frozen=True)
class Evidence:
    """What is known of one candidate. Fields that a score's `needs` do not ask for are `None`.

    Pairs hold one view for each of two disjoint halves of the prompts.
    """

    weight: Weight
    base: Tensor | None = None
    """The base policy's matrix, [out, in]."""
    gradient: tuple[View, View] | None = None
    """Mean gradient of the loss (`gradients`)."""
    direction: tuple[View, View] | None = None
    """Mean of the gradients scaled as Adam scales them, with factored second moments: under `gradients` at the base
    policy, under `updates` along the probes, where it is proportional to the weight update."""
    squares: float | None = None
    """Mean squared Frobenius norm of the gradients of single micro-batches (`gradients`)."""


@dataclass(frozen=True)
class ScoreContext:
    """The settings that scores share."""

    plan: PlanConfig
    lora_rank: int
    seed: int

    @property
    def rank(self) -> int:
        """Rank whose truncation the tail scores measure."""
        return self.plan.score_rank


ScoreFunction = Callable[[Sequence[Evidence], ScoreContext], list[float]]


@dataclass(frozen=True)
class Score:
    """A ranking criterion: larger means that full fine-tuning is worth more than LoRA there."""

    name: str
    needs: Needs
    function: ScoreFunction
    kinds: tuple[Kind, ...]
    """The kinds of view that its evidence holds."""

    @property
    def definition(self) -> str:
        return (self.function.__doc__ or "").strip()

    def __call__(self, modules: Sequence[Evidence], context: ScoreContext) -> dict[str, float]:
        """Scores by module name. Raises `ConfigError` if the function fails or returns what is no score."""
        try:
            values = self.function(modules, context)
            scores = {m.weight.name: float(value) for m, value in zip(modules, values, strict=True)}
        except ConfigError:
            raise
        except Exception as error:  # a user's function may raise anything
            raise ConfigError(f"plan.score={self.name} failed: {type(error).__name__}: {error}") from error
        broken = [name for name, score in scores.items() if not math.isfinite(score)]
        if broken:
            raise ConfigError(
                f"plan.score={self.name} gave {broken[0]} the score {scores[broken[0]]}, which is no number"
            )
        return scores


_SCORES: Registry[Score] = Registry("plan.score", "hybrid_rl.scores", ("modules", "context"))
score_names = _SCORES.names

_KINDS: dict[Needs, tuple[Kind, ...]] = {"gradients": ("gradient", "direction"), "updates": ("direction",)}


def register_score(
    name: str, *, needs: Needs = "gradients", kinds: tuple[Kind, ...] | None = None
) -> Callable[[ScoreFunction], ScoreFunction]:
    """Decorator that makes a function available as `plan.score=name`. Raises `ValueError` if the name is taken.

    `kinds` says which of a gradient score's views it looks at; the others are then not gathered.
    """

    def register(function: ScoreFunction) -> ScoreFunction:
        found = _KINDS.get(needs, ()) if kinds is None else kinds
        score = _SCORES.register(name)(Score(name, needs, function, found))
        function.score = score  # type: ignore[attr-defined]
        return function

    return register


def per_module(function: Callable[[Evidence, ScoreContext], float]) -> ScoreFunction:
    """A score of single candidates as one of all of them."""

    @wraps(function)
    def of_all(modules: Sequence[Evidence], context: ScoreContext) -> list[float]:
        return [function(module, context) for module in modules]

    return of_all


def find_score(name: str) -> Score:
    """The score called `name`; a function that was not registered is one of gradients. Raises `ConfigError` naming the
    nearest one if there is none."""
    found = _SCORES.look_up(name)
    if isinstance(found, Score):
        return found
    registered = getattr(found, "score", None)
    if isinstance(registered, Score):
        return replace(registered, name=name)
    return Score(name, "gradients", _SCORES.check(name, found), _KINDS["gradients"])
