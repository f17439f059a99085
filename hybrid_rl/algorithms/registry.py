"""Functions by name: registered ones, ones that installed packages offer, and `module:function`."""

from __future__ import annotations

import difflib
import importlib
import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from typing import Any, Generic, TypeVar

from hybrid_rl.settings import ConfigError

F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True)
class Registry(Generic[F]):
    """What one setting may name."""

    setting: str
    group: str
    """Entry point group under which installed packages offer more."""
    parameters: tuple[str, ...]
    """What the functions are called with, by position."""
    _functions: dict[str, F] = field(default_factory=dict)

    def register(self, name: str) -> Callable[[F], F]:
        """Decorator that makes a function available as `name`. Raises `ValueError` if another one has the name."""

        def register(function: F) -> F:
            if self._functions.setdefault(name, function) is not function:
                raise ValueError(f"{self.setting}={name} is another function already")
            return function

        return register

    def find(self, name: str) -> F:
        """The function called `name`. Raises `ConfigError` if there is none, or if it takes other parameters."""
        function = self._functions[name] if name in self._functions else self._load(name)
        try:
            inspect.signature(function).bind(*self.parameters)
        except (TypeError, ValueError):  # no function, other parameters, or one in C that does not tell them
            raise ConfigError(f"{self.setting}={name!r} is no function of ({', '.join(self.parameters)})") from None
        return function

    def _load(self, name: str) -> F:
        offered = {e.name: e.value for e in entry_points(group=self.group)}
        module, colon, attribute = offered.get(name, name).partition(":")
        if not colon:
            known = [*self._functions, *sorted(offered.keys() - self._functions.keys())]
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {close[0]}?" if close else "."
            raise ConfigError(f"{self.setting}={name!r} is unknown{hint} Use {', '.join(known)}, or module:function")
        if module.endswith(".py"):
            raise ConfigError(f"{self.setting}={name!r} names a file; write module:function, without .py")
        if "" not in sys.path:  # a console script does not look where it is run
            sys.path.insert(0, "")
        try:
            return getattr(importlib.import_module(module), attribute)
        except Exception as error:  # a user's module may raise anything
            raise ConfigError(f"{self.setting}={name!r} cannot be loaded: {type(error).__name__}: {error}") from error
