"""The forms a reward may have, how each is called, and what may come back."""

from __future__ import annotations

import json
import re
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from hybrid_rl.cluster.inline import ThisProcess
from hybrid_rl.config import ConfigError, RewardConfig, RewardSpec
from hybrid_rl.reward import RewardHost, RewardPool, plugin
from hybrid_rl.reward.given import taken
from hybrid_rl.types import Completion, Outcome, Prompt

PLUGINS = """
    import asyncio, os, time
    from fractions import Fraction
    from functools import partial
    from typing import Literal

    import numpy as np

    def lists(completions, prompts, prompt, completion_ids, finish_reason, answer):
        assert prompts == prompt
        return [float(len(ids)) for ids in completion_ids]

    def items(completion, prompt, completion_ids, finish_reason, answer):
        return (completion == answer) + (prompt == "p") + len(completion_ids) + (finish_reason == "stop")

    async def asynchronous_lists(completions, **columns):
        await asyncio.sleep(0)
        return [1.0 for _ in completions]

    async def asynchronous_items(completion):
        if completion == "hangs":
            await asyncio.sleep(60)
        if completion == "will not be stopped":
            while True:
                try:
                    await asyncio.sleep(60)
                except asyncio.CancelledError:
                    pass
        if completion == "blocks":
            time.sleep(60)
        if completion == "exits":
            raise SystemExit(4)
        if completion == "times out by itself":
            async with asyncio.timeout(0.01):
                await asyncio.sleep(60)
        await asyncio.sleep(0.2)
        return 1.0

    class Counter:
        def __init__(self, start, step=1):
            self.count, self.step = start, step

        def setup(self):
            self.count += 100

        def __call__(self, completion):
            self.count += self.step
            return self.count

        def close(self):
            with open("closed", "a") as file:
                file.write("closed ")

    class AsyncJudge:
        async def setup(self):
            self.ready = asyncio.get_running_loop()

        async def __call__(self, completion):
            return float(self.ready is asyncio.get_running_loop())

    class BadSetup:
        def setup(self):
            raise OSError("no model")

        def __call__(self, completions):
            return [1.0] * len(completions)

    class NotCalled:
        pass

    class SetUpOnce:
        def __init__(self, at):
            self.at = at

        def setup(self):
            if os.path.exists(self.at):
                os._exit(3)
            open(self.at, "w").close()

        def __call__(self, completion):
            return 1.0

    def ended(finish_reason):
        return [float(r == "stop") for r in finish_reason]

    def maker(scale, offset=0.0):
        def reward(completions, **columns):
            return [scale * len(c) + offset for c in completions]
        return reward

    def makes_nothing(scale):
        return scale

    def with_argument(completions, answer, factor=2.0, **columns):
        return [factor * (c == a) for c, a in zip(completions, answer)]

    def with_choice(completions, which: Literal["first", "last"] = "last"):
        return [float(which == "first")] * len(completions)

    def fills_a_column(completions, answer):
        return [float(c == answer) for c in completions]

    def numbers(completions, kind):
        return {
            "numpy": lambda: np.array([1.0, 2.0, 3.0], dtype=np.float32),
            "numpy whole": lambda: np.arange(1, 4),
            "numpy scalars": lambda: [np.float16(1), np.int64(2), np.float64(3)],
            "torch": lambda: __import__("torch").tensor([1.0, 2.0, 3.0], requires_grad=True).bfloat16(),
            "torch scalars": lambda: [__import__("torch").tensor(i + 1) for i in range(3)],
            "fractions": lambda: (Fraction(1), Fraction(2), Fraction(3)),
            "truth": lambda: [True, np.bool_(True), False],
            "none": lambda: [None, 1, None],
            "matrix": lambda: np.ones((3, 1)),
            "one number": lambda: 1.0,
            "text": lambda: "123",
            "texts": lambda: ["1", "2", "3"],
            "generator": lambda: (float(i) for i in range(3)),
            "dictionary": lambda: {0: 1.0, 1: 1.0, 2: 1.0},
            "nothing": lambda: None,
            "too few": lambda: [1.0, 2.0],
            "too many": lambda: [1.0] * 4,
            "huge": lambda: [1.0] * 3_000_000,
            "one is not finite": lambda: np.array([1.0, np.nan, 3.0]),
            "one is no number": lambda: [1.0, "2", 3.0],
            "one is too large": lambda: [1, 10**400, 3],
        }[kind[0]]()

    of_three = partial(numbers, kind=["fractions"])

    def logs(completions, log_extra, log_metric):
        log_extra("length", np.array([len(c) for c in completions]))
        log_extra("said", [c * 3000 for c in completions])
        log_extra("\\ud800", [None] * len(completions))
        log_extra("number", [float("nan"), 10**5000][: len(completions)])
        log_metric("mean length", np.mean([len(c) for c in completions]))
        return [1.0] * len(completions)

    def logs_of_one(completion, log_extra, log_metric):
        log_extra("upper", completion.upper())
        log_metric("length", len(completion))
        if completion == "bad":
            raise ValueError("after it was logged")
        return 1.0

    def logs_too_few(completions, log_extra):
        log_extra("length", [1])
        return [1.0] * len(completions)

    def seen(completions, seen_at):
        with open(seen_at, "a") as file:
            file.write("".join(completions) + " ")
        if "hangs" in completions:
            time.sleep(60)
        if "exits" in completions:
            os._exit(1)
        return [1.0] * len(completions)

    def is_chat(completion, prompt):
        return not isinstance(completion, str) and completion[0]["role"] + prompt[0]["role"] == "assistantuser"

    def independent(completions, seen_at):
        return seen(completions, seen_at)

    independent.independent = True

    def of_the_group(completions, seen_at):
        return seen(completions, seen_at)

    of_the_group.independent = False

    def of_either(completions, seen_at):
        return seen(completions, seen_at)
"""
Returned = Callable[[str], list[dict[str, Any]]]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("forms") / "forms.py"
    path.write_text(textwrap.dedent(PLUGINS))
    return path


