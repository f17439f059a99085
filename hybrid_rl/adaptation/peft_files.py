"""A trained policy as a PEFT adapter directory that anyone's PEFT loads, and such directories as plans with values.

An adapter directory is of one PEFT type. Low-rank differences are plain LoRA of one rank, with every scaling folded
into B and alpha equal to the rank: loaders that know no patterns read that rightly too. A policy without any, whose
adapters are DoRA, IA3, VeRA or RandLoRA, is of that type. Everything else is in `modules_to_save`, whole.
"""

from __future__ import annotations

import json
import math
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from peft import IA3Config, LoraConfig, PeftConfig, RandLoraConfig, TaskType, VeraConfig
from peft.tuners.tuners_utils import BaseTunerLayer, _check_lora_target_modules_mamba
from peft.utils.constants import DUMMY_TARGET_MODULES
from peft.utils.other import get_pattern_key
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from hybrid_rl import module_facts as facts
from hybrid_rl.adaptation.adapters import Adapter
from hybrid_rl.adaptation.apply import AdaptedModel
from hybrid_rl.components import Anatomy, Weight
from hybrid_rl.plan import AdaptationPlan, PlannedModule, architecture_of

PEFT_CONFIG = "adapter_config.json"
PEFT_WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_TRAINED = {
    "lora_A.weight": "lora_A.default.weight",
    "lora_B.weight": "lora_B.default.weight",
    "lora_magnitude_vector": "lora_magnitude_vector.default.weight",
    **{name: f"{name}.default" for name in ("ia3_l", "vera_lambda_b", "vera_lambda_d")},
    **{name: f"{name}.default" for name in ("randlora_lambda", "randlora_gamma")},
}
"""Kind of a tensor beside a weight, as a directory names it -> its name within our layers."""
_OWN = re.compile(rf"(.+)\.({'|'.join(map(re.escape, _TRAINED))})(?:\.weight)?")
_PROJECTIONS = {"VERA": ("vera_A", "vera_B"), "RANDLORA": ("randlora_A", "randlora_B")}
"""By PEFT type, random matrices that all its layers share, made from a seed."""


class NotPeft(ValueError):
    """Why a policy is not a PEFT adapter, or a PEFT adapter is nothing that is trained here."""


# --- writing ---


@torch.no_grad()
def write_peft(adapted: AdaptedModel, plan: AdaptationPlan, directory: Path, base_model: str) -> int:
    """Write the policy as it computes now; returns the rank of its LoRA if it is LoRA alone, else 0.

    Raises `NotPeft` for what no PEFT adapter holds.
    """
    layers = _Layers(adapted)
    owners = dict.fromkeys(layers.owner(name) for name in adapted.full)
    kind, native = _native(adapted, [m for m in plan.adapted if m.name not in owners])
    targets = [name for m in native for name in layers.sharers(m.name)]
    held = {m.name for m in native}
    replaced = [m for m in dict.fromkeys([*owners, *adapted.adapters]) if m not in held]
    whole = [name for m in replaced for name in layers.sharers(m)]
    layers.check_alone(targets, whole)
    config = _config(kind, native, targets)
    config.base_model_name_or_path, config.inference_mode, config.task_type = base_model, True, TaskType.CAUSAL_LM
    config.target_modules = targets or DUMMY_TARGET_MODULES  # type: ignore[attr-defined]
    config.modules_to_save = whole or None  # type: ignore[attr-defined]

    tensors: dict[str, Tensor] = {}
    factors = {m.name: _factors(adapted.adapters[m.name]) for m in native if kind in ("lora", "dora")}
    rank = max((len(a) for a, _ in factors.values()), default=0) or 1
    if isinstance(config, LoraConfig):
        config.r = config.lora_alpha = rank
    for m in native:
        found: dict[str, Tensor] = {p: tensor.detach() for p, tensor in adapted.adapters[m.name].parameters.items()}
        found = {stored: found[name] for stored, name in _TRAINED.items() if name in found}
        if m.name in factors:
            a, b = factors[m.name]
            found |= {"lora_A.weight": _padded(a, rank, dim=0), "lora_B.weight": _padded(b, rank, dim=1)}
        for name in layers.sharers(m.name):
            tensors |= {f"{_PREFIX}{name}.{stored}": _copy(tensor) for stored, tensor in found.items()}
    for name in _PROJECTIONS["VERA"] if kind == "vera" and native else ():
        tensors[f"base_model.{name}"] = _copy(getattr(adapted.adapters[native[0].name].layer, name)["default"])
    for name in whole:
        tensors |= {f"{_PREFIX}{name}.{leaf}": _copy(tensor) for leaf, tensor in layers.whole(name).items()}
    config.save_pretrained(str(directory))
    _sort_lists(directory / PEFT_CONFIG)
    safetensors.torch.save_file(tensors, directory / PEFT_WEIGHTS, metadata={"format": "pt"})
    return rank if kind == "lora" and native and not whole else 0


