"""The code reward: shapes of tests, finding the program, comparing, and what does not count as passing."""

from __future__ import annotations

import json
from typing import Any

import pytest

from rewards import sandbox
from rewards.code import extract_program, passes, same_output, same_value
from rewards.sandbox import SandboxUnavailable

try:
    sandbox.run("pass")
except SandboxUnavailable as error:
    pytest.skip(f"no sandbox here: {error}", allow_module_level=True)

DOUBLE = "```python\nprint(int(input()) * 2)\n```"
PAIRS = [{"input": "1\n", "output": "2\n"}, {"input": "5", "output": "10"}]
FUNCTION = "```python\ndef f(a, b):\n    return a + b\n```"


def scored(completion: Any, tests: Any, **settings: Any) -> tuple[float | None, str | None]:
    """One completion's score and verdict."""
    logged: dict[str, list[Any]] = {}
    (score,) = passes([completion], tests=[tests], log_extra=logged.__setitem__, **settings)
    assert list(logged) == ["code_verdict"]
    return score, logged["code_verdict"][0]


@pytest.mark.parametrize(
    "tests",
    [
        PAIRS,
        json.dumps(PAIRS),
        {"input": ["1", "5"], "output": ["2", "10"]},
        {"inputs": ["1", "5"], "outputs": ["2", "10"]},
        json.dumps({"inputs": ["1\n", "5\n"], "outputs": ["2\n", "10\n"]}),
        {"inputs": [["1"], ["5"]], "outputs": [["2"], ["10"]]},
        {"fn_name": None, "inputs": ["1"], "outputs": ["2"]},
    ],
)
def test_lines_to_read_and_print(tests: Any):
    assert scored(DOUBLE, tests) == (1.0, "passed")
    assert scored(DOUBLE.replace("* 2", "* 3"), tests) == (0.0, "wrong answer on test 1")


@pytest.mark.parametrize(
    ("tests", "fn_name"),
    [
        ([{"input": [1, 2], "output": 3}], ["f"]),
        ([{"input": "1\n2", "output": "3"}], ["f"]),
        ([{"input": [1, 2], "output": 3, "fn_name": "f"}], None),
        ({"fn_name": "f", "inputs": [[1, 2]], "outputs": [[3]]}, None),
        (json.dumps({"fn_name": "f", "inputs": [[1, 2], [[1], [2]]], "outputs": [3, [1, 2]]}), None),
        ([{"input": ["x", "y"], "output": "xy"}], "f"),
        ([{"input": '"x"\n"1"', "output": '"x1"'}], "f"),
    ],
)
def test_a_function_to_call(tests: Any, fn_name: Any):
    assert scored(FUNCTION, tests, fn_name=fn_name) == (1.0, "passed")
    assert scored(FUNCTION.replace("a + b", "None"), tests, fn_name=fn_name) == (0.0, "wrong answer on test 1")


@pytest.mark.parametrize(
    ("tests", "entry_point"),
    [
        ("assert f(1, 2) == 3", None),
        (["assert f(1, 2) == 3", "assert f('a', 'b') == 'ab'"], None),
        (json.dumps(["assert f(1, 2) == 3"]), None),
        ("def check(candidate):\n    assert candidate(1, 2) == 3\n", ["f"]),
        ("def check(candidate):\n    assert candidate(1, 2) == 3\ncheck(f)", None),
        ("def test_it():\n    assert f(1, 2) == 3\n", None),
    ],
)
def test_code_to_run_after_it(tests: Any, entry_point: Any):
    assert scored(FUNCTION, tests, entry_point=entry_point) == (1.0, "passed")
    wrong = scored(FUNCTION.replace("a + b", "None"), tests, entry_point=entry_point)
    assert wrong == (0.0, "error on test 1: AssertionError")


