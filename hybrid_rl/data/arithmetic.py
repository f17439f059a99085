"""A seeded arithmetic task whose answers can be verified: two-digit addition.

Every problem is `a+b=` with both operands in 10..99; the answer is their sum. The split is by *unordered* pair and
fixed for all time, so a problem and its mirror image (`37+45=`, `45+37=`) are always on the same side and the held-out
set is disjoint from the training set by construction, whatever seed a run uses.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import combinations_with_replacement

_LOW, _HIGH = 10, 99
_SPLIT_SEED = 20260512
_HELD_OUT_PAIRS = 600


def problems(split: str) -> Iterator[dict[str, str]]:
    """Yield the rows of `split` (`train` or `eval`) in a fixed shuffled order:
    `{"prompt": "37+45=", "answer": "82", "slip": "72"}`.

    `slip` is what a hurried pupil answers, who forgets to carry from the ones to the tens; it equals the answer where
    nothing is carried. `train` has about 6,900 problems and `eval` about 1,190.
    """
    if split not in ("train", "eval"):
        raise ValueError(f"the arithmetic task has the splits 'train' and 'eval', not {split!r}")
    shuffler = random.Random(_SPLIT_SEED)
    pairs = list(combinations_with_replacement(range(_LOW, _HIGH + 1), 2))
    shuffler.shuffle(pairs)
    chosen = pairs[:_HELD_OUT_PAIRS] if split == "eval" else pairs[_HELD_OUT_PAIRS:]
    ordered = sorted({pair for a, b in chosen for pair in ((a, b), (b, a))})
    shuffler.shuffle(ordered)
    for a, b in ordered:
        carried = a % 10 + b % 10 >= 10
        yield {"prompt": f"{a}+{b}=", "answer": str(a + b), "slip": str(a + b - 10 * carried)}
