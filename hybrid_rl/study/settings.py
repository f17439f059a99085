"""A study's settings: methods x learning rates x seeds x tasks over one base configuration.

Nothing here imports torch. A method, a task and a choice of rates each say some settings of a run by dotted names, and
`{seed}` in any text of theirs or of the base stands for the seed. What all methods share stands in the base, so that
prompts, their order, completions a step and steps are the same for all.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, model_validator

from hybrid_rl.config_file import apply_overrides, load_tree
from hybrid_rl.settings import ConfigError, Positive, PositiveInt, Settings

_Seeds = Annotated[list[int], Field(min_length=1)]
_Names = Annotated[list[str], Field(min_length=1)]


_SHARED = (
    *("seed", "steps", "data", "sampling", "batch.prompts", "batch.num_generations", "rewards", "reward", "eval"),
    *("run", "cluster", "checkpoint", "tracking", "warm_start"),
)
"""Settings, or sections of them, in which methods cannot differ: else they would not be compared on the same task."""


class Method(Settings):
    """One way to train."""

    settings: dict[str, Any] = Field({}, alias="set")
    """Dotted name of a setting -> its value."""
    rates: dict[str, Annotated[list[Positive], Field(min_length=1)]] = {}
    """Setting -> the values to try. Lists are gone through together, so that all are of the same length."""
    rates_of: str | None = None
    """Another method, whose chosen rates this one takes instead of a sweep of its own."""
    pool: str | None = None
    """What several methods are together, as draws of one kind: their mean is an arm of its own."""
    also: str = ""
    """A remark for the table."""

    @model_validator(mode="after")
    def _sets_what_may_differ(self) -> Method:
        for name in {**self.settings, **self.rates}:
            if name in _SHARED or name.partition(".")[0] in _SHARED:
                raise ValueError(f"{name} is the same for all methods; say it in the base, or in a task")
        return self

    @model_validator(mode="after")
    def _one_source_of_rates(self) -> Method:
        if self.rates and self.rates_of is not None:
            raise ValueError(f"rates and rates_of={self.rates_of!r} both say its rates; drop one")
        if len({len(values) for values in self.rates.values()}) > 1:
            raise ValueError(f"rates has lists of different lengths: {', '.join(self.rates)}")
        return self

    @property
    def points(self) -> list[dict[str, float]]:
        """The choices of rates; one empty choice without any."""
        if not self.rates:
            return [{}]
        return [dict(zip(self.rates, values, strict=True)) for values in zip(*self.rates.values(), strict=True)]


class Recovery(Settings):
    """What share of the gain of `of` over `over` another method has."""

    of: str = "full"
    over: str = "lora"


class Curve(Settings):
    """Accuracies by rank, whose area (AURAC) is told: of several methods, each trained for its rank, or of one that is
    evaluated at every rank (Matryoshka)."""

    ranks: Annotated[list[PositiveInt], Field(min_length=2)]
    """Rising."""
    methods: _Names
    """As many, or one."""

    @model_validator(mode="after")
    def _as_many(self) -> Curve:
        if len(self.methods) not in (1, len(self.ranks)):
            raise ValueError(f"{len(self.ranks)} ranks, but {len(self.methods)} methods; give as many, or one")
        if self.ranks != sorted(set(self.ranks)):
            raise ValueError(f"ranks={self.ranks} must rise, without repetition")
        return self

    def points(self) -> list[tuple[str, str]]:
        """Of each rank, the method, and what is added to the name of a set of held-out problems there."""
        if len(self.methods) == 1:
            return [(self.methods[0], f"@{rank}") for rank in self.ranks]
        return [(method, "") for method in self.methods]


class Study(Settings):
    """All settings of a study."""

    base: str
    """Configuration file of a run: what all methods share."""
    dir: str
    """Where runs and results go; `studies/<file's name>` by default."""
    title: str = ""
    """What the study asks, for its report."""
    methods: Annotated[dict[str, Method], Field(min_length=1)]
    tasks: Annotated[dict[str, dict[str, Any]], Field(min_length=1)] = {"task": {}}
    """Name -> settings of the task."""
    seeds: _Seeds
    """Every method runs with each."""
    sweep_seeds: _Seeds | None = None
    """Those with which every choice of rates runs; all of `seeds` by default."""
    metric: Literal["mean_at_k", "accuracy"] = "mean_at_k"
    """Share of right answers by sampling `eval.k` times a problem, or greedily once."""
    choose_on: str = "validation"
    """Set of `data.eval` on which rates are chosen."""
    report_on: _Names = ["test"]
    """Sets that results are told of; comparisons are made on each."""
    compare: list[tuple[str, str]] = []
    """Pairs of methods, pools or curves (by AURAC), the first claimed to be better; all pairs are corrected together
    (Holm)."""
    recovery: Recovery | None = None
    curves: dict[str, Curve] = {}
    """Name -> methods and ranks, of which the area under the accuracies is told beside the results."""
    count_ranking: bool = True
    """Take the rollout batches that a ranking samples off the method's training steps, so that all sample as much."""
    parallel: PositiveInt = 1
    """Runs at a time; on a cluster, those that it has room for."""
    threads: PositiveInt = 1
    """CPU threads of a run's process."""
    keep_runs: bool = False
    """Keep checkpoints and rollouts of finished runs."""
    effect: Positive = 0.03
    """Difference that the note on power asks how many problems and seeds are needed for."""

    @model_validator(mode="after")
    def _names_that_are_there(self) -> Study:
        for name, method in self.methods.items():
            other = method.rates_of
            if other is not None and (other not in self.methods or self.methods[other].rates_of is not None):
                raise ValueError(f"methods.{name}.rates_of={other!r} must be a method with rates of its own")
        arms = [*self.methods, *self.pools]
        if both := set(self.methods) & set(self.pools):
            raise ValueError(f"{sorted(both)[0]!r} is both a method and a pool; rename one")
        if both := set(self.curves) & set(arms):
            raise ValueError(f"curves: {sorted(both)[0]!r} is a method or pool too; rename one")
        if wrong := [n for pair in self.compare for n in pair if n not in arms and n not in self.curves]:
            raise ValueError(
                f"compare: {wrong[0]!r} is no method, pool or curve; there are {', '.join([*arms, *self.curves])}"
            )
        if mixed := [pair for pair in self.compare if len({name in self.curves for name in pair}) == 2]:
            raise ValueError(f"compare: {list(mixed[0])} are a curve and a method; an area is compared with an area")
        named = [("recovery", n) for n in ((self.recovery.of, self.recovery.over) if self.recovery else ())]
        named += [(f"curves.{c}", n) for c, curve in self.curves.items() for n in curve.methods]
        for where, name in named:
            if name not in arms:
                raise ValueError(f"{where}: {name!r} is no method or pool; there are {', '.join(arms)}")
        for name, curve in self.curves.items():
            if len(curve.methods) == 1 and curve.methods[0] not in self.methods:
                raise ValueError(f"curves.{name}: {curve.methods[0]!r} is a pool; name a method, or one for each rank")
        for name, numbers in (("seeds", self.seeds), ("sweep_seeds", self.sweep_seeds or [])):
            if len(set(numbers)) < len(numbers):
                raise ValueError(f"{name}={numbers} has a seed twice")
        return self

    def nested_ranks(self, method: str) -> list[int]:
        """Ranks at which a method's policy is evaluated beside itself."""
        return sorted({r for c in self.curves.values() if c.methods == [method] for r in c.ranks})

    @property
    def pools(self) -> dict[str, list[str]]:
        """Methods by the pool that they are in."""
        found: dict[str, list[str]] = {}
        for name, method in self.methods.items():
            if method.pool is not None:
                found.setdefault(method.pool, []).append(name)
        return found


def load_study(path: str | Path, overrides: list[str] | None = None) -> Study:
    """Read a study's YAML file, apply `key=value` overrides, and check it. Raises `ConfigError`."""
    tree = load_tree(path)
    apply_overrides(tree, overrides or ())
    tree.setdefault("dir", f"studies/{Path(path).stem}")
    try:
        return Study.model_validate(tree)
    except ValidationError as error:
        lines = [
            f"  - {'.'.join(map(str, d['loc']))}: {d['msg'].removeprefix('Value error, ')}" for d in error.errors()
        ]
        raise ConfigError(f"{path}:\n" + "\n".join(lines[:12])) from None


def filled(value: Any, seed: int) -> Any:
    """With the seed in place of `{seed}` in every text."""
    if isinstance(value, str):
        return value.replace("{seed}", str(seed))
    if isinstance(value, Mapping):
        return {filled(k, seed): filled(v, seed) for k, v in value.items()}
    if isinstance(value, list):
        return [filled(v, seed) for v in value]
    return value
