"""The completion's text against the `answer` column or a pattern."""

from __future__ import annotations

import re
import unicodedata
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

from rewards.common import independent, text_of

_ARTICLES = re.compile(r"\b(?:a|an|the)\b")

Kind = Literal["case", "punctuation", "articles", "whitespace"]
LogExtra = Callable[[str, list[Any]], None]


@independent
def exact(
    completions: list[Any],
    answer: list[Any],
    log_extra: LogExtra | None = None,
    *,
    extract: str | None = None,
    ignore: Sequence[Kind] = ("case", "whitespace"),
    **columns: Any,
) -> list[float | None]:
    """1.0 where the completion is `answer`, or one of them where it is a list, else 0.0.

    `extract`: a regular expression; its last match's first group, or the whole match without a group, is compared
    instead of the whole completion, and no match is no answer. `ignore`: differences in `case`, `punctuation`, English
    `articles`, and `whitespace` (other than where there is some). `None` (not applicable) without an answer. Raises
    `ValueError` for another kind to ignore.
    """
    found = [_last_match(extract, text_of(c)) if extract is not None else text_of(c) for c in completions]
    plain = [normalised(text, ignore) if text is not None else None for text in found]
    if log_extra is not None:
        log_extra("extracted", plain)
    golds = [[normalised(gold, ignore) for gold in _golds(a)] for a in answer]
    return [float(text in gold) if gold else None for text, gold in zip(plain, golds, strict=True)]


@independent
def contains(
    completions: list[Any],
    answer: list[Any],
    *,
    ignore: Sequence[Kind] = ("case", "whitespace"),
    **columns: Any,
) -> list[float | None]:
    """1.0 where `answer`, or one of them where it is a list, stands in the completion, not within a word, else 0.0.

    `ignore` and `None` as for `exact`. A policy that lists all possible answers is right every time.
    """
    scores: list[float | None] = []
    for completion, gold in zip(completions, answer, strict=True):
        text = normalised(text_of(completion), ignore)
        wanted = [plain for g in _golds(gold) if (plain := normalised(g, ignore))]
        within = any(re.search(rf"(?<!\w){re.escape(w)}(?!\w)", text) for w in wanted)
        scores.append(float(within) if wanted else None)
    return scores


@independent
def regex(
    completions: list[Any],
    pattern: str | list[str | None],
    log_extra: LogExtra | None = None,
    *,
    whole: bool = False,
    **columns: Any,
) -> list[float | None]:
    """1.0 where the regular expression `pattern` (a column, or one for all) is found in the completion, else 0.0.

    `whole`: it must match all of the completion but whitespace around it. "extracted" is the last match's first group,
    or the whole match without a group. Flags are written inline, `(?i)`. A pattern that backtracks for ever ends by the
    time limit. `None` (not applicable) where a row has no pattern. Raises `re.error` for one that is none.
    """
    patterns = [pattern] * len(completions) if isinstance(pattern, str) else pattern
    texts = [text_of(completion).strip() if whole else text_of(completion) for completion in completions]
    found = [
        None if p is None else _last_match(rf"(?:{p})\Z" if whole else p, t, anchored=whole)
        for p, t in zip(patterns, texts, strict=True)
    ]
    if log_extra is not None:
        log_extra("extracted", found)
    return [None if p is None else float(f is not None) for p, f in zip(patterns, found, strict=True)]


def normalised(text: str, ignore: Sequence[Kind]) -> str:
    """The text without the differences in `ignore`, in the order of SQuAD's evaluation (arXiv 1606.05250, section 6.1):
    case, punctuation, articles, whitespace."""
    if isinstance(ignore, str) or not set(ignore) <= set(get_args(Kind)):
        raise ValueError(f"rewards.match: ignore={ignore!r} must be a list of {', '.join(get_args(Kind))}")
    if "case" in ignore:
        text = text.casefold()
    if "punctuation" in ignore:
        text = "".join(c for c in text if not unicodedata.category(c).startswith("P"))
    if "articles" in ignore:
        text = _ARTICLES.sub(" ", text)
    return " ".join(text.split()) if "whitespace" in ignore else text


def _last_match(pattern: str, text: str, *, anchored: bool = False) -> str | None:
    matches = [re.match(pattern, text)] if anchored else deque(re.finditer(pattern, text), maxlen=1)
    found = matches[-1] if matches else None
    if found is None:
        return None
    return (found[1] or "") if found.re.groups else found[0]


def _golds(answer: Any) -> list[str]:
    if answer is None:
        return []
    return [str(a) for a in answer] if isinstance(answer, list | tuple) else [str(answer)]