def _native(adapted: AdaptedModel, planned: Sequence[PlannedModule]) -> tuple[str, list[PlannedModule]]:
    """The treatment that the directory's type is of (`lora`: all that are low-rank differences), and the modules whose
    adapters it holds as what they are."""
    kinds = {"lora" if m.sent == "factors" else m.treatment for m in planned}
    kind = next((k for k in ("lora", "dora", "ia3", "vera", "randlora") if k in kinds), "lora")
    alike = [m for m in planned if (m.sent == "factors" if kind == "lora" else m.treatment == kind)]
    native = [m for m in alike if _allowed(kind, m, adapted)]
    shares = kind in ("vera", "randlora")  # one configuration, and random matrices by the shapes of all modules
    if shares and (native != alike or len({(m.rank, m.alpha) for m in alike}) > 1):
        return "lora", []
    return kind, native


def _allowed(kind: str, m: PlannedModule, adapted: AdaptedModel) -> bool:
    """Whether PEFT loads it. In some models it refuses layers by their names, or takes them for experts."""
    config = _config(kind, [m], [m.name])
    config.target_modules = {m.name}  # type: ignore[attr-defined]
    try:
        _check_lora_target_modules_mamba(config, adapted.model, m.name.rpartition(".")[2])
        convert_peft_config_for_transformers(config, adapted.model, None)
    except ValueError:
        return False
    return config.target_modules == {m.name}  # type: ignore[attr-defined]


def _config(kind: str, native: Sequence[PlannedModule], targets: Sequence[str]) -> PeftConfig:
    if kind == "ia3":
        fed = {m.name for m in native if m.options["scales"] == "input"}
        return IA3Config(target_modules=list(targets), feedforward_modules=[name for name in targets if name in fed])
    if kind == "vera":
        return VeraConfig(r=native[0].rank or 0, vera_dropout=0.0)
    if kind == "randlora":
        options: dict[str, Any] = {"r": native[0].rank, "randlora_alpha": native[0].alpha, "randlora_dropout": 0.0}
        with warnings.catch_warnings():  # made from a seed, they are the same wherever torch's generator is
            warnings.simplefilter("ignore")
            return RandLoraConfig(**options, save_projection=False)  # it would save them once for each layer
    return LoraConfig(use_dora=kind == "dora" and bool(native))


def _factors(adapter: Adapter) -> tuple[Tensor, Tensor]:
    """A [rank, in] and B [out, rank] of all that the adapter adds, scalings folded into B, fp32."""
    parts = []
    for f in adapter.factors():
        there = slice(None) if f.p is None else f.p != 0  # ranks that were taken away, or left out
        parts.append((f.a.detach().float()[there], f.scaled_b[:, there]))
    a, b = torch.cat([a for a, _ in parts]), torch.cat([b for _, b in parts], dim=1)
    out, inner = len(b), a.shape[1]
    if len(a) <= min(out, inner):
        return a, b
    # Several pairs may have more ranks together than the matrix has: their product is one of its own smaller side.
    return (b @ a, torch.eye(out)) if out <= inner else (torch.eye(inner), b @ a)


def _copy(tensor: Tensor) -> Tensor:
    """fp32, and its own: a shared weight's tensors are written once for each module."""
    return tensor.detach().to(torch.float32, copy=True).contiguous()


def _padded(factor: Tensor, rank: int, dim: int) -> Tensor:
    shape = list(factor.shape)
    shape[dim] = rank - shape[dim]
    return torch.cat([factor, factor.new_zeros(shape)], dim=dim)


