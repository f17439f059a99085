"""Calling a reward plugin. Runs in a reward process, never in the trainer's.

A plugin is a function, or a class whose instances are called (`setup` first, `close` at the end, if it has them), or a
function with none of the parameters that mark a reward (`_MARKS`), which makes one of the arguments. How a reward is
called follows from its parameters, as in TRL: `completions` gets a list and returns a list; `completion` gets one and
returns one.

A reward of lists may have an attribute `independent`: `True` if it may be given its completions one at a time, `False`
if its scores mean something only among all completions of a prompt. Without one, it gets them one at a time after it
failed on them together.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import json
import math
import numbers
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, get_type_hints

from pydantic import PydanticSchemaGenerationError, TypeAdapter, ValidationError

from hybrid_rl.plugins.resolve import accepted, load_plugin, missing, named_parameters, takes_all, wait
from hybrid_rl.plugins.worker import at_end, reason
from hybrid_rl.types import FAILURES

ENTRY_POINTS = "hybrid_rl.rewards"
"""Group under which installed packages offer rewards."""
LISTS = ("completions", "prompts", "completion_ids", "finish_reason", "log_extra", "log_metric")
"""What every reward can take besides the columns: with `completion`, the single `completion`, `prompt` and so on."""
_LARGE = 1 << 63
_OWN_METRICS = ("mean", "not_applicable", *FAILURES)
_SINGLE = {"completions": "completion", "prompts": "prompt"}
_MARKS = {"completions", "completion", "completion_ids", "prompts", "finish_reason"}
"""Parameters that tell a reward from a function that makes one."""


@dataclass(frozen=True)
class _Reward:
    """A plugin ready to be called."""

    function: Callable[..., Any]
    arguments: Mapping[str, Any]
    """That its every call gets."""
    single: bool
    """Whether it takes one completion, not a list."""
    independent: bool | None
    """Whether a list may as well be given piece by piece: `None` where only a failure is reason to."""
    asynchronous: bool


def check(plugin: str, arguments: str, given: Collection[str]) -> Iterator[dict[str, Any]]:
    """Make a plugin ready for calls. Yields `missing`, the parameters that it wants and is not given; `piecewise`,
    whether it answers completion by completion; `single`, whether it takes one; `whole`, whether it must have them all
    at once; `parameters`, its own, and whether it needs each; `takes`, those of them that are no arguments, `None`
    where it takes whatever there is; and `settings`, its arguments with their defaults, as text where JSON has no such
    type.

    Raises what loading it raises, and `TypeError` for arguments it does not take.
    """
    reward = _reward(plugin, arguments)
    lists = LISTS if not reward.single else [_SINGLE.get(name, name) for name in LISTS]
    parameters = named_parameters(reward.function)
    yield {
        "missing": missing(reward.function, [*lists, *given, *reward.arguments]),
        "piecewise": (reward.single and not reward.asynchronous) or bool(reward.independent),
        "single": reward.single,
        "whole": not reward.single and reward.independent is False,
        "parameters": parameters,
        "takes": None if takes_all(reward.function) else [n for n in parameters if n not in reward.arguments],
        "settings": _settings(plugin, json.loads(arguments)),
    }


def score(plugin: str, arguments: str, group: Mapping[str, Sequence[Any]], seconds: float) -> Iterator[dict[str, Any]]:
    """Score the completions of one prompt. `group` has lists of the same length: `completions`, `prompts`,
    `completion_ids`, `finish_reason` and the columns, as far as the plugin takes them.

    Yields one object a completion, in order: `score`, `error` or `timeout`, and what was logged. Where the plugin
    returns no list of as many scores as completions, that is the error of each.
    """
    reward = _reward(plugin, arguments)
    size = len(group["completions"])
    if reward.single and reward.asynchronous:
        yield from _at_once(reward, group, seconds)
    elif reward.single or reward.independent:
        for i in range(size):
            yield _one(reward, {name: values[i : i + 1] for name, values in group.items()})
    else:
        notes = _Notes(size)
        result = _finished(_call(reward, _listed(group) | notes.loggers()))
        for i, value in enumerate(_scores(result, size)):
            yield {**value, **notes.of(i)}


def _one(reward: _Reward, group: Mapping[str, Sequence[Any]]) -> dict[str, Any]:
    """One completion by itself; an exception of the plugin is its outcome."""
    notes = _Notes(1)
    try:
        if reward.single:
            result = [_finished(_call(reward, _singled(group) | notes.loggers()))]
        else:
            result = _finished(_call(reward, _listed(group) | notes.loggers()))
        return {**_scores(result, 1)[0], **notes.of(0)}
    except BaseException as error:
        return {"error": reason(error), **notes.of(0)}


def _at_once(reward: _Reward, group: Mapping[str, Sequence[Any]], seconds: float) -> Iterator[dict[str, Any]]:
    """All completions of an asynchronous reward beside each other, each with its own limit of time."""

    async def one(i: int) -> dict[str, Any]:
        notes = _Notes(1)
        single = {name: values[i : i + 1] for name, values in group.items()}
        limit = asyncio.timeout(seconds)
        try:
            async with limit:
                result = await _call(reward, _singled(single) | notes.loggers())
            return {**_scores([result], 1)[0], **notes.of(0)}
        except BaseException as error:  # one that gets out of a task stops the loop for all
            # A plugin's own TimeoutError is an error like others.
            return {**({"timeout": True} if limit.expired() else {"error": reason(error)}), **notes.of(0)}

    async def all_of() -> list[dict[str, Any]]:
        return list(await asyncio.gather(*(one(i) for i in range(len(group["completions"])))))

    yield from _loop().run_until_complete(all_of())


def _singled(group: Mapping[str, Sequence[Any]]) -> dict[str, Any]:
    # A column `prompt` is the prompt itself, as the policy saw it.
    return {_SINGLE.get(name, name): values[0] for name, values in group.items()}


def _listed(group: Mapping[str, Sequence[Any]]) -> dict[str, Any]:
    given = {name: list(values) for name, values in group.items()}
    return {**given, "prompt": given["prompts"]} if "prompts" in given else given


def _call(reward: _Reward, given: Mapping[str, Any]) -> Any:
    return reward.function(**accepted(reward.function, {**given, **reward.arguments}))


def _finished(result: Any) -> Any:
    return _loop().run_until_complete(wait(result)) if inspect.isawaitable(result) else result


@lru_cache(maxsize=1)
def _loop() -> asyncio.AbstractEventLoop:
    """One loop for the worker's life: connections that a plugin keeps belong to the loop that opened them."""
    loop = asyncio.new_event_loop()
    asyncio.set_event_loop(loop)
    return loop


