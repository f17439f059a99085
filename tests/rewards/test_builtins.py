"""Built-in rewards: what they score, their formulas against TRL's and plain recomputations, and their table."""

from __future__ import annotations

import ast
import functools
import importlib
import inspect
import json
import math
import random
import re
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschema import SchemaError
from trl.rewards.accuracy_rewards import get_cosine_scaled_reward
from trl.rewards.other_rewards import get_repetition_penalty_reward, get_soft_overlong_punishment

from hybrid_rl.config import RewardSpec
from hybrid_rl.reward.plugin import check
from rewards import choice, json_schema, length, match, repetition
from rewards.format import boxed, boxes, tags
from rewards.language import Consistency

ROOT = Path(__file__).parents[2]
CITIES = ["Paris", "Rome", "a bit of both", "None of these"]


def ids(*lengths: int) -> list[list[int]]:
    return [list(range(n)) for n in lengths]


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("The answer is (C).", "C"),
        ("**Answer:** C", "C"),
        ("Answer:\n\nC) Rome", "C"),
        ("so the correct answer is **C**, since A is wrong", "C"),
        ("<answer>C</answer> and A", "C"),
        ("A, or rather \\boxed{\\text{C}}. The answer is D", "C"),
        ("\\boxed{(c)}", "C"),
        ("First \\boxed{A}, then \\boxed{C}", "C"),
        ("The answer is B? No: the answer is C", "C"),
        ("The answer is C. Option B is wrong.", "C"),
        ("The answer is not B. I choose C", "C"),
        ("C", "C"),
        ("B is too small and I think C", "C"),
        ("C: A dog has four legs, I'd say", "C"),
        ("Answer: I think C", "C"),
        ("Answer: I would say (C)", "C"),
        ("The answer is A dog, which is C", "C"),
        ("The answer is A because C is wrong", "A"),
        ("The answer is I.", "I"),
        ("the answer is a bit odd", None),
        ("A dog. I think so, on an A-level, $A_1$", None),
        ("K", None),
        ("", None),
    ],
)
def test_the_letter_that_is_chosen(text: str, letter: str | None):
    logged: dict[str, list[Any]] = {}
    assert choice.accuracy([text], ["C"], log_extra=logged.__setitem__) == [float(letter == "C")]
    assert logged == {"extracted": [letter]}
    chat = [[{"role": "user", "content": "A"}, {"role": "assistant", "content": text}]]
    assert choice.accuracy(chat, ["C"]) == [float(letter == "C")]


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("The answer is Rome.", "B"),
        ("Thinking of Paris.\n**Rome**", "B"),
        ("\\boxed{\\text{B}}", "B"),
        ("\\boxed{rome}", "B"),
        ("The answer is a bit of both", "C"),
        ("The answer is H, as in A", "A"),
        ("Rome is not Paris", None),
    ],
)
def test_options_by_their_text(text: str, letter: str | None):
    logged: dict[str, list[Any]] = {}
    for given_as in (CITIES, {"text": CITIES, "label": list("ABCD")}):
        choice.accuracy([text], ["A"], choices=[given_as], log_extra=logged.__setitem__)
        assert logged == {"extracted": [letter]}


def test_first_or_last_choice():
    text = "The answer is A. Wait, the answer is B."
    assert choice.accuracy([text] * 2, ["A", "B"], which="first") == [1.0, 0.0]
    assert choice.accuracy([text] * 2, ["A", "B"]) == [0.0, 1.0]
    with pytest.raises(ValueError, match="which='best' must be"):
        choice.accuracy([text], ["A"], which="best")


def test_gold_letters_texts_and_indices():
    golds = ["b", "(B)", 1, "1", "Rome", " rome. "]
    assert choice.accuracy(["B"] * 6, golds, choices=[CITIES] * 6) == [1.0] * 6
    assert choice.accuracy(["B"], [2], first_index=1) == [1.0]
    numbers = [["1", "2", "3", "4"]] * 2
    assert choice.accuracy(["B"] * 2, ["2", 2], choices=numbers) == [1.0, 0.0], "a text before an index"
    assert choice.accuracy(["B"] * 4, ["K", 4, "Berlin", None], choices=[CITIES] * 4) == [None] * 4


