"""The authoring tools, as a user runs them, and the guide that shows them."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from hybrid_rl.cli import main
from hybrid_rl.config import RewardConfig, RewardSpec
from hybrid_rl.reward import RewardPool
from hybrid_rl.reward.trial import Row, Trial
from hybrid_rl.types import Completion, Prompt

GUIDE = Path(__file__).parents[2] / "docs" / "rewards.md"
PLUGINS = """
    import os, time

    def mixed(completion, answer, log_metric, log_extra):
        log_metric("length", len(completion))
        log_extra("extracted", completion)
        if completion == "hang": time.sleep(3600)
        if completion == "raise": raise KeyError("b[oo]m")
        if completion == "crash": os._exit(3)
        return None if completion == "none" else float(completion == answer)

    def whole(completions, answer, **columns):
        best = max(completions)
        return [float(c == best) for c in completions]

    def always_raises(completions, **columns):
        raise RuntimeError("broken")

    def always_hangs(completion):
        time.sleep(3600)

    def hangs_at_first(completions):
        # The first four groups.
        with open("calls", "a") as file:
            file.write("x")
        if os.path.getsize("calls") <= 4: time.sleep(3600)
        return [1.0] * len(completions)

    hangs_at_first.independent = False

    def gold(completion, gold):
        return float(completion == gold)

    def lengths(completion_ids):
        return [len(ids) for ids in completion_ids]

    def asked(completion, prompt):
        return len(prompt)

    def chatty(completion):
        return float(completion[-1]["content"] == "42")

    def echo(completions, log_extra, **given):
        rest = sorted((k, v) for k, v in given.items() if k != "log_metric")
        log_extra("given", [str((c, rest)) for c in completions])
        return [0.0] * len(completions)

    class Scaled:
        def __init__(self, scale=1.0): self.scale = scale
        def __call__(self, completion): return self.scale * len(completion)
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with some plugins."""
    (tmp_path / "mine.py").write_text(textwrap.dedent(PLUGINS))
    (tmp_path / "broken.py").write_text("def f(:\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")  # tables do not fold
    return tmp_path


def write(path: Path, *records: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def rows(*completions: str, answer: str = "42") -> list[dict[str, Any]]:
    return [{"prompt": "6*7=", "completion": c, "answer": answer} for c in completions]


def tried(capsys: pytest.CaptureFixture, *words: str) -> tuple[dict[str, Any], str]:
    """The object that `reward test --json` prints last, and the rest."""
    assert main(["reward", "test", *words, "--json"]) == 0
    *shown, last = capsys.readouterr().out.splitlines()
    return json.loads(last), "\n".join(shown)


def test_a_new_reward_is_written_once(here: Path, capsys):
    assert main(["reward", "new", "exact_sum"]) == 0
    shown = capsys.readouterr().out
    assert "pytest test_exact_sum.py" in shown
    assert "hybrid-rl reward test exact_sum.py:exact_sum --data" in shown
    text = (here / "exact_sum.py").read_text() + (here / "test_exact_sum.py").read_text()
    assert "my_reward" not in text
    assert "MyReward" not in text
    (here / "exact_sum.py").write_text("mine")
    assert main(["reward", "new", "exact_sum"]) == 2
    assert "exact_sum.py is there already" in capsys.readouterr().err
    assert (here / "exact_sum.py").read_text() == "mine"


@pytest.mark.parametrize("name", ["3x", "a-b", "class", "json", "test_it", "a.b", ""])
def test_names_that_cannot_be_are_refused(here: Path, capsys, name: str):
    before = sorted(here.iterdir())
    assert main(["reward", "new", name]) == 2
    assert repr(name) in capsys.readouterr().err
    assert main(["reward", "new", "fine", "--dir", "nowhere"]) == 2
    assert main(["reward", "new", "fine", "--dir", "/proc"]) == 2
    assert "/proc/fine.py cannot be written" in capsys.readouterr().err
    assert sorted(here.iterdir()) == before


def test_every_outcome_is_counted_with_its_cause(here: Path, capsys):
    write(here / "data.jsonl", *rows("42", "41", "none", "hang", "raise", "raise", "crash", "42"))
    result, shown = tried(capsys, "mine.py:mixed", "--data", "data.jsonl", "--timeout", "0.5", "--workers", "2")
    counted = {name: result[name] for name in ("n", "scored", "not_applicable", "timeout", "error", "crash")}
    assert counted == {"n": 8, "scored": 3, "not_applicable": 1, "timeout": 1, "error": 2, "crash": 1}
    assert result["mean"] == pytest.approx(2 / 3)
    assert result["metrics"].keys() == {"length"}
    assert result["per"] == "completion"
    assert result["slowest"]["at"] == "line 4"
    assert 0.5 < result["slowest"]["seconds"] < result["seconds"] + 1
    for part in ("KeyError: 'b[oo]m'", "line 5", "reward.timeout=0.5", "status 3", "on 4 of 8 completions"):
        assert part in shown


def test_a_plugin_that_always_fails_still_gets_its_table(here: Path, capsys):
    write(
        here / "data.jsonl", *({**row, "prompt": str(i)} for i, row in enumerate(rows(*("x" * i for i in range(40)))))
    )
    result, shown = tried(capsys, "mine.py:always_raises", "--data", "data.jsonl")
    assert (result["n"], result["error"], result["mean"], result["not_asked"]) == (40, 40, None, 0)
    assert "RuntimeError: broken" in shown
    started = time.monotonic()
    result, shown = tried(capsys, "mine.py:always_hangs", "--data", "data.jsonl", "--timeout", "0.3", "--workers", "4")
    assert time.monotonic() - started < 15
    assert result["timeout"] == 40
    assert result["not_asked"] > 20
    assert "never ended in time" in shown


def test_a_reward_of_groups_is_given_up_after_as_many_prompts_as_in_a_run(here: Path, capsys):
    groups = [rows("hang", "hang"), *([{**row, "prompt": str(i)} for row in rows("a", "b")] for i in range(20))]
    write(here / "data.jsonl", *(row for group in groups for row in group))
    words = ["--data", "data.jsonl", "--timeout", "0.3", "--workers", "1"]
    assert tried(capsys, "mine.py:hangs_at_first", *words)[0]["not_asked"] == 0


def test_lines_of_the_same_prompt_are_a_group(here: Path, capsys):
    both = [*rows("a", "b", "c"), *({**row, "prompt": "7*6="} for row in rows("a", "b"))]
    write(here / "data.jsonl", *both)
    result, _ = tried(capsys, "mine.py:whole", "--data", "data.jsonl")
    assert (result["scored"], result["mean"], result["per"]) == (5, pytest.approx(2 / 5), "prompt")
    result, _ = tried(capsys, "mine.py:whole", "--data", "data.jsonl", "--limit", "2")
    assert (result["n"], result["mean"]) == (2, 0.5)


def test_columns_by_another_name_and_rollouts_unfolded(here: Path, capsys):
    write(here / "data.jsonl", {"question": "?", "response": "42", "solution": "42"})
    words = ["--column", "completion=response", "gold=solution", "--column", "prompt=question"]
    assert tried(capsys, "mine.py:gold", "--data", "data.jsonl", *words)[0]["mean"] == 1.0
    kept = {
        "prompt_id": "0/1",
        "prompt": "Q: ?",
        "completion": "42",
        "tokens": 3,
        "columns": {"prompt": "?", "gold": "4"},
    }
    write(here / "rollouts.jsonl", kept, kept | {"finish_reason": "environment"})
    result, _ = tried(capsys, "mine.py:gold", "--data", "rollouts.jsonl")
    assert (result["mean"], result["not_applicable"]) == (0.0, 1)
    assert tried(capsys, "mine.py:asked", "--data", "rollouts.jsonl")[0]["mean"] == 4.0
    result, shown = tried(capsys, "mine.py:lengths", "--data", "rollouts.jsonl")
    assert result["mean"] == 3.0
    assert "placeholders" in shown


def test_chat_messages_where_the_data_or_the_user_says_so(here: Path, capsys):
    messages = [{"role": "assistant", "content": "42"}]
    write(here / "chat.jsonl", {"prompt": [{"role": "user", "content": "?"}], "completion": messages})
    assert tried(capsys, "mine.py:chatty", "--data", "chat.jsonl")[0]["mean"] == 1.0
    write(here / "text.jsonl", {"prompt": "?", "completion": "42"})
    assert tried(capsys, "mine.py:chatty", "--data", "text.jsonl", "--chat")[0]["mean"] == 1.0


def test_where_two_plugins_differ(here: Path, capsys):
    write(here / "data.jsonl", *rows("42", "41", "none"))
    words = ["--data", "data.jsonl", "--against", "mine.py:whole"]
    result, shown = tried(capsys, "mine.py:mixed", *words)
    assert result["against"]["disagreements"] == 2
    assert result["against"]["both_scored"] == 2
    assert "read '42'" in shown
    words = ["--data", "data.jsonl", "--arguments", '{"scale": 2}', "--against", "mine.py:Scaled"]
    assert tried(capsys, "mine.py:Scaled", *words)[0]["against"]["disagreements"] == 3


@pytest.mark.parametrize(
    ("plugin", "lines", "parts"),
    [
        ("mine.py:mixed", None, ["data.jsonl does not exist"]),
        ("mine.py:mixed", '{"prompt": "a", "completion": "b"}\nnot json', ["not JSONL", "line 2"]),
        ("mine.py:mixed", '{"prompt": "a", "completion": "b"}\n\n[1]', ["line 3", "a list"]),
        ("mine.py:mixed", '{"prompt": "a", "answer": "b"}', ["line 1", "no completion", "--column completion="]),
        ("mine.py:mixed", '{"completion": 7}', ["line 1", "completion", "int"]),
        ("mine.py:mixed", "\n", ["no lines"]),
        (
            "mine.py:gold",
            '{"completion": "a", "gold": "b"}\n{"completion": "a"}',
            ["'gold'", "line 2", "--column gold="],
        ),
        ("mine.py:asked", '{"completion": "a"}', ["needs the prompt", "line 1"]),
        ("mine.py:lengths", '{"completion": "a"}', ["completion_ids", "tokens"]),
        ("mine.py:nothing", '{"completion": "a"}', ["cannot be loaded", "no function 'nothing'"]),
        ("broken.py:f", '{"completion": "a"}', ["cannot be loaded", "SyntaxError"]),
        ("nowhere.py:f", '{"completion": "a"}', ["cannot be loaded", "does not exist"]),
        ("no_such_module:f", '{"completion": "a"}', ["cannot be loaded", "ModuleNotFoundError"]),
    ],
)
def test_wrong_input_is_one_line_and_status_2(here: Path, capsys, plugin: str, lines: str | None, parts: list[str]):
    if lines is not None:
        (here / "data.jsonl").write_text(lines)
    assert main(["reward", "test", plugin, "--data", "data.jsonl", "--json"]) == 2
    output = capsys.readouterr()
    assert not output.out
    for part in parts:
        assert part in output.err
    assert len(output.err.splitlines()) == 1


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["--arguments", "{"], "not JSON"),
        (["--arguments", "[1]"], "must be a JSON object"),
        (["--arguments", '{"scal": 1}'], "no argument 'scal'; it has scale"),
        (["--column", "answer"], "ours=theirs"),
        (["--column", "answer=nope"], "no column 'nope'"),
        (["--against-arguments", "{}"], "--against"),
        (["--against", "./mine.py:Scaled"], "the plugin itself"),
    ],
)
def test_wrong_options_are_refused(here: Path, capsys, words: list[str], part: str):
    write(here / "data.jsonl", *rows("1"))
    assert main(["reward", "test", "mine.py:Scaled", "--data", "data.jsonl", *words]) == 2
    assert part in capsys.readouterr().err


@pytest.mark.parametrize("words", [["--timeout", "0"], ["--workers", "x"], ["--limit", "0"], ["a=b"], ["--nope"]])
def test_words_that_no_option_takes(here: Path, capsys, words: list[str]):
    with pytest.raises(SystemExit) as ended:
        main(["reward", "test", "mine.py:Scaled", "--data", "data.jsonl", *words])
    assert ended.value.code == 2


class Here:
    """The node that a pool needs; a cluster's imports torch."""

    def nodes(self) -> list[str]:
        return ["here"]

    def start_on(self, node: str, worker: type, *args: Any, name: str, at_once: int) -> Any:
        def submit(method: str, *given: Any) -> Future:
            future: Future = Future()
            future.set_result(getattr(made, method)(*given))
            return future

        made = worker(*args)
        return SimpleNamespace(name=name, submit=submit, kill=lambda: None)


