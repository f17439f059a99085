"""A penalty for text that repeats itself."""

from __future__ import annotations

from typing import Any, Literal

from rewards.common import independent, text_of


@independent
def ngrams(
    completions: list[Any],
    completion_ids: list[list[int]] | None = None,
    *,
    n: int = 3,
    over: Literal["tokens", "words"] = "tokens",
    max_penalty: float = -1.0,
    **columns: Any,
) -> list[float | None]:
    """`max_penalty` times the share of a completion's n-grams that are repeats of earlier ones: 0 where none is.

    The penalty of arXiv 2502.03373, appendix C.2, which is one of single tokens, as a score of the whole completion, as
    TRL has it. `over`: `tokens`, or `words` (parted by whitespace, case ignored). Texts of fewer than `n` score 0.
    Raises `ValueError` for a positive penalty, `n` below 1 or another `over`.
    """
    if n < 1 or max_penalty > 0 or over not in ("tokens", "words"):
        raise ValueError(
            f"rewards.repetition:ngrams: n={n} must be at least 1, max_penalty={max_penalty} at most 0, and "
            f"over={over!r} tokens or words"
        )
    if over == "words":
        units: list[list[Any]] = [text_of(completion).casefold().split() for completion in completions]
    elif completion_ids is None:
        raise ValueError("rewards.repetition:ngrams: without completion_ids, only over=words is possible")
    else:
        units = [list(ids) for ids in completion_ids]
    return [max_penalty * _repeats(sequence, n) + 0.0 for sequence in units]  # not -0.0


def _repeats(units: list[Any], n: int) -> float:
    count = len(units) - n + 1
    if count < 1:
        return 0.0
    return 1 - len({tuple(units[i : i + n]) for i in range(count)}) / count
