"""What looks like a secret is left out, and what does not is left alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from hybrid_rl.config_file import parse_config
from hybrid_rl.plain_text import visible
from hybrid_rl.redaction import scrub, scrub_files, scrub_tree
from hybrid_rl.run_directory import RunDirectory, dump_config
from hybrid_rl.samples import read_rollouts
from hybrid_rl.tracking import MetricsLog
from hybrid_rl.types import Completion, Prompt, ScoredGroup


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SERVICE_API_KEY", 'marker"one\\two')
    monkeypatch.setenv("HF_TOKEN", "marker-of-hf-token")
    monkeypatch.setenv("HF_TOKEN_OLD", "marker-of-hf-token-longer")
    monkeypatch.setenv("SHORT_KEY", "true")
    monkeypatch.setenv("TOKENIZERS_MODE", "not-a-secret")


def test_values_of_variables_that_are_secrets_are_scrubbed():
    assert scrub("a marker-of-hf-token b") == "a (HF_TOKEN, left out) b"
    assert scrub("marker-of-hf-token-longer") == "(HF_TOKEN_OLD, left out)"
    assert scrub(json.dumps({"said": 'marker"one\\two'})) == '{"said": "(SERVICE_API_KEY, left out)"}'
    assert scrub("true, not-a-secret") == "true, not-a-secret"


def test_logs_are_scrubbed_where_they_hold_one(tmp_path: Path):
    (tmp_path / "a.log").write_bytes(b"one \xff\nthe key: marker-of-hf-token\n")
    (tmp_path / "b.log").write_bytes(b"nothing \xff\n")
    (tmp_path / "empty.log").touch()
    untouched = (tmp_path / "b.log").stat().st_ino
    scrub_files(tmp_path)
    assert (tmp_path / "a.log").read_bytes() == b"one \xff\nthe key: (HF_TOKEN, left out)\n"
    assert (tmp_path / "b.log").stat().st_ino == untouched
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.log", "b.log", "empty.log"]


def test_in_trees_text_is_scrubbed_and_numbers_stay(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("X_PASSWORD", "12345678")
    tree = {"12345678": ["12345678", 12345678, 12345678.0, None, True], "at": ("marker-of-hf-token", Path("/12345678"))}
    left = "(X_PASSWORD, left out)"
    assert scrub_tree(tree) == {
        left: [left, 12345678, 12345678.0, None, True],
        "at": ["(HF_TOKEN, left out)", f"/{left}"],
    }


def test_a_secret_of_digits_spoils_no_file(tiny_tree: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("X_PASSWORD", "12345678")
    tree = {**tiny_tree, "seed": 12345678, "run": {"dir": str(tmp_path / "run"), "name": "of 12345678"}}
    config = parse_config(tree)
    run = RunDirectory.create(config, "run")
    run.begin(config)
    written = yaml.safe_load(run.config.read_text())
    assert (written["seed"], written["run"]["name"]) == (12345678, "of (X_PASSWORD, left out)")
    columns = {"answer": 12345678, "asked": "12345678"}
    completion = Completion("it is 12345678", (1,), (-0.5,), "stop", 0)
    group = ScoredGroup(Prompt("0", "what?", (1,), columns), (completion,), (12345678.0,), {})
    run.write_rollouts(1, [group], [[0.0]])
    (row,) = read_rollouts(run.rollouts_of(1))
    assert (row["reward"], row["completion"]) == (12345678.0, "it is (X_PASSWORD, left out)")
    assert row["columns"] == {"answer": 12345678, "asked": "(X_PASSWORD, left out)"}
    MetricsLog(run, config).close()


def test_settings_are_written_down_without_them(tiny_tree: dict):
    config = parse_config({**tiny_tree, "run": {"name": "of marker-of-hf-token"}})
    written = yaml.safe_load(dump_config(config))
    assert written["run"]["name"] == "of (HF_TOKEN, left out)"
    assert written["steps"] == config.steps


def test_text_that_acts_is_spelt_out():
    assert visible("a\tb\nc") == "a\tb\nc"
    assert visible("\x1b[31m\x00\x9b\u202e\u2066\ufeff\ud800") == "\\x1b[31m\\x00\\x9b\\u202e\\u2066\\ufeff\\ud800"
    assert visible("é \U0001f600 <b>") == "é \U0001f600 <b>"
    assert visible("x" * 10, 4) == "xxxx … (6 more characters)"
