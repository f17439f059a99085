"""Multiple choice: the letter that a completion chooses, against the `answer` column."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from numbers import Integral
from typing import Any, Literal

from rewards.common import independent, text_of
from rewards.format import boxes

LETTERS = "ABCDEFGHIJ"
_OPENING = r"[\s(\[{*_`\"'$]*(?:\\(?:text|textbf|mathrm|mathbf)\{)?\(?"
# A small letter must be in brackets: "the answer is a bit odd". "I'd" and "A-level" are no letters alone.
# "I think B" and "A dog" begin with none either, but "A because it" does: no noun follows.
_NO_NOUN = r"(?:and|as|because|but|by|due|for|from|is|or|since|which|while|with)\b"
_LEADING = re.compile(_OPENING + rf"(?:(?!I +[a-z]|A +(?!{_NO_NOUN})[a-z])([A-J])(?![\w'’-])|([a-j])[)\]}}])")
_ANNOUNCED = re.compile(r"(?i)(?<!/)\banswer\b(?:\s*(?:is|was|would be|must be|should be|:|=|>|\*|_))*\s*")
_ALONE = re.compile(r"(?<![\w'’\\$-])([A-J])(?![\w'’-])")
_ARTICLE_OR_PRONOUN = re.compile(r"[AI] +[a-z]")
_FAR = 500
"""Characters after "the answer is" that are looked at."""
_EDGES = " \t\r\n.,:;!?*_`\"'$()[]{}"


@independent
def accuracy(
    completions: list[Any],
    answer: list[Any],
    choices: list[Any] | None = None,
    log_extra: Callable[[str, list[Any]], None] | None = None,
    *,
    which: Literal["first", "last"] = "last",
    first_index: int = 0,
    **columns: Any,
) -> list[float | None]:
    """1.0 where the completion chooses `answer`, 0.0 where it chooses another option or none.

    The choice is looked for as `\\boxed{C}`, then "answer is (C)" and the like, then an option's text as the last line,
    then a letter alone; of several of a kind, the `which` (`first` or `last`). With the column `choices` (a list of
    texts, or a mapping with the list `text`), an option's exact text stands for its letter, and letters beyond the
    options are none; else letters go to J.

    `answer` is a letter, an option's text, or an index that counts from `first_index`; an integer is always an index, a
    string of digits only where it is no option's text. `None` (not applicable) where it is none of these. Raises
    `ValueError` for another `which`.
    """
    if which not in ("first", "last"):
        raise ValueError(f"rewards.choice:accuracy: which={which!r} must be 'first' or 'last'")
    rows = [_texts(row) for row in choices] if choices is not None else [[]] * len(completions)
    chosen = [_choice(text_of(c), options, which) for c, options in zip(completions, rows, strict=True)]
    golds = [_gold(a, options, first_index) for a, options in zip(answer, rows, strict=True)]
    if log_extra is not None:
        log_extra("extracted", chosen)
    return [None if gold is None else float(letter == gold) for letter, gold in zip(chosen, golds, strict=True)]


def _choice(text: str, options: Sequence[str], which: str) -> str | None:
    backwards = -1 if which == "last" else 1
    for box in boxes(text)[::backwards]:
        if letter := _read(box, options):
            return letter
    announced = [found.end() for found in _ANNOUNCED.finditer(text)]
    for begin in announced[::backwards]:
        if letter := _read(text[begin : begin + _FAR].partition("\n")[0], options):
            return letter
    lines = text.strip().splitlines()
    if lines and (letter := _as_option(lines[-1], options)):
        return letter
    alone = [found for found in _ALONE.finditer(text) if not _ARTICLE_OR_PRONOUN.match(text, found.start())]
    letters = [found[1] for found in alone if found[1] in _letters(options)]
    return letters[::backwards][0] if letters else None


def _read(text: str, options: Sequence[str]) -> str | None:
    """The option that a short text begins with the letter of, or is the text of."""
    if letter := _as_option(text, options):
        return letter
    found = _LEADING.match(text)
    letter = (found[1] or found[2]).upper() if found else ""
    return letter if letter and letter in _letters(options) else None


def _as_option(text: str, options: Sequence[str]) -> str | None:
    wanted = _plain(text)
    return next((letter for letter, o in zip(LETTERS, options, strict=False) if wanted and _plain(o) == wanted), None)


def _gold(answer: Any, options: Sequence[str], first_index: int) -> str | None:
    letters = _letters(options)
    text = str(answer).strip()
    if not isinstance(answer, Integral):
        letter = text.strip("(). ").upper()
        if len(letter) == 1 and letter in letters:
            return letter
        if option := _as_option(text, options):
            return option
    index = int(text) - first_index if re.fullmatch(r"\d{1,2}", text) else -1
    return letters[index] if 0 <= index < len(letters) else None


def _letters(options: Sequence[str]) -> str:
    return LETTERS[: len(options)] if options else LETTERS


def _texts(choices: Any) -> list[str]:
    texts = choices["text"] if isinstance(choices, Mapping) else choices
    return [str(text) for text in texts] if texts is not None else []


def _plain(text: str) -> str:
    return " ".join(text.casefold().split()).strip(_EDGES)
