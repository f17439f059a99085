"""The example environment, as a plain function."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from hybrid_rl.plugins import load_plugin

FILE = Path(__file__).parent.parent.parent / "configs" / "calculator.py"


@pytest.mark.parametrize(
    ("turn", "answer"),
    [
        ("so it is <calc>2*(3+4)</calc>", "=14;"),
        ("<calc>1</calc>=1; and <calc> 1,234 - 34\n</calc>\n", "=1200;"),
        ("<calc>0.1+0.2</calc>", "=0.3;"),
        ("<calc>10/4</calc>", "=2.5;"),
        ("<calc>7//2 + 7%2 + 2**-1</calc>", "=4.5;"),
        ("<calc>1/0</calc>", "=error;"),
        ("<calc>five</calc>", "=error;"),
        ("<calc>2*</calc>", "=error;"),
        ("<calc></calc>", None),
        ("<calc>2</calc> is two", None),
        ("the answer is 14", None),
        ("", None),
    ],
)
def test_what_the_calculator_answers(turn: str, answer: str | None):
    assert load_plugin(f"{FILE}:respond")(turns=["<calc>9</calc>", "=9;", turn], question="?") == answer


@pytest.mark.parametrize(
    "expression",
    [
        "9**9**9",
        "(10**15)**50**50",
        "__import__('os').getcwd()",
        "'a'*10**9",
        "[0]*10**9",
        "(lambda: 1)()",
        "(-8)**0.5",
        "1e308*10",
        "True",
        "1j*1j",
        "9" * 100,
        "(" * 100,
        "1 if 1 else 2",
        "1;2",
    ],
)
def test_what_is_no_arithmetic_or_too_large_is_an_error_at_once(expression: str):
    started = time.perf_counter()
    assert load_plugin(f"{FILE}:calculate")(expression) == "error"
    assert time.perf_counter() - started < 0.1
