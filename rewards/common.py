"""What several rewards share. A user's reward may import it too."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

F = TypeVar("F", bound=Callable[..., Any])


def text_of(completion: Any) -> str:
    """A completion is text, or a list of chat messages whose last one counts."""
    return completion if isinstance(completion, str) else str(completion[-1]["content"])


def independent(function: F) -> F:
    """Mark a reward whose score of a completion does not depend on the others it is called with. It is then called with
    one at a time, so that one that hangs costs its own time limit and no other's score is computed twice."""
    function.__dict__["independent"] = True
    return function