def test_exact_match_ignores_what_it_is_told_to():
    texts = ["The  Eiffel Tower!", "the eiffel tower!", "The Eiffel Tower!"]
    assert match.exact(texts, ["The Eiffel Tower!"] * 3) == [1.0, 1.0, 1.0]
    assert match.exact(texts, ["The Eiffel Tower!"] * 3, ignore=[]) == [0.0, 0.0, 1.0]
    assert match.exact(texts, ["an eiffel-tower"] * 3, ignore=["case", "punctuation", "articles"])[2] == 0.0
    everything = ["case", "punctuation", "articles", "whitespace"]
    assert match.exact(texts, ["Eiffel   tower"] * 3, ignore=everything) == [1.0] * 3
    assert match.exact(["7", "7", "7"], [["six", 7], [], None]) == [1.0, None, None]
    with pytest.raises(ValueError, match="must be a list of case"):
        match.exact(["a"], ["a"], ignore=["umlauts"])


def test_exact_match_of_an_extracted_part():
    logged: dict[str, list[Any]] = {}
    texts = ["<answer>4</answer> no <answer> Five </answer>", "five"]
    pattern = "<answer>(.*?)</answer>"
    assert match.exact(texts, ["five"] * 2, extract=pattern, log_extra=logged.__setitem__) == [1.0, 0.0]
    assert logged == {"extracted": ["five", None]}


def test_contains_whole_words():
    assert match.contains(["It is Rome, surely", "Romeo", "C++ it is"], ["rome", "Rome", "c++"]) == [1.0, 0.0, 1.0]
    assert match.contains(["x"], [""]) == [None]


def test_regular_expressions_from_argument_or_column():
    logged: dict[str, list[Any]] = {}
    texts = ["x = 1, x = 2", "y"]
    assert match.regex(texts, r"x = (\d)", log_extra=logged.__setitem__) == [1.0, 0.0]
    assert logged == {"extracted": ["2", None]}
    assert match.regex(texts, ["(?i)Y", None]) == [0.0, None]
    assert match.regex([" 12 ", "12 a", "1"], "1|12", whole=True) == [1.0, 0.0, 1.0]


@pytest.mark.parametrize(
    ("text", "strict", "lenient", "partial"),
    [
        ("<think>a</think>\n<answer>b</answer>\n", 1, 1, 1),
        ("So: <think>a</think><answer>b</answer>", 0, 1, 0.8),
        ("<think>a</think> then <answer>b</answer>", 0, 1, 0.8),
        ("<think> </think><answer>b</answer>", 0, 0, 0.8),
        ("<answer>b</answer><think>a</think>", 0, 0, 0.8),
        ("<think>a<answer>b</answer></think>", 0, 0, 0.8),
        ("<think>a</think><think>a</think><answer>b</answer>", 0, 0, 0.4),
        ("<think>a</think><answer>b", 0, 0, 0.6),
        ("b", 0, 0, 0),
    ],
)
def test_tags(text: str, strict: float, lenient: float, partial: float):
    assert tags([text]) == [strict]
    assert tags([text], strict=False) == [lenient]
    assert tags([text], partial=True) == [pytest.approx(partial)]
    assert tags([text.removeprefix("<think>")], opened=True)[0] == (strict if text.startswith("<think>") else 0.0)


def test_tags_must_be_names():
    for wrong in ([], "think", ["a", "a"]):
        with pytest.raises(ValueError, match="must be a list of different names"):
            tags(["x"], tags=wrong)


def test_boxed():
    texts = ["\\boxed{\\frac{1}{2}}", "\\boxed{ }", "\\boxed{1} \\boxed{2}", "\\boxed{1", "\\boxed 1", "1"]
    assert boxed(texts) == [1.0, 0.0, 0.0, 0.0, 0.0, 0.0]
    assert boxes("\\boxed{a \\boxed{b} \\{} {c} \\boxed{d} \\boxed{e") == ["a \\boxed{b} \\{", "b", "d"]


@given(st.lists(st.integers(0, 60)), st.integers(1, 40), st.integers(0, 20))
def test_overlong_is_dapos(lengths: list[int], buffer: int, more: int):
    limit = buffer + more
    ours = length.overlong(max_length=limit, buffer=buffer)([""] * len(lengths), ids(*lengths))
    assert ours == pytest.approx(get_soft_overlong_punishment(limit, buffer)(ids(*lengths)))
    if lengths:
        assert ours[0] == pytest.approx(max(-1, min(0, ((limit - buffer) - lengths[0]) / buffer)))


def test_overlong_needs_a_buffer():
    with pytest.raises(ValueError, match="buffer=0 must be from 1"):
        length.overlong(max_length=4, buffer=0)


