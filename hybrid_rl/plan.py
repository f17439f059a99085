"""The adaptation plan: for every candidate matrix its component, its score and its treatment.

`plan.json` is the one place where a run's trained modules are listed; the optimizer groups, the weight sync, the
receipts and the checkpoints all derive from it. Modules are named in full, never by suffix or pattern.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal

from hybrid_rl.components import Anatomy, Weight
from hybrid_rl.config import Config, ConfigError, LoraConfig, PlanConfig
from hybrid_rl.files import write_atomically
from hybrid_rl.placement import PLACEMENTS

Treatment = Literal["full", "lora", "frozen"]
PLAN_VERSION = 1


@dataclass(frozen=True)
class PlannedModule:
    """One weight and what is done with it."""

    name: str
    """Module whose `weight` it is, or the full name of a bare parameter."""
    component: str
    layer: int | None
    shape: tuple[int, ...]
    params: int
    score: float | None
    rank: int | None
    """LoRA rank; `None` unless the treatment is `lora`."""
    alpha: float | None
    """LoRA scaling numerator; `None` unless the treatment is `lora`."""
    treatment: Treatment
    slices: tuple[tuple[str, int], ...] = ()
    """Parts of a fused projection, in the order of its rows: name and rows. They share one treatment."""
    extra: bool = False
    """Full by `plan.also_full`, outside the budget and the ranking."""
    note: str | None = None
    """Why the treatment is not the one that the settings ask for."""


@dataclass(frozen=True)
class AdaptationPlan:
    """An ordered list of planned modules, best score first, and where it came from."""

    model: str
    topology: str
    method: Mapping[str, Any]
    """How the plan was made: score and its parameters, budget, placement."""
    seed: int
    modules: tuple[PlannedModule, ...]
    architecture: str = ""
    """Digest of the names and shapes of all the model's weights; empty if it is not known."""

    def named(self, treatment: Treatment) -> list[PlannedModule]:
        """The modules with this treatment, in rank order."""
        return [m for m in self.modules if m.treatment == treatment]

    @property
    def candidates(self) -> list[PlannedModule]:
        """The modules that were ranked, in rank order."""
        return [m for m in self.modules if not m.extra]

    @property
    def totals(self) -> dict[str, int]:
        """Matrices and parameters by treatment, and the trainable parameters they come to."""
        totals = _sizes("candidate", self.candidates)
        for treatment in ("full", "lora", "frozen"):
            totals |= _sizes(treatment, self.named(treatment))
        totals |= _sizes("extra", [m for m in self.modules if m.extra])
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
            "architecture": self.architecture,
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
    def load(path: str | Path, setting: str = "plan.path") -> AdaptationPlan:
        """Read a plan, possibly edited by hand; `setting` is what the error messages call it."""
        try:
            text = Path(path).read_text(encoding="utf-8")
        except FileNotFoundError:
            raise ConfigError(f"{setting}={str(path)!r} does not exist") from None
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{setting}={str(path)!r} cannot be read: {error}") from None
        try:
            return AdaptationPlan.from_json(text)
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError(f"{setting}={str(path)!r} is not a plan: {type(error).__name__}: {error}") from None

    @staticmethod
    def from_json(text: str) -> AdaptationPlan:
        """The inverse of `to_json`. Totals and hash are derived anew, not read, so that edits hold."""
        tree = json.loads(text)
        if tree["version"] != PLAN_VERSION:
            raise ValueError(f"it has version {tree['version']}, this program reads version {PLAN_VERSION}")
        modules = tuple(_module(m) for m in tree["modules"])
        return AdaptationPlan(
            tree["model"], tree["topology"], tree["method"], tree["seed"], modules, tree.get("architecture", "")
        )

    def check_against(self, anatomy: Anatomy) -> None:
        """Refuse a plan that was made for another model, or edited into something that cannot be trained."""
        weights = {w.name: w for w in anatomy.weights}
        seen: set[str] = set()
        for m in self.modules:
            if m.name in seen:
                raise ConfigError(f"the plan lists {m.name} twice")
            seen.add(m.name)
        self._check_same_model(weights, anatomy)
        for m in self.modules:
            _check_treatment(m, weights[m.name])
        if not any(m.treatment != "frozen" for m in self.modules):
            raise ConfigError(
                "the plan trains nothing; raise plan.budget.ratio or set plan.rest=lora, or in a finished plan treat "
                "some module as full or lora"
            )

    def _check_same_model(self, weights: Mapping[str, Weight], anatomy: Anatomy) -> None:
        absent = [m.name for m in self.modules if m.name not in weights]
        changed = [m for m in self.modules if m.name in weights and weights[m.name].shape != m.shape]
        same = self.architecture in ("", architecture_of(anatomy))
        if same and not absent and not changed:
            return
        unlisted = sorted({w.name for w in anatomy.candidates} - {m.name for m in self.modules})
        lines = [f"the plan was made for another model ({self.model}); rank this one anew. What differs:"]
        if absent:
            lines.append(f"  {len(absent)} modules that this model does not have, e.g. {absent[0]}")
        if changed:
            m = changed[0]
            lines.append(f"  {len(changed)} of another shape, e.g. {m.name} {m.shape}, here {weights[m.name].shape}")
        if unlisted:
            lines.append(f"  {len(unlisted)} of this model's candidates are not in the plan, e.g. {unlisted[0]}")
        raise ConfigError("\n".join(lines))


