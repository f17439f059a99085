"""Trained weights in a file, as they are trained: fp32, by their own names, before anything is folded or merged."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from hybrid_rl.adaptation.apply import AdaptedModel
from hybrid_rl.adaptation.delta import read_delta
from hybrid_rl.adaptation.peft_files import PEFT_CONFIG, read_peft

WEIGHTS = "weights.safetensors"
"""Name of the file in a checkpoint."""


def write_weights(tensors: Iterable[tuple[str, Tensor]], path: Path) -> None:
    """Write named tensors, in fp32."""
    held = {name: tensor.detach().to("cpu", torch.float32, copy=True).contiguous() for name, tensor in tensors}
    safetensors.torch.save_file(held, path, metadata={"format": "pt"})


@torch.no_grad()
def read_weights(adapted: AdaptedModel, path: Path) -> None:
    """Set the trained parameters to what `write_weights` wrote of them.

    Raises `ValueError` if the file has other tensors than the model trains, or of other shapes.
    """
    trained = adapted.trained
    with safetensors.safe_open(path, "pt") as file:
        names = set(file.keys())
        if names != trained.keys():
            raise ValueError(f"{path} is not of this plan: {sorted(names ^ trained.keys())[0]} is in one of them alone")
        for name, parameter in trained.items():
            tensor = file.get_tensor(name)
            if tensor.shape != parameter.shape:
                raise ValueError(
                    f"{path}: {name} has shape {tuple(tensor.shape)}, the model's {tuple(parameter.shape)}"
                )
            parameter.copy_(tensor)


def read_start(adapted: AdaptedModel, directory: Path) -> None:
    """Set the trained parameters of a model that is otherwise the base model to those of an export or PEFT directory.

    Raises `ValueError` if it has others than the model trains.
    """
    (read_peft if (directory / PEFT_CONFIG).is_file() else read_delta)(adapted, directory)