def test_cosine_is_trls_but_for_exceeding():
    lengths = [0, 7, 50, 99, 100, 120]
    right = [{"content": "\\boxed{2}"}]
    wrong = [{"content": "\\boxed{3}"}]
    for completion in (right, wrong):
        completions, answer = [completion] * len(lengths), ["2"] * len(lengths)
        theirs = get_cosine_scaled_reward(100)(completions, answer, ids(*lengths))
        like = length.cosine(max_length=100, exceeded=None)(completions, ids(*lengths), answer=answer)
        assert like == pytest.approx(theirs)
        ours = length.cosine(max_length=100)(completions, ids(*lengths), answer=answer)
        assert ours == pytest.approx([*theirs[:4], -1.0, -1.0])


def test_cosine_by_hand():
    """With the values of the paper: eta_L + (eta_0 - eta_L) / 2 (1 + cos(pi t / T))."""
    papers: dict[str, Any] = {"right": (2, 1), "wrong": (-10, 0), "exceeded": -10}
    reward = length.cosine(max_length=100, accuracy="rewards.match:contains", **papers)
    found = reward(["a", "b", "a", "a"], ids(25, 25, 100, 25), answer=["a"] * 3 + [None])
    quarter = (1 + math.cos(math.pi / 4)) / 2
    assert found == [pytest.approx(1 + quarter), pytest.approx(-10 * quarter), -10, None]


def test_shorter_is_relative_to_the_group():
    """Kimi k1.5: lambda = 0.5 - (len - min) / (max - min) for right answers, min(0, lambda) for wrong ones."""
    rng = random.Random(0)
    prompts = ["p"] * 5 + ["q"] * 4 + ["alone"]
    lengths = [rng.randrange(1, 50) for _ in range(5)] + [8] * 4 + [3]
    texts = [rng.choice("ab") for _ in prompts]
    reward = length.shorter(accuracy="rewards.match:exact")
    found = reward(texts, ids(*lengths), prompts, answer=["a"] * 10)
    low, high = min(lengths[:5]), max(lengths[:5])
    for text, n, score in zip(texts[:5], lengths, found, strict=False):
        relative = 0.5 - (n - low) / (high - low)
        assert score == pytest.approx(relative if text == "a" else min(0, relative))
    assert found[5:] == [0.0] * 4 + [None]
    assert not getattr(reward, "independent", False)
    assert getattr(length.cosine(max_length=1), "independent", False)


def test_what_has_no_answer_is_not_compared_with():
    reward = length.shorter(accuracy="rewards.match:exact")
    assert reward(["a", "a", "a"], ids(1, 5, 9), answer=["a", "a", None]) == [0.5, -0.5, None]


@pytest.mark.parametrize("accuracy", ["rewards.language:Consistency", "rewards.nowhere:f", "rewards.math:nothing", "x"])
def test_what_cannot_say_who_is_right_is_refused(accuracy: str):
    with pytest.raises(ValueError, match=f"accuracy='{accuracy}' must be"):
        length.shorter(accuracy=accuracy)


@pytest.mark.parametrize(
    ("plugin", "arguments"),
    [
        ("rewards.choice:accuracy", {"which": "best"}),
        ("rewards.match:exact", {"ignore": ["umlauts"]}),
        ("rewards.match:contains", {"ignore": "case"}),
        ("rewards.format:tags", {"tags": "think"}),
        ("rewards.length:overlong", {"max_length": 4, "buffer": 5}),
        ("rewards.length:cosine", {"max_length": 4, "accuracy": "rewards.math:nothing"}),
        ("rewards.length:cosine", {"max_length": 4, "right": [1.0]}),
        ("rewards.length:target", {"target_length": "many"}),
        ("rewards.repetition:ngrams", {"over": "letters"}),
        ("rewards.json_schema:valid", {"parsed": "some"}),
        ("rewards.code:passes", {"score": "mean"}),
        ("rewards.code:passes", {"extract": "middle"}),
        ("rewards.code:passes", {"runner": "docker"}),
        ("rewards.judge:Judge", {"model": "m", "when_spent": "guess"}),
        ("rewards.judge:Judge", {"model": "m", "max_tokens": 0}),
    ],
)
def test_a_wrong_setting_is_found_before_the_run(plugin: str, arguments: dict[str, Any]):
    with pytest.raises((TypeError, ValueError)):
        list(check(plugin, json.dumps(arguments), ["answer", "tests"]))


@pytest.mark.parametrize("name", ["overlong", "cosine", "shorter"])
def test_rewards_of_their_settings_are_called_as_others(name: str):
    arguments = {"overlong": {"max_length": 4, "buffer": 2}, "cosine": {"max_length": 4}, "shorter": {}}[name]
    (facts,) = check(f"rewards.length:{name}", json.dumps(arguments), ["answer"])
    assert (facts["missing"], facts["piecewise"]) == ([], name != "shorter")


