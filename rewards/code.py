"""Whether the program in a completion passes tests, run in `rewards.sandbox`.

The `tests` column says what is asked of the program: lines to read and print, a function to call, or code to run after
it. docs/rewards-code.md has the columns, the settings and what the sandbox keeps out.
"""

from __future__ import annotations

import ast
import json
import math
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from rewards import sandbox
from rewards.common import independent, text_of
from rewards.sandbox import Call, Check, Result, Runner

_BLOCK = re.compile(r"^[ \t]*```[ \t]*([\w+-]*)[^\n]*\n(.*?)^[ \t]*```[ \t]*$", re.MULTILINE | re.DOTALL)
_PYTHON = {"python", "python3", "py"}


@independent
def passes(
    completions: list[Any],
    tests: list[Any],
    fn_name: Any = None,
    entry_point: Any = None,
    log_extra: Callable[[str, list[Any]], None] | None = None,
    *,
    score: Literal["all", "fraction"] = "all",
    extract: Literal["first", "last", "whole"] = "last",
    prelude: str = "",
    tolerance: float = 0.0,
    max_tests: int = 20,
    seconds: float = 5.0,
    total_seconds: float = 20.0,
    memory_mib: int = 512,
    output_kib: int = 64,
    packages: bool = False,
    runner: Runner = "landlock",
    image: str = "",
    **columns: Any,
) -> list[float | None]:
    """1.0 where the completion's program passes its tests, 0.0 where it does not or there is no program, and `None`
    where the row has no tests.

    `score`: `all` stops at the first test that fails; `fraction` is the share of the tests that pass. `extract`: the
    `last` or `first` fenced block, Python's before others, or the `whole` completion. `prelude` is code put before the
    program. The first `max_tests` tests are run, each at most `seconds`, and all together `total_seconds`, after which
    the rest count as failed. Numbers may differ by `tolerance`, absolutely or relatively.

    Raises `ValueError` for a setting or tests that make no sense, and `sandbox.SandboxUnavailable`.
    """
    if score not in ("all", "fraction"):
        raise ValueError(f"score {score!r} is neither all nor fraction")
    if max_tests < 1:
        raise ValueError(f"max_tests {max_tests} must be at least 1")
    run = partial(
        sandbox.run, memory_mib=memory_mib, output_kib=output_kib, packages=packages, runner=runner, image=image
    )
    scores: list[float | None] = []
    verdicts: list[str | None] = []
    for i, completion in enumerate(completions):
        cases = _cases(tests[i], _of_row(fn_name, i), _of_row(entry_point, i) or None)[:max_tests]
        program = extract_program(text_of(completion), extract)
        if not cases:
            value, verdict = None, None
        elif program is None:
            value, verdict = 0.0, "no program"
        else:
            timed = partial(_run_all, cases, f"{prelude}\n{program}", run, tolerance, seconds, total_seconds)
            passed, verdict = timed(stop_at_failure=score == "all")
            value = float(passed == len(cases)) if score == "all" else passed / len(cases)
        scores.append(value)
        verdicts.append(verdict)
    if log_extra is not None:
        log_extra("code_verdict", verdicts)
    return scores


def extract_program(text: str, which: Literal["first", "last", "whole"] = "last") -> str | None:
    """The program in a completion; `None` without a complete fenced block."""
    if which not in ("first", "last", "whole"):
        raise ValueError(f"extract {which!r} is none of first, last and whole")
    if which == "whole":
        return text
    blocks = [(language.lower(), code) for language, code in _BLOCK.findall(text)]
    blocks = [b for b in blocks if b[0] in _PYTHON] or blocks
    return blocks[0 if which == "first" else -1][1] if blocks else None


@dataclass(frozen=True)
class _Case:
    """One test: what is run beside the program, and what must come of it."""

    stdin: str = ""
    then: Call | Check | None = None
    expected: tuple[Any, ...] = ()
    """Values of which the outcome must equal one. None for a check, which decides by itself."""


def _run_all(
    cases: Sequence[_Case],
    program: str,
    run: Callable[..., Result],
    tolerance: float,
    seconds: float,
    total_seconds: float,
    *,
    stop_at_failure: bool,
) -> tuple[int, str]:
    """Returns how many cases passed, and the verdict: that of the first that did not."""
    until, passed, verdict = time.monotonic() + total_seconds, 0, "passed"
    for number, case in enumerate(cases, 1):
        left = until - time.monotonic()
        if left <= 0:
            return passed, f"total_seconds over before test {number}" if verdict == "passed" else verdict
        result = run(program, stdin=case.stdin, then=case.then, seconds=min(seconds, left))
        failure = _failure(case, result, tolerance)
        if failure is None:
            passed += 1
            continue
        if verdict == "passed":
            what, detail = failure
            verdict = f"{what} on test {number}" + (f": {detail}" if detail else "")
        if stop_at_failure:
            break
    return passed, verdict


