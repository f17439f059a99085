"""The mathematics reward: what is taken for the answer, what equals what, and what a hostile completion costs."""

from __future__ import annotations

import json
import logging
import time
from functools import cache
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from math_verify import parse, verify

from rewards.math import Extract, Percent, Which, accuracy, extracted, last_boxed, spelling
from rewards.math_answers import read
from rewards.math_equality import equal

ROOT = Path(__file__).parents[2]
PAIRS = [json.loads(line) for line in (Path(__file__).parent / "math_pairs.jsonl").read_text("utf-8").splitlines()]
"""`math_verify_alone` is what math-verify says of both in a box, with its default settings."""


def named(pair: dict[str, Any]) -> str:
    return f"{pair['gold']} | {pair['answer']}"


@cache
def boxed(text: str) -> list[Any]:
    return parse(f"\\boxed{{{text}}}", parsing_timeout=0)


@pytest.mark.parametrize("pair", PAIRS, ids=named)
def test_pairs(pair: dict[str, Any]):
    assert accuracy([f"It is 12, so $\\boxed{{{pair['answer']}}}$."], [pair["gold"]]) == [pair["expected"]]


@pytest.mark.parametrize("agreed", [PAIRS[::4], pytest.param(PAIRS, marks=pytest.mark.slow)], ids=["some", "all"])
def test_what_is_recorded_of_math_verify_alone_is_what_it_does(
    agreed: list[dict[str, Any]], caplog: pytest.LogCaptureFixture
):
    caplog.set_level(logging.CRITICAL, "math_verify")
    for pair in [pair for pair in PAIRS if "note" in pair or pair in agreed]:
        alone = verify(boxed(pair["gold"]), boxed(pair["answer"]), timeout_seconds=0)
        assert alone == pair["math_verify_alone"], named(pair)


def test_disagreements_have_a_note():
    for pair in PAIRS:
        assert ("note" in pair) == (pair["expected"] != pair["math_verify_alone"]), named(pair)


def test_the_pairs_are_many_and_of_both_kinds():
    assert len({named(pair) for pair in PAIRS}) == len(PAIRS) >= 200
    assert min(sum(p["expected"] == kind for p in PAIRS) for kind in (0, 1)) > 100


def test_the_documented_disagreements_are_those_of_the_pairs():
    rows = [
        f"| `{p['gold']}` | `{p['answer']}` | {p['expected']} | {p['math_verify_alone']} | {p['note']} |"
        for p in PAIRS
        if "note" in p
    ]
    documented = (ROOT / "docs/rewards-math.md").read_text("utf-8").splitlines()
    assert [line for line in documented if line.startswith("| `") and line.count(" | ") == 4] == rows, "\n".join(rows)


@pytest.mark.parametrize(
    ("text", "gold", "expected"),
    [
        ("\\boxed{42}", "42", 1.0),
        ("\\boxed{41}", "42", 0.0),
        ("\\boxed{ -042 }", "-42", 1.0),
        ("\\boxed{-42}", "42", 0.0),
        ("first \\boxed{1}, then \\boxed{42}", "42", 1.0),
        ("\\boxed{42}, no: \\boxed{1}", "42", 0.0),
        ("\\boxed{\\frac{1}{2}}", "0.5", 1.0),
        ("\\boxed{1,234}", "1234", 1.0),
        ("so the answer is 42", "42", 1.0),
        ("nothing to see", "42", 0.0),
        ("\\boxed{42", "42", 0.0),
        ("", "42", 0.0),
    ],
)
def test_math_accuracy(text: str, gold: str, expected: float):
    assert accuracy([text], answer=[gold]) == [expected]
    assert accuracy([[{"role": "assistant", "content": text}]], answer=[gold]) == [expected]


def test_the_last_complete_box_counts():
    assert last_boxed("\\boxed{a} \\boxed{\\frac{1}{2}} \\boxed{open") == "\\frac{1}{2}"
    assert last_boxed("\\boxed{\\{1, 2\\}}") == "\\{1, 2\\}"
    assert last_boxed("none") is None