def architecture_of(anatomy: Anatomy) -> str:
    """Digest of the names and shapes of all weights."""
    content = sorted((w.name, w.shape) for w in anatomy.weights)
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def _module(tree: Mapping[str, Any]) -> PlannedModule:
    unknown = sorted(tree.keys() - PlannedModule.__dataclass_fields__.keys())
    if unknown:
        raise ValueError(f"module {tree.get('name')} has {unknown[0]!r}, which means nothing")
    slices = tuple((str(name), int(rows)) for name, rows in tree.get("slices", ()))
    return PlannedModule(**{**tree, "shape": tuple(tree["shape"]), "slices": slices})


def _sizes(label: str, modules: Sequence[PlannedModule]) -> dict[str, int]:
    return {f"{label}_modules": len(modules), f"{label}_params": sum(m.params for m in modules)}


def _check_treatment(m: PlannedModule, weight: Weight) -> None:
    """Refuse a treatment that this weight cannot have."""
    if m.treatment not in ("full", "lora", "frozen"):
        raise ConfigError(f"the plan treats {m.name} as {m.treatment!r}; use full, lora or frozen")
    if m.treatment == "full":
        check_full(weight)
    if m.treatment == "lora":
        if not (_is_positive(m.rank, int) and _is_positive(m.alpha, (int, float))):
            raise ConfigError(
                f"the plan treats {m.name} as lora without a positive rank and alpha; give both, e.g. 8 and 16"
            )
        reason = "it is not the weight of a linear layer" if not weight.linear else weight.no_lora
        if reason:
            raise ConfigError(f"the plan treats {m.name} as lora, but {reason}; use full or frozen")
        if (m.rank or 0) > min(m.shape):
            raise ConfigError(
                f"the plan gives {m.name} of shape {by(m.shape)} the rank {m.rank}; use at most {min(m.shape)}"
            )


def check_full(weight: Weight) -> None:
    """Refuse full fine-tuning of a weight whose gradient or value would not be its own."""
    if weight.quantised:
        raise ConfigError(
            f"{weight.name} is quantised and cannot be fully fine-tuned; load the model unquantised, or use lora"
        )
    if weight.component in ("embedding", "lm_head") and weight.tied:
        raise ConfigError(
            f"{weight.name} is tied to {weight.tied[0]}: training one would train the other; leave it out of the plan"
        )


def _is_positive(value: Any, kind: type | tuple[type, ...]) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool) and value > 0


def by(shape: Sequence[int]) -> str:
    """`64x128`"""
    return "x".join(str(n) for n in shape)


def select_candidates(anatomy: Anatomy, settings: PlanConfig) -> list[Weight]:
    """The linear layers that `plan.placement`, `plan.include` and `plan.exclude` choose, in the model's order."""
    terms = _placement_terms(settings.placement)
    ranked = {w.name for w in anatomy.candidates}
    linear = [w for w in anatomy.weights if w.linear]
    included = matching(linear, settings.include, "plan.include", "linear layer")
    placed = {
        w.name
        for w in linear
        if (w.name in ranked or w.component == "lm_head") and any(_fits(w, term) for term in terms)
    }
    if not placed and not included:
        raise ConfigError(f"plan.placement={settings.placement}: this {anatomy.topology} model has no such matrices")
    chosen = [w for w in linear if w.name in placed | included]
    excluded = matching(chosen, settings.exclude, "plan.exclude", "candidate")
    chosen = [w for w in chosen if w.name not in excluded]
    if not chosen:
        raise ConfigError(f"plan.exclude={settings.exclude} leaves no candidate")
    for w in chosen:
        if w.component in ("embedding", "lm_head") and w.tied:
            raise ConfigError(f"{w.name} is tied to {w.tied[0]} and cannot be adapted on its own; leave it out")
    return chosen