@pytest.fixture
def host(path: Path) -> Iterator[Callable[..., RewardHost]]:
    """Start a host for one reward."""
    started: list[RewardHost] = []

    def start(name: str, timeout: float = 5.0, workers: int = 1, **arguments: Any) -> RewardHost:
        plugin = name if ":" in name else f"{path}:{name}"
        spec = RewardSpec(plugin=plugin, name=name, arguments=arguments)
        started.append(RewardHost([spec], RewardConfig(timeout=timeout, workers=workers)))
        return started[-1]

    yield start
    for each in started:
        each.close()


def call(path: Path, name: str, given: dict[str, list[Any]], **arguments: Any) -> list[dict[str, Any]]:
    """What a worker says, as its messages have it."""
    said = plugin.score(f"{path}:{name}", json.dumps(arguments), given, 5.0)
    return [json.loads(json.dumps(each)) for each in said]


def group(*completions: str, **columns: Any) -> dict[str, list[Any]]:
    size = len(completions)
    given = {name: [value] * size for name, value in columns.items()}
    return {
        **given,
        "prompts": ["p"] * size,
        "completions": list(completions),
        "completion_ids": [[7] * (i + 1) for i in range(size)],
        "finish_reason": ["stop"] * size,
    }


@pytest.mark.parametrize(
    ("name", "arguments", "expected"),
    [
        ("lists", {}, [1.0, 2.0, 3.0]),
        ("items", {}, [4.0, 4.0, 5.0]),
        ("asynchronous_lists", {}, [1.0, 1.0, 1.0]),
        ("asynchronous_items", {}, [1.0, 1.0, 1.0]),
        ("Counter", {"start": 5, "step": 2}, [107.0, 109.0, 111.0]),
        ("AsyncJudge", {}, [1.0, 1.0, 1.0]),
        ("maker", {"scale": 2.0, "offset": 1.0}, [3.0, 5.0, 3.0]),
        ("with_argument", {}, [2.0, 0.0, 0.0]),
        ("with_argument", {"factor": 0.5}, [0.5, 0.0, 0.0]),
        ("fills_a_column", {"answer": "bb"}, [0.0, 1.0, 0.0]),
        ("of_three", {}, [1.0, 2.0, 3.0]),
        ("ended", {}, [1.0, 1.0, 1.0]),
    ],
)
def test_forms(path: Path, name: str, arguments: dict[str, Any], expected: list[float]):
    """An argument that has the name of a column replaces it."""
    (found,) = plugin.check(f"{path}:{name}", json.dumps(arguments), ["answer", "prompt"])
    assert found["missing"] == []
    assert [said["score"] for said in call(path, name, group("a", "bb", "c", answer="a"), **arguments)] == expected