class _Layers:
    """Modules of an adapted model by their names in the base model."""

    def __init__(self, adapted: AdaptedModel) -> None:
        self._modules: dict[str, nn.Module] = {}
        inside: set[str] = set()
        for name, module in adapted.model.named_modules(remove_duplicate=False):
            if name.rpartition(".")[0] in inside:
                inside.add(name)
                continue
            if isinstance(module, BaseTunerLayer):
                inside.add(name)
                module = module.get_base_layer()
            self._modules[name] = module
        self._holders: dict[int, list[str]] = {}
        for name, module in self._modules.items():
            for parameter in module.parameters(recurse=False):
                self._holders.setdefault(id(parameter), []).append(name)
        self._adapters = {alias: a for name, a in adapted.adapters.items() for alias in self.sharers(name)}

    def owner(self, parameter: str) -> str:
        """The module that a fully fine-tuned parameter is of."""
        name = parameter.rpartition(".")[0]
        if not facts.is_leaf(self._modules[name]):
            raise NotPeft(f"{parameter} is a parameter of a block, and PEFT saves layers")
        return name

    def sharers(self, module: str) -> list[str]:
        """This module and every other one like it that has its weights."""
        own = self._modules[module]
        names = dict.fromkeys(name for p in own.parameters(recurse=False) for name in self._holders[id(p)])
        return [name for name in names if type(self._modules[name]) is type(own)]

    def whole(self, module: str) -> dict[str, Tensor]:
        """Everything that a module holds, as the policy has it."""
        state = dict(self._modules[module].state_dict())
        if (adapter := self._adapters.get(module)) is not None:
            state |= adapter.whole()
        return state

    def check_alone(self, targets: Sequence[str], whole: Sequence[str]) -> None:
        """Refuse names by which PEFT would take other modules too: it goes by how names end."""
        meant, ends = {*targets, *whole}, tuple([*whole, *(f".{name}" for name in targets)])
        for name in self._modules:
            if name not in meant and name.endswith(ends):
                raise NotPeft(f"PEFT would adapt {name} too: its name ends like that of a module which is")


def _sort_lists(path: Path) -> None:
    """PEFT writes sets in no order."""
    tree = json.loads(path.read_text(encoding="utf-8"))
    tree = {k: sorted(v) if isinstance(v, list) and all(isinstance(x, str) for x in v) else v for k, v in tree.items()}
    path.write_text(json.dumps(tree, indent=1) + "\n", encoding="utf-8")


# --- reading ---


def peft_plan(directory: Path, anatomy: Anatomy, model: str, seed: int, only: AdaptationPlan | None) -> AdaptationPlan:
    """The plan that trains what a PEFT directory holds: LoRA (rank-stabilised or not), DoRA, IA3, VeRA or RandLoRA
    where it has an adapter, `full` where it has a whole module.

    `only`: the plan that it was exported from; of modules that it has whole, what that changed is trained. Raises
    `NotPeft` for what cannot be continued.
    """
    contents = _Contents(directory)
    names = {alias: w for w in anatomy.weights for alias in (w.name, *w.tied)}
    parameters = {_parameter(alias, w): w for alias, w in names.items()}
    changed = None if only is None else {name for m in only.modules for name in _changed(m)}
    planned: dict[str, PlannedModule] = {}
    for module in contents.adapted:
        if module not in names or not names[module].linear:
            raise NotPeft(f"it adapts {module}, which is no linear layer of this model with a weight of its own")
        w = names[module]
        if not contents.same((w.name, *w.tied)):
            raise NotPeft(f"it adapts {module}, but not {w.tied[0]}, which has the same weight, likewise")
        planned[w.name] = contents.planned(w)
    candidates = {w.name for w in anatomy.candidates}
    for parameter in contents.saved:
        if parameter not in parameters:
            raise NotPeft(f"it has {parameter}, which this model has not")
        w = parameters[parameter]
        if not contents.same([_parameter(alias, w) for alias in (w.name, *w.tied)]):
            raise NotPeft(f"it has {parameter}, but not {w.tied[0]}, which is the same weight, likewise")
        shape = contents.shape(parameter)
        if shape != w.shape:
            raise NotPeft(f"it has {parameter} of shape {shape}, which is {w.shape} in this model")
        if changed is None or w.name in changed:
            planned[w.name] = _entry(w, "full", extra=w.name not in candidates)
    ordered = [
        planned.get(w.name, _entry(w, "frozen")) for w in anatomy.weights if w.name in planned.keys() | candidates
    ]
    ordered.sort(key=lambda m: (m.extra, m.treatment == "frozen"))
    method = {"peft_type": contents.kind}
    return AdaptationPlan(model, anatomy.topology, method, seed, tuple(ordered), architecture_of(anatomy))


def _changed(m: PlannedModule) -> list[str]:
    """Names of the weights that a policy has otherwise than the base model for this module."""
    if m.treatment == "frozen":
        return []
    return [m.name, f"{m.name}.bias"] if m.options.get("scales") == "output" else [m.name]