def test_target_length():
    assert length.target(["", "", ""], ids(8, 10, 14), 10, per_token=0.5) == [-1.0, 0.0, -2.0]
    assert length.target([""] * 3, ids(8, 10, 14), [8, None, 4]) == [0.0, None, pytest.approx(-0.003)]


@given(st.lists(st.lists(st.integers(0, 3), max_size=12), max_size=4), st.integers(1, 5))
def test_repeated_ngrams_are_trls(sequences: list[list[int]], n: int):
    ours = repetition.ngrams([""] * len(sequences), sequences, n=n, max_penalty=-2.0)
    assert ours == pytest.approx(get_repetition_penalty_reward(n, -2.0)(sequences))


def test_repeated_words():
    assert repetition.ngrams(["a b A b a b", "a b c", ""], n=2, over="words") == [pytest.approx(-0.6), 0.0, 0.0]
    with pytest.raises(ValueError, match="only over=words"):
        repetition.ngrams(["a"])
    with pytest.raises(ValueError, match="max_penalty=1"):
        repetition.ngrams(["a"], max_penalty=1)


ENGLISH = "First we add the two numbers together. Then we divide the sum by three, which leaves four apples for her."
OTHERS = {
    "de": "Zuerst berechnen wir die Summe der beiden Zahlen. Danach teilen wir das Ergebnis durch drei.",
    "fr": "D'abord, on calcule la somme des deux nombres. Ensuite, on divise le résultat par trois.",
    "es": "Primero calculamos la suma de los dos números. Después dividimos el resultado entre tres.",
    "zh": "首先我们计算两个数的和。然后把结果除以三，得到四个苹果。",
    "ja": "まず二つの数の和を計算します。次に結果を三で割ると、りんごは四つです。",
    "ru": "Сначала найдём сумму двух чисел. Затем разделим результат на три и получим четыре яблока.",
}


@functools.lru_cache
def consistency(language: str = "en", among: tuple[str, ...] | None = None) -> Consistency:
    reward = Consistency(language, among=among)
    reward.setup()
    return reward


def test_language_of_a_text():
    reward = consistency()
    assert reward(ENGLISH) == 1.0
    for text in OTHERS.values():
        assert reward(text) == 0.0
        assert 0 < (reward(f"{ENGLISH}\n{text}") or 0) < 1
    assert consistency("zh")(OTHERS["zh"]) == 1.0
    switching = "So we first add the two numbers, 然后 we divide the sum by three, 得到 four apples."
    assert 0.8 < (reward(switching) or 0) < 1
    assert [reward(switching) for _ in range(3)] == [reward(switching)] * 3


def test_code_formulas_and_numbers_have_no_language():
    reward = consistency()
    code = "```python\nfür_alle = [größe for größe in die_liste if größe ist klein]\n```"
    formulas = "$x + \\text{die Summe aller Zahlen}$ \\[ \\alpha = 3 \\] 3 + 4 = 7 α n <think>"
    assert reward(f"{ENGLISH}\n{code}\n{formulas}") == 1.0
    assert reward(f"{code} {formulas} 42") is None
    assert reward("") is None


def test_languages_to_choose_from():
    assert consistency("en", ("en", "zh"))("Wait, no. Hmm, let me see: yes!") == 1.0
    with pytest.raises(ValueError, match=r"\['xx'\] unknown"):
        Consistency(among=["xx"]).setup()


SCHEMA = {
    "type": "object",
    "properties": {"n": {"$ref": "#/$defs/n"}},
    "required": ["n"],
    "$defs": {"n": {"minimum": 3}},
}


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ('{"n": 3}', 1.0),
        ('{"n": 2}', 0.25),
        ('First {"n": 1}, then {"n": 4}.', 1.0),
        ('Say {"n": 4}:\n```json\n{"n": 1}\n```\n```\n{"m": {"n": 5}}\n```\nDone {"n": 4}', 0.25),
        ('```json\n{"n": 4\n```\n{"n": 4}', 0.0),
        ('{"m": {"n": 4}} in f(x[0])', 0.25),
        ('{"n": NaN}', 0.0),
        ("[" * 100_000, 0.0),
        ("none", 0.0),
    ],
)
def test_json_under_a_schema(text: str, score: float):
    for schema in (SCHEMA, json.dumps(SCHEMA), [SCHEMA], [json.dumps(SCHEMA)]):
        assert json_schema.valid([text], schema, parsed=0.25) == [score]