def _scores(found: Any, size: int) -> list[dict[str, Any]]:
    """`score` or `error` of each completion."""
    values = found.tolist() if hasattr(found, "tolist") else found
    if not isinstance(values, list | tuple):
        return [{"error": f"ValueError: it returned {type(found).__name__}, no list of scores"}] * size
    if len(values) != size:
        return [{"error": f"ValueError: it returned {len(values)} scores for {size} completions"}] * size
    return [_score(value) for value in values]


def _score(value: Any) -> dict[str, Any]:
    try:
        return {"score": None if value is None else _number(value)}
    except Exception as error:
        return {"error": reason(error)}


def _number(value: Any) -> float:
    if not isinstance(value, numbers.Real) and not hasattr(value, "__float__"):
        raise ValueError(f"it returned {type(value).__name__} where a number or None is due")
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(f"it returned a number that is not finite: {number}")
    return number


class _Notes:
    """What a plugin logs of the completions of one call."""

    _LONGEST = 2000

    def __init__(self, size: int) -> None:
        self._size = size
        self._extra: dict[str, list[Any]] = {}
        self._metrics: dict[str, float] = {}

    def loggers(self) -> dict[str, Any]:
        return {"log_extra": self._log_extra, "log_metric": self._log_metric}

    def of(self, i: int) -> dict[str, Any]:
        return {"extra": {name: values[i] for name, values in self._extra.items()}, "metrics": self._metrics}

    def _log_extra(self, column: str, values: Any) -> None:
        # A reward of single completions logs its value, TRL's lists them.
        values = values.tolist() if hasattr(values, "tolist") else values
        listed = list(values) if isinstance(values, list | tuple) else [values]
        if len(listed) != self._size:
            raise ValueError(f"log_extra({column!r}) was given {len(listed)} values for {self._size} completions")
        self._extra[self._text(column)] = [self._short(value) for value in listed]

    def _log_metric(self, name: str, value: Any) -> None:
        if name in _OWN_METRICS:
            raise ValueError(f"log_metric({name!r}): the run itself measures that; choose another name")
        self._metrics[self._text(name)] = _number(value)

    def _short(self, value: Any) -> Any:
        if value is None or (isinstance(value, float) and math.isfinite(value)):
            return value
        if isinstance(value, int):  # Python writes no decimal number of many thousand digits
            return value if -_LARGE <= value < _LARGE else self._text(hex(value))
        return self._text(value)

    def _text(self, value: Any) -> str:
        """As any file can hold it."""
        return str(value)[: self._LONGEST].encode(errors="replace").decode()