@pytest.mark.parametrize("chat", [False, True])
def test_a_trial_gives_a_plugin_what_a_run_gives_it(here: Path, chat: bool):
    columns = {"prompt": "6*7", "answer": "42", "choices": [1, 2]}
    spec, settings = RewardSpec(plugin="mine.py:echo"), RewardConfig(workers=1)
    completions = [Completion(text, (1, 2), (), reason, 0) for text, reason in (("a", "stop"), ("b", "length"))]
    pool = RewardPool([spec], settings, Here(), chat=chat)
    try:
        (group,) = pool.score([Prompt("0", "Q: 6*7", (1,), columns)], [completions]).groups
    finally:
        pool.close()
    trial = Trial(spec, settings, chat=chat)
    try:
        trial.examine(columns)
        verdict = trial.score_rows(
            [Row("", 0, "Q: 6*7", c.text, columns, c.finish_reason, c.token_ids) for c in completions]
        )
    finally:
        trial.close()
    assert [o.extra for o in verdict.outcomes] == [o.extra for o in group.outcomes["mine.py:echo"]]
    assert "6*7" in verdict.outcomes[0].extra["given"]


@pytest.fixture
def run(here: Path) -> Path:
    """A run of two steps with two rewards, two completions a prompt."""
    rewards = [
        {"plugin": "mine.py:chatty", "name": "form", "gate": 1.0},
        {"plugin": "mine.py:mixed", "name": "right", "weight": {0: 2.0, 10: 2.0}},
    ]
    tree = {"model": {"path": "m"}, "data": {"train": "t", "eval": "e"}, "rewards": rewards}
    (here / "run" / "rollouts").mkdir(parents=True)
    (here / "run" / "config.yaml").write_text(yaml.safe_dump(tree))

    def kept(prompt: str, completion: str, form: float, right: float | None, total: float, **more: Any) -> dict:
        columns = {"prompt": prompt, "answer": "42"}
        rest = {"columns": columns, "tokens": 2, "rewards": {"form": form, "right": right}, "failures": {}}
        return {"prompt_id": prompt, "prompt": prompt, "completion": completion, "reward": total, **rest, **more}

    write(
        here / "run" / "rollouts" / "step_000001.jsonl",
        kept("p", "42", 1.0, 1.0, 3.0),
        kept("p", "41", 1.0, 0.0, 1.0),
        kept("q", "none", 1.0, 1.0, 3.0),  # no longer scored: what is left is the same as the other's
        kept("q", "41", 1.0, 0.0, 1.0),
        kept("r", "42", 0.0, None, 0.0),  # the gate kept it back
        kept("r", "41", 0.0, None, 0.0),
    )
    write(
        here / "run" / "rollouts" / "step_000002.jsonl",
        kept("p", "42", 1.0, 0.0, 1.0),  # equal before, not now
        kept("p", "41", 1.0, 0.0, 1.0),
        kept("q", "42", 1.0, 0.0, 1.0),  # another one is the best
        kept("q", "41", 1.0, 1.0, 3.0),
    )
    return here / "run"