# In the shapes of GSM8K's: integers, thousands separators, signs; and those of its variants with money and decimals.
GOLDS = [
    "18", "3", "70000", "540", "20", "64", "260", "160", "45", "460", "366", "694", "13", "5", "25", "1,450", "2,125",
    "5,600", "10,800", "57,500", "114,200", "1,875,000", "-3", "-10", "0", "1", "$18", "$1,250", "$2.50", "12.5",
    "0.75", "-1.5", "$0.40",
]  # fmt: skip
WRAPPINGS = [
    "\\boxed{%s}",
    "so\n#### %s",
    "Of 12, 3 are left. The answer is %s.",
    "**Answer:** %s",
    "It makes 2 + x = %s",
]


@pytest.mark.parametrize("wrapping", WRAPPINGS)
@pytest.mark.parametrize("gold", GOLDS)
def test_golds_in_wrappings(gold: str, wrapping: str):
    number = float(gold.replace("$", "").replace(",", ""))
    bare = f"{number:.10g}"
    for right in {gold, bare, f"{number:,.10g}", f"{number:,.2f}", gold.replace("$", "\\$")}:
        assert accuracy([wrapping % right], [gold]) == [1.0], right
    for wrong in {number + 1, number - 1, -number, 10 * number, number + 0.01} - {number}:
        assert accuracy([wrapping % f"{wrong:,.10g}"], [gold]) == [0.0], wrong


RIGHT_THEN_RUNS_ON = (
    "She sells 16 - 3 - 4 = 9 eggs for 9 * 2 = 18 dollars.\n#### 18\n\n"
    "Question: A robe takes 2 bolts of blue fibre and half as much white. How many?\nAnswer: 2 + 1 = 3\n#### 3\n"
)


@pytest.mark.parametrize("extract", ["auto", "marker"])
def test_the_last_marker_of_a_completion_that_runs_on_is_not_its_answer(extract: Extract):
    """A paper's first results came of this: without stop sequences, the last `####` was an invented next question's."""
    assert accuracy([RIGHT_THEN_RUNS_ON], ["18"], extract=extract) == [0.0]
    assert accuracy([RIGHT_THEN_RUNS_ON], ["18"], extract=extract, which="first") == [1.0]
    assert accuracy([RIGHT_THEN_RUNS_ON.partition("Question")[0]], ["18"], extract=extract) == [1.0], "a stop sequence"


@pytest.mark.parametrize(
    ("text", "extract", "last", "first"),
    [
        ("\\boxed{1} \\boxed{2}", "auto", "2", "1"),
        ("#### 1\n#### 2\n\\boxed{3}", "auto", "3", "3"),
        ("#### 1\n#### 2\n\\boxed{3}", "marker", "2", "1"),
        ("#### Step 1: add\n3 + 4\n#### 7", "auto", "7", "7"),
        ("####\n7 apples\n", "marker", "7 apples", "7 apples"),
        ("#### \\boxed{7}", "marker", "7", "7"),
        ("#### The answer is 7. Done.", "marker", "7", "7"),
        ("no mark, 7", "marker", None, None),
        ("no box, 7", "boxed", None, None),
        ("<answer>1</answer> <answer>\\boxed{2}</answer>", "answer_tag", "2", "1"),
        ("no tag, 7", "answer_tag", None, None),
        ("of 1,234 there are 5 - 3 left, $7.50.", "last_number", "$7.50", "1,234"),
        ("3/4 and -2", "last_number", "-2", "3/4"),
        ("nothing", "last_number", None, None),
        ("the answer is 7. Now 12 others", "auto", "7", "7"),
        ("The answer is (B).", "auto", "(B)", "(B)"),
        ("The correct option is B", "auto", "B", "B"),
        ("The answer is 5 because 2+3=5 and not 6.", "auto", "5", "5"),
        ("所以,最终答案为 42。检查 7", "auto", "42", "42"),
        ("The final answer is: $\\frac{3}{4}$ of it, not 5", "auto", "\\frac{3}{4}", "\\frac{3}{4}"),
        ("with 12 we get $x = \\frac12$ there", "auto", "x = \\frac12", "12"),
        ("it costs $18 and $20 in all", "auto", "$20", "$18"),
        ("12 is \\boxed{7", "auto", None, None),
        ("<think>\\boxed{1}</think> so \\boxed{2}", "auto", "2", "2"),
        ("x^2 + 1", "auto", "x^2 + 1", "x^2 + 1"),
        ("Evelyn", "auto", "Evelyn", "Evelyn"),
    ],
)
def test_policies(text: str, extract: Extract, last: str | None, first: str | None):
    assert (extracted(text, extract), extracted(text, extract, "first")) == (last, first)


