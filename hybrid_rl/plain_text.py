"""Text for people: from a model or a file, made so that nothing in it acts on what shows it; and spans of time."""

from __future__ import annotations

import re

_ACTING = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f"  # control characters but tab and newline: escape sequences of terminals
    "\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff"  # what hides text or turns its direction
    "\ud800-\udfff]"  # halves of characters, which no file can hold
)


def visible(text: str, limit: int | None = None) -> str:
    """`text` with control characters, direction marks and the like spelt out (`\\x1b`), cut after `limit` characters.
    Markup is left as it is: escaping it is up to what shows it."""
    cut = text if limit is None else text[:limit]
    shown = _ACTING.sub(_spelt, cut)
    return shown + (f" … ({len(text) - len(cut):,} more characters)" if len(cut) < len(text) else "")


def span(seconds: float) -> str:
    """`2 h 05 min`, `3 min 07 s` or `12 s`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def _spelt(found: re.Match[str]) -> str:
    code = ord(found[0])
    return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}"
