"""What training changed, in files from which it is restored exactly: fp32, nothing folded, nothing merged.

Fully fine-tuned weights are in `delta-*.safetensors`: `<name>`, the whole tensor, or where that is smaller
`<name>.indices` and `<name>.values`, its elements that differ from the base model's (in fp32), by their place in the
flattened tensor. Trained parameters beside weights are in `adapter.safetensors`, by their own names.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from hybrid_rl.adaptation.apply import AdaptedModel

ADAPTER_FILE = "adapter.safetensors"
_DELTAS = "delta-*.safetensors"
_INDICES, _VALUES = ".indices", ".values"
_FILE_BYTES = 4 * 2**30
"""Of a file of weights, about."""


def write_delta(
    full: Iterable[tuple[str, Tensor, Tensor]], beside: Iterable[tuple[str, Tensor]], directory: Path
) -> None:
    """Write trained weights, each with the base model's, and the trained parameters beside weights; all fp32."""
    held: dict[str, Tensor] = {}
    files = 0
    for name, new, base in full:
        held |= _encoded(name, new, base)
        if sum(t.nbytes for t in held.values()) >= _FILE_BYTES:
            files, held = files + 1, _saved(held, directory / _DELTAS.replace("*", f"{files + 1:05d}"))
    if held:
        _saved(held, directory / _DELTAS.replace("*", f"{files + 1:05d}"))
    if adapters := {name: tensor.detach().contiguous() for name, tensor in beside}:
        _saved(adapters, directory / ADAPTER_FILE)


@torch.no_grad()
def read_delta(adapted: AdaptedModel, directory: Path) -> None:
    """Set the trained parameters of a model that is otherwise the base model to what `write_delta` wrote.

    Raises `ValueError` if the files are damaged, or have other tensors than the model trains, or of other shapes.
    """
    trained, seen = adapted.trained, set()
    for path in [*sorted(directory.glob(_DELTAS)), directory / ADAPTER_FILE]:
        try:
            for name, parts in _tensors(path):
                if name not in trained:
                    raise ValueError(f"{path} is not of this plan: it has {name}, which the model does not train")
                _set(trained[name], parts, f"{path}: {name}")
                seen.add(name)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path} cannot be read: {error}") from None
    if absent := sorted(trained.keys() - seen):
        raise ValueError(f"{directory} is not of this plan: it has no {absent[0]}")


def _encoded(name: str, new: Tensor, base: Tensor) -> dict[str, Tensor]:
    """Compared as integers: -0.0 differs from 0.0."""
    new = new.detach().float().contiguous()
    changed = (new.view(torch.int32) != base.detach().float().contiguous().view(torch.int32)).flatten()
    kind = torch.int32 if new.numel() <= torch.iinfo(torch.int32).max else torch.int64
    if int(changed.sum()) * (new.element_size() + kind.itemsize) >= new.nbytes:
        return {name: new}
    indices = changed.nonzero()[:, 0]
    return {name + _INDICES: indices.to(kind), name + _VALUES: new.flatten()[indices]}


def _saved(held: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    safetensors.torch.save_file(held, path, metadata={"format": "pt"})
    return {}


def _tensors(path: Path) -> Iterator[tuple[str, tuple[Tensor, ...]]]:
    """By parameter, the whole tensor, or indices and values."""
    if not path.is_file():
        return
    with safe_open(path, "pt") as file:
        for key in file.keys():  # noqa: SIM118
            if key.endswith(_INDICES):
                name = key.removesuffix(_INDICES)
                yield name, (file.get_tensor(key), file.get_tensor(name + _VALUES))
            elif not key.endswith(_VALUES):
                yield key, (file.get_tensor(key),)


def _set(parameter: Tensor, parts: tuple[Tensor, ...], where: str) -> None:
    if len(parts) == 1:
        if parts[0].shape != parameter.shape:
            raise ValueError(f"{where} has shape {tuple(parts[0].shape)}, the model's {tuple(parameter.shape)}")
        parameter.copy_(parts[0])
        return
    indices, values = parts
    if indices.ndim != 1 or indices.shape != values.shape or indices.is_floating_point():
        raise ValueError(f"{where} has indices {tuple(indices.shape)} and values {tuple(values.shape)}")
    if len(indices) and not (int(indices.min()) >= 0 and int(indices.max()) < parameter.numel()):
        raise ValueError(f"{where} has elements that the model's, of shape {tuple(parameter.shape)}, has not")
    parameter.view(-1)[indices.long().to(parameter.device)] = values.to(parameter)
