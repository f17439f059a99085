"""A policy as model files: the base model's own, with the trained tensors in the places of theirs.

Weights are computed in fp32 and cast once, each to the type that it has in the base model's files. Everything else is
copied bit for bit, one file at a time, so that a sharded model stays sharded and a tied weight tied.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import safe_open
from torch import Tensor
from transformers.core_model_loading import revert_weight_conversion
from transformers.utils.hub import cached_file

from hybrid_rl.adaptation import AdaptedModel, remove_adapters
from hybrid_rl.weight_sync import BaseFiles

_TYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_KEPT = ("*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "LICENSE*", "NOTICE*")
"""Files of a model beside its weights and its code."""
_LEFT = ("adapter_config.json", "export.json", "plan.json", "trainer_state.json", "training_args.json")


class NotInFiles(ValueError):
    """Why a policy cannot be written as model files."""


@dataclass(frozen=True)
class Rounding:
    """What the one cast did to a tensor."""

    dtype: str
    """Of the files."""
    max_error: float
    mean_error: float
    """Absolute."""
    mean_change: float
    """Mean absolute difference between policy and base model, before the cast."""
    undone: float
    """Share of the changed elements that the cast takes back to the base model's value."""


@torch.no_grad()
def write_merged(adapted: AdaptedModel, model_path: str, directory: Path) -> dict[str, Rounding]:
    """Write the policy as it computes now into `directory`; returns what the cast did, by name in the files.

    The adapters are merged into `adapted` and taken off. Raises `NotInFiles` where the files hold a trained tensor in a
    form that it cannot be cast to.
    """
    files = BaseFiles(model_path)
    _check_tied(adapted)
    changed = list(adapted.full.values())
    for adapter in adapted.adapters.values():
        weight, bias, base_bias = adapter.weight(), adapter.bias(), adapter.layer.get_base_layer().bias
        adapter.base.data = weight
        changed.append(adapter.base)
        if bias is not None:
            base_bias.data = bias
            changed.append(base_bias)
    remove_adapters(adapted.model)
    new = _by_key(adapted.model, {id(p) for p in changed}, files)
    rounding: dict[str, Rounding] = {}
    for path, names in files.by_file().items():
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
            tensors = {name: file.get_tensor(name) for name in names}
        for name in new.keys() & tensors.keys():
            tensors[name], rounding[name] = _cast(name, new[name], tensors[name])
        safetensors.torch.save_file(tensors, directory / path.name, metadata=metadata)
    _copy_rest(model_path, next(iter(files.by_file())).parent, directory)
    return dict(sorted(rounding.items()))


def _check_tied(adapted: AdaptedModel) -> None:
    """A weight that something without the adapter uses too cannot be changed."""
    holders: dict[int, list[str]] = {}
    for name, module in adapted.model.named_modules(remove_duplicate=False):
        if not isinstance(module, BaseTunerLayer):
            for parameter in module.parameters(recurse=False):
                holders.setdefault(id(parameter), []).append(name)
    for module, adapter in adapted.adapters.items():
        other = [name for name in holders[id(adapter.base)] if not name.endswith(".base_layer")]
        if other:
            raise NotInFiles(f"{other[0]} has the weight of {module}, without its adapter")


def _by_key(model: Any, changed: Collection[int], files: BaseFiles) -> dict[str, Tensor]:
    """The changed parameters by their names in the base model's files, where one may be in parts, or a part."""
    everything = dict(model.named_parameters(remove_duplicate=False))
    names: dict[int, list[str]] = {}
    for name, parameter in everything.items():
        if id(parameter) in changed:
            names.setdefault(id(parameter), []).append(name)
    new: dict[str, Tensor] = {}
    together: dict[str, Tensor] = {}
    for aliases in names.values():
        size = everything[aliases[0]].numel()
        found = [_in_files(model, {alias: everything[alias].data}, files) for alias in aliases]
        forms = [f for f in found if sum(t.numel() for t in f.values()) == size and _fits(f, files)]
        if not forms:  # in the files it is one with others
            together = together or _in_files(model, {name: p.data for name, p in everything.items()}, files)
            forms = [{key: together[key] for key in f} for f in found if f and together.keys() >= f.keys()]
        if not forms or not all(_fits(f, files) for f in forms):
            raise NotInFiles(f"{aliases[0]} is in the base model's files in another form")
        for form in forms:
            new |= form
    return new


def _in_files(model: Any, parameters: dict[str, Tensor], files: BaseFiles) -> dict[str, Tensor]:
    """Parameters in the form of the files, by their names there; without what the files do not have."""
    try:
        parts = revert_weight_conversion(model, parameters)
    except (RuntimeError, ValueError):  # they are not all that makes a tensor of the files
        return {}
    found = {}
    for part, value in parts.items():
        with suppress(KeyError):
            found[files.key(part)] = value
    return found


def _fits(tensors: Mapping[str, Tensor], files: BaseFiles) -> bool:
    return all(files.shape(key) == tensor.shape for key, tensor in tensors.items())


def _cast(name: str, new: Tensor, old: Tensor) -> tuple[Tensor, Rounding]:
    if old.dtype not in _TYPES:
        raise NotInFiles(f"{name} is of {old.dtype} in the base model's files, which nothing can be merged into")
    cast = torch.empty(new.shape, dtype=old.dtype).copy_(new)  # also where it is a part of a larger one
    if not bool(cast.isfinite().all()):
        raise NotInFiles(f"{name} has values that {old.dtype}, its type in the base model's files, cannot hold")
    before, after = old.float(), cast.float()
    error, moved = (after - new).abs(), new != before
    count = max(1, int(moved.sum()))
    return cast, Rounding(
        str(old.dtype).removeprefix("torch."),
        float(error.max()),
        float(error.double().mean()),
        float((new - before).abs().double().mean()),
        float((moved & (after == before)).sum()) / count,
    )


def _copy_rest(model_path: str, source: Path, directory: Path) -> None:
    """Configuration, tokenizer, templates, licence. Code stays with the base model, and is referred to there."""
    for pattern in _KEPT:
        for path in sorted(source.glob(pattern)):
            left = path.name in _LEFT or path.name.endswith(".bin.index.json")
            if path.is_file() and not left and not (directory / path.name).exists():
                shutil.copyfile(path, directory / path.name)
    config = directory / "config.json"
    if not config.exists():
        shutil.copyfile(str(cached_file(model_path, "config.json")), config)
    tree = json.loads(config.read_text(encoding="utf-8"))
    if "auto_map" in tree:
        tree["auto_map"] = {k: v if "--" in v else f"{model_path}--{v}" for k, v in tree["auto_map"].items()}
        config.write_text(json.dumps(tree, indent=2) + "\n", encoding="utf-8")