@torch.no_grad()
def read_peft(adapted: AdaptedModel, directory: Path) -> None:
    """Set the trained parameters to what a PEFT directory holds of them.

    Raises `ValueError` if it does not hold them all, or of other shapes.
    """
    contents = _Contents(directory)
    for name, parameter in adapted.trained.items():
        tensor = contents.value(name)
        if tensor is None or tensor.shape != parameter.shape:
            has = "nothing" if tensor is None else f"shape {tuple(tensor.shape)}"
            raise ValueError(f"{directory} has {has} for {name}, whose shape is {tuple(parameter.shape)}")
        parameter.copy_(tensor)
    for adapter in adapted.adapters.values():
        for name, wanted in contents.projections.items():
            if not torch.equal(getattr(adapter.layer, name)["default"].cpu(), wanted):
                raise ValueError(f"{directory} has other random matrices {name} than PEFT makes here")


class _Contents:
    """What is in a PEFT directory."""

    def __init__(self, directory: Path) -> None:
        self._config = _read_config(directory)
        self.kind: str = self._config["peft_type"]
        if not (directory / PEFT_WEIGHTS).is_file():
            raise NotPeft(f"it has no {PEFT_WEIGHTS}; save it with safe_serialization=True")
        try:
            self._file = safe_open(directory / PEFT_WEIGHTS, "pt").__enter__()
        except (SafetensorError, OSError) as error:
            raise NotPeft(f"its {PEFT_WEIGHTS} cannot be read: {error}") from None
        self._keys: dict[str, str] = {}
        """Trained parameter -> its name in the file."""
        self.adapted: list[str] = []
        """Modules with an adapter."""
        self.saved: list[str] = []
        """Parameters and buffers that are there whole."""
        self.projections: dict[str, Tensor] = {}
        for key in self._file.keys():  # noqa: SIM118
            if (leaf := key.rpartition(".")[2]) in _PROJECTIONS.get(self.kind, ()):
                self.projections[leaf] = self._file.get_tensor(key)
                continue
            name = key.removeprefix(_PREFIX)
            if found := _OWN.fullmatch(name):
                self._keys[f"{found[1]}.{_TRAINED[found[2]]}"] = key
                self.adapted += [found[1]] if found[1] not in self.adapted[-1:] else []
            elif re.search(r"lora_|ia3_|vera_", name):
                raise NotPeft(f"it has {name}, a kind of tensor that is not trained here")
            else:
                self._keys[name] = key
                self.saved.append(name)
        self.adapted = list(dict.fromkeys(self.adapted))

    def planned(self, weight: Weight) -> PlannedModule:
        """The adapter of a module."""
        out, inner = weight.shape
        if self.kind == "IA3":
            fed = self.shape(f"{weight.name}.{_TRAINED['ia3_l']}") == (1, inner)
            self._check(weight, ia3_l=(1, inner) if fed else (out, 1))
            return _entry(weight, "ia3", options={"scales": "input" if fed else "output"})
        if self.kind in _PROJECTIONS:
            r, alpha = _positive("r", self._config.get("r")), None
            if self.kind == "VERA":
                self._check(weight, vera_lambda_b=(out,), vera_lambda_d=(r,))
            else:
                bases = math.ceil(min(weight.shape) / r)
                self._check(weight, randlora_lambda=(r, bases), randlora_gamma=(bases, min(weight.shape)))
                alpha = _positive("randlora_alpha", self._config.get("randlora_alpha"))
            return _entry(weight, self.kind.lower(), rank=r, alpha=alpha)
        config, live = self._config, self._live(weight.name)
        self._check(weight, **{"lora_A.weight": (len(live), inner), "lora_B.weight": (out, len(live))})
        if config.get("use_dora"):
            self._check(weight, lora_magnitude_vector=(out,))
        pattern = config.get("alpha_pattern") or {}
        alpha = pattern.get(get_pattern_key(list(pattern), weight.name), config.get("lora_alpha"))
        alpha = _positive("lora_alpha", alpha)
        rank, root = int(live.sum()), math.sqrt if config.get("use_rslora") else float
        treatment = "dora" if config.get("use_dora") else "lora" if root is float else "rslora"
        ours = math.sqrt if treatment == "rslora" else float
        if (rank, ours) != (len(live), root):
            alpha = alpha / root(len(live)) * ours(rank)
        return _entry(weight, treatment, rank=rank, alpha=alpha)

    def _check(self, weight: Weight, **shapes: tuple[int, ...]) -> None:
        """Refuse other shapes of a module's tensors than these."""
        for kind, wanted in shapes.items():
            found = self.shape(f"{weight.name}.{_TRAINED[kind]}")
            if found != wanted:
                raise NotPeft(
                    f"it has {kind} of {weight.name} of shape {found}, which would be {wanted} for that module's "
                    f"{weight.shape} in this model"
                )

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a tensor by our name."""
        if name not in self._keys:
            raise NotPeft(f"it has no {name}")
        return tuple(self._file.get_slice(self._keys[name]).get_shape())

    def value(self, name: str) -> Tensor | None:
        """A trained parameter by our name, in fp32."""
        if name not in self._keys:
            return None
        tensor = self._tensor(name)
        module, _, kind = name.partition(".lora_")
        if kind.startswith(("A.", "B.")):
            return tensor[self._live(module)] if kind.startswith("A.") else tensor[:, self._live(module)]
        return tensor

    def same(self, names: Sequence[str]) -> bool:
        """Whether these modules, or parameters, are the same here."""
        first, *others = ({k.removeprefix(n): k for k in self._keys if k == n or k.startswith(f"{n}.")} for n in names)
        return all(
            other.keys() == first.keys()
            and all(torch.equal(self._tensor(other[k]), self._tensor(first[k])) for k in other)
            for other in others
        )

    def _live(self, module: str) -> Tensor:
        """Which ranks are more than padding, which no training would change; [rank of the tensors]."""
        a, b = (self._tensor(f"{module}.{_TRAINED[kind]}") for kind in ("lora_A.weight", "lora_B.weight"))
        if a.ndim != 2 or b.ndim != 2 or len(a) != b.shape[1]:
            raise NotPeft(f"its factors of {module} have shapes {tuple(a.shape)} and {tuple(b.shape)}")
        live = (a != 0).any(1) | (b != 0).any(0)
        live[0] |= not live.any()
        return live

    def _tensor(self, name: str) -> Tensor:
        if name not in self._keys:
            raise NotPeft(f"it has no {name}")
        return self._file.get_tensor(self._keys[name]).float()


def _entry(weight: Weight, treatment: str, **adapter: Any) -> PlannedModule:
    known: dict[str, Any] = {"score": None, "rank": None, "alpha": None, **adapter}
    return PlannedModule(
        name=weight.name,
        component=weight.component,
        layer=weight.layer,
        shape=weight.shape,
        params=weight.params,
        treatment=treatment,
        slices=weight.slices,
        **known,
    )


def _positive(name: str, value: Any) -> Any:
    """A number from `adapter_config.json`."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
        raise NotPeft(f"its {PEFT_CONFIG} has {name}={value!r}, which should be a positive number")
    return value