def select_extras(anatomy: Anatomy, settings: PlanConfig, candidates: Sequence[Weight]) -> list[Weight]:
    """The weights that `plan.also_full` names: routers, gates, norms, decay rates, convolutions, expert stacks."""
    names = matching(anatomy.weights, settings.also_full, "plan.also_full", "weight")
    both = sorted(names & {w.name for w in candidates})
    if both:
        raise ConfigError(
            f"plan.also_full matches {both[0]}, a candidate that the budget decides on; narrow the pattern, "
            "or take the module out with plan.exclude"
        )
    extras = [w for w in anatomy.weights if w.name in names]
    for w in extras:
        check_full(w)
    return extras


def matching(weights: Iterable[Weight], patterns: Sequence[str], setting: str, what: str) -> set[str]:
    """Names that match any of the shell-style patterns. A pattern that matches nothing is refused."""
    names = [w.name for w in weights]
    found: set[str] = set()
    for pattern in patterns:
        matched = {name for name in names if fnmatchcase(name, pattern)}
        if not matched:
            wider = f"*{pattern.strip('*')}*"
            hint = (
                f"did you mean {wider!r}?"
                if any(fnmatchcase(n, wider) for n in names)
                else f"they look like {names[0]}"
            )
            raise ConfigError(f"{setting}: {pattern!r} matches no {what} by its full name; {hint}")
        found |= matched
    return found


def _placement_terms(placement: str) -> list[tuple[str, tuple[str, ...]]]:
    """`attention:q_proj|v_proj+mlp` -> [("attention", ("q_proj", "v_proj")), ("mlp", ())]."""
    terms = []
    for term in PLACEMENTS.get(placement, placement).split("+"):
        component, _, leaves = term.partition(":")
        terms.append((component, tuple(leaves.split("|")) if leaves else ()))
    return terms


def _fits(weight: Weight, term: tuple[str, tuple[str, ...]]) -> bool:
    component, leaves = term
    return weight.component == component and (not leaves or weight.name.rpartition(".")[2] in leaves)


def build_plan(
    anatomy: Anatomy,
    scores: Mapping[str, float],
    *,
    model: str,
    method: Mapping[str, Any],
    seed: int,
    ratio: float,
    settings: PlanConfig,
    lora: LoraConfig,
    unreached: Collection[str] = (),
) -> AdaptationPlan:
    """Give the best-scored candidates full treatment within the budget, and `settings.rest` to the others.

    The budget is `ratio` of the candidates' parameters or number. `scores` may be empty when it takes none or all of
    them. Ties are broken by name. `unreached` are modules that no gradient reaches: they are frozen.
    """
    candidates = select_candidates(anatomy, settings)
    extras = select_extras(anatomy, settings, candidates)
    names = {c.name for c in candidates}
    if scores and set(scores) != names:
        raise ValueError(f"scores and candidates name different modules: {sorted(set(scores) ^ names)[:3]}")
    broken = [name for name, score in scores.items() if not math.isfinite(score)]
    if broken:
        raise ValueError(f"scores are not finite: {broken[:3]}")
    ordered = sorted(candidates, key=lambda c: (-scores.get(c.name, 0.0), c.name))
    eligible = [c for c in ordered if not c.quantised and c.name not in unreached]
    full = choose_full(eligible, scores, ratio=ratio, settings=settings, of=candidates)
    ranks = _ranks(candidates, lora)
    modules = []
    for c in ordered:
        treatment, note = _treatment(c, c.name in full, settings.rest, c.name in unreached)
        rank, note = _fitting_rank(c, ranks[c.name], note) if treatment == "lora" else (None, note)
        alpha = lora.resolved_alpha * rank / lora.rank if rank is not None else None
        modules.append(_planned(c, treatment, scores.get(c.name), rank, alpha, note=note))
    modules += [_planned(w, "full", None, None, None, extra=True) for w in extras]
    plan = AdaptationPlan(model, anatomy.topology, method, seed, tuple(modules), architecture_of(anatomy))
    plan.check_against(anatomy)
    return plan