def test_another_marker():
    assert accuracy(["A: 7\n"], ["7"], extract="marker", marker="A:") == [1.0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"extract": "regex"}, "extract='regex'.*auto, boxed, marker, answer_tag, last_number"),
        ({"which": "all"}, "which='all'.*last, first"),
        ({"percent": "no"}, "percent='no'.*either, value, number"),
        ({"marker": " "}, "marker=' '"),
    ],
)
def test_unknown_policies_are_refused(settings: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        accuracy([], [], **settings)


@pytest.mark.parametrize(
    ("percent", "scores"), [("either", [1.0, 1.0, 1.0]), ("value", [1.0, 1.0, 0.0]), ("number", [1.0, 0.0, 1.0])]
)
def test_what_a_percentage_equals(percent: Percent, scores: list[float]):
    texts = ["\\boxed{50\\%}", "\\boxed{0.5}", "\\boxed{50}"]
    assert accuracy(texts, ["50%"] * 3, percent=percent) == scores


@pytest.mark.parametrize("gold", [None, "", "  ", "$", "\\frac{1}{", "\\foo{a}{b"])
def test_a_gold_answer_that_cannot_be_read_does_not_apply(gold: str | None):
    assert accuracy(["\\boxed{1}", "nothing"], [gold, gold]) == [None, None]


@pytest.mark.parametrize("gold", ["Thus\n#### 1,234", "It is \\boxed{1234}.", 1234, 1234.0, "$1234$"])
def test_gold_answers_as_data_sets_give_them(gold: Any):
    assert accuracy(["\\boxed{1234}", "\\boxed{1235}"], [gold, gold]) == [1.0, 0.0]


def test_the_extracted_answers_are_logged():
    logged: dict[str, list[Any]] = {}
    texts = [f"\\boxed{{{a}}}" for a in ("\\frac12", "1/2", "0.5", "x = 0.5", "\\frac{2}{4}", "7")]
    accuracy(
        [*texts, "it has no answer at all"], ["1"] * 7, log_extra=lambda column, values: logged.update({column: values})
    )
    assert logged == {"extracted": ["1/2", "1/2", "1/2", "1/2", "1/2", "7", ""]}


@pytest.mark.parametrize(
    "same",
    [
        ["\\frac{\\sqrt{2}}{2}", "1/\\sqrt2", "\\sqrt{0.5}"],
        ["(x+1)^2", "x^2+2x+1", "1+x(x+2)"],
        ["\\sin 2x", "2\\sin x\\cos x"],
        ["\\{1,2\\}", "2, 1", "1 \\text{ and } 2"],
        ["[0,1)\\cup(2,\\infty)", "(2,\\infty) \\cup [0,1)"],
        ["50 \\text{ cents}", "\\$0.50"],
        ["\\text{(B)}", "B", "(B)"],
        ["\\text{Yes}", "yes"],
    ],
)
def test_equal_answers_are_spelt_alike(same: list[str]):
    assert len({spelling(text) for text in same}) == 1


def test_answers_that_are_spelt_alike_have_the_same_verdict():
    answers = {text for pair in PAIRS for text in (pair["gold"], pair["answer"])}
    by_spelling: dict[str, list[str]] = {}
    for text in sorted(answers):
        if "=" not in text and not getattr(read(text), "unit", ()):  # names are left out, and units converted
            by_spelling.setdefault(spelling(text), []).append(text)
    groups = [group for group in by_spelling.values() if len(group) > 1]
    assert len(groups) > 30
    for gold in sorted(answers)[::12]:
        for group in groups:
            assert len({equal(read(gold), read(text)) for text in group}) == 1, (gold, group)


HOSTILE = {
    "tower of powers": "\\boxed{9^{9^{9^{9}}}}",
    "factorials": "\\boxed{((((9!)!)!)!)!}",
    "binomial": "\\boxed{\\binom{1000000000}{500000000}}",
    "expansion": "\\boxed{(x+1)^{1000000}}",
    "products to expand": "\\boxed{(x+1)^{12}(y+1)^{12}(z+1)^{12}(w+1)^{12}}",
    "exponentials": "\\boxed{e^{e^{e^{e^{e}}}}}",
    "digits": "\\boxed{" + "9" * 100_000 + "}",
    "exponent": "\\boxed{1e999999999}",
    "division by zero": "\\boxed{1/0}",
    "sum": "\\boxed{\\sum_{k=1}^{1000000000} \\frac{1}{k}}",
    "unknown function": "\\boxed{f(x)^{9^{9^9}}}",
    "products beside one": "\\boxed{f(2)(a+b)^{12}(c+d)^{12}(x+y)^{12}(u+v)^{12}}",
    "gamma functions": "\\boxed{" + "x!" * 240 + "}",
    "many results": "\\boxed{" + "+".join(["1000!"] * 80) + "}",
    "unions": "\\boxed{" + "\\cup".join(f"({i},{i + 2})" for i in range(0, 80, 2)) + "}",
    "differences": "\\boxed{(-\\infty,1)" + "\\setminus\\{" * 30 + "2" + "\\}" * 30 + "}",
    "signs": "\\boxed{x=" + "\\pm1" * 120 + "}",
    "degrees": "\\boxed{5" + "° " * 200 + "<x}",
    "vulgar fractions": "\\boxed{" + "½" * 499 + "}",
    "NUL": "\\boxed{" + "\0" * 90 + "}" + "\0" * 100_000,
    "Arabic digits": "\u0661" * 100_000,
    "blank lines": "answer:" + "\n" * 100_000,
    "brackets": "\\boxed{" + "(" * 240 + "1" + ")" * 240 + "}",
    "braces": "\\boxed{" + "{" * 240 + "1" + "}" * 240 + "}",
    "sets": "\\boxed{" + "\\{" * 120 + "1" + "\\}" * 120 + "}",
    "fractions": "\\boxed{" + "\\frac{1}{1+" * 40 + "1" + "}" * 40 + "}",
    "bars": "\\boxed{" + "|" * 400 + "}",
    "commas": "\\boxed{" + "x+1," * 120 + "1}",
    "open boxes": "\\boxed{" * 3000,
    "dollars": "$" * 20_000,
    "anchors": "the answer is " * 3000,
    "markers": "#### 1\n" * 4000,
    "tags": "<answer>" * 3000,
    "spans": "\\(" * 10_000,
    "separators": "1,234," * 4000,
    "prose": "the quick brown fox " * 5000,
}


def unlogged(column: str, values: list[Any]) -> None:
    assert column == "extracted"


@pytest.mark.parametrize("extract", get_args(Extract))
@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_completion_costs_little_and_scores_0(name: str, extract: Extract):
    accuracy(["\\boxed{[0,1]\\cup[1,2]}"], ["[0,2]"])  # math-verify builds its tables at its first call
    for which in get_args(Which):
        started = time.process_time()
        scores = accuracy([HOSTILE[name]] * 2, ["42", "x+2"], extract=extract, which=which, log_extra=unlogged)
        assert time.process_time() - started < 0.4
        assert scores == [0.0, 0.0]


def test_answers_too_large_to_compute_are_compared_as_they_are_written():
    assert accuracy(["\\boxed{9^{9^{9}}}", "\\boxed{9^{9^{8}}}"], ["9^{9^9}"] * 2) == [1.0, 0.0]


@settings(max_examples=300, deadline=1000)
@given(st.text(alphabet="0123456789xyi+-*/^(){}[]|,.;:=<> \\%$!_&~'ab\n√π∞°±≤∈∪") | st.text(max_size=60))
def test_no_answer_is_an_error(text: str):
    assert set(accuracy([f"\\boxed{{{text}}}", text], ["42", "x+1"], log_extra=unlogged)) <= {0.0, 1.0}
    assert accuracy([text], [text], extract="last_number")[0] in (0.0, 1.0, None)


@settings(max_examples=200, deadline=1000)
@given(st.fractions(max_denominator=500), st.fractions(max_denominator=500))
def test_fractions_are_equal_when_they_are(a: Any, b: Any):
    assert equal(read(str(a)), read(f"\\frac{{{b.numerator}}}{{{b.denominator}}}")) == (a == b)
    assert equal(read(str(a)), read(f"{a.numerator * 3} / {a.denominator * 3}"))
