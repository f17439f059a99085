"""Finding and calling a reward plugin. Runs in a reward process, never in the trainer's."""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import importlib.util
import inspect
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

RewardFunction = Callable[..., Any]
_loaded: dict[str, RewardFunction] = {}


def load_plugin(spec: str) -> RewardFunction:
    """The function that `module:function` or `path/to/file.py:function` names."""
    if spec not in _loaded:
        source, _, name = spec.rpartition(":")
        if not source:
            raise ValueError(f"{spec!r} is not of the form module:function or path/to/file.py:function")
        module = _load_file(Path(source)) if source.endswith(".py") else importlib.import_module(source)
        function = getattr(module, name, None)
        if not callable(function):
            raise ValueError(f"{source} has no function {name!r}")
        _loaded[spec] = function
    return _loaded[spec]


def preload(specs: Sequence[str]) -> None:
    """Load plugins ahead of their first call. One that cannot be loaded says so when it is called."""
    for spec in specs:
        with contextlib.suppress(Exception):
            load_plugin(spec)


def _load_file(path: Path) -> Any:
    name = f"hybrid_rl_user_reward_{path.stem}"
    module_spec = importlib.util.spec_from_file_location(name, path)
    if module_spec is None or module_spec.loader is None or not path.is_file():
        raise FileNotFoundError(f"reward file {path} does not exist")
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[name] = module
    module_spec.loader.exec_module(module)
    return module


def missing_columns(spec: str, available: Sequence[str]) -> list[str]:
    """Parameters without a default that the plugin wants and the data does not have."""
    wanted = inspect.signature(load_plugin(spec)).parameters.values()
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    required = [p.name for p in wanted if p.kind in named and p.default is inspect.Parameter.empty]
    return [name for name in required if name not in {"completions", "prompts", *available}]


def call_plugin(
    spec: str, prompts: Sequence[Any], completions: Sequence[Any], columns: Mapping[str, Sequence[Any]]
) -> list[float | None]:
    """Score completions. TRL's convention: keyword arguments, one list each; `None` means not applicable.

    Raises `ValueError` if the plugin returns another number of scores than completions, or a score that is not finite.
    """
    function = load_plugin(spec)
    parameters = inspect.signature(function).parameters
    arguments = {"prompts": list(prompts), **{name: list(values) for name, values in columns.items()}}
    if not any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        arguments = {name: values for name, values in arguments.items() if name in parameters}
    scores = function(completions=list(completions), **arguments)
    if inspect.isawaitable(scores):
        scores = asyncio.run(_wait(scores))
    scores = [None if score is None else float(score) for score in scores]
    if len(scores) != len(completions):
        raise ValueError(f"{spec} returned {len(scores)} scores for {len(completions)} completions")
    if any(score is not None and not math.isfinite(score) for score in scores):
        raise ValueError(f"{spec} returned a score that is not finite")
    return scores


async def _wait(awaitable: Any) -> Any:
    return await awaitable
