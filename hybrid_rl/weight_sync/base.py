"""The base model's own files: what a matrix was before anything was trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor
from transformers.utils.hub import cached_file

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"


class BaseFiles:
    """Tensors of a checkpoint in safetensors files by name; read when asked for, from mapped memory, never kept."""

    def __init__(self, model_path: str) -> None:
        self._model_path = model_path
        self._files: dict[str, str] = {}
        index = self._file(_INDEX)
        if index is not None:
            names = json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"]
            paths = {file: self._file(file) for file in set(names.values())}
            self._files = {name: paths[file] or "" for name, file in names.items()}
        elif (single := self._file(_SINGLE)) is not None:
            with safe_open(single, "pt") as opened:
                self._files = dict.fromkeys(opened.keys(), single)
        self._open: dict[str, Any] = {}

    def by_file(self) -> dict[Path, list[str]]:
        """Names in the files, by the file that they are in; empty where there are no safetensors files."""
        names: dict[Path, list[str]] = {}
        for name, path in self._files.items():
            names.setdefault(Path(path), []).append(name)
        return names

    def shape(self, name: str) -> tuple[int, ...]:
        """Raises `KeyError` if the files have no such tensor."""
        return tuple(self._slice(name).get_shape())

    def read(self, name: str) -> Tensor:
        """A tensor as it is in the files. Raises `KeyError` if they have none of that name."""
        return self._slice(name)[:]

    def _slice(self, name: str) -> Any:
        key = self.key(name)
        file = self._files[key]
        if file not in self._open:
            self._open[file] = safe_open(file, "pt").__enter__()
        return self._open[file].get_slice(key)

    def key(self, name: str) -> str:
        """The name in the files: of models that transformers loads as part of a larger one, with another prefix.

        Raises `KeyError` if they have none.
        """
        if name in self._files:
            return name
        tail = "." + name.removeprefix("model.")
        alike = [key for key in self._files if ("." + key).endswith(tail)]
        if len(alike) != 1:
            where = (
                f"safetensors files of {self._model_path}" if self._files else f"{self._model_path} (no safetensors)"
            )
            raise KeyError(f"{name} is not in the {where}")
        return alike[0]

    def _file(self, name: str) -> str | None:
        return cached_file(
            self._model_path,
            name,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
