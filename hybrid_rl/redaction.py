"""What looks like a secret stays out of what a run leaves behind: settings, rollouts, logs, reports.

Settings are judged by their names and as URLs, the environment by its variables' names. A secret that a user gives any
other way, inside a prompt for instance, cannot be told from other text.
"""

from __future__ import annotations

import json
import os
import re
from typing import Any

from hybrid_rl.settings import ConfigError

LEFT_OUT = "(secret, left out)"

_VARIABLE_WORDS = frozenset({"key", "apikey", "token", "secret", "password", "passwd", "credential", "credentials"})
_SETTING = re.compile(
    r"(.*_)?(api_?key|access_key|secret_key|private_key|(access|auth|api|hf|bearer|refresh)_token|token|secret|"
    r"password|passwd|credentials?|authorization)",
    re.IGNORECASE,
)
_KNOWN_SHAPES = re.compile(r"\b(sk-[\w-]{20,}|hf_\w{20,}|gh[pousr]_\w{20,}|xox[abp]-[\w-]{10,}|AKIA[0-9A-Z]{16})")
_URL_PASSWORD = re.compile(r"(?<=://)([^\s/@:]*):([^\s/@]+)@")
_SHORTEST = 8
"""Characters of a variable's value that is looked for; `true` or a path's first letters stand everywhere."""


def scrub(text: str) -> str:
    """`text` without the values of environment variables that are secrets, also where JSON escapes them."""
    for value, name in _environment().items():
        for form in (value, json.dumps(value)[1:-1]):
            text = text.replace(form, f"({name}, left out)")
    return text


def redacted(settings: Any) -> Any:
    """A tree of settings without its secrets: of values under a name such as `api_key`, passwords in URLs, keys of a
    well-known shape, and what `scrub` removes."""
    if isinstance(settings, dict):
        return {k: LEFT_OUT if _is_secret(k, v) else redacted(v) for k, v in settings.items()}
    if isinstance(settings, list | tuple):
        return [redacted(value) for value in settings]
    if isinstance(settings, str):
        return _KNOWN_SHAPES.sub(LEFT_OUT, _URL_PASSWORD.sub(rf"\1:{LEFT_OUT}@", scrub(settings)))
    return settings


def check_complete(settings: Any, where: str = "") -> None:
    """Refuse settings that were written without their secrets, where those would be used."""
    if isinstance(settings, dict):
        for name, value in settings.items():
            check_complete(value, f"{where}.{name}" if where else str(name))
    elif isinstance(settings, list | tuple):
        for i, value in enumerate(settings):
            check_complete(value, f"{where}.{i}")
    elif isinstance(settings, str) and (LEFT_OUT in settings or re.search(r"\(\w+, left out\)", settings)):
        raise ConfigError(
            f"{where}={settings!r}: a secret was left out when these settings were written down; give {where} again on "
            "the command line, or have what reads it take an environment variable"
        )


def _is_secret(name: Any, value: Any) -> bool:
    return isinstance(name, str) and isinstance(value, str) and bool(value) and _SETTING.fullmatch(name) is not None


def _environment() -> dict[str, str]:
    """Secret value -> the variable that has it; the longest first, since one may contain another."""
    found = {
        value: name
        for name, value in os.environ.items()
        if len(value) >= _SHORTEST and _VARIABLE_WORDS & set(name.lower().split("_"))
    }
    return dict(sorted(found.items(), key=lambda item: -len(item[0])))
