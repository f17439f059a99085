"""What looks like a secret is left out, and what does not is left alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from hybrid_rl.config_file import parse_config
from hybrid_rl.plain_text import visible
from hybrid_rl.redaction import scrub, scrub_files
from hybrid_rl.run_directory import dump_config


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