def replayed(capsys: pytest.CaptureFixture, *words: str) -> tuple[dict[str, Any], str]:
    assert main(["reward", "replay", *words, "--json"]) == 0
    *shown, last = capsys.readouterr().out.splitlines()
    return json.loads(last), "\n".join(shown)


def test_a_run_is_scored_again(run: Path, capsys):
    result, shown = replayed(capsys, "run", "--reward", "mine.py:mixed", "--out", "out.jsonl")
    assert result["compared_with"] == "right"
    first, second = result["steps"]
    names = ("step", "n", "saved_mean", "mean", "disagreements", "scored_by_one", "groups", "best_changes")
    assert [first[name] for name in names] == [1, 6, 0.5, pytest.approx(1 / 3), 1, 1, 3, 0]
    assert [first[name] for name in ("gain_signal", "lose_signal", "correlation")] == [0, 1, pytest.approx(1.0)]
    assert [second[name] for name in names] == [2, 4, 0.25, 0.5, 3, 0, 2, 1]
    assert [second[name] for name in ("gain_signal", "lose_signal")] == [1, 0]
    assert result["overall"]["disagreements"] == 4
    assert result["not_applicable"] == 3
    assert "of 3 completions with another score" in shown
    lines = [json.loads(line) for line in Path("out.jsonl").read_text().splitlines()]
    assert len(lines) == 10
    assert (lines[4]["outcome"], lines[4]["detail"]) == ("not_applicable", "the run did not ask about it")


