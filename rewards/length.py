"""Rewards by length in tokens. Each is to be added to a reward for being right.

Those that are given no completions make a reward of their settings, so that a wrong one is found before the run.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

from rewards.common import independent

Reward = Callable[..., list[float | None]]
RIGHT = 0.5
"""Completions that the reward `accuracy` scores higher than this are right."""


def overlong(*, max_length: int, buffer: int) -> Reward:
    """Soft overlong punishment (DAPO, arXiv 2503.14476, eq. 13): 0 up to `max_length - buffer` tokens, then linear to
    -1 at `max_length`, and -1 beyond. `max_length` is `sampling.max_completion_length`, or less.

    With `algo.overlong_buffer`, the same is punished already. Raises `ValueError` unless 0 < buffer <= max_length.
    """
    if not 0 < buffer <= max_length:
        raise ValueError(f"rewards.length:overlong: buffer={buffer} must be from 1 to max_length={max_length}")
    free = max_length - buffer

    @independent
    def score(completions: list[Any], completion_ids: list[list[int]], **columns: Any) -> list[float | None]:
        return [min(max((free - len(ids)) / buffer, -1.0), 0.0) for ids in completion_ids]

    return score


def cosine(
    *,
    max_length: int,
    right: tuple[float, float] = (1.0, 0.5),
    wrong: tuple[float, float] = (-1.0, -0.5),
    exceeded: float | None = -1.0,
    accuracy: str = "rewards.math:accuracy",
) -> Reward:
    """The cosine reward of arXiv 2502.03373, section 4.2: from the first of `right` for an answer of no length to the
    second for one of `max_length` tokens, along half a cosine; likewise `wrong`; and `exceeded` from `max_length`
    tokens on (`None`: the second value, as TRL does). The paper's values are (2, 1), (-10, 0) and -10.

    Other than the paper's, it replaces the reward for being right, which is asked which ones are: `accuracy`, as
    `module:function`, is called with the columns. `None` (not applicable) where that is. Raises `ValueError` for one
    that cannot be, and for a `max_length` below 1.
    """
    if max_length < 1:
        raise ValueError(f"rewards.length:cosine: max_length={max_length} must be at least 1 token")
    is_right = _rightness(accuracy)

    @independent
    def score(completions: list[Any], completion_ids: list[list[int]], **columns: Any) -> list[float | None]:
        scores: list[float | None] = []
        for ids, is_it in zip(completion_ids, is_right(completions, columns), strict=True):
            if is_it is None:
                scores.append(None)
            elif len(ids) >= max_length and exceeded is not None:
                scores.append(float(exceeded))
            else:
                shortest, longest = right if is_it else wrong
                share = min(len(ids) / max_length, 1.0)
                scores.append(longest + (shortest - longest) * (1 + math.cos(math.pi * share)) / 2)
        return scores

    return score


def shorter(*, accuracy: str = "rewards.math:accuracy") -> Reward:
    """Length relative to the group (Kimi k1.5, arXiv 2501.12599, section 2.3.3): 0.5 for the shortest completion of a
    prompt to -0.5 for the longest, linearly; at most 0 for wrong ones; 0 where all are equally long.

    `accuracy` as for `cosine`. `None` (not applicable) where that is, and for a completion without others to compare
    with. The paper warms up without it, as it slows the beginning of training.
    """
    is_right = _rightness(accuracy)

    def score(
        completions: list[Any], completion_ids: list[list[int]], prompts: list[Any] | None = None, **columns: Any
    ) -> list[float | None]:
        right = is_right(completions, {**columns, "prompts": prompts})
        groups: dict[str, list[int]] = {}
        for i, prompt in enumerate(prompts if prompts is not None else [None] * len(completions)):
            if right[i] is not None:
                groups.setdefault(repr(prompt), []).append(i)
        scores: list[float | None] = [None] * len(completions)
        for group in groups.values():
            lengths = [len(completion_ids[i]) for i in group]
            shortest, span = min(lengths), max(lengths) - min(lengths)
            if len(group) == 1:
                continue
            for i, length in zip(group, lengths, strict=True):
                relative = 0.5 - (length - shortest) / span if span else 0.0
                scores[i] = relative if right[i] else min(0.0, relative)
        return scores

    return score


@independent
def target(
    completions: list[Any],
    completion_ids: list[list[int]],
    target_length: int | list[int | None],
    *,
    per_token: float = 0.0003,
    **columns: Any,
) -> list[float | None]:
    """`-per_token` for each token more or fewer than `target_length`, a column or one number for all (L1-Exact, arXiv
    2503.04697, eq. 1, with its α). `None` (not applicable) where a row has no target.
    """
    targets = [target_length] * len(completions) if isinstance(target_length, int) else target_length
    return [
        None if tokens is None else per_token * -abs(len(ids) - tokens)
        for ids, tokens in zip(completion_ids, targets, strict=True)
    ]


def _rightness(accuracy: str) -> Callable[[list[Any], Mapping[str, Any]], list[bool | None]]:
    module, _, name = accuracy.partition(":")
    try:
        function = getattr(import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"accuracy={accuracy!r} must be module:function: {error}") from error
    parameters = inspect.signature(function).parameters
    if "completions" not in parameters or inspect.iscoroutinefunction(function):
        raise ValueError(f"accuracy={accuracy!r} must be a plain function of lists, not per item, async or a class")
    takes_all = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())

    def ask(completions: list[Any], columns: Mapping[str, Any]) -> list[bool | None]:
        given = {column: values for column, values in columns.items() if takes_all or column in parameters}
        return [None if score is None else score > RIGHT for score in function(completions=completions, **given)]

    return ask
