"""Mathematical equality with the `answer` column. What is taken for a completion's answer, and what equals what, is
told in docs/rewards-math.md; `rewards.math_answers` reads answers, `rewards.math_equality` compares them."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, Literal, get_args

from rewards.common import independent, text_of
from rewards.math_answers import Group, Text, read
from rewards.math_equality import Percent, equal, readable

Extract = Literal["auto", "boxed", "marker", "answer_tag", "last_number"]
Which = Literal["last", "first"]
LIMIT = 20_000
"""Characters of a completion that are searched: its last ones, or its first ones with `which: first`."""
NEAR = 2_000
"""Of those, where an answer that nothing marks is looked for."""

_BRACE = re.compile(r"\\boxed\s*\{|\\.|[{}]", re.DOTALL)
_TAG = re.compile(r"<answer>((?:(?!<answer>).)*?)</answer>", re.DOTALL | re.IGNORECASE)
_NUMBER = re.compile(
    r"(?<![\w.\\{/^])(?:(?<![)\]}])[-+−])?(?:\\?[$€£])?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)?(?:\.\d+|(?<=\d))"
    r"(?:/\d+)?(?: ?\\?%)?"
)
_SPAN = (
    r"\$\$(?P<display>[^$]{1,400})\$\$|(?<![\\\d])\$(?=\S)(?P<inline>[^$\n]{1,400}?)(?<=\S)\$(?!\d)"
    r"|\\\((?P<round>.{1,400}?)\\\)|\\\[(?P<square>.{1,400}?)\\\]"
)
_EXPRESSION = re.compile(
    rf"{_SPAN}|(?P<fraction>-?\\[dt]?frac\{{[^{{}}]*\}}\{{[^{{}}]*\}})|(?P<number>{_NUMBER.pattern})", re.DOTALL
)
_ANCHOR = re.compile(
    r"(?:\b(?:answer|correct (?:option|choice))\b\**\s*(?:is\b|[:=])|答案\s*[是为:：])"
    r"(?:[\s:*=]|\b(?:therefore|thus|then|simply|just)\b)*(?P<answer>[^\n]{1,400})",
    re.IGNORECASE,
)
_PROSE = re.compile(r"(?<![\\a-zA-Z])[a-zA-Z]{2,}[^a-zA-Z{(]*\s[^a-zA-Z]*|\n\s*\S|[\u3040-\u9fff]")
"""Words in a row, or several lines: no bare answer."""
_SENTENCE = re.compile(r"(?<=[\w)}$%])\.(?:\s|$)|。")


@independent
def accuracy(
    completions: list[Any],
    answer: list[Any],
    extract: Extract = "auto",
    which: Which = "last",
    marker: str = "####",
    percent: Percent = "either",
    log_extra: Callable[[str, list[Any]], None] | None = None,
    **columns: Any,
) -> list[float | None]:
    """1.0 where the completion's answer equals `answer`, 0.0 where it does not or there is none.

    `extract`: where the answer stands. `boxed`: in `\\boxed{...}`; `marker`: after `marker`, to the end of its line;
    `answer_tag`: in `<answer>...</answer>`; `last_number`: the last number (with `which: first`, the first); `auto`: in
    a box; without one, after the marker; without one, after "answer is", else the last expression.
    `which`: the `last` or the `first` of several.
    `percent`: what `50%` equals: its `value`, 0.5; the `number` before the sign, 50; or `either`.

    `None` (not applicable) where the gold answer itself cannot be read. The column `extracted` gets one text for equal
    answers so far as is practical, '' where there is none. Raises `ValueError` for an unknown policy.
    """
    for name, value, kind in (("extract", extract, Extract), ("which", which, Which), ("percent", percent, Percent)):
        if value not in get_args(kind):
            raise ValueError(
                f"{name}={value!r} of rewards.math:accuracy is unknown; choose from {', '.join(get_args(kind))}"
            )
    if not marker.strip():
        raise ValueError(f"marker={marker!r} of rewards.math:accuracy must not be blank")
    texts = [extracted(text_of(completion), extract, which, marker) for completion in completions]
    if log_extra is not None:
        log_extra("extracted", ["" if text is None else spelling(text) for text in texts])
    return [
        _score(text, "" if gold is None else str(gold), marker, percent)
        for text, gold in zip(texts, answer, strict=True)
    ]


def extracted(text: str, extract: Extract = "auto", which: Which = "last", marker: str = "####") -> str | None:
    """The text of a completion's answer, as it was written; `None` if it has none."""
    text = text.partition("</think>")[2] or text
    text, pick = (text[-LIMIT:], -1) if which == "last" else (text[:LIMIT], 0)
    if extract == "answer_tag":
        found = [_phrase(tag, pick) for tag in _TAG.findall(text)]
    elif extract == "last_number":
        found = _NUMBER.findall(text)
    elif extract == "marker":
        found = _marked(text, marker, pick)
    else:
        found = _boxes(text)
    if extract == "auto" and not found:  # `#### Step 2` is a heading
        found = [phrase for phrase in _marked(text, marker, pick) if not isinstance(read(phrase), Text)]
        return found[pick] if found else _unmarked(text.strip(), pick)
    return (found[pick] or None) if found else None