def test_steps_and_what_is_compared(run: Path, capsys):
    result, _ = replayed(capsys, "run", "--reward", "mine.py:whole", "--steps", "2")
    assert (result["compared_with"], result["n"]) == ("reward", 4)
    result, _ = replayed(capsys, "run", "--reward", "mine.py:whole", "--steps", "1-1", "--instead-of", "form")
    assert (result["compared_with"], result["n"]) == ("form", 6)
    absolute = str(Path("mine.py").resolve()) + ":mixed"
    assert replayed(capsys, "run", "--reward", absolute, "--steps", "2")[0]["compared_with"] == "right"
    for words, part in {
        ("run", "--steps", "2-1"): "no span",
        ("run", "--steps", "7-9"): "the steps 1 to 2",
        ("run", "--instead-of", "x"): "none of the run's rewards",
        ("run", "--out", "no/where.jsonl"): "does not exist",
        ("run", "--out", "run"): "is a directory",
        ("run", "--out", "/proc/out.jsonl"): "cannot be written",
        ("nowhere",): "does not exist",
    }.items():
        assert main(["reward", "replay", *words, "--reward", "mine.py:whole"]) == 2
        assert part in capsys.readouterr().err


def test_nothing_of_this_imports_torch(run: Path):
    write(run.parent / "data.jsonl", *rows("42"))
    code = "import sys; from hybrid_rl.cli import main\n"
    code += "assert main(['reward', 'new', 'mine_too']) == 0\n"
    code += "assert main(['reward', 'test', 'mine.py:mixed', '--data', 'data.jsonl']) == 0\n"
    code += "assert main(['reward', 'replay', 'run', '--reward', 'mine.py:whole']) == 0\n"
    code += "print(sorted({'torch', 'transformers', 'ray', 'matplotlib'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.endswith("[]\n"), done.stderr


