"""The form of a completion, whatever it says: tags in order, exactly one box."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from rewards.common import independent, text_of


@independent
def tags(
    completions: list[Any],
    *,
    tags: Sequence[str] = ("think", "answer"),
    strict: bool = True,
    opened: bool = False,
    partial: bool = False,
    **columns: Any,
) -> list[float | None]:
    """1.0 where the completion has `<tag>…</tag>` of all `tags`, each once, in this order, none inside another or blank
    (DeepSeek-R1's format reward, arXiv 2501.12948, section 2.2.2), else 0.0.

    `strict`: with nothing but whitespace outside. `opened`: the prompt ends with the first opening tag, as some chat
    templates do, and the completion goes on from there. `partial`: instead of 0.0, the share of the opening and closing
    tags that are there exactly once; of the whole form, the last part of the score is for order and contents. Raises
    `ValueError` without `tags` or for one that is given twice.
    """
    if not tags or isinstance(tags, str) or len(set(tags)) < len(tags):
        raise ValueError(f"rewards.format:tags: tags={tags!r} must be a list of different names")
    marks = [mark for tag in tags for mark in (f"<{tag}>", f"</{tag}>")]
    scores: list[float | None] = []
    for completion in completions:
        text = (marks[0] if opened else "") + text_of(completion)
        once = sum(text.count(mark) == 1 for mark in marks)
        whole = once == len(marks) and _in_order(text, marks, strict)
        scores.append(float(whole) if whole or not partial else once / (len(marks) + 1))
    return scores


@independent
def boxed(completions: list[Any], **columns: Any) -> list[float | None]:
    """1.0 where the completion has exactly one `\\boxed{…}`, complete and not blank, else 0.0."""
    texts = [text_of(completion) for completion in completions]
    return [float(t.count("\\boxed") == 1 and [bool(b.strip()) for b in boxes(t)] == [True]) for t in texts]


def boxes(text: str) -> list[str]:
    """Contents of all complete `\\boxed{…}`, with their nested braces, in order of where they begin."""
    found, open_braces, begins = [], 0, []
    for token in re.finditer(r"\\boxed\s*\{|\\[{}]|[{}]", text):
        mark = token[0]
        if mark.startswith("\\boxed"):
            begins.append((open_braces, token.end()))
        if mark.endswith("{") and mark != "\\{":
            open_braces += 1
        elif mark == "}":
            open_braces = max(open_braces - 1, 0)
            if begins and begins[-1][0] == open_braces:
                _, begin = begins.pop()
                found.append((begin, text[begin : token.start()]))
    return [content for _, content in sorted(found)]


def _in_order(text: str, marks: Sequence[str], strict: bool) -> bool:
    """Whether marks that are all there once come in order, around contents."""
    end = 0
    for opening, closing in zip(marks[::2], marks[1::2], strict=True):
        begin = text.find(opening, end)
        close = text.find(closing, begin)
        if begin < 0 or close < 0 or not text[begin + len(opening) : close].strip():
            return False
        if strict and text[end:begin].strip():
            return False
        end = close + len(closing)
    return not (strict and text[end:].strip())
