"""From scores to an adaptation plan: candidates, the budget, and every candidate's treatment."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from glob import escape as glob_escape
from typing import Any

from hybrid_rl.components import Anatomy, Weight
from hybrid_rl.config import Config, ConfigError, PlanConfig
from hybrid_rl.placement import PLACEMENTS
from hybrid_rl.plan import AdaptationPlan, PlannedModule, architecture_of, by, check_full
from hybrid_rl.treatments import ROUTED, TREATMENTS, AdaloraConfig, LoraConfig, MatryoshkaConfig, MolfConfig


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
    rest: str | None = None,
    molf: MolfConfig | None = None,
    matryoshka: MatryoshkaConfig | None = None,
    adalora: AdaloraConfig | None = None,
    unreached: Collection[str] = (),
) -> AdaptationPlan:
    """Give the best-scored candidates full treatment within the budget, and `rest` to the others: the name of a
    treatment, `settings.rest` by default.

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
    adapters = _Adapters(
        lora, molf or MolfConfig(), matryoshka or MatryoshkaConfig(), adalora or AdaloraConfig(), candidates
    )
    modules = []
    for c in ordered:
        treatment, note = _treatment(c, c.name in full, rest or settings.rest, c.name in unreached)
        modules.append(adapters.planned(c, treatment, scores.get(c.name), note))
    modules += [adapters.planned(w, "full", None, None, extra=True) for w in extras]
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


def _treatment(weight: Weight, full: bool, rest: str, unreached: bool) -> tuple[str, str | None]:
    """What is done with a candidate, and why where it is not what the settings ask for."""
    if unreached:
        return "frozen", "no gradient reaches it"
    if full:
        return "full", None
    if TREATMENTS[rest].adapter and weight.no_lora:
        return "frozen", f"no adapter can serve it: {weight.no_lora}"
    return rest, None


class _Adapters:
    """The adapters that the settings ask for."""

    def __init__(
        self,
        lora: LoraConfig,
        molf: MolfConfig,
        matryoshka: MatryoshkaConfig,
        adalora: AdaloraConfig,
        candidates: Sequence[Weight],
    ) -> None:
        self._lora, self._molf, self._matryoshka, self._adalora = lora, molf, matryoshka, adalora
        self._ranks = dict.fromkeys((c.name for c in candidates), lora.rank)
        for pattern, rank in lora.ranks.items():  # the last that matches counts
            self._ranks |= dict.fromkeys(matching(candidates, [pattern], "lora.ranks", "candidate"), rank)

    def planned(
        self, weight: Weight, treatment: str, score: float | None, note: str | None, *, extra: bool = False
    ) -> PlannedModule:
        facts = TREATMENTS[treatment]
        rank, options = None, {}
        if facts.adapter:
            rank, options, lowered = self._fitted(weight, treatment)
            note = note or lowered
        alpha = None
        if facts.scaled and rank is not None:
            stabilised = treatment == "rslora" or options.get("rank_stabilised", False)
            # The experts of MoLF share one alpha: `lora.alpha`, or by default that of the first one's rank.
            first = options.get("ranks", [rank])[0]
            alpha = self._lora.alpha_at(first, stabilised=stabilised, counts=facts.counts)
            if treatment in ROUTED and self._lora.alpha is not None:
                alpha = self._lora.alpha
        return PlannedModule(
            name=weight.name,
            component=weight.component,
            layer=weight.layer,
            shape=weight.shape,
            params=weight.params,
            score=score,
            rank=rank if facts.ranked else None,
            alpha=alpha,
            treatment=treatment,
            slices=weight.slices,
            extra=extra,
            note=note,
            options=options,
        )

    def _fitted(self, weight: Weight, treatment: str) -> tuple[int, dict[str, Any], str | None]:
        """The rank of a weight's adapter, its options, and a note where it is lowered: a matrix has no more ranks than
        its smaller side."""
        wanted, most = self._ranks[weight.name], min(weight.shape)
        rank = min(wanted, most)
        options: dict[str, Any] = {}
        if treatment in ROUTED:
            asked = self._molf.ranks or ([wanted, 4 * wanted] if treatment == "molf_efficient" else [wanted])
            ranks = [min(r, most) for r in asked]
            options = {"ranks": ranks, "rank_stabilised": self._molf.rank_stabilised}
            wanted, rank = sum(asked), sum(ranks)
        if treatment == "matryoshka":
            settings = self._matryoshka
            asked = settings.ranks or [*(2**i for i in range(wanted.bit_length()) if 2**i < wanted), wanted]
            ranks = [r for r in asked if r <= most] or [most]
            options = {"ranks": ranks, "scaling": settings.scaling, "init": settings.init, "loss": settings.loss}
            wanted, rank = asked[-1], ranks[-1]
        if treatment == "adalora":
            options = {"target": rank}
            wanted = self._adalora.initial(wanted, self._lora.rank)
            rank = min(wanted, most)
        if treatment == "ia3":  # as in its paper, what an MLP's second layer is given; elsewhere, what comes out
            options = {"scales": "input" if weight.leads_back else "output"}
        lowered = f"rank {wanted} lowered to {rank}: the matrix is {by(weight.shape)}" if rank < wanted else None
        return rank, options, lowered if TREATMENTS[treatment].ranked else None


