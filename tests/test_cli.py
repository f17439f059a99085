"""The command line: bad input is refused with one screen and status 2 before any worker starts."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from hybrid_rl.cli import main


def nested(tree: dict, name: str, value: object) -> dict:
    *parents, leaf = name.split(".")
    node = tree
    for parent in parents:
        node = node.setdefault(parent, {})
    node[leaf] = value
    return tree


@pytest.fixture
def no_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Starting any worker fails the test."""

    def refuse(*args: object, **kwargs: object) -> None:
        pytest.fail("a worker was started")

    monkeypatch.setattr("hybrid_rl.cluster.ray.RayCluster.start", refuse)
    monkeypatch.setattr("hybrid_rl.cluster.inline.InlineCluster.start", refuse)


@pytest.mark.usefixtures("no_workers")
@pytest.mark.parametrize(
    ("setting", "value", "parts"),
    [
        ("learning_rate", 1.0, ["unknown setting learning_rate"]),
        ("full.lr", "fast", ["full.lr='fast'"]),
        ("batch.mini_batches", 3, ["batch.mini_batches", "learner.world_size"]),
        ("data.train", "nowhere.jsonl", ["data.train='nowhere.jsonl'", "does not exist"]),
        ("data.columns", {"prompt": "question"}, ["no column 'question'", "data.columns.prompt"]),
        ("data.answer_after", "####", ["row 0", "data.answer_after='####'"]),
        ("adaptation", "lora", None),
        ("model.path", "no/such-model", ["model.path='no/such-model'"]),
        ("lora.rank", 65, ["lora.rank=65 is more than any candidate has", "at most 64"]),
        ("plan.placement", "recurrent", ["plan.placement=recurrent", "attention-only"]),
        ("plan.path", "nowhere.json", ["plan.path='nowhere.json'", "does not exist"]),
        ("learner.cpus", 1000, ["needs 2000.5 CPUs", "learner.cpus"]),
        ("rollout.gpus", 64, ["needs 64 GPUs", "rollout.engines"]),
        ("rewards", [{"plugin": "nowhere.py:f"}], ["nowhere.py:f", "cannot be loaded"]),
        ("data.max_prompt_length", 2, ["data.max_prompt_length=2"]),
        ("sampling.max_completion_length", 9000, ["batch.tokens_per_micro_batch", "9016"]),
        ("sampling.max_completion_length", 8000, ["8006 tokens", "4096 positions"]),
        ("cluster.address", "127.0.0.1:1", ["cluster.address='127.0.0.1:1'"]),
        ("run.dir", "/proc/nowhere", ["run.dir='/proc/nowhere'", "cannot be written"]),
    ],
)
def test_bad_input_is_one_screen_and_status_2(
    tiny_tree: dict,
    write_config: Callable,
    capsys: pytest.CaptureFixture,
    setting: str,
    value: object,
    parts: list | None,
):
    path = write_config(nested(tiny_tree, setting, value))
    if parts is None:  # nothing wrong with it
        assert main(["train", str(path), "--dry-run"]) == 0
        return
    assert main(["train", str(path)]) == 2
    error = capsys.readouterr().err
    for part in parts:
        assert part in error
    assert len(error.splitlines()) <= 15
    assert "Traceback" not in error


@pytest.mark.usefixtures("no_workers")
def test_files_that_are_no_data_or_model(tiny_tree: dict, write_config: Callable, tmp_path: Path, capsys):
    (tmp_path / "empty.jsonl").write_text("")
    path = write_config(nested(tiny_tree, "data.train", str(tmp_path / "empty.jsonl")))
    assert main(["train", str(path)]) == 2
    assert "has no rows" in capsys.readouterr().err
    (tmp_path / "notes").mkdir()
    path = write_config(
        nested(nested(tiny_tree, "data.train", "arithmetic@train"), "model.path", str(tmp_path / "notes"))
    )
    assert main(["train", str(path)]) == 2
    assert "model.path=" in capsys.readouterr().err


def test_a_dry_run_prints_the_resolved_settings(tiny_tree: dict, write_config: Callable, capsys):
    assert main(["train", str(write_config(tiny_tree)), "seed=5", "--dry-run", "steps=7"]) == 0
    printed = capsys.readouterr().out
    assert "steps: 7" in printed
    assert "zero_stage: 2" in printed
    assert not Path(tiny_tree["run"]["dir"]).exists()


@pytest.mark.parametrize(("words", "part"), [(["--help"], "warm-start"), (["reward", "--help"], "replay")])
def test_help_is_quick_and_imports_nothing_large(words: list[str], part: str):
    started = time.perf_counter()
    code = "import sys; from hybrid_rl.cli import main\n"
    code += f"try: main({words})\nexcept SystemExit: print({{'torch', 'pydantic', 'rich'}} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("set()\n")
    assert part in done.stdout
    assert time.perf_counter() - started < 30  # a hang, not a benchmark


@pytest.mark.parametrize(
    "words", [["reward"], ["reward", "test"], ["reward", "replay", "run"], ["reward", "new", "a", "b=1"]]
)
def test_half_a_command_is_refused(words: list[str]):
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 2