@pytest.mark.parametrize(
    ("name", "arguments", "said"),
    [
        ("lists", {"factr": 1}, "it takes no argument 'factr'; it has answer"),
        ("with_argument", {"factr": 1}, "it takes no argument 'factr'; it has answer, factor"),
        ("asynchronous_lists", {"completions": 1}, "it takes no argument 'completions'; it has none"),
        ("Counter", {"start": 1, "stop": 2}, "it takes no argument 'stop'; it has start, step"),
        ("with_choice", {"which": "middle"}, "argument which='middle': Input should be 'first' or 'last'"),
        ("Counter", {}, "missing 1 required positional argument: 'start'"),
        ("maker", {"scale": 1, "offst": 2}, "it takes no argument 'offst'; it has scale, offset"),
        ("makes_nothing", {"scale": 1}, "what it returns cannot be called"),
        ("BadSetup", {}, "no model"),
        ("NotCalled", {}, "cannot be called; it needs __call__"),
        ("nothing", {}, "has no function 'nothing'"),
        ("no_such_module:f", {}, "No module named 'no_such_module'"),
        ("nowhere.py:f", {}, "file nowhere.py does not exist"),
    ],
)
def test_what_cannot_be_used_is_refused_with_the_reason(path: Path, name: str, arguments: dict[str, Any], said: str):
    spec = name if ":" in name else f"{path}:{name}"
    with pytest.raises((TypeError, ValueError, OSError, ImportError), match=re.escape(said)):
        list(plugin.check(spec, json.dumps(arguments), ["prompt"]))


def test_entry_points_of_installed_packages_are_found_by_name(
    host: Callable[..., RewardHost], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    info = tmp_path / "their_rewards-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: their-rewards\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[hybrid_rl.rewards]\ntheirs = their_rewards:theirs\n")
    (tmp_path / "their_rewards.py").write_text("def theirs(completion):\n    return 7.0\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    both = RewardHost([RewardSpec(plugin="theirs"), RewardSpec(plugin="ours")], RewardConfig())
    try:
        with pytest.raises(ConfigError, match=r"'ours' is not of the form .* which offer theirs"):
            both.check([])
        assert [o.score for o in both.score(0, group("a"))] == [7.0]
    finally:
        both.close()


@pytest.fixture
def returned(path: Path) -> Returned:
    """What becomes of what `numbers` returns."""
    return lambda kind: call(path, "numbers", group("a", "b", "c", kind=kind))


@pytest.mark.parametrize("kind", ["numpy", "numpy whole", "numpy scalars", "torch", "torch scalars", "fractions"])
def test_numbers_of_any_library_are_scores(returned: Returned, kind: str):
    assert [said["score"] for said in returned(kind)] == [1.0, 2.0, 3.0]


def test_truth_is_a_score_and_none_is_not_applicable(returned: Returned):
    assert [said["score"] for said in returned("truth")] == [1.0, 1.0, 0.0]
    assert [said["score"] for said in returned("none")] == [None, 1.0, None]


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("one number", "returned float, no list of scores"),
        ("text", "returned str, no list of scores"),
        ("generator", "returned generator, no list of scores"),
        ("dictionary", "returned dict, no list of scores"),
        ("nothing", "returned NoneType, no list of scores"),
        ("too few", "returned 2 scores for 3 completions"),
        ("too many", "returned 4 scores for 3 completions"),
        ("huge", "returned 3000000 scores for 3 completions"),
        ("texts", "returned str where a number or None is due"),
        ("matrix", "returned list where a number or None is due"),
    ],
)
def test_what_is_no_list_of_scores_is_an_error_of_all(returned: Returned, kind: str, said: str):
    """Never called again one by one, where a list of the wrong length might pass for a right one."""
    assert all(said in each["error"] for each in returned(kind))


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("one is not finite", "returned a number that is not finite: nan"),
        ("one is no number", "returned str where a number or None is due"),
        ("one is too large", "OverflowError"),
    ],
)
def test_a_score_that_is_none_costs_its_completion(returned: Returned, kind: str, said: str):
    first, second, third = returned(kind)
    assert (first["score"], third["score"]) == (1.0, 3.0)
    assert said in second["error"]


