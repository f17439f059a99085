"""The adaptation plan: for every candidate matrix its component, its score and its treatment.

`plan.json` is the one place where a run's trained modules are listed; the optimizer groups, the weight sync, the
receipts and the checkpoints all derive from it. Modules are named in full, never by suffix or pattern.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from hybrid_rl.components import Anatomy, Weight
from hybrid_rl.config import ConfigError
from hybrid_rl.files import write_atomically
from hybrid_rl.treatments import ROUTED, TREATMENTS, adapter_params, multiplied_params

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
    """Rank of its adapter; `None` if the treatment has none. Of several adapters, of all together."""
    alpha: float | None
    """Scaling numerator of the adapter; `None` if the treatment has none."""
    treatment: str
    """A name of `TREATMENTS`."""
    slices: tuple[tuple[str, int], ...] = ()
    """Parts of a fused projection, in the order of its rows: name and rows. They share one treatment."""
    extra: bool = False
    """Full beside the candidates (`plan.also_full`, `bitfit`, MoLF), outside the budget and the ranking."""
    note: str | None = None
    """Why the treatment is not the one that the settings ask for."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """What else the treatment needs. MoLF: `ranks` of the LoRA experts, `rank_stabilised`. Matryoshka: the nested
    `ranks`, `scaling`, `init`, `loss`. AdaLoRA: the `target` that ranks come down to on average. IA3: whether it
    `scales` the layer's `input` or `output`."""

    @property
    def trains_weight(self) -> bool:
        return TREATMENTS[self.treatment].trains_weight

    @property
    def has_adapter(self) -> bool:
        return TREATMENTS[self.treatment].adapter

    @property
    def sent(self) -> str:
        """What engines are sent of it: `weight`, `factors` or `nothing`."""
        return TREATMENTS[self.treatment].sent

    @property
    def sent_rank(self) -> int:
        """Rank of the factors that engines are sent; 0 without."""
        return (self.rank or 0) * TREATMENTS[self.treatment].multiple if self.sent == "factors" else 0

    @property
    def adapter_params(self) -> int:
        """Trained parameters beside the weight."""
        return adapter_params(self.treatment, self.shape, self.rank or 0, self.options) if self.has_adapter else 0

    @property
    def multiplied_params(self) -> tuple[int, int]:
        """Trained and frozen elements of the adapter that every token is multiplied by."""
        return multiplied_params(self.treatment, self.shape, self.rank or 0, self.options)


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

    def named(self, treatment: str) -> list[PlannedModule]:
        """The modules with this treatment, in rank order."""
        return [m for m in self.modules if m.treatment == treatment]

    @property
    def adapted(self) -> list[PlannedModule]:
        """The modules with an adapter, in rank order."""
        return [m for m in self.modules if m.has_adapter]

    def sent_as(self, what: str) -> list[PlannedModule]:
        """The modules of which engines are sent `what` (`weight`, `factors`), in rank order."""
        return [m for m in self.modules if m.sent == what]

    @property
    def sent_params(self) -> int:
        """Elements of what engines are sent in full: whole weights, and factors, which all have the largest rank."""
        rank = max((m.sent_rank for m in self.modules), default=0)
        factors = sum(rank * sum(m.shape[-2:]) for m in self.sent_as("factors"))
        return factors + sum(m.params for m in self.sent_as("weight"))

    @property
    def weight_params(self) -> int:
        """Parameters of the weights that are trained themselves."""
        return sum(m.params for m in self.modules if m.trains_weight)

    @property
    def candidates(self) -> list[PlannedModule]:
        """The modules that were ranked, in rank order."""
        return [m for m in self.modules if not m.extra]

    @property
    def totals(self) -> dict[str, int]:
        """Matrices and parameters by treatment, and the trainable parameters they come to."""
        totals = _sizes("candidate", self.candidates)
        used = {m.treatment for m in self.modules}
        for treatment in TREATMENTS:
            if treatment in used or treatment in ("full", "lora", "frozen"):
                totals |= _sizes(treatment, self.named(treatment))
        totals |= _sizes("extra", [m for m in self.modules if m.extra])
        totals["adapter_params"] = sum(m.adapter_params for m in self.modules)
        totals["trainable_params"] = self.weight_params + totals["adapter_params"]
        return totals

    @property
    def hash(self) -> str:
        """Digest of the model and of every module's treatment, in order: equal hashes train the same parameters."""
        modules = [[m.name, m.shape, m.treatment, m.rank, m.alpha, m.options] for m in self.modules]
        return hashlib.sha256(json.dumps([self.model, modules], sort_keys=True).encode()).hexdigest()[:16]

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
        adalora = self.named("adalora")
        if adalora and sum(m.rank or 0 for m in adalora) == sum(m.options["target"] for m in adalora):
            raise ConfigError(
                f"the plan's {len(adalora)} adalora modules keep all the ranks that they start with, so that there is "
                "nothing to allocate; give them larger ranks or smaller targets (lora.rank), or use lora"
            )
        losses = sorted({m.options["loss"] for m in self.named("matryoshka")})
        if len(losses) > 1:
            raise ConfigError(
                f"the plan trains some matryoshka modules with loss={losses[0]} and others with {losses[1]}, but an "
                "update has one; use the same for all"
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
    if m.treatment not in TREATMENTS:
        raise ConfigError(f"the plan treats {m.name} as {m.treatment!r}; use one of {', '.join(TREATMENTS)}")
    treatment, treats = TREATMENTS[m.treatment], f"the plan treats {m.name} as {m.treatment}"
    if treatment.trains_weight:
        check_full(weight)
    if not treatment.adapter:
        return
    needed = {"rank": (m.rank, int)} if treatment.ranked else {}
    needed |= {"alpha": (m.alpha, (int, float))} if treatment.scaled else {}
    unused = {"rank": m.rank, "alpha": m.alpha}
    for name in unused.keys() - needed.keys():
        if unused[name] is not None:
            raise ConfigError(f"{treats}, which has no {name}, but gives {name}={unused[name]}; make it null")
    if not all(_is_positive(value, kind) for value, kind in needed.values()):
        raise ConfigError(f"{treats} without a positive {' and '.join(needed)}; give them, e.g. 8 and 16")
    reason = "it is not the weight of a linear layer" if not weight.linear else weight.no_lora
    if reason:
        raise ConfigError(f"{treats}, but {reason}; use full or frozen")
    if treatment.sent == "weight" and weight.quantised:
        raise ConfigError(f"{treats}, which needs its weight, but it is quantised; use lora")
    if treatment.sent == "weight" and weight.tied:
        raise ConfigError(f"{treats}, which is computed from its weight, but {weight.tied[0]} has the same; use lora")
    _check_options(m, treats)
    if max(m.options.get("ranks", ()), default=m.rank or 0) > min(m.shape):
        raise ConfigError(
            f"the plan gives {m.name} of shape {by(m.shape)} the rank {m.rank}; use at most {min(m.shape)}"
        )


def _check_options(m: PlannedModule, treats: str) -> None:
    """Refuse options that the treatment does not know, or could not work with."""
    known = {
        **{name: {"ranks": None, "rank_stabilised": (True, False)} for name in ROUTED},
        "matryoshka": {
            "ranks": None,
            "scaling": ("none", "rank", "sqrt"),
            "init": ("paper", "peft"),
            "loss": ("sum", "per_rank", "sampled", "largest"),
        },
        "adalora": {"target": None},
        "ia3": {"scales": ("input", "output")},
    }.get(m.treatment, {})
    if set(m.options) != set(known):
        raise ConfigError(f"{treats} with options {sorted(m.options)}; it needs {sorted(known) or 'none'}")
    for name, allowed in known.items():
        value = m.options[name]
        if allowed is not None and value not in allowed:
            raise ConfigError(f"{treats} with {name}={value!r}; use one of {', '.join(map(str, allowed))}")
        if name == "target" and not (_is_positive(value, int) and value <= (m.rank or 0)):
            raise ConfigError(f"{treats} with target={value!r}; use a whole number from 1 to its rank {m.rank}")
        if name == "ranks" and not isinstance(value, list | tuple):
            raise ConfigError(f"{treats} with ranks={value!r}; give a list, e.g. [2, 4, 8]")
        if name == "ranks":
            whole = sum(value) if m.treatment in ROUTED else max(value, default=0)
            if not all(_is_positive(rank, int) for rank in value) or whole != m.rank:
                raise ConfigError(f"{treats} with ranks {list(value)}, which do not come to its rank {m.rank}")
            if m.treatment == "matryoshka" and list(value) != sorted(set(value)):
                raise ConfigError(f"{treats} with ranks {list(value)}, which must rise")


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


def treatment_label(module: PlannedModule | None) -> str:
    """`full`, `lora r=8`, `molf r=8+32`, `frozen`; `absent` of a module that a plan does not list."""
    if module is None:
        return "absent"
    ranks = "+".join(map(str, module.options["ranks"])) if module.treatment in ROUTED else module.rank
    return f"{module.treatment} r={ranks}" if module.rank else module.treatment
