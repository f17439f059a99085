"""The scores by name, and what each may look at.

A score is a function of all candidates at once, so that it may compare them; `per_module` makes one of a function of a
single candidate. `plan.score` names one that is registered here, one that an installed package offers under the entry
point group `hybrid_rl.scores`, or a function as `module:function`.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import wraps
from importlib.metadata import entry_points
from typing import Literal, cast

from torch import Tensor

from hybrid_rl.components import Weight
from hybrid_rl.config import ConfigError, PlanConfig
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


_SCORES: dict[str, Score] = {}


_KINDS: dict[Needs, tuple[Kind, ...]] = {"gradients": ("gradient", "direction"), "updates": ("direction",)}


def register_score(
    name: str, *, needs: Needs = "gradients", kinds: tuple[Kind, ...] | None = None
) -> Callable[[ScoreFunction], ScoreFunction]:
    """Decorator that makes a function available as `plan.score=name`. Raises `ValueError` if the name is taken.

    `kinds` says which of a gradient score's views it looks at; the others are then not gathered.
    """

    def register(function: ScoreFunction) -> ScoreFunction:
        if name in _SCORES and _SCORES[name].function is not function:
            raise ValueError(f"there is a score {name!r} already")
        found = _KINDS.get(needs, ()) if kinds is None else kinds
        _SCORES[name] = function.score = Score(name, needs, function, found)  # type: ignore[attr-defined]
        return function

    return register


def per_module(function: Callable[[Evidence, ScoreContext], float]) -> ScoreFunction:
    """A score of single candidates as one of all of them."""

    @wraps(function)
    def of_all(modules: Sequence[Evidence], context: ScoreContext) -> list[float]:
        return [function(module, context) for module in modules]

    return of_all


def score_names() -> list[str]:
    """Every name that `plan.score` accepts, without the dotted ones."""
    return [*_SCORES, *sorted(e.name for e in entry_points(group=ENTRY_POINTS) if e.name not in _SCORES)]


def find_score(name: str) -> Score:
    """The score called `name`. Raises `ConfigError` naming the nearest one if there is none."""
    if name in _SCORES:
        return _SCORES[name]
    offered = {e.name: e.value for e in entry_points(group=ENTRY_POINTS)}
    path = offered.get(name, name)
    if ":" in path:
        return _from_path(name, path)
    close = difflib.get_close_matches(name, score_names(), n=1)
    hint = f"; did you mean {close[0]}?" if close else ""
    raise ConfigError(f"plan.score={name!r} is no score{hint} Use {', '.join(score_names())}, or module:function")


def _from_path(name: str, path: str) -> Score:
    module_name, _, attribute = path.partition(":")
    if "" not in sys.path:  # a console script does not look where it is run
        sys.path.insert(0, "")
    try:
        function = getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"plan.score={name!r} cannot be loaded: {error}") from None
    registered = getattr(function, "score", None)
    if isinstance(registered, Score):
        return replace(registered, name=name)
    takes_two = callable(function) and len(inspect.signature(inspect.unwrap(function)).parameters) == 2
    if not takes_two:
        raise ConfigError(
            f"plan.score={name!r} is not a score: {path} must be a function (modules, context) -> list of numbers, "
            "or (module, context) -> number under @per_module"
        )
    return Score(name, "gradients", cast(ScoreFunction, function), _KINDS["gradients"])
