"""A policy as model files: the base model's own, with the trained tensors in the places of theirs.

Weights are computed in fp32 and cast once, each to the type that it has in the base model's files. Everything else is
copied bit for bit, one file at a time, so that a sharded model stays sharded and a tied weight tied.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import safe_open
from torch import Tensor, nn
from transformers.core_model_loading import revert_weight_conversion
from transformers.utils.hub import cached_file

from hybrid_rl.adaptation import AdaptedModel, remove_adapters
from hybrid_rl.weight_sync import BaseFiles

_TYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_CONFIGS = (
    *("config.json", "generation_config.json", "tokenizer_config.json", "preprocessor_config.json"),
    *("processor_config.json", "image_processor_config.json", "video_preprocessor_config.json"),
)
"""Configuration, which may name a model's own code."""
_BESIDE = (
    *("tokenizer.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt"),
    *("tokenizer.model", "tokenizer.model.v*", "spiece.model", "sentencepiece*.model", "*.tiktoken", "tekken.json"),
    *("chat_template.jinja", "chat_template.json", "LICENSE*", "NOTICE*"),
)
"""What else belongs to a model, beside its weights and its code."""


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

    The adapters are merged into `adapted` and taken off, and its weights rounded as the files' are. Raises `NotInFiles`
    where the files hold a trained tensor in a form that it cannot be cast to.
    """
    files = BaseFiles(model_path)
    _check_tied(adapted)
    changed = list(adapted.full.values())
    for adapter in adapted.adapters.values():
        for name, value in adapter.whole().items():
            parameter = adapter.layer.get_base_layer().get_parameter(name)
            parameter.data = value
            changed.append(parameter)
    remove_adapters(adapted.model)
    forms = _by_key(adapted.model, {id(p): p for p in changed}, files)
    new = {key: tensor for form in forms.values() for key, tensor in form.items()}
    rounding: dict[str, Rounding] = {}
    for path, names in files.by_file().items():
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
            tensors = {name: file.get_tensor(name) for name in names}
        for name in new.keys() & tensors.keys():
            tensors[name], rounding[name] = _cast(name, new[name], tensors[name])
        safetensors.torch.save_file(tensors, directory / path.name, metadata=metadata)
    for parameter, form in forms.items():
        types = {getattr(torch, rounding[key].dtype) for key in form}
        if len(types) > 1:
            raise NotInFiles(f"{min(form)} and others that are one tensor in the model are of {len(types)} types there")
        parameter.data = parameter.data.to(*types).to(parameter.dtype)
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


def _by_key(model: Any, changed: Mapping[int, nn.Parameter], files: BaseFiles) -> dict[nn.Parameter, dict[str, Tensor]]:
    """Each changed parameter, given by its id, by its names in the base model's files, where it may be in parts, or a
    part."""
    everything = dict(model.named_parameters(remove_duplicate=False))
    names: dict[int, list[str]] = {}
    for name, parameter in everything.items():
        if id(parameter) in changed:
            names.setdefault(id(parameter), []).append(name)
    new: dict[nn.Parameter, dict[str, Tensor]] = {}
    together: dict[str, Tensor] = {}
    for which, aliases in names.items():
        size = everything[aliases[0]].numel()
        found = [_in_files(model, {alias: everything[alias].data}, files) for alias in aliases]
        forms = [f for f in found if sum(t.numel() for t in f.values()) == size and _fits(f, files)]
        if not forms:  # in the files it is one with others
            together = together or _in_files(model, {name: p.data for name, p in everything.items()}, files)
            forms = [{key: together[key] for key in f} for f in found if f and together.keys() >= f.keys()]
        if not forms or not all(_fits(f, files) for f in forms):
            raise NotInFiles(f"{aliases[0]} is in the base model's files in another form")
        new[changed[which]] = {key: tensor for form in forms for key, tensor in form.items()}
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
    """Configuration, tokenizer, templates, licence, the index of weight files. A local model's own code comes along; a
    hub model's stays there, and is referred to."""
    for pattern in (*_CONFIGS, *_BESIDE, "model.safetensors.index.json"):
        for path in sorted(source.glob(pattern)):
            shutil.copyfile(path, directory / path.name)
    if not (directory / "config.json").exists():
        shutil.copyfile(str(cached_file(model_path, "config.json")), directory / "config.json")
    local = Path(model_path).is_dir()
    for path in (directory / name for name in _CONFIGS if (directory / name).exists()):
        tree = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(tree, dict) or "auto_map" not in tree:
            continue
        if local:
            for code in sorted(source.glob("*.py")):
                shutil.copyfile(code, directory / code.name)
        else:
            tree["auto_map"] = {kind: _at(model_path, classes) for kind, classes in tree["auto_map"].items()}
            path.write_text(json.dumps(tree, indent=2) + "\n", encoding="utf-8")


def _at(repository: str, classes: Any) -> Any:
    """Classes of `auto_map` (`module.Class`; of tokenizers a list, with `None`) as ones in that repository."""
    if isinstance(classes, list):
        return [_at(repository, each) for each in classes]
    return classes if not isinstance(classes, str) or "--" in classes else f"{repository}--{classes}"
