"""Controls: scores that know nothing, against which the others must show their worth."""

from __future__ import annotations

import random
from collections.abc import Sequence


def random_scores(names: Sequence[str], seed: int) -> dict[str, float]:
    """`random`: uniform in [0, 1), from the seed and the order of the names alone."""
    generator = random.Random(seed)
    return {name: generator.random() for name in names}
