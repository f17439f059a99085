"""Trained weights in a file, as they are trained: fp32, by their own names, before anything is folded or merged."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from hybrid_rl.adaptation.apply import AdaptedModel
from hybrid_rl.adaptation.delta import read_delta
from hybrid_rl.adaptation.peft_files import read_peft
from hybrid_rl.digests import digest

WEIGHTS = "weights.safetensors"
"""Name of the file in a checkpoint."""


@dataclass(frozen=True)
class Start:
    """Values that training starts from."""

    directory: str
    """Of an export, or of a PEFT adapter."""
    format: str
    """`delta` or `peft`."""
    digests: Mapping[str, str] = field(default_factory=dict)
    """Of the trained parameters as they come to be; empty of what was made elsewhere."""


def write_weights(tensors: Iterable[tuple[str, Tensor]], path: Path) -> None:
    """Write named tensors, in fp32."""
    held = {name: tensor.detach().to("cpu", torch.float32, copy=True).contiguous() for name, tensor in tensors}
    safetensors.torch.save_file(held, path, metadata={"format": "pt"})


@torch.no_grad()
def read_weights(adapted: AdaptedModel, path: Path) -> None:
    """Set the trained parameters to what `write_weights` wrote of them.

    Raises `ValueError` if the file is damaged, or has other tensors than the model trains, or of other shapes.
    """
    trained = adapted.trained
    try:
        with safetensors.safe_open(path, "pt") as file:
            names = set(file.keys())
            if names != trained.keys():
                other = sorted(names ^ trained.keys())[0]
                raise ValueError(f"{path} is not of this plan: {other} is in one of them alone")
            for name, parameter in trained.items():
                tensor = file.get_tensor(name)
                if tensor.shape != parameter.shape:
                    raise ValueError(
                        f"{path}: {name} has shape {tuple(tensor.shape)}, the model's {tuple(parameter.shape)}"
                    )
                parameter.copy_(tensor)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from None


def read_start(adapted: AdaptedModel, start: Start) -> None:
    """Set the trained parameters of a model that is otherwise the base model to those of `start`.

    Raises `ValueError` if it has others than the model trains, or they come out otherwise than it says.
    """
    (read_peft if start.format == "peft" else read_delta)(adapted, Path(start.directory))
    for name, parameter in adapted.trained.items() if start.digests else ():
        if digest(parameter) != start.digests.get(name):
            raise ValueError(f"{start.directory}: {name} does not come to what was exported; export it again")
