"""Whether two answers are equal.

Numbers, groups and words are compared as what they are; expressions by their values at fixed places, so that nothing is
simplified or solved. The algebra of sets is math-verify's.
"""

from __future__ import annotations

import logging
import re
from fractions import Fraction
from functools import lru_cache
from typing import Any, Literal

from math_verify import LatexExtractionConfig, parse, verify

from rewards.math_answers import Answer, Group, Number, Relation, Text
from rewards.math_expressions import Symbolic, Value, near, scaled

# It warns that no alarm is set, at its first call in each process: a reward's worker can be killed.
logging.getLogger("math_verify").setLevel(logging.ERROR)

Percent = Literal["either", "value", "number"]

ROUNDED = Fraction(1, 10**6)
"""Largest relative error of a decimal that stands for a number which no decimal states exactly."""
_NUMBER = r"-?\d{1,9}(?:/\d{1,9})?"
_SET = rf"(?:[(\[](?:{_NUMBER}|-∞), (?:{_NUMBER}|∞)[)\]]|\{{{_NUMBER}(?:, {_NUMBER}){{0,9}}\}})"
_SETS = re.compile(rf"{_SET}(?: [∪∖] {_SET}){{0,4}}")
"""Intervals and sets of rational numbers, as they are spelt, and too few to take math-verify long."""
_LATEX = str.maketrans({"∞": "\\infty ", "∪": "\\cup ", "∖": "\\setminus ", "{": "\\{", "}": "\\}"})


def readable(gold: Answer) -> bool:
    """Whether completions can be held against it: there is something, and it is not broken LaTeX."""
    text = gold.text if isinstance(gold, Text) else "x"
    return text.count("{") == text.count("}") and bool(re.search(r"\w|∞", text))


@lru_cache(maxsize=16384)
def equal(gold: Answer, answer: Answer, percent: Percent = "either") -> bool:
    """Whether the answer is right. The order matters: a gold answer without a unit or a name accepts any.

    `percent`: what `50%` equals: its `value`, 0.5; the `number` before the sign, 50; or `either`.
    """
    if _same(gold, answer, percent):
        return True
    return isinstance(gold, Group) and isinstance(answer, Group) and _same_sets(str(gold), str(answer))


def _same(gold: Answer, answer: Answer, percent: Percent) -> bool:
    if gold == answer:
        return True
    if isinstance(gold, Relation) and isinstance(answer, Relation):
        if gold.value and answer.value and gold.name == answer.name and _same(gold.value, answer.value, percent):
            return True
        return _proportional(gold, answer)
    if isinstance(gold, Relation):
        return bool(gold.value) and _same(gold.value, answer, percent)
    if isinstance(answer, Relation):
        return bool(answer.value) and _same(gold, answer.value, percent)
    if isinstance(gold, Group) or isinstance(answer, Group):
        return _same_group(gold, answer, percent)
    if isinstance(gold, Number) and isinstance(answer, Number):
        return _same_number(gold, answer, percent)
    if isinstance(gold, Symbolic) and isinstance(answer, Symbolic):
        pairs = _defined(gold, answer)
        return bool(pairs) and all(near(g, a) for g, a in pairs)
    return isinstance(gold, Text) and isinstance(answer, Text) and gold.letters == answer.letters


def _same_number(gold: Number, answer: Number, percent: Percent) -> bool:
    wanted, found = gold.value, answer.value
    if gold.unit and answer.unit:
        if gold.unit != answer.unit:
            return False
        wanted, found = scaled(wanted, gold.factor), scaled(found, answer.factor)
    scales = {Fraction(1)}  # what the answer is multiplied by before it is held against the gold one
    if gold.percent != answer.percent:
        by_value = Fraction(1, 100) if answer.percent else Fraction(100)
        scales = {"either": {by_value, *scales}, "value": {by_value}, "number": scales}[percent]
    rounded = gold.decimal != answer.decimal and _endless((answer if gold.decimal else gold).value)
    return any(near(wanted, scaled(found, scale), ROUNDED if rounded else None) for scale in scales)


def _endless(value: Value) -> bool:
    """Whether no decimal states it exactly."""
    return not isinstance(value, Fraction) or 10 ** value.denominator.bit_length() % value.denominator != 0


def _proportional(gold: Relation, answer: Relation) -> bool:
    """Whether one relation is the other times a constant, which for inequalities is positive."""
    if gold.difference is None or answer.difference is None:
        return False
    if gold.sign != answer.sign or gold.difference.names != answer.difference.names:
        return False
    ratios = [a / g for g, a in _defined(gold.difference, answer.difference) if g and a]
    positive = gold.sign in "=≠" or all(getattr(r, "imag", 0) == 0 and r.real > 0 for r in ratios)
    return bool(ratios) and all(near(ratio, ratios[0]) for ratio in ratios) and positive


def _defined(gold: Symbolic, answer: Symbolic) -> list[tuple[Value, Value]]:
    """Values at the places where both have one."""
    pairs = zip(gold.values, answer.values, strict=True)
    return [(g, a) for g, a in pairs if g is not None and a is not None]


def _same_group(gold: Answer, answer: Answer, percent: Percent) -> bool:
    golds, answers = (a if isinstance(a, Group) else Group("{}", (a,)) for a in (gold, answer))
    wanted, found = golds.items, answers.items
    if golds.fences == answers.fences == "≈":
        return _same(wanted[0], found[0], percent)
    if golds.fences == "≈":
        return any(_same(form, answer, percent) for form in wanted)
    if answers.fences == "≈":
        return any(_same(gold, form, percent) for form in found)
    both = {golds.fences: wanted, answers.fences: found}
    names = {item.name for item in both.get("{}", ()) if isinstance(item, Relation)}
    assigned = both.keys() == {"()", "{}"} and len(names) == len(both["{}"])  # `x = 1, y = 2`
    if golds.fences != answers.fences and not assigned:
        return False
    if golds.ordered or assigned:
        return len(wanted) == len(found) and all(_same(g, a, percent) for g, a in zip(wanted, found, strict=True))
    return all(any(_same(g, a, percent) for a in found) for g in wanted) and all(
        any(_same(g, a, percent) for g in wanted) for a in found
    )


def _same_sets(gold: str, answer: str) -> bool:
    """Whether a union or difference is the same set as what is written otherwise."""
    if not re.search("[∪∖]", gold + answer) or not _SETS.fullmatch(gold) or not _SETS.fullmatch(answer):
        return False
    return verify(list(_parsed(gold)), list(_parsed(answer)), timeout_seconds=0)


@lru_cache(maxsize=4096)
def _parsed(sets: str) -> tuple[Any, ...]:
    latex = f"\\boxed{{{sets.translate(_LATEX)}}}"
    return tuple(parse(latex, [LatexExtractionConfig()], "no_fallback", parsing_timeout=0))