def follow(here: Path, chosen: Callable[[str], bool]) -> list[str]:
    """Do what the guide says: write its files as they come, run the chosen blocks by bash; returns what each showed."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    shown = []
    for language, text in re.findall(r"^```(\w+)\n(.*?)^```$", GUIDE.read_text(), re.DOTALL | re.MULTILINE):
        text = text.replace("8765", str(PORT))
        name = re.match(r"# (\w+\.(?:py|yaml))\n", text)
        if name is not None:
            (here / name[1]).write_text(text)
        elif language == "bash" and chosen(text):
            environment = {**os.environ, "PATH": path}
            command = ["bash", "-ec", text]
            done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
            assert done.returncode == 0, text + done.stdout + done.stderr
            assert "Traceback" not in done.stderr
            shown.append(done.stdout)
    return shown


def test_the_guide_works_word_for_word(here: Path):
    """All of it but what takes long: training, and importing TRL."""
    long = ("hybrid-rl train", "runs/", "launch/", "trl.")
    made, first, mended, remote = follow(here, lambda text: not any(word in text for word in long))
    assert "5 passed" in made
    assert "2 of the 5 completions that both score" in first
    assert "agree on every completion, 5 scored" in mended
    assert "reward/remote.py:Remote/seconds" in remote
    assert "failed on 5 of 5 completions" in remote
    settings = yaml.safe_load((here / "several.yaml").read_text())
    assert [RewardSpec(**each).name for each in settings["rewards"]] == ["format", "right", "near"]


@pytest.mark.slow
def test_the_guide_on_rewards_of_trl(here: Path):
    (shown,) = follow(here, lambda text: "trl." in text)
    assert "get_soft_overlong_punishment" in shown


PORT = 20_000 + os.getpid() % 10_000
