"""Settings files that are damaged, hostile or absurd: reading one gives a configuration or a clear error, soon."""

from __future__ import annotations

import copy
import os
import random
import resource
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from hybrid_rl.config import Config, ConfigError
from hybrid_rl.config_file import load_config, setting_names

_NAMES = setting_names()
RECIPES = sorted((Path(__file__).parent.parent / "configs").glob("*.yaml"))
MINIMAL = "model: {path: m}\ndata: {train: a, eval: b}\n"
LINES, WIDTH = 24, 400
"""Most lines of an error, and characters of one of them."""

_HOSTILE = [
    "!!python/object/apply:os.system ['touch OWNED']",
    "!!python/name:os.system",
    "!!python/object/new:subprocess.Popen [[touch, OWNED]]",
    "!!python/module:os",
    "!!timestamp 'no date'",
    "!!int 'one'",
    "!!float {}",
    "!!bool maybe",
    "!!binary '%%%'",
    "!!set {a, b}",
    "!!omap [a: 1]",
    "2001-13-45",
    "2024-01-01 10:00:00",
    ".nan",
    "-.inf",
    "1e400",
    "9" * 5000,
    "0x" + "f" * 9000,
    "0b" + "1" * 400,
    "190:20:30.15",
    "'\\ud800'",
    '"\\ud800"',
    '"\\0\\e[2J"',
    "[" * 1000,
    "{a: " * 200 + "1" + "}" * 200,
    "[" * 40 + "]" * 40,
    "&a [*a]",
    "&a {b: *a}",
    "{<<: {steps: 3}}",
    "{<<: [1, 2]}",
    "{? [1] : 2}",
    "{? {a: 1} : 2}",
    "{1: 2, true: 3, null: 4, 1.5: 5}",
    "{a: 1, a: 2}",
    "*nowhere",
    "%YAML 9.9",
    "--- a\n--- b",
    "|\n  text",
    "'http://user:hunter2@host/'",
    "null",
    "~",
    "[]",
    "{}",
    "''",
    "'" + "x" * 100_000 + "'",
    "[" + "1," * 20_100 + "]",
]
_VALUES: list[Any] = [
    None,
    True,
    False,
    -1,
    0,
    1,
    10**25,
    2**63,
    1e308,
    float("nan"),
    float("-inf"),
    "",
    "\x00",
    "ü\u2028",
]
_VALUES += [[], {}, [[]], {"": ""}, {3: 4}, [None], "x" * 5000, "[31m", "auto", "1e-5", {"a": {"b": {"c": [1]}}}]


def bomb(kind: str) -> str:
    """A billion values by nine aliases."""
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    for i in range(1, 10):
        of = ", ".join([f"*a{i - 1}"] * 9)
        lines.append(f"a{i}: &a{i} [{of}]" if kind == "list" else f"a{i}: &a{i} {{<<: [{of}]}}")
    if kind == "merge":
        lines[0] = "a0: &a0 {x: 1, y: 2}"
    return MINIMAL + "\n".join(lines)