def test_rows_and_completions_that_have_nothing():
    for tests in (None, "", [], "[]", {}):
        assert scored(DOUBLE, tests) == (None, None)
    assert scored("I do not know", PAIRS) == (0.0, "no program")
    assert scored("```python\nprint(2)", PAIRS) == (0.0, "no program")
    assert scored("", PAIRS) == (0.0, "no program")
    assert scored([{"role": "user", "content": "?"}, {"role": "assistant", "content": DOUBLE}], PAIRS)[0] == 1.0


def test_several_completions_each_with_its_row():
    completions = [DOUBLE, FUNCTION, FUNCTION, "none"]
    rows: dict[str, Any] = {"fn_name": ["", "f", None, ""], "entry_point": [None, None, "f", None]}
    tests = [PAIRS, [{"input": [1, 2], "output": 3}], "def check(c): assert c(1, 2) == 3", None]
    assert passes(completions, tests=tests, answer=[1, 2, 3, 4], **rows) == [1.0, 1.0, 1.0, None]


@pytest.mark.parametrize(
    ("tests", "entry_point", "says"),
    [
        ({"inputs": ["1"], "outputs": []}, None, "of one length"),
        ({"inputs": ["1"]}, None, "of one length"),
        ([{"input": "1"}], None, "mappings with input and output"),
        (["assert 1", {"input": "1", "output": "2"}], None, "mappings with input and output"),
        ("def check(candidate): assert candidate", None, "entry_point"),
        (7, None, "int is no kind of tests"),
    ],
)
def test_tests_that_make_no_sense_are_refused(tests: Any, entry_point: Any, says: str):
    with pytest.raises(ValueError, match=says):
        scored(FUNCTION, tests, entry_point=entry_point)


@pytest.mark.parametrize("setting", [{"score": "mean"}, {"extract": "middle"}, {"max_tests": 0}, {"runner": "docker"}])
def test_settings_that_make_no_sense_are_refused(setting: dict[str, Any]):
    with pytest.raises(ValueError, match=next(iter(setting))):
        scored(DOUBLE, PAIRS, **setting)


THIRDS = [{"input": str(i), "output": str(2 * i)} for i in range(3)]


def test_fraction_goes_on_after_a_failure_and_all_stops():
    completion = "```python\nn = int(input())\nprint(0 if n == 1 else n * 2)\n```"
    assert scored(completion, THIRDS, score="fraction") == (pytest.approx(2 / 3), "wrong answer on test 2")
    assert scored(completion, THIRDS) == (0.0, "wrong answer on test 2")
    assert scored(completion, THIRDS, max_tests=1) == (1.0, "passed")
    assert scored(completion, THIRDS[::2], score="fraction") == (1.0, "passed")


def test_verdicts_say_what_happened():
    assert scored("```\n1/0\n```", PAIRS)[1] == "error on test 1: ZeroDivisionError: division by zero"
    assert scored("```\nwhile 1: pass\n```", PAIRS, seconds=0.5)[1] == "timeout on test 1"
    assert scored("```\nx = bytearray(1 << 40)\n```", PAIRS)[1] == "memory on test 1"
    assert scored("```\nwhile 1: print(1)\n```", PAIRS, output_kib=1)[1] == "output on test 1"
    assert scored("```\nimport os; os._exit(0)\n```", "f()")[1] == "error on test 1: it ended early with exit code 0"


def test_the_time_of_all_tests_is_limited():
    slow = "```python\nimport time\nif input() != '0': time.sleep(0.6)\nprint(0)\n```"
    tests = [{"input": str(i), "output": "0"} for i in range(9)]
    score, verdict = scored(slow, tests, score="fraction", total_seconds=1.0)
    assert (score, verdict) == (pytest.approx(2 / 9), "timeout on test 3")


def test_which_block_is_the_program():
    text = "```python\nfirst\n```\nor\n```\nplain\n```\nor\n  ```Python title\nlast\n  ```\n```bash\nls\n```"
    assert extract_program(text) == "last\n"
    assert extract_program(text, "first") == "first\n"
    assert extract_program(text, "whole") == text
    assert extract_program("```\nplain\n```") == "plain\n"
    assert extract_program("```python\ns = '```'\n```") == "s = '```'\n"
    assert extract_program("```\ncut") is None


