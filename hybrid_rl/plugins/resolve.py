"""What a plugin's name means, and how a function is called by the names of its parameters."""

from __future__ import annotations

import asyncio
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterable, Mapping
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

_loaded: dict[str, Callable[..., Any]] = {}


def load_plugin(spec: str, group: str | None = None) -> Callable[..., Any]:
    """What `module:name`, `path/to/file.py:name`, or an entry point of `group` names. Raises `ValueError` if that is
    nothing that can be called, or whatever importing it raises."""
    if spec not in _loaded:
        source, _, name = _full_name(spec, group).rpartition(":")
        module = _load_file(Path(source)) if source.endswith(".py") else importlib.import_module(source)
        function = getattr(module, name, None)
        if not callable(function):
            raise ValueError(f"{source} has no function {name!r}")
        _loaded[spec] = function
    return _loaded[spec]


def call(spec: str, arguments: Mapping[str, Any]) -> Any:
    """Call a plugin with those of the arguments that it takes; one that is asynchronous is waited for."""
    function = load_plugin(spec)
    result = function(**accepted(function, arguments))
    return asyncio.run(wait(result)) if inspect.isawaitable(result) else result


def accepted(function: Callable[..., Any], arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the arguments that a function takes by name."""
    if takes_all(function):
        return dict(arguments)
    parameters = inspect.signature(function).parameters
    return {name: value for name, value in arguments.items() if name in parameters}


def takes_all(function: Callable[..., Any]) -> bool:
    """Whether a function takes arguments of any name."""
    return any(p.kind is inspect.Parameter.VAR_KEYWORD for p in inspect.signature(function).parameters.values())


def named_parameters(function: Callable[..., Any]) -> dict[str, bool]:
    """Names that a function can be given arguments by -> whether it needs one."""
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    parameters = inspect.signature(function).parameters.values()
    return {p.name: p.default is inspect.Parameter.empty for p in parameters if p.kind in named}


def missing(function: Callable[..., Any], given: Iterable[str]) -> list[str]:
    """Parameters without a default that it wants and is not given."""
    return [name for name, needed in named_parameters(function).items() if needed and name not in set(given)]


def absolute(spec: str) -> str:
    """A plugin's name, with the path of its file made absolute: processes may be started elsewhere."""
    source, _, name = spec.rpartition(":")
    return f"{Path(source).resolve()}:{name}" if source.endswith(".py") else spec


def _full_name(spec: str, group: str | None) -> str:
    if ":" in spec:
        return spec
    offered = {e.name: e.value for e in entry_points(group=group)} if group is not None else {}
    if spec not in offered:
        known = f", which offer {', '.join(sorted(offered))}" if offered else ""
        packages = f", nor a name that installed packages offer as {group}{known}" if group is not None else ""
        raise ValueError(f"{spec!r} is not of the form module:function or path/to/file.py:function{packages}")
    return offered[spec]


def _load_file(path: Path) -> Any:
    name = f"hybrid_rl_user_{path.stem}"
    module_spec = importlib.util.spec_from_file_location(name, path)
    if module_spec is None or module_spec.loader is None or not path.is_file():
        raise FileNotFoundError(f"file {path} does not exist")
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[name] = module
    module_spec.loader.exec_module(module)
    return module


async def wait(awaitable: Any) -> Any:
    """Of anything that can be awaited, a coroutine."""
    return await awaitable
