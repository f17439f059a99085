"""What a setting may name: registered entries, ones that installed packages offer, and `module:attribute`."""

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

T = TypeVar("T")


@dataclass(frozen=True)
class Registry(Generic[T]):
    """The entries of one setting: functions, or what is made of them."""

    setting: str
    group: str
    """Entry point group under which installed packages offer more."""
    parameters: tuple[str, ...]
    """What the functions are called with, by position."""
    _entries: dict[str, T] = field(default_factory=dict)

    def register(self, name: str) -> Callable[[T], T]:
        """Decorator that makes an entry available as `name`. Raises `ValueError` if another one has the name."""

        def register(entry: T) -> T:
            if self._entries.setdefault(name, entry) != entry:
                raise ValueError(f"{self.setting}={name} is another function already")
            return entry

        return register

    def names(self) -> list[str]:
        """Every name that the setting accepts, without the dotted ones."""
        return [*self._entries, *sorted(self._offered().keys() - self._entries.keys())]

    def find(self, name: str) -> T:
        """The function called `name`. Raises `ConfigError` if there is none, or if it takes other parameters."""
        return self.check(name, self.look_up(name))

    def look_up(self, name: str) -> Any:
        """Whatever is called `name`. Raises `ConfigError` naming the nearest one if there is nothing."""
        if name in self._entries:
            return self._entries[name]
        module, colon, attribute = self._offered().get(name, name).partition(":")
        if not colon:
            close = difflib.get_close_matches(name, self.names(), n=1)
            hint = f"; did you mean {close[0]}?" if close else "."
            known = ", ".join(self.names())
            raise ConfigError(f"{self.setting}={name!r} is unknown{hint} Use {known}, or module:function")
        if module.endswith(".py"):
            raise ConfigError(f"{self.setting}={name!r} names a file; write module:function, without .py")
        if "" not in sys.path:  # a console script does not look where it is run
            sys.path.insert(0, "")
        try:
            return getattr(importlib.import_module(module), attribute)
        except Exception as error:  # a user's module may raise anything
            raise ConfigError(f"{self.setting}={name!r} cannot be loaded: {type(error).__name__}: {error}") from error

    def check(self, name: str, function: Any) -> Any:
        """`function`, or a `ConfigError` if it cannot be called with the parameters."""
        try:
            inspect.signature(function).bind(*self.parameters)
        except (TypeError, ValueError):  # no function, other parameters, or one in C that does not tell them
            raise ConfigError(f"{self.setting}={name!r} is no function of ({', '.join(self.parameters)})") from None
        return function

    def _offered(self) -> dict[str, str]:
        return {e.name: e.value for e in entry_points(group=self.group)}