def test_what_is_logged_comes_with_the_scores(path: Path):
    first, second = call(path, "logs", group("a", "bb"))
    assert first["extra"] == {"length": 1, "said": "a" * 2000, "?": None, "number": "nan"}
    assert second["extra"].pop("number") == hex(10**5000)[:2000]
    assert second["extra"] == {"length": 2, "said": "b" * 2000, "?": None}
    assert first["metrics"] == second["metrics"] == {"mean length": 1.5}
    with pytest.raises(ValueError, match="was given 1 values for 2 completions"):
        call(path, "logs_too_few", group("a", "b"))


def test_what_was_logged_before_an_error_is_kept(host: Callable[..., RewardHost]):
    first, bad = host("logs_of_one").score(0, group("a", "bad"))
    assert first == Outcome("score", 1.0, "", {"upper": "A"}, {"length": 1.0})
    said = "logs_of_one raised ValueError: after it was logged"
    assert bad == Outcome("error", None, said, {"upper": "BAD"}, {"length": 3.0})


def test_items_of_an_asynchronous_reward_wait_beside_each_other(host: Callable[..., RewardHost]):
    one = host("asynchronous_items", timeout=1.0)
    one.check([])
    started = time.monotonic()
    outcomes = one.score(0, group("a", "hangs", "times out by itself", "exits", *"bcdefgh"))
    assert time.monotonic() - started < 2.0
    assert [o.kind for o in outcomes[:4]] == ["score", "timeout", "error", "error"]
    assert outcomes[1].detail == "asynchronous_items took more than reward.timeout=1 s"
    assert "TimeoutError" in outcomes[2].detail
    assert "SystemExit: 4" in outcomes[3].detail
    assert [o.score for o in outcomes[4:]] == [1.0] * 7


@pytest.mark.parametrize("bad", ["blocks", "will not be stopped"])
def test_an_item_that_stops_its_loop_costs_only_itself(host: Callable[..., RewardHost], bad: str):
    one = host("asynchronous_items", timeout=0.3)
    one.check([])
    started = time.monotonic()
    outcomes = one.score(0, group("a", bad, "b"))
    assert [o.kind for o in outcomes] == ["score", "timeout", "score"]
    assert time.monotonic() - started < 2 * (0.3 + 0.5) + 1.0, "the group's limit, and its own"


@pytest.mark.parametrize(
    ("name", "calls", "kinds", "limits"),
    [
        ("independent", "a hangs b ", ["score", "timeout", "score"], 1),
        ("of_either", "ahangsb a hangs b ", ["score", "timeout", "score"], 2),
        ("of_the_group", "ahangsb ", ["timeout"] * 3, 1),
    ],
)
def test_what_a_hanging_completion_costs_the_others(
    host: Callable[..., RewardHost], tmp_path: Path, name: str, calls: str, kinds: list[str], limits: int
):
    one = host(name, timeout=0.3, seen_at=str(tmp_path / "seen"))
    one.check([])
    started = time.monotonic()
    outcomes = one.score(0, group("a", "hangs", "b"))
    assert time.monotonic() - started < limits * (0.3 + 0.5) + 1.0
    assert [o.kind for o in outcomes] == kinds
    assert (tmp_path / "seen").read_text() == calls


