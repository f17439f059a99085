"""Whether two answers are equal.

Numbers, groups and words are compared as what they are; expressions by their values at fixed places, so that nothing is
simplified or solved. math-verify compares what `rewards.math_answers` could not read, of the kinds that cannot take it
long.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from fractions import Fraction
from functools import lru_cache
from typing import Any

import sympy
from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

from rewards.math_answers import Answer, Group, Named, Number, Raw, Relation, Symbolic, Words
from rewards.math_expressions import POINTS, constant, names

# It warns that no alarm is set, at its first call in each process: a reward's worker can be killed.
logging.getLogger("math_verify").setLevel(logging.ERROR)

PERCENT = ("either", "value", "number")
CLOSE = Fraction(1, 10**6)
"""Largest relative error of a decimal that stands for a number which no decimal states exactly."""
EXACT = Fraction(1, 10**18)
"""Of numbers computed to 30 digits."""

_LATEX = (LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig())
_CHEAP = (sympy.Add, sympy.Mul, sympy.Symbol, sympy.NumberSymbol, sympy.Tuple, sympy.Set, sympy.Rel, sympy.logic.And)


@lru_cache(maxsize=8192)
def readable(gold: Answer) -> bool:
    """Whether completions can be held against it: there is something, and it is not broken LaTeX."""
    if not isinstance(gold, (Words, Raw)):
        return True
    return bool(gold.text) and (isinstance(gold, Words) or gold.verbatim or bool(_sympy(_latex(gold))))


@lru_cache(maxsize=16384)
def equal(gold: Answer, answer: Answer, percent: str = "either") -> bool:
    """Whether the answer is right. The order matters: a gold answer without a unit or a name accepts any.

    `percent`: what `50%` equals: its `value`, 0.5; the `number` before the sign, 50; or `either`.
    """
    if _same(gold, answer, percent):
        return True
    opaque = isinstance(gold, Raw) or isinstance(answer, Raw)
    if not opaque or any(isinstance(a, Words) or (isinstance(a, Raw) and a.verbatim) for a in (gold, answer)):
        return False
    found, wanted = _sympy(_latex(answer)), _sympy(_latex(gold))
    return bool(found) and bool(wanted) and verify(list(wanted), list(found), timeout_seconds=0)


def _same(gold: Answer, answer: Answer, percent: str) -> bool:
    if gold == answer:
        return True
    if isinstance(gold, Named) and isinstance(answer, Named):
        if gold.name == answer.name and _same(gold.value, answer.value, percent):
            return True
        return (
            gold.relation is not None and answer.relation is not None and _proportional(gold.relation, answer.relation)
        )
    if isinstance(gold, (Named, Relation)) and isinstance(answer, (Named, Relation)):
        relations = [a.relation if isinstance(a, Named) else a for a in (gold, answer)]
        return relations[0] is not None and relations[1] is not None and _proportional(relations[0], relations[1])
    if isinstance(answer, Named):
        return _same(gold, answer.value, percent)
    if isinstance(gold, Named):
        return _same(gold.value, answer, percent)
    if isinstance(gold, Group) or isinstance(answer, Group):
        return _same_group(gold, answer, percent)
    if isinstance(gold, Number) and isinstance(answer, Number):
        return _same_number(gold, answer, percent)
    if isinstance(gold, (Symbolic, Number)) and isinstance(answer, (Symbolic, Number)):
        return _same_values(_values(gold), _values(answer))  # `\sin^2 x + \cos^2 x` is 1
    if isinstance(gold, (Words, Raw)) and isinstance(answer, (Words, Raw)):
        return gold.text.casefold() == answer.text.casefold() if len(gold.text) > 1 else gold.text == answer.text
    if isinstance(gold, (Symbolic, Words)) and isinstance(answer, (Symbolic, Words)):
        return gold.text.strip("()") == answer.text.strip("()")
    return False


def _same_number(gold: Number, answer: Number, percent: str) -> bool:
    if gold.unit and answer.unit:
        if gold.unit != answer.unit:
            return False
        factors = gold.factor, answer.factor
    else:
        factors = Fraction(1), Fraction(1)
    for a in _scales(gold, answer, percent):
        if all(_close(g * factors[0], x * factors[1] * a, gold, answer) for g, x in
               ((gold.real, answer.real), (gold.imaginary, answer.imaginary))):  # fmt: skip
            return True
    return False


def _scales(gold: Number, answer: Number, percent: str) -> Iterator[Fraction]:
    """What the answer is multiplied by before it is held against the gold one."""
    if gold.percent == answer.percent:
        yield Fraction(1)
        return
    if percent != "number":
        yield Fraction(1, 100) if answer.percent else Fraction(100)
    if percent != "value":
        yield Fraction(1)


def _close(gold: Fraction, answer: Fraction, g: Number, a: Number) -> bool:
    difference, size = abs(gold - answer), abs(gold)
    if g.decimal != a.decimal and _endless(a if g.decimal else g):
        return difference <= size * CLOSE
    return difference <= (0 if g.exact and a.exact else size * EXACT)


def _endless(number: Number) -> bool:
    """Whether no decimal states it exactly."""
    rest = number.real.denominator
    for prime in (2, 5):
        while rest % prime == 0:
            rest //= prime
    return not number.exact or rest != 1


def _values(answer: Symbolic | Number) -> tuple[Any, ...]:
    return answer.values if isinstance(answer, Symbolic) else (constant(answer.real, answer.imaginary),) * POINTS


def _same_values(gold: tuple[Any, ...], answer: tuple[Any, ...]) -> bool:
    pairs = [(g, a) for g, a in zip(gold, answer, strict=True) if g is not None and a is not None]
    return bool(pairs) and all(_near(g, a) for g, a in pairs)


def _near(a: Any, b: Any) -> bool:
    return abs(a - b) <= (abs(a) + abs(b)) * 1e-18


def _proportional(gold: Relation, answer: Relation) -> bool:
    """Whether one relation is the other times a constant, which for inequalities is positive."""
    if gold.sign != answer.sign or names(gold.difference.tree) != names(answer.difference.tree):
        return False
    pairs = zip(gold.difference.values, answer.difference.values, strict=True)
    ratios = [a / g for g, a in pairs if g is not None and a is not None and g != 0]
    if not ratios or not all(_near(ratio, ratios[0]) for ratio in ratios) or ratios[0] == 0:
        return False
    return gold.sign in "=≠" or (getattr(ratios[0], "imag", 0) == 0 and getattr(ratios[0], "real", ratios[0]) > 0)


def _same_group(gold: Answer, answer: Answer, percent: str) -> bool:
    golds, answers = (a if isinstance(a, Group) else Group("{}", (a,)) for a in (gold, answer))
    if golds.ordered != answers.ordered or (golds.ordered and golds.fences != answers.fences):
        return False
    if golds.ordered:
        pairs = zip(golds.items, answers.items, strict=False)
        return len(golds.items) == len(answers.items) and all(_same(g, a, percent) for g, a in pairs)
    if golds.fences != answers.fences:
        return False
    wanted, found = list(dict.fromkeys(golds.items)), list(dict.fromkeys(answers.items))
    return all(any(_same(g, a, percent) for a in found) for g in wanted) and all(
        any(_same(g, a, percent) for g in wanted) for a in found
    )


@lru_cache(maxsize=4096)
def _sympy(latex: str) -> tuple[Any, ...]:
    """What math-verify reads; nothing where its comparison could take long."""
    if len(latex) > 200 or re.search(r"!|binom|choose|\\(?:sum|prod|int|lim|det|gcd|lcm)(?![a-z])", latex):
        return ()
    found = parse(f"\\boxed{{{latex}}}", extraction_config=_LATEX, fallback_mode="no_fallback", parsing_timeout=0)
    return tuple(found) if all(_cheap(expression) for expression in found) else ()


def _cheap(expression: Any) -> bool:
    nodes = list(sympy.preorder_traversal(expression)) if isinstance(expression, sympy.Basic) else []
    return 0 < len(nodes) < 60 and all(
        isinstance(node, (*_CHEAP, sympy.core.function.AppliedUndef, sympy.Abs))
        or (isinstance(node, sympy.Number) and node.is_finite and abs(node) < 10**30)
        or (isinstance(node, sympy.Pow) and node.exp.is_number and node.exp.is_Rational and abs(node.exp) <= 12)
        or node in (sympy.oo, -sympy.oo, sympy.I, sympy.true, sympy.false)
        for node in nodes
    )


def _latex(answer: Answer) -> str:
    """As math-verify reads it."""
    text = answer.text if isinstance(answer, (Raw, Words, Symbolic)) else str(answer)
    return text.replace("∞", "\\infty ").replace("∪", "\\cup ").replace("∈", "\\in ").replace("{}", "\\emptyset ")