def test_schemas_that_are_missing_wrong_or_elsewhere(monkeypatch: pytest.MonkeyPatch):
    opened: list[Any] = []
    monkeypatch.setattr("urllib.request.urlopen", lambda *args, **kwargs: opened.append(args))
    assert json_schema.valid(["{}"], [None]) == [None]
    with pytest.raises(SchemaError):
        json_schema.valid(["{}"], {"type": "thing"})
    for elsewhere in ("http://127.0.0.1:9/schema.json", "file:///etc/passwd", "other.json"):
        with pytest.raises(ValueError, match="is not within it"):
            json_schema.valid(["{}"], {"$ref": elsewhere})
    assert not opened


@settings(max_examples=50)
@given(st.text(alphabet='{}[]",:1a`\n ', max_size=40))
def test_nothing_a_policy_writes_is_an_error(text: str):
    for function in (boxed, tags, functools.partial(json_schema.valid, schema=SCHEMA)):
        assert function([text])[0] is not None
    choice.accuracy([text], ["A"], choices=[["a", "b"]])


@pytest.mark.parametrize(
    "text", ["answer ", "answer\n", "\\boxed{", "\\(", "\\[", "$$a", "```\n", "<think>", "[1,", '{"a":', '["', "{", " "]
)
def test_no_text_takes_long(text: str):
    text = text * (60_000 // len(text))
    started = time.perf_counter()
    choice.accuracy([text], ["A"], choices=[["a", "b"]])
    for function in (boxed, tags, functools.partial(json_schema.valid, schema=SCHEMA)):
        function([text])
    match.exact([text], ["a"], ignore=["case", "punctuation", "articles", "whitespace"])
    repetition.ngrams([text], over="words")
    consistency()(text)
    assert time.perf_counter() - started < 10


ELSEWHERE = ("common", "math", "code")
"""Modules without rewards, or whose rewards have pages of their own."""


def builtins() -> list[str]:
    found = []
    for path in sorted((ROOT / "rewards").glob("*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body if path.stem not in ELSEWHERE else ():
            members = node.body if isinstance(node, ast.ClassDef) else []
            called = next((m for m in members if getattr(m, "name", "") == "__call__"), node)
            name = getattr(node, "name", "_")
            if not isinstance(called, ast.FunctionDef | ast.AsyncFunctionDef) or name.startswith("_"):
                continue
            makes_one = isinstance(called.returns, ast.Name) and called.returns.id == "Reward"
            if makes_one or {"completion", "completions"} & {a.arg for a in called.args.args}:
                found.append(f"rewards.{path.stem}:{name}")
    return found


PAGE = (ROOT / "docs/rewards-builtin.md").read_text(encoding="utf-8")
ROWS = {cells[1].strip(" `"): cells for line in PAGE.splitlines() if len(cells := line.split("|")) == 6}


def test_the_table_has_every_builtin():
    assert set(ROWS) == {*builtins(), "plugin", "---", "rewards.math:…", "rewards.code:passes"}
    assert "(rewards-math.md)" in PAGE
    assert "(rewards-code.md)" in PAGE


@pytest.mark.parametrize("name", builtins())
def test_the_table_has_every_argument_with_its_default(name: str):
    module, _, attribute = name.partition(":")
    parameters = dict(inspect.signature(getattr(importlib.import_module(module), attribute)).parameters)
    named: dict[str, Any] = {}
    for entry in re.findall(r"`([^`]+)`", ROWS[name][4]):
        key, colon, value = entry.partition(": ")
        assert key in parameters, f"{name} has no argument {key}"
        named[key] = parameters[key].default
        if colon:
            written = yaml.safe_load(value)
            default = list(named[key]) if isinstance(named[key], tuple) else named[key]
            assert written == default, f"{name}: {key}"
        else:
            assert named[key] is inspect.Parameter.empty or isinstance(named[key], str)
    settings_of = {n for n, p in parameters.items() if p.kind is inspect.Parameter.KEYWORD_ONLY}
    assert settings_of <= set(named), f"the row of {name} lacks arguments"


def test_the_examples_are_valid():
    block = re.search(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
    assert block is not None
    examples = [RewardSpec(**entry) for entry in yaml.safe_load(block[1])["rewards"]]
    assert [e.plugin for e in examples] == [name for name in ROWS if name in builtins()]
    for example in examples:
        module, _, attribute = example.plugin.partition(":")
        parameters = inspect.signature(getattr(importlib.import_module(module), attribute)).parameters
        assert set(example.arguments) <= set(parameters)