def _failure(case: _Case, result: Result, tolerance: float) -> tuple[str, str] | None:
    """What went wrong and its detail; `None` if the case passed."""
    if result.status == "error":
        said = result.stderr.strip().splitlines()
        return "error", said[-1][:200] if said else f"it ended early with exit code {result.exit_code}"
    if result.status != "ok":
        return result.status, ""
    if isinstance(case.then, Check):
        return None
    try:
        if case.then is None:
            right = any(same_output(result.stdout, expected, tolerance) for expected in case.expected)
        else:
            value = json.loads(result.stdout)
            right = any(same_value(value, expected, tolerance) for expected in case.expected)
    except (ValueError, RecursionError):  # not the sandbox's JSON, or nested too deep
        right = False
    return None if right else ("wrong answer", "")


def same_output(output: str, expected: str, tolerance: float = 0.0) -> bool:
    """Whether two texts have the same words on each line; blank lines at the end do not count."""
    lines, wanted = ([line.split() for line in text.rstrip().splitlines()] for text in (output, expected))
    return [len(line) for line in lines] == [len(line) for line in wanted] and all(
        word == other or (tolerance > 0 and _close(_number(word), _number(other), tolerance))
        for line, wanted_line in zip(lines, wanted, strict=True)
        for word, other in zip(line, wanted_line, strict=True)
    )


def same_value(value: Any, expected: Any, tolerance: float = 0.0) -> bool:
    """Whether two values of JSON are equal. A boolean equals no number."""
    if isinstance(value, list) and isinstance(expected, list):
        return len(value) == len(expected) and all(map(partial(same_value, tolerance=tolerance), value, expected))
    if isinstance(value, dict) and isinstance(expected, dict):
        return value.keys() == expected.keys() and all(same_value(value[k], expected[k], tolerance) for k in value)
    if isinstance(value, bool) or isinstance(expected, bool):
        return value is expected
    if isinstance(value, int | float) and isinstance(expected, int | float):
        return value == expected or (tolerance > 0 and _close(value, expected, tolerance))
    return value == expected


def _close(value: float | None, expected: float | None, tolerance: float) -> bool:
    if value is None or expected is None:
        return False
    try:
        return math.isclose(value, expected, rel_tol=tolerance, abs_tol=tolerance)
    except OverflowError:  # an integer beyond the floats
        return False


def _number(word: str) -> float | None:
    try:
        return float(word)
    except ValueError:
        return None


def _of_row(column: Any, i: int) -> Any:
    """A column's value for a completion; what is set in `arguments` instead is the same for all."""
    return column[i] if isinstance(column, list) else column


def _cases(tests: Any, fn_name: str | None, entry_point: str | None) -> list[_Case]:
    """A row's tests, of any of the shapes in docs/rewards-code.md."""
    tests = _parsed(tests)
    if not tests:
        return []
    if isinstance(tests, str):
        tests = [tests]
    if isinstance(tests, dict):
        fn_name = tests.get("fn_name") or fn_name
        inputs, outputs = (_parsed(tests.get(key, tests.get(f"{key}s"))) for key in ("input", "output"))
        if not isinstance(inputs, list) or not isinstance(outputs, list) or len(inputs) != len(outputs):
            raise ValueError("tests: a mapping needs inputs and outputs, lists of one length")
        # APPS puts a function's result in a list of one.
        return [_pair(i, o, fn_name, wrapped=True) for i, o in zip(inputs, outputs, strict=True)]
    if not isinstance(tests, list):
        raise ValueError(f"tests: {type(tests).__name__} is no kind of tests")
    if all(isinstance(test, str) for test in tests):
        return [_check(test, entry_point) for test in tests]
    if not all(isinstance(test, dict) and {"input", "output"} <= test.keys() for test in tests):
        raise ValueError("tests: a list is of code, or of mappings with input and output")
    return [_pair(test["input"], test["output"], test.get("fn_name") or fn_name) for test in tests]


def _pair(given: Any, expected: Any, fn_name: str | None, wrapped: bool = False) -> _Case:
    if not fn_name:
        # Lists of lines are found too.
        given, expected = ("\n".join(map(str, x)) if isinstance(x, list) else str(x) for x in (given, expected))
        return _Case(stdin=given, expected=(expected,))
    if isinstance(given, str):  # one argument of JSON a line
        arguments = [json.loads(line) for line in given.splitlines() if line.strip()]
    elif isinstance(given, list):
        arguments = given
    else:
        raise ValueError(f"tests: the input of {fn_name} is {type(given).__name__}, not a list of its arguments")
    # Text is the result itself or JSON of it.
    values = [expected] if not isinstance(expected, str) else [expected, _json_or(expected, expected)]
    if wrapped and isinstance(expected, list) and len(expected) == 1:
        values.append(expected[0])
    return _Case(then=Call(fn_name, arguments), expected=tuple(values))


def _check(tests: str, entry_point: str | None) -> _Case:
    if entry_point is None and re.search(r"^def check\(", tests, re.M) and not re.search(r"^check\(", tests, re.M):
        raise ValueError("tests: they define check(candidate); name the candidate in the column entry_point")
    try:
        ast.parse(tests)
    except SyntaxError as error:  # or every program would fail them
        raise ValueError(f"the tests are no Python: {error}") from None
    return _Case(then=Check(tests, entry_point))


def _parsed(tests: Any) -> Any:
    """Tests that are a JSON text of a list or mapping are that."""
    value = _json_or(tests, None) if isinstance(tests, str) else None
    return value if isinstance(value, list | dict) else tests


def _json_or(text: str, default: Any) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return default