def places(tree: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    inner = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return [path, *(place for key, value in inner for place in places(value, (*path, key)))]


def structured(draw: random.Random, tree: dict) -> str:
    """A recipe with some of its values, names or sections replaced."""
    tree = copy.deepcopy(tree)
    for _ in range(draw.randint(1, 3)):
        *parents, leaf = draw.choice([p for p in places(tree) if p])
        node = tree
        for part in parents:
            node = node[part]
        action = draw.random()
        value = copy.deepcopy(draw.choice(_VALUES))
        if action < 0.55:
            node[leaf] = value
        elif action < 0.7 and isinstance(node, dict):
            node[draw.choice([draw.choice(_NAMES), 7, None, 1.5, True, ("a", "b"), "ü" * 9, f"{leaf}s"])] = value
        elif action < 0.85:
            del node[leaf]
        else:
            *section, name = draw.choice(_NAMES).split(".")
            node = tree
            for part in section:
                node[part] = node = node.get(part) if isinstance(node.get(part), dict) else {}
            node[name] = value
    return yaml.dump(tree, sort_keys=False)


def textual(draw: random.Random, text: str) -> bytes:
    """A recipe with hostile YAML in it, or with lines or bytes that are damaged."""
    lines, action = text.splitlines(), draw.random()
    if action < 0.5:
        at = draw.choice([i for i, line in enumerate(lines) if ":" in line and not line.startswith("#")])
        lines[at] = lines[at].partition(":")[0] + ": " + draw.choice(_HOSTILE)
    elif action < 0.6:
        lines.insert(
            draw.randrange(len(lines)), draw.choice(["  - x", "\tsteps: 3", "? x", "... ", "steps: 1", "- ", "&a"])
        )
    elif action < 0.7:
        lines.append(f"{draw.choice(_NAMES).split('.')[0]}: {draw.choice(_HOSTILE)}")
    raw = bytearray("\n".join(lines), "utf-8", "surrogatepass")
    if action >= 0.7:
        for _ in range(draw.randint(1, 8)):
            at = draw.randrange(len(raw))
            change = draw.randrange(3)
            raw[at : at + (change > 0)] = bytes([draw.randrange(256)]) if change < 2 else b""
    return bytes(raw)


def check(path: Path, content: bytes) -> bool:
    """Whether it was accepted. Fails the test where reading it neither accepts it nor refuses it clearly."""
    path.write_bytes(content)
    started = time.perf_counter()
    try:
        accepted = isinstance(load_config(path), Config)
    except ConfigError as error:
        accepted, message = False, str(error)
        assert len(message.splitlines()) <= LINES, message
        assert max(map(len, message.splitlines())) <= WIDTH, message
        assert "hunter2" not in message
        message.encode("utf-8", "backslashreplace")
    assert time.perf_counter() - started < 10, content[:2000]
    return accepted


def fuzz(directory: Path, cases: range) -> int:
    """How many were accepted."""
    texts = [path.read_text() for path in RECIPES]
    trees, accepted = [yaml.safe_load(text) for text in texts], 0
    for seed in cases:
        draw = random.Random(seed)
        which = draw.randrange(len(RECIPES))
        content = structured(draw, trees[which]).encode() if draw.random() < 0.5 else textual(draw, texts[which])
        try:
            accepted += check(directory / "c.yaml", content)
        except Exception as error:
            raise AssertionError(f"case {seed}: {type(error).__name__}: {error}\n{content[:1500]!r}") from error
    return accepted


def test_damaged_files_give_a_configuration_or_a_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    accepted = fuzz(tmp_path, range(150))
    assert 5 < accepted < 145  # both happen
    assert not Path("OWNED").exists()


@pytest.mark.slow
def test_ten_thousand_damaged_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    accepted = fuzz(tmp_path, range(10_000))
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    print(f"{accepted} of 10,000 accepted; {grown:.0f} MiB more memory at the most")
    assert grown < 500
    assert not Path("OWNED").exists()


@pytest.mark.parametrize("hostile", _HOSTILE, ids=lambda h: h[:24])
def test_hostile_values(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hostile: str):
    monkeypatch.chdir(tmp_path)
    for setting in ("steps", "rewards", "plan"):
        check(tmp_path / "c.yaml", f"{MINIMAL}{setting}: {hostile}\n".encode("utf-8", "surrogatepass"))
    check(tmp_path / "c.yaml", hostile.encode())
    assert not os.path.exists("OWNED")


@pytest.mark.parametrize("kind", ["list", "merge"])
def test_a_billion_laughs(tmp_path: Path, kind: str):
    (tmp_path / "c.yaml").write_text(bomb(kind))
    with pytest.raises(ConfigError, match=r"more than 20,000 values"):
        load_config(tmp_path / "c.yaml")


def test_settings_given_twice_are_refused(tmp_path: Path):
    (tmp_path / "c.yaml").write_text(MINIMAL + "steps: 3\nseed: 1\nsteps: 4\n")
    with pytest.raises(ConfigError, match=r"line 5, column 1: 'steps' is given twice"):
        load_config(tmp_path / "c.yaml")


def test_an_error_in_the_yaml_shows_none_of_it(tmp_path: Path):
    (tmp_path / "c.yaml").write_text("tracking:\n  mlflow: 'http://me:hunter2@host'\n    group: a\n" + MINIMAL)
    with pytest.raises(ConfigError, match=r"is not valid YAML: line 3, column 5") as caught:
        load_config(tmp_path / "c.yaml")
    assert "hunter2" not in str(caught.value)
