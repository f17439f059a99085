"""Users' functions (rewards, environments) in processes of their own, which may hang, crash or raise.

A plugin is `module:function` or `path/to/file.py:function`, called with keyword arguments of which it takes those it
names. Nothing of it is ever loaded in the calling process.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import importlib.util
import inspect
import logging
import multiprocessing
import sys
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pebble import ProcessExpired, ProcessPool

from hybrid_rl.settings import ConfigError

logger = logging.getLogger(__name__)
START_SECONDS = 120.0
"""Longest that importing a plugin may take."""
GIVE_UP_AFTER = 8
"""Failures in a row after which a plugin that has not answered at all is taken for broken."""

Plugin = Callable[..., Any]
_loaded: dict[str, Plugin] = {}


@dataclass(frozen=True)
class Failure:
    """Why a call has no result."""

    kind: str
    """`timeout`, `error` or `crash`."""
    detail: str


class PluginProcesses:
    """Worker processes that call plugins, each call with a time limit."""

    def __init__(self, specs: Sequence[str], *, workers: int, timeout: float) -> None:
        """`timeout`: seconds a call may take, `reward.timeout`."""
        self._specs, self._workers, self._timeout = list(specs), workers, timeout
        self._starting = threading.Lock()  # an asynchronous run scores in a thread
        self._closed = False
        self._pool = self._start()

    def check(self, spec: str, given: Collection[str], *, setting: str) -> None:
        """Import a plugin, in a worker. Raises `ConfigError` if it cannot be, or has a parameter without a default that
        is not among what is `given`."""
        try:
            missing = self._pool.schedule(missing_parameters, args=(spec, list(given)), timeout=START_SECONDS).result()
        except (Exception, ProcessExpired) as error:
            raise ConfigError(f"{setting}: plugin {spec!r} cannot be loaded: {error}") from None
        if missing:
            raise ConfigError(
                f"{setting}: plugin {spec!r} needs the column {missing[0]!r}; the data has {sorted(given)}. "
                "Map one to it with data.columns"
            )

    def schedule(self, function: Callable[..., Any], *arguments: Any) -> Future[Any]:
        """Call `function` in a worker; its arguments and result are pickled."""
        with self._starting:
            if self._closed:
                raise RuntimeError("the plugin processes were stopped")
            try:
                return self._pool.schedule(function, args=arguments, timeout=self._timeout)
            except RuntimeError:  # the pool broke: an idle worker was killed from outside
                logger.warning("the plugin processes died while idle; starting new ones")
                self._stop()
                self._pool = self._start()
                return self._pool.schedule(function, args=arguments, timeout=self._timeout)

    def outcome(self, spec: str, future: Future[Any]) -> Any:
        """Wait for the result of a call of `spec`, or a `Failure`."""
        try:
            return future.result()
        except FutureTimeout:
            return Failure("timeout", f"{spec} took more than reward.timeout={self._timeout:g} s")
        except ProcessExpired as crash:
            return Failure("crash", f"the process of {spec} ended with status {crash.exitcode}")
        except Exception as error:  # whatever the user's code raises
            return Failure("error", f"{spec} raised {type(error).__name__}: {error}")

    def close(self) -> None:
        """Calls under way end as failed; none can be begun any more."""
        with self._starting:
            self._closed = True
            self._stop()

    def _stop(self) -> None:
        self._pool.stop()
        self._pool.join()

    def _start(self) -> ProcessPool:
        """Workers import the plugins before they take work, so that no call's time limit pays for it."""
        return ProcessPool(
            max_workers=self._workers,
            initializer=preload,
            initargs=(self._specs,),
            # Not fork: the driver has threads, and a plugin must not see its memory.
            context=multiprocessing.get_context("spawn"),
        )


def call(spec: str, arguments: Mapping[str, Any]) -> Any:
    """Call a plugin with those of the arguments that it takes; one that is asynchronous is waited for. In a worker."""
    function = load_plugin(spec)
    parameters = inspect.signature(function).parameters
    if not any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        arguments = {name: value for name, value in arguments.items() if name in parameters}
    result = function(**arguments)
    return asyncio.run(_wait(result)) if inspect.isawaitable(result) else result


def load_plugin(spec: str) -> Plugin:
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


def missing_parameters(spec: str, given: Collection[str]) -> list[str]:
    """Parameters without a default that the plugin wants and is not given."""
    wanted = inspect.signature(load_plugin(spec)).parameters.values()
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    required = [p.name for p in wanted if p.kind in named and p.default is inspect.Parameter.empty]
    return [name for name in required if name not in given]


def _load_file(path: Path) -> Any:
    name = f"hybrid_rl_user_{path.stem}"
    module_spec = importlib.util.spec_from_file_location(name, path)
    if module_spec is None or module_spec.loader is None or not path.is_file():
        raise FileNotFoundError(f"file {path} does not exist")
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[name] = module
    module_spec.loader.exec_module(module)
    return module


async def _wait(awaitable: Any) -> Any:
    return await awaitable