def test_a_prelude_comes_before_the_program():
    completion = "```python\ndef f(a: List[int]): return a\n```"
    settings: dict[str, Any] = {"fn_name": "f", "prelude": "from typing import *"}
    assert scored(completion, [{"input": [[1]], "output": [1]}], **settings) == (1.0, "passed")


@pytest.mark.parametrize(
    ("output", "expected", "tolerance", "same"),
    [
        ("1 2\n3", "1 2\n3\n", 0.0, True),
        ("1  2 \n3\n\n", "1 2\n3", 0.0, True),
        ("1\r\n2\r\n", "1\n2\n", 0.0, True),
        ("1 2 3", "1 2\n3", 0.0, False),
        ("1\n\n2", "1\n2", 0.0, False),
        ("", "1", 0.0, False),
        ("", "", 0.0, True),
        ("0.33333", "0.33334", 0.0, False),
        ("0.33333", "0.33334", 1e-4, True),
        ("1000000", "1000001", 1e-4, True),
        ("yes 1.0", "yes 1", 1e-9, True),
        ("nan", "1", 1.0, False),
        ("inf", "1", 1.0, False),
        ("1", "inf", 1.0, False),
    ],
)
def test_comparing_output(output: str, expected: str, tolerance: float, same: bool):
    assert same_output(output, expected, tolerance) is same


@pytest.mark.parametrize(
    ("value", "expected", "tolerance", "same"),
    [
        ([1, [2.0]], [1, [2]], 0.0, True),
        ({"a": [1]}, {"a": [1]}, 0.0, True),
        ({"a": 1}, {"b": 1}, 0.0, False),
        ([1], [1, 2], 0.0, False),
        (True, 1, 0.0, False),
        (1, True, 0.0, False),
        ("1", 1, 0.0, False),
        (None, None, 0.0, True),
        (0.1 + 0.2, 0.3, 0.0, False),
        ([0.1 + 0.2], [0.3], 1e-9, True),
        (10**400, 10**400, 1e-9, True),
        (10**400, 10**400 + 1, 1e-9, False),
    ],
)
def test_comparing_values(value: Any, expected: Any, tolerance: float, same: bool):
    assert same_value(value, expected, tolerance) is same


@pytest.mark.parametrize(
    "body",
    [
        "import sys\nsys.exit(0)",
        "import os\nos._exit(0)",
        "class Same:\n    def __eq__(self, other): return True\ndef f(a, b): return Same()",
        "import json\njson.dumps = lambda x: '3 or anything'\ndef f(a, b): return 0",
        "import os\nfor fd in range(3, 64):\n    try: os.write(fd, b'true')\n    except OSError: pass\nos._exit(0)",
        "def f(a, b): return [3, 3]",
        "x = []\nfor _ in range(500): x = [x]\nimport json\njson.dumps = lambda _: '[' * 60000\ndef f(a, b): return x",
        "def f(a, b): return 10 ** 5000",
        "def f(a, b): return float('nan')",
        "class f(int):\n    def __new__(cls, a, b): return int.__new__(cls, 4)\n    def __repr__(self): return '3'",
    ],
)
def test_a_function_s_result_cannot_be_forged(body: str):
    completion = f"```python\n{body}\n```"
    assert scored(completion, [{"input": [1, 2], "output": 3}], fn_name="f")[0] == 0.0


def test_it_is_marked_as_independent():
    assert passes.__dict__["independent"] is True


def test_tests_that_are_no_python_are_an_error_not_a_zero():
    program = "```python\ndef f(x):\n    return x\n```"
    for tests in ("assert f(1 == 1", ["assert f(1) == 1", "assert f(1 == 1"]):
        with pytest.raises(ValueError, match="the tests are no Python"):
            passes([program], tests=[tests])
