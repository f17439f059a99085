"""Seeded arithmetic tasks whose answers can be verified: two-digit addition and subtraction, bare or told in words.

Every problem is `a+b=` or `a-b=` with both operands in 10..99; the answer is their sum, or their difference, which is
never negative. The split is by *unordered* pair and fixed for all time, so a problem and its mirror image (`37+45=`,
`45+37=`) are always on the same side and the held-out set is disjoint from the training set by construction, whatever
seed a run uses.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from itertools import chain, combinations_with_replacement

_LOW, _HIGH = 10, 99
_SPLIT_SEED = 20260512
_HELD_OUT_PAIRS = 600
_SPLITS = {
    "train": slice(_HELD_OUT_PAIRS, None),
    "eval": slice(_HELD_OUT_PAIRS),
    "validation": slice(_HELD_OUT_PAIRS // 2),
    "test": slice(_HELD_OUT_PAIRS // 2, _HELD_OUT_PAIRS),
}
_NAMES = ("Ada", "Ben", "Cleo", "Dan", "Eve", "Finn")
_THINGS = ("apples", "books", "coins", "eggs", "shells", "stamps")
_STORIES = {
    "+": (
        "{who} has {a} {what} and gets {b} more. How many now? ",
        "{who} put {a} {what} to {b} others. How many are there? ",
        "{a} {what} on Monday, {b} on Tuesday: how many in all? ",
    ),
    "-": (
        "{who} has {a} {what} and loses {b}. How many are left? ",
        "Of {a} {what}, {who} sold {b}. How many remain? ",
        "{who} has {a} {what}, {b} too many. How many are needed? ",
    ),
}


def problems(split: str, operation: str = "addition") -> Iterator[dict[str, str]]:
    """Yield the rows of `split` (`train`, `eval`, or the halves of `eval`: `validation` and `test`) in a fixed shuffled
    order: `{"prompt": "37+45=", "answer": "82", "slip": "72"}`.

    `slip` is what a hurried pupil answers, who forgets to carry from the ones to the tens; it equals the answer where
    nothing is carried, and in subtraction, of which the pupil is sure. `operation`: `addition`, of whose problems
    `train` has about 6,900 and `eval` about 1,190; `subtraction`, about half as many; `both`; or `words`, the same as
    `both`, each told as a story of a sentence or two that says by its words whether to add or to subtract. Raises
    `ValueError` for others.
    """
    if split not in _SPLITS:
        raise ValueError(f"the arithmetic task has the splits {_listed(_SPLITS)}, not {split!r}")
    if operation not in _OPERATIONS:
        raise ValueError(f"the arithmetic task has the operations {_listed(_OPERATIONS)}, not {operation!r}")
    return _OPERATIONS[operation](split)


def _addition(split: str) -> Iterator[dict[str, str]]:
    chosen, shuffler = _pairs(split)
    ordered = sorted({pair for a, b in chosen for pair in ((a, b), (b, a))})
    shuffler.shuffle(ordered)
    for a, b in ordered:
        carried = a % 10 + b % 10 >= 10
        yield {"prompt": f"{a}+{b}=", "answer": str(a + b), "slip": str(a + b - 10 * carried)}


def _subtraction(split: str) -> Iterator[dict[str, str]]:
    for a, b in _pairs(split)[0]:
        yield {"prompt": f"{b}-{a}=", "answer": str(b - a), "slip": str(b - a)}


def _both(split: str) -> Iterator[dict[str, str]]:
    return chain(_addition(split), _subtraction(split))


def _words(split: str) -> Iterator[dict[str, str]]:
    draw = random.Random(f"{_SPLIT_SEED} words {split}")
    rows = list(_both(split))
    draw.shuffle(rows)
    for row in rows:
        sign = "+" if "+" in row["prompt"] else "-"
        a, b = row["prompt"].rstrip("=").split(sign)
        told = draw.choice(_STORIES[sign]).format(who=draw.choice(_NAMES), what=draw.choice(_THINGS), a=a, b=b)
        yield {**row, "prompt": told}


def _pairs(split: str) -> tuple[list[tuple[int, int]], random.Random]:
    """The split's pairs, smaller first, and what goes on shuffling them."""
    shuffler = random.Random(_SPLIT_SEED)
    pairs = list(combinations_with_replacement(range(_LOW, _HIGH + 1), 2))
    shuffler.shuffle(pairs)
    return pairs[_SPLITS[split]], shuffler


def _listed(names: Mapping[str, object]) -> str:
    *most, last = map(repr, names)
    return f"{', '.join(most)} and {last}"


_OPERATIONS: dict[str, Callable[[str], Iterator[dict[str, str]]]] = {
    "addition": _addition,
    "subtraction": _subtraction,
    "both": _both,
    "words": _words,
}
