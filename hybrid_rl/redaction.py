"""Secrets of the environment stay out of what a run leaves behind: settings, rollouts, logs, reports, trackers.

Settings that hold secrets are refused (`yaml_reader.refuse_secrets`). One that reaches a prompt or a completion any
other way cannot be told from other text.
"""

from __future__ import annotations

import json
import mmap
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

_WORDS = frozenset({"key", "apikey", "token", "secret", "password", "passwd", "credential", "credentials"})
"""Of the names of variables whose values are secrets."""
_SHORTEST = 8
"""Characters of a value that is looked for; `true` or a path's first letters stand everywhere."""


def scrub(text: str) -> str:
    """`text` without the values of environment variables that are secrets, also where JSON escapes them."""
    return _scrub(text, _secrets())


def scrub_tree(tree: Any) -> Any:
    """The same of all text in a tree that is to be written as JSON or YAML, names included. Numbers stay what they are,
    also where a secret has the same digits; anything that JSON has no form for becomes text."""
    return _scrub_tree(tree, _secrets())


def json_lines(trees: Iterable[Any]) -> Iterator[str]:
    """Each tree as `scrub_tree` leaves it, as a line of JSON."""
    secrets = _secrets()
    forms = [form for value in secrets for form in (value, json.dumps(value)[1:-1])]
    for tree in trees:
        line = json.dumps(tree, default=_plain)
        # Most hold no secret, and walking through a tree takes longer than writing it.
        yield json.dumps(_scrub_tree(tree, secrets)) if any(form in line for form in forms) else line


def _plain(value: Any) -> Any:
    return dict(value) if isinstance(value, Mapping) else str(value)


def scrub_files(directory: Path) -> None:
    """The same of the logs in a directory, once nothing writes to them any more: what a worker, or a library in it,
    prints by itself goes to a file as it is."""
    values = [value.encode() for value in _secrets()]
    for path in directory.glob("*.log"):
        if path.stat().st_size:
            with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
                found = any(content.find(value) >= 0 for value in values)
            if found:
                aside = path.with_suffix(".scrubbed")
                with (
                    path.open(encoding="utf-8", errors="surrogateescape") as file,
                    aside.open("w", encoding="utf-8", errors="surrogateescape") as clean,
                ):
                    clean.writelines(map(scrub, file))
                aside.replace(path)


def _scrub(text: str, secrets: Mapping[str, str]) -> str:
    for value, name in secrets.items():
        for form in (value, json.dumps(value)[1:-1]):
            text = text.replace(form, f"({name}, left out)")
    return text


def _scrub_tree(tree: Any, secrets: Mapping[str, str]) -> Any:
    if tree is None or isinstance(tree, int | float):
        return tree
    if isinstance(tree, Mapping):
        return {_scrub_tree(name, secrets): _scrub_tree(value, secrets) for name, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [_scrub_tree(value, secrets) for value in tree]
    return _scrub(str(tree), secrets)


def _secrets() -> dict[str, str]:
    """Value -> the variable that has it; the longest first, since one may contain another."""
    found = {
        value: name
        for name, value in os.environ.items()
        if len(value) >= _SHORTEST and _WORDS & set(name.lower().split("_"))
    }
    return dict(sorted(found.items(), key=lambda item: -len(item[0])))
