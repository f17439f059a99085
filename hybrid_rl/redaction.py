"""Secrets of the environment stay out of what a run leaves behind: settings, rollouts, logs, reports, trackers.

Settings that hold secrets are refused (`yaml_reader.refuse_secrets`). One that reaches a prompt or a completion any
other way cannot be told from other text.
"""

from __future__ import annotations

import json
import os

_WORDS = frozenset({"key", "apikey", "token", "secret", "password", "passwd", "credential", "credentials"})
"""Of the names of variables whose values are secrets."""
_SHORTEST = 8
"""Characters of a value that is looked for; `true` or a path's first letters stand everywhere."""


def scrub(text: str) -> str:
    """`text` without the values of environment variables that are secrets, also where JSON escapes them."""
    secrets = {
        value: name
        for name, value in os.environ.items()
        if len(value) >= _SHORTEST and _WORDS & set(name.lower().split("_"))
    }
    for value in sorted(secrets, key=len, reverse=True):  # one may contain another
        for form in (value, json.dumps(value)[1:-1]):
            text = text.replace(form, f"({secrets[value]}, left out)")
    return text
