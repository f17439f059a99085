"""Mathematical equality with the `answer` column, by math-verify."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any

from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

_INTEGER = re.compile(r"\s*[+-]?\d+\s*$", re.ASCII)
_TARGETS = (LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig())


def accuracy(completions: list[Any], answer: list[str], **columns: Any) -> list[float | None]:
    """1.0 where the completion's answer equals `answer`, 0.0 where it does not or there is none.

    The completion's answer is the last `\\boxed{...}`; without a box, the last expression that math-verify finds.
    `None` (not applicable) where the gold answer itself cannot be read.
    """
    return [_score(_text(completion), str(gold)) for completion, gold in zip(completions, answer, strict=True)]


def _score(completion: str, gold: str) -> float | None:
    boxed = last_boxed(completion)
    if boxed is not None and boxed.strip() == gold.strip():
        return 1.0
    if boxed is not None and _INTEGER.match(boxed) and _INTEGER.match(gold):
        return float(int(boxed) == int(gold))  # spares the parser, which takes a thousand times longer
    parsed_gold = _parse_gold(gold)
    if not parsed_gold:
        return None
    found = parse(completion if boxed is None else f"\\boxed{{{boxed}}}", extraction_config=_TARGETS)
    return float(verify(list(parsed_gold), found))


@lru_cache(maxsize=4096)
def _parse_gold(gold: str) -> tuple[Any, ...]:
    return tuple(parse(f"\\boxed{{{gold}}}", extraction_config=_TARGETS))


def last_boxed(text: str) -> str | None:
    """Content of the last complete `\\boxed{...}`, with its nested braces; `None` without one."""
    start = text.rfind("\\boxed{")
    while start != -1:
        begin = start + len("\\boxed{")
        depth = 1
        for i in range(begin, len(text)):
            depth += {"{": 1, "}": -1}.get(text[i], 0)
            if depth == 0:
                return text[begin:i]
        start = text.rfind("\\boxed{", 0, start)
    return None


def _text(completion: Any) -> str:
    """A completion is text, or a list of chat messages whose last one counts."""
    return completion if isinstance(completion, str) else str(completion[-1]["content"])
