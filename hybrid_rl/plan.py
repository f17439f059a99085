"""The adaptation plan: for every candidate matrix its component, its score and its treatment.

`plan.json` is the one place where a run's trained modules are listed; the optimizer groups, the weight sync, the
receipts and the checkpoints all derive from it.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from hybrid_rl.components import Matrix
from hybrid_rl.config import ConfigError
from hybrid_rl.files import write_atomically

Treatment = Literal["full", "lora", "frozen"]
PLAN_VERSION = 1


@dataclass(frozen=True)
class PlannedModule:
    """One candidate matrix and what is done with it."""

    name: str
    component: str
    layer: int
    shape: tuple[int, int]
    params: int
    score: float | None
    rank: int | None
    """LoRA rank; `None` unless the treatment is `lora`."""
    alpha: float | None
    """LoRA scaling numerator; `None` unless the treatment is `lora`."""
    treatment: Treatment


@dataclass(frozen=True)
class AdaptationPlan:
    """An ordered list of planned modules, best score first, and where it came from."""

    model: str
    topology: str
    method: Mapping[str, Any]
    """How the plan was made: score and its parameters, budget, placement."""
    seed: int
    modules: tuple[PlannedModule, ...]

    def named(self, treatment: Treatment) -> list[PlannedModule]:
        """The modules with this treatment, in rank order."""
        return [m for m in self.modules if m.treatment == treatment]

    @property
    def totals(self) -> dict[str, int]:
        """Matrices and parameters by treatment, and the trainable parameters they come to."""
        totals = {"candidate_modules": len(self.modules), "candidate_params": sum(m.params for m in self.modules)}
        for treatment in ("full", "lora", "frozen"):
            chosen = self.named(treatment)
            totals |= {f"{treatment}_modules": len(chosen), f"{treatment}_params": sum(m.params for m in chosen)}
        totals["lora_adapter_params"] = sum((m.rank or 0) * sum(m.shape) for m in self.named("lora"))
        totals["trainable_params"] = totals["full_params"] + totals["lora_adapter_params"]
        return totals

    @property
    def hash(self) -> str:
        """Digest of the model and of every module's treatment, in order: equal hashes train the same parameters."""
        content = [self.model, [[m.name, m.shape, m.treatment, m.rank, m.alpha] for m in self.modules]]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]

    def to_json(self) -> str:
        tree = {
            "version": PLAN_VERSION,
            "model": self.model,
            "method": dict(self.method),
            "seed": self.seed,
            "hash": self.hash,
            "topology": self.topology,
            "totals": self.totals,
            "modules": [asdict(m) for m in self.modules],
        }
        return json.dumps(tree, indent=1) + "\n"

    def save(self, path: str | Path) -> None:
        write_atomically(Path(path), self.to_json())

    @staticmethod
    def load(path: str | Path) -> AdaptationPlan:
        """Read a plan, possibly edited by hand."""
        try:
            text = Path(path).read_text(encoding="utf-8")
        except FileNotFoundError:
            raise ConfigError(f"plan.path={str(path)!r} does not exist") from None
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"plan.path={str(path)!r} cannot be read: {error}") from None
        try:
            return AdaptationPlan.from_json(text)
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError(f"plan.path={str(path)!r} is not a plan: {type(error).__name__}: {error}") from None

    @staticmethod
    def from_json(text: str) -> AdaptationPlan:
        """The inverse of `to_json`. Totals and hash are derived anew, not read, so that edits hold."""
        tree = json.loads(text)
        if tree["version"] != PLAN_VERSION:
            raise ValueError(f"it has version {tree['version']}, this program reads version {PLAN_VERSION}")
        modules = tuple(PlannedModule(**{**m, "shape": tuple(m["shape"])}) for m in tree["modules"])
        return AdaptationPlan(tree["model"], tree["topology"], tree["method"], tree["seed"], modules)

    def check_against(self, candidates: Sequence[Matrix]) -> None:
        """Refuse a plan that was made for another model, or edited into something that cannot be trained."""
        shapes = {c.name: c.shape for c in candidates}
        if len({m.name for m in self.modules}) != len(self.modules):
            raise ConfigError("the plan lists a module twice")
        for m in self.modules:
            if m.name not in shapes:
                raise ConfigError(
                    f"the plan names module {m.name}, which this model does not have; rank this model anew"
                )
            if shapes[m.name] != m.shape:
                raise ConfigError(f"the plan gives {m.name} the shape {m.shape}, this model {shapes[m.name]}")
            if m.treatment not in ("full", "lora", "frozen"):
                raise ConfigError(f"the plan treats {m.name} as {m.treatment!r}; use full, lora or frozen")
            if m.treatment == "lora":
                if not (_is_number(m.rank, int) and _is_number(m.alpha, (int, float))):
                    raise ConfigError(f"the plan treats {m.name} as lora without a positive rank and alpha")
                check_rank(m.rank or 0, m.name, m.shape)
        if not any(m.treatment != "frozen" for m in self.modules):
            raise ConfigError("the plan trains nothing; raise plan.budget.ratio or set plan.rest=lora")


def _is_number(value: Any, kind: type | tuple[type, ...]) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool) and value > 0


def check_rank(rank: int, name: str, shape: tuple[int, int]) -> None:
    """Refuse a LoRA rank that the matrix cannot have."""
    if rank > min(shape):
        raise ConfigError(
            f"lora.rank={rank} is larger than {name} of shape {shape[0]}x{shape[1]}; use at most {min(shape)}"
        )


def build_plan(
    candidates: Sequence[Matrix],
    scores: Mapping[str, float],
    *,
    model: str,
    topology: str,
    method: Mapping[str, Any],
    seed: int,
    ratio: float,
    unit: Literal["params", "modules"],
    rest: Literal["lora", "frozen"],
    rank: int,
    alpha: float,
) -> AdaptationPlan:
    """Give the best-scored candidates full treatment as long as they fit the budget, and `rest` to the others.

    The budget is `ratio` of the candidates' parameters or number; a candidate that does not fit is passed over for
    smaller ones behind it. Ties are broken by name. `scores` may be empty when the budget takes none or all.
    """
    if scores and set(scores) != {c.name for c in candidates}:
        raise ValueError("scores and candidates name different modules")
    broken = [name for name, score in scores.items() if not math.isfinite(score)]
    if broken:
        raise ValueError(f"scores are not finite: {broken[:3]}")
    ordered = sorted(candidates, key=lambda c: (-scores.get(c.name, 0.0), c.name))
    cost = {c.name: (c.params if unit == "params" else 1) for c in ordered}
    left = ratio * sum(cost.values())
    modules = []
    for c in ordered:
        treatment: Treatment = "full" if cost[c.name] <= left else rest
        if treatment == "full":
            left -= cost[c.name]
        lora = treatment == "lora"
        modules.append(
            PlannedModule(
                name=c.name,
                component=c.component,
                layer=c.layer,
                shape=c.shape,
                params=c.params,
                score=scores.get(c.name),
                rank=rank if lora else None,
                alpha=alpha if lora else None,
                treatment=treatment,
            )
        )
    plan = AdaptationPlan(model, topology, method, seed, tuple(modules))
    plan.check_against(candidates)
    return plan