def test_a_list_reward_that_hangs_is_not_waited_for_again_and_again(
    host: Callable[..., RewardHost], tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    one = host("of_either", timeout=0.2, seen_at=str(tmp_path / "seen"))
    one.check([])
    assert [o.kind for o in one.score(0, group("a", "hangs"))] == ["score", "timeout"]
    assert [o.kind for o in one.score(0, group("a", *["hangs"] * 7))] == ["score"] + ["timeout"] * 7
    assert (tmp_path / "seen").read_text().split()[3:] == ["a" + "hangs" * 7, "a", *["hangs"] * 4]
    assert caplog.text.count("independent = False") == 1


def test_no_reward_pays_for_the_setup_of_another(path: Path, tmp_path: Path):
    bad = RewardSpec(plugin=f"{path}:SetUpOnce", arguments={"at": str(tmp_path / "begun")})
    both = RewardHost([bad, RewardSpec(plugin=f"{path}:items")], RewardConfig(workers=1))
    try:
        both.check(["answer"])
        assert [o.kind for o in both.score(1, group("a", answer="a"))] == ["score"]
        assert [o.kind for o in both.score(0, group("a"))] == ["crash"]
        assert [o.kind for o in both.score(1, group("a", answer="a"))] == ["score"]
    finally:
        both.close()


@pytest.mark.parametrize(
    ("name", "sent"),
    [
        ("items", {"answer", "completions", "prompts", "completion_ids", "finish_reason"}),
        ("of_either", {"completions"}),
        ("fills_a_column", {"answer", "completions"}),
        ("asynchronous_lists", {"answer", "other", "completions", "prompts", "completion_ids", "finish_reason"}),
    ],
)
def test_a_reward_is_sent_what_it_takes(path: Path, name: str, sent: set[str]):
    arguments = json.dumps({"seen_at": "x"} if name == "of_either" else {})
    (found,) = plugin.check(f"{path}:{name}", arguments, ["answer"])
    assert taken(group("a", answer="a", other=1), found["takes"]).keys() == sent


def test_a_crash_is_blamed_on_a_completion_whose_process_had_served_no_other(
    host: Callable[..., RewardHost], tmp_path: Path
):
    one = host("independent", seen_at=str(tmp_path / "seen"))
    assert [o.kind for o in one.score(0, group("a", "exits", "b"))] == ["score", "crash", "score"]
    assert (tmp_path / "seen").read_text() == "a exits exits b "


def test_close_is_called_once_a_process(
    host: Callable[..., RewardHost], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    one = host("Counter", start=0)
    one.score(0, group("a", "b"))
    one.score(0, group("a", "b"))
    one.close()
    assert (tmp_path / "closed").read_text() == "closed " * 2, (
        "of the one that tried it out, and of the one that served"
    )


@pytest.mark.parametrize("chat", [False, True])
def test_rewards_of_trl_get_chat_messages(path: Path, chat: bool):
    """Others get text, unless `data.chat` says otherwise."""
    specs = [
        RewardSpec(plugin="trl.rewards:accuracy_reward"),
        RewardSpec(plugin="trl.rewards:think_format_reward"),
        RewardSpec(
            plugin="trl.rewards:get_soft_overlong_punishment",
            arguments={"max_completion_len": 10, "soft_punish_cache": 4},
        ),
        RewardSpec(plugin=f"{path}:is_chat"),
    ]
    texts = [r"<think>so</think>\boxed{\frac{1}{2}}", r"\boxed{3}"]
    done = [Completion(t, tuple(range(n)), (0.0,) * n, "stop", 0) for t, n in zip(texts, (6, 8), strict=True)]
    prompt = Prompt("0", "p", (1,), {"prompt": "p", "solution": r"$\frac{1}{2}$"})
    pool = RewardPool(specs, RewardConfig(workers=1), ThisProcess(), chat=chat)
    try:
        pool.check(["prompt", "solution"])
        (scored,) = pool.score([prompt], [done]).groups
    finally:
        pool.close()
    assert [scored.scores(s.name) for s in specs] == [(1.0, 0.0), (1.0, 0.0), (0.0, -0.5), (float(chat),) * 2]
    assert scored.outcomes[specs[0].name][0].extra["solution"] == r"$\frac{1}{2}$"
