"""The command line: bad input is refused with one screen and status 2 before any worker starts."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import pytest

from hybrid_rl.cli import main


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


@pytest.mark.parametrize(
    ("words", "command", "unknown"),
    [
        (["train", "c.yaml", "--fast", "5", "seed=1"], "train", "--fast 5"),
        (["doctor", "sync", "c.yaml", "--fast"], "doctor sync", "--fast"),
        (["reward", "new", "a", "b=1"], "reward new", "b=1"),
        (["report", "run", "more"], "report", "more"),
    ],
)
def test_what_is_unknown_shows_its_commands_usage(words: list[str], command: str, unknown: str, capsys):
    with pytest.raises(SystemExit):
        main(words)
    said = capsys.readouterr().err
    assert said.startswith(f"usage: hybrid-rl {command} ")
    assert said.endswith(f"unrecognized arguments: {unknown}\n")


@pytest.mark.parametrize("words", [["steps", "--dry-run"], ["--dry-run", "steps"]])
def test_a_word_is_no_setting_wherever_it_stands(words: list[str], tiny_tree: dict, write_config: Callable, capsys):
    assert main(["train", str(write_config(tiny_tree)), *words]) == 2
    assert capsys.readouterr().err == "hybrid-rl train: override 'steps' is not of the form key=value\n"


def test_the_version(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"hybrid-rl {version('hybrid-rl')}\n"


def test_doctor_needs_no_check(capsys):
    with pytest.raises(SystemExit):
        main(["doctor", "--help"])
    said = capsys.readouterr().out
    assert "[CHECK]" in said.splitlines()[0]
    assert "Check this machine" in said