def probe_plan(anatomy: Anatomy, config: Config) -> AdaptationPlan:
    """LoRA on every candidate that can have it: what a probe trains."""
    settings = config.plan.model_copy(update={"also_full": []})
    return build_plan(
        anatomy,
        {},
        model=config.model.path,
        method={"probe": True},
        seed=config.seed,
        ratio=0.0,
        settings=settings,
        lora=config.lora,
        rest="lora",
    )


def configured_plan(
    anatomy: Anatomy,
    config: Config,
    scores: Mapping[str, float],
    method: Mapping[str, Any],
    unreached: Collection[str] = (),
) -> AdaptationPlan:
    """The plan that the configuration makes of these scores."""
    settings, lora = config.plan, config.lora
    ratio = {"hybrid": settings.budget.ratio, "full": 1.0}.get(config.adaptation, 0.0)
    how: dict[str, Any] = {
        "adaptation": config.adaptation,
        "placement": settings.placement,
        "budget": {**settings.budget.model_dump(), "ratio": ratio},
        "rest": config.rest,
    }
    how |= {name: getattr(settings, name) for name in ("include", "exclude", "also_full") if getattr(settings, name)}
    if config.adaptation == "lora_matched":
        lora = _matched(select_candidates(anatomy, settings), settings.budget.ratio, lora)
        how |= {"matched_ratio": settings.budget.ratio, "matched_rank": lora.rank}
    if config.adaptation in ("bitfit", *ROUTED):
        settings = settings.model_copy(update={"also_full": _besides(anatomy, config)})
    return build_plan(
        anatomy,
        scores,
        model=config.model.path,
        method={**how, **method},
        seed=config.seed,
        ratio=ratio,
        settings=settings,
        lora=lora,
        rest=config.rest,
        molf=config.molf,
        matryoshka=config.matryoshka,
        adalora=config.adalora,
        unreached=unreached,
    )


def _matched(candidates: Sequence[Weight], ratio: float, lora: LoraConfig) -> LoraConfig:
    """LoRA of the rank that has as many trained parameters as a hybrid plan: `ratio` of the candidates full, LoRA of
    `lora.rank` on the rest, both spread evenly over the candidates."""
    full = ratio * sum(c.params for c in candidates)
    per_rank = sum(sum(c.shape) for c in candidates)
    rank = round(full / per_rank + (1 - ratio) * lora.rank)
    alpha = None if lora.alpha is None else lora.alpha * rank / lora.rank
    return lora.model_copy(update={"rank": max(rank, 1), "alpha": alpha})


def _besides(anatomy: Anatomy, config: Config) -> list[str]:
    """Names of what `adaptation` trains fully beside the candidates: of `bitfit`, norms and biases. Of MoLF, biases of
    the candidates, which belong to their first expert, and all but linear layers, expert stacks and the output head,
    which tied embeddings are, unless `molf.unwrapped` is `freeze`."""
    candidates = {c.name for c in select_candidates(anatomy, config.plan)}
    others = [w for w in anatomy.weights if w.name not in candidates and not w.quantised]
    biases = {w.name for w in others if w.name.rpartition(".")[2] == "bias"}
    if config.adaptation == "bitfit":
        chosen = [w for w in others if w.component == "norm" or w.name in biases]
    elif config.trains_unwrapped:
        chosen = [w for w in others if not (w.linear or w.tied or w.component in ("lm_head", "expert", "router"))]
    else:
        first = candidates if config.adaptation == "molf" else ()
        chosen = [w for w in others if w.name in biases and w.name.removesuffix(".bias") in first]
    return list(dict.fromkeys([*config.plan.also_full, *(glob_escape(w.name) for w in chosen)]))