def _parameter(alias: str, weight: Weight) -> str:
    """Full name of a weight's parameter under one of its names."""
    return f"{alias}.weight" if weight.parameter == f"{weight.name}.weight" else alias


_KINDS: dict[str, type[PeftConfig]] = {
    "LORA": LoraConfig,
    "IA3": IA3Config,
    "VERA": VeraConfig,
    "RANDLORA": RandLoraConfig,
}
_HARMLESS = {
    *("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "lora_dropout"),
    *("target_modules", "exclude_modules", "feedforward_modules", "modules_to_save", "layers_to_transform"),
    *("layers_pattern", "init_lora_weights", "init_ia3_weights", "base_model_name_or_path", "revision", "task_type"),
    *("inference_mode", "auto_mapping", "peft_type", "peft_version", "megatron_core", "qalora_group_size"),
    *("eva_config", "corda_config", "loftq_config", "lora_ga_config", "ensure_weight_tying", "randlora_alpha"),
    *("vera_dropout", "randlora_dropout", "d_initial", "init_weights", "save_projection"),
}
"""Settings that say nothing about what an adapter computes, or that are read here."""
_PLAIN_STARTS = ("gaussian", "eva", "orthogonal", "mica", "lora_ga")
"""Starts of LoRA by name that leave the base model's weights as they are."""


def _read_config(directory: Path) -> dict[str, Any]:
    """`adapter_config.json`. Raises `NotPeft` for what is not trained here."""
    try:
        config = json.loads((directory / PEFT_CONFIG).read_text(encoding="utf-8"))
        kind = str(config["peft_type"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise NotPeft(f"its {PEFT_CONFIG} cannot be read: {type(error).__name__}: {error}") from None
    if kind not in _KINDS:
        raise NotPeft(f"it is of peft_type={kind}; {', '.join(_KINDS)} can be continued")
    start = config.get("init_lora_weights", True)
    if isinstance(start, str) and start.lower() not in _PLAIN_STARTS:
        raise NotPeft(
            f"init_lora_weights={start}: PEFT changes the base model's weights where it loads this; convert it to "
            "plain LoRA with PEFT's path_initial_model_for_weight_conversion"
        )
    usual = _KINDS[kind]().to_dict()
    for name, value in config.items():
        if name not in _HARMLESS and value and value != usual.get(name):
            raise NotPeft(f"{name}={value!r} is nothing that is trained here")
    return config