def choose_full(
    ordered: Sequence[Weight],
    scores: Mapping[str, float],
    *,
    ratio: float,
    settings: PlanConfig,
    of: Sequence[Weight],
) -> set[str]:
    """Names of the candidates, given best first, that full fine-tuning is spent on.

    The budget is `ratio` of the weights `of`, in `settings.budget.unit`. `skip` passes over a candidate that does not
    fit what is left, `prefix` stops at it, `knapsack` takes the set of largest total score, a score being per parameter
    where the unit is parameters. `quotas` caps a component's share of the budget.
    """
    budget = settings.budget
    cost = {c.name: c.params if budget.unit == "params" else 1 for c in of}
    total = ratio * sum(cost.values()) * (1 + 1e-12)  # 0.29 x 100 is 28.999...
    caps = {component: share * total for component, share in budget.quotas.items()}
    unknown = sorted(caps.keys() - {c.component for c in of})
    if unknown:
        there = ", ".join(dict.fromkeys(c.component for c in of))
        raise ConfigError(f"plan.budget.quotas names {unknown[0]}, of which there are no candidates; there are {there}")
    if budget.fill == "knapsack" and 0 < ratio < 1 and ordered:
        return _knapsack(ordered, scores, cost, total, caps)
    spent: dict[str, float] = {}
    full: set[str] = set()
    for c in ordered:
        fits = sum(spent.values()) + cost[c.name] <= total
        within = spent.get(c.component, 0.0) + cost[c.name] <= caps.get(c.component, math.inf)
        if fits and within:
            spent[c.component] = spent.get(c.component, 0.0) + cost[c.name]
            full.add(c.name)
        elif budget.fill == "prefix" and not fits:
            break
    return full


def _knapsack(
    ordered: Sequence[Weight],
    scores: Mapping[str, float],
    cost: Mapping[str, int],
    total: float,
    caps: Mapping[str, float],
) -> set[str]:
    """The set of largest summed value within the budget and the caps: an integer program, solved (HiGHS) to within a
    millionth of the largest value."""
    import numpy as np
    from scipy.optimize import Bounds, LinearConstraint, milp

    costs = np.array([cost[c.name] for c in ordered], dtype=float)
    values = np.array([scores[c.name] for c in ordered]) * costs
    scale = max(float(np.abs(values).max()), 1e-300)
    rows, limits = [costs / costs.sum()], [total / costs.sum()]
    for component, cap in caps.items():
        rows.append(np.array([c.component == component for c in ordered]) * costs / costs.sum())
        limits.append(cap / costs.sum())
    result = milp(
        -values / scale,
        integrality=np.ones(len(ordered)),
        bounds=Bounds(0, 1),
        constraints=LinearConstraint(np.array(rows), -np.inf, np.array(limits)),  # pyright: ignore[reportArgumentType]
        options={"mip_rel_gap": 0.0},
    )
    if result.x is None:
        raise RuntimeError(f"the knapsack was not solved: {result.message}")
    return {c.name for c, taken in zip(ordered, result.x, strict=True) if taken > 0.5}


def _treatment(weight: Weight, full: bool, rest: Treatment, unreached: bool) -> tuple[Treatment, str | None]:
    """What is done with a candidate, and why where it is not what the settings ask for."""
    if unreached:
        return "frozen", "no gradient reaches it"
    if full:
        return "full", None
    if rest == "lora" and weight.no_lora:
        return "frozen", f"LoRA cannot serve it: {weight.no_lora}"
    return rest, None


def _ranks(candidates: Sequence[Weight], lora: LoraConfig) -> dict[str, int]:
    """Every candidate's LoRA rank as configured: the last of `lora.ranks`' patterns that matches, else `lora.rank`."""
    ranks = {c.name: lora.rank for c in candidates}
    for pattern, rank in lora.ranks.items():
        for name in matching(candidates, [pattern], "lora.ranks", "candidate"):
            ranks[name] = rank
    return ranks


def _fitting_rank(weight: Weight, rank: int, note: str | None) -> tuple[int, str | None]:
    """A matrix has no more ranks than its smaller side."""
    most = min(weight.shape)
    if rank <= most:
        return rank, note
    return most, f"rank {rank} lowered to {most}: the matrix is {by(weight.shape)}"


def _planned(
    weight: Weight,
    treatment: Treatment,
    score: float | None,
    rank: int | None,
    alpha: float | None,
    *,
    extra: bool = False,
    note: str | None = None,
) -> PlannedModule:
    return PlannedModule(
        name=weight.name,
        component=weight.component,
        layer=weight.layer,
        shape=weight.shape,
        params=weight.params,
        score=score,
        rank=rank,
        alpha=alpha,
        treatment=treatment,
        slices=weight.slices,
        extra=extra,
        note=note,
    )


def probe_plan(anatomy: Anatomy, config: Config) -> AdaptationPlan:
    """LoRA on every candidate that can have it: what a probe trains."""
    settings = config.plan.model_copy(update={"rest": "lora", "also_full": []})
    return build_plan(
        anatomy,
        {},
        model=config.model.path,
        method={"probe": True},
        seed=config.seed,
        ratio=0.0,
        settings=settings,
        lora=config.lora,
    )


def treatment_label(module: PlannedModule | None) -> str:
    """`full`, `lora r=8`, `frozen`; `absent` of a module that a plan does not list."""
    if module is None:
        return "absent"
    return f"lora r={module.rank}" if module.treatment == "lora" else module.treatment