def spelling(text: str) -> str:
    """One text for equal answers, so far as is practical: answers of different texts may still be equal. The reverse
    holds, but that the name of `x = 5` is left out and units are converted."""
    return str(read(text))


def last_boxed(text: str) -> str | None:
    """Content of the last complete `\\boxed{...}`, with its nested braces; `None` without one."""
    boxes = _boxes(text)
    return boxes[-1] if boxes else None


def _score(text: str | None, gold: str, marker: str, percent: Percent) -> float | None:
    boxed = last_boxed(gold)  # a data set's gold answer may be a whole solution
    wanted = read(gold.rpartition(marker)[2] if boxed is None else boxed)
    if not readable(wanted):
        return None
    return float(text is not None and bool(text.strip()) and equal(wanted, read(text), percent))


def _boxes(text: str) -> list[str]:
    """Contents of complete boxes in order of their beginnings. One pass, whatever is left open."""
    if "\\boxed" not in text:
        return []
    found: dict[int, str] = {}
    opened: list[int | None] = []
    for match in _BRACE.finditer(text):
        token = match[0]
        if token == "{" or token.startswith("\\boxed"):
            opened.append(None if token == "{" else match.end())
        elif token == "}" and opened:
            start = opened.pop()
            if start is not None:
                found[start] = text[start : match.start()]
    return [found[start] for start in sorted(found)]


def _marked(text: str, marker: str, pick: int) -> list[str]:
    """What the rest of the line after each marker states; or the next line, if there is no rest."""
    return [_phrase(part.lstrip().partition("\n")[0], pick) for part in text.split(marker)[1:]]


def _phrase(line: str, pick: int) -> str:
    """The answer in a line that should hold nothing else."""
    boxes = _boxes(line)
    if boxes:
        return boxes[pick]
    if anchor := _ANCHOR.search(line):
        line = anchor["answer"]
    return _SENTENCE.split(line, maxsplit=1)[0].strip()


def _unmarked(text: str, pick: int) -> str | None:
    """An answer that nothing marks: after "answer is", else the last (or first) formula or number."""
    if "\\boxed" in text:
        return None  # it was cut off in its box
    text = text[-NEAR:] if pick == -1 else text[:NEAR]
    if not _PROSE.search(text) and _stands_alone(text):
        return text
    for line in [match["answer"] for match in _ANCHOR.finditer(text)][:: pick or 1]:
        phrase = _SENTENCE.split(line, maxsplit=1)[0]
        if _stands_alone(phrase):
            return phrase
        if span := _EXPRESSION.search(line):
            return span[span.lastgroup or 0]
    spans = [match[match.lastgroup or 0] for match in _EXPRESSION.finditer(text)]
    return spans[pick] if spans else None


def _stands_alone(phrase: str) -> bool:
    """Whether it is an answer and nothing else, so far as one can see: mathematics, or up to three words."""
    answer = read(phrase)
    items = answer.items if isinstance(answer, Group) and not answer.ordered else (answer,)
    texts = [item for item in items if isinstance(item, Text)]
    short = all(text.prose and len(text.text.split()) < 4 for text in texts)
    return short and len(texts) in (0, len(items))  # not `5, which is odd`