@lru_cache(maxsize=256)
def _reward(plugin: str, arguments: str) -> _Reward:
    """`arguments` is JSON. A class is instantiated and set up once a process."""
    found, given = load_plugin(plugin, ENTRY_POINTS), json.loads(arguments)
    if inspect.isclass(found):
        _refuse_unknown(found, given)
        made: Any = found(**given)
        function, given = made, {}
        if hasattr(made, "setup"):
            _finished(made.setup())
        if hasattr(made, "close"):
            at_end(lambda: _finished(made.close()))
        if not callable(function):
            raise TypeError(f"instances of {plugin} cannot be called; it needs __call__")
    elif _is_maker(found):
        _refuse_unknown(found, given)
        function, given = found(**given), {}
        if not callable(function):
            raise TypeError(f"{plugin} takes no completions, and what it returns cannot be called")
    else:
        _refuse_unknown(found, given)
        function = found
    independent = getattr(function, "independent", None)
    single = "completion" in inspect.signature(function).parameters
    asynchronous = inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)
    return _Reward(function, given, single, independent, asynchronous)


def _settings(plugin: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    parameters = inspect.signature(load_plugin(plugin, ENTRY_POINTS)).parameters.values()
    told = (*LISTS, *_SINGLE.values())
    defaults = {
        p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty and p.name not in told
    }
    return json.loads(json.dumps({**defaults, **arguments}, default=str))


def _is_maker(function: Callable[..., Any]) -> bool:
    parameters = inspect.signature(function).parameters.values()
    several = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters)
    return not several and not _MARKS & {p.name for p in parameters}


def _refuse_unknown(function: Callable[..., Any], arguments: Mapping[str, Any]) -> None:
    """`**columns` would swallow a misspelt argument."""
    known = named_parameters(function)
    for name in arguments:
        if name not in known or name in (*LISTS, *_SINGLE.values()):
            settable = [n for n in known if n not in (*LISTS, *_SINGLE.values())]
            raise TypeError(f"it takes no argument {name!r}; it has {', '.join(settable) or 'none'}")
    hints: dict[str, Any] = {}
    with contextlib.suppress(Exception):  # names that only a type checker knows
        hints = get_type_hints(function.__init__ if inspect.isclass(function) else function)
    for name, value in arguments.items():
        if name in hints:
            _refuse_unfit(name, value, hints[name])


def _refuse_unfit(name: str, value: Any, hint: Any) -> None:
    """An argument that its annotation does not allow is refused before the run, not at the first call."""
    try:
        TypeAdapter(hint).validate_python(value)
    except ValidationError as error:
        raise TypeError(f"argument {name}={value!r}: {error.errors()[0]['msg']}") from None
    except PydanticSchemaGenerationError:  # of no type that can be checked
        return
