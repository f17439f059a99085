"""What workers run for an environment: a function that answers a transcript."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

from hybrid_rl.plugins.resolve import call, load_plugin, missing


def needs(spec: str, given: Collection[str]) -> Iterator[list[str]]:
    """Parameters that the function wants and is not given."""
    yield missing(load_plugin(spec), given)


def respond(spec: str, arguments: Mapping[str, Any]) -> Iterator[str | None]:
    """The text that the function answers; `None` where the episode is over."""
    found = call(spec, arguments)
    if found is not None and not isinstance(found, str):
        raise TypeError(f"it returned {type(found).__name__}, neither text nor None")
    yield found
