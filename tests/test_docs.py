"""The documentation says what is so: its commands parse and run, its settings, files, links and messages exist.

A block of commands that no test can run has `<!-- not run: REASON -->` before it, and is listed as skipped.
"""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from hybrid_rl import reference
from hybrid_rl.cli import read_command_line
from hybrid_rl.config_file import load_config, setting_names
from hybrid_rl.failures import CAUSES
from tests.documents import (
    GUIDES,
    PAGES,
    ROOT,
    Block,
    anchors,
    blocks,
    code_spans,
    commands,
    first_cells,
    links,
    shell_blocks,
)

TROUBLESHOOTING = ROOT / "docs" / "troubleshooting.md"
SHELL = [block for page in GUIDES for block in shell_blocks(page)]
_SUFFIXES = {"json", "jsonl", "yaml", "md", "png", "svg", "py", "sh", "html", "log", "txt", "csv", "db", "toml"}
_SETTING = re.compile(r"([a-z_]+(?:\.[a-z_0-9]+)+)(?:=.*)?", re.DOTALL)
_RECIPE = "configs/quickstart.yaml"
_STANDS_FOR = {"CONFIG": _RECIPE, "RUN": "runs/example", "FILE.jsonl": "runs/example/rollouts/step_000001.jsonl"}
"""Words that stand for something of the reader's -> what the tests put there."""


def by_name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def test_the_reference_of_settings_is_that_of_the_code():
    assert reference.PAGE.read_text(encoding="utf-8") == reference.page(), "run: python -m hybrid_rl.reference"


def test_every_setting_has_a_meaning():
    assert not re.findall(r'^\| <a id="(.*?)">.*\|  \|$', reference.page(), re.MULTILINE)


@pytest.mark.parametrize("page", PAGES, ids=by_name)
def test_links_lead_somewhere(page: Path):
    for link in links(page):
        path, _, anchor = link.partition("#")
        if re.match(r"[a-z]+:", path):
            continue
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def settings_in(words: list[str]) -> list[str]:
    """Those of `words` that are, or set, a setting."""
    sections = {name for name in setting_names() if "." not in name} - {"rewards", "seed", "steps"}
    named = [match[1] for word in words if (match := _SETTING.fullmatch(word))]
    names = [name for name in named if name.partition(".")[0] in sections]
    return [n for n in names if n.rpartition(".")[2] not in _SUFFIXES and not n.startswith("model.layers.")]


@pytest.mark.parametrize("page", GUIDES, ids=by_name)
def test_settings_exist(page: Path):
    words = code_spans(page) + [word for block in shell_blocks(page) for words in commands(block) for word in words]
    assert not set(settings_in(words)) - set(setting_names())


@pytest.mark.parametrize("page", GUIDES, ids=by_name)
def test_files_exist(page: Path):
    rooms = {path.name for path in ROOT.iterdir() if path.is_dir()} - {"runs", "models"}
    words = code_spans(page) + [word for block in shell_blocks(page) for words in commands(block) for word in words]
    paths = {re.split(r"[:@]", word)[0].removeprefix("./") for word in words if re.fullmatch(r"[\w./*:@-]+", word)}
    for path in paths:
        if path.partition("/")[0] in rooms and "/" in path:
            assert list(ROOT.glob(path.rstrip("/"))), path


def test_the_table_of_rooms_has_every_module():
    spans = set(code_spans(ROOT / "README.md"))
    for room in (ROOT / "hybrid_rl", ROOT / "trainers"):
        for path in room.iterdir():
            name = f"{path.name}/" if path.is_dir() else path.name
            if (path.suffix == ".py" or (path / "__init__.py").exists()) and not name.startswith("_"):
                assert spans & {name, f"{room.name}/{name}"}, name


@pytest.mark.parametrize("page", GUIDES, ids=by_name)
def test_commands_in_the_text_exist(page: Path):
    for span in code_spans(page):
        if (words := span.split())[:1] == ["hybrid-rl"] and len(words) > 1:
            with pytest.raises(SystemExit) as end:
                read_command_line([words[1], "--help"])
            assert end.value.code == 0, span


@pytest.mark.parametrize("block", SHELL, ids=lambda block: block.where)
def test_commands_parse(block: Block):
    subprocess.run(["bash", "-n"], input=block.text, text=True, check=True)
    for words in commands(block):
        if "hybrid-rl" in words:
            options = read_command_line(words[words.index("hybrid-rl") + 1 :])
            recipe = ROOT / _STANDS_FOR.get(getattr(options, "config", ""), getattr(options, "config", ""))
            if "config" in options and recipe.is_file():
                load_config(recipe, options.overrides)


def test_messages_of_the_troubleshooting_guide_are_those_of_the_code():
    said = "\0".join(messages())
    for message in first_cells(TROUBLESHOOTING):
        parts = [re.escape(part.strip()) for part in message.split("...") if part.strip()]
        assert parts, message
        assert re.search(r"[^\0]*?".join(parts), said), f"nothing prints: {message}"


def test_every_cause_of_a_failure_is_in_the_troubleshooting_guide():
    text = TROUBLESHOOTING.read_text(encoding="utf-8")
    assert not [cause.name for cause in CAUSES if f"`{cause.name}" not in text]


@cache
def messages() -> list[str]:
    """Every text that the code may print; what an f-string fills in is a `…`."""
    found = [line for path in (ROOT / "launch").glob("*.sh") for line in path.read_text(encoding="utf-8").splitlines()]
    for room in ("hybrid_rl", "trainers", "rewards"):
        for path in (ROOT / room).rglob("*.py"):
            tree = ast.parse(path.read_text(encoding="utf-8"))
            documentation = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
            for node in ast.walk(tree):
                if isinstance(node, ast.JoinedStr):
                    found.append("".join(str(v.value) if isinstance(v, ast.Constant) else "…" for v in node.values))
                elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in documentation:
                    found.append(node.value)
    return found


@pytest.mark.parametrize("block", [b for b in SHELL if b.not_run], ids=lambda block: block.where)
def test_commands_that_no_test_runs_are_listed(block: Block):
    pytest.skip(str(block.not_run))


_SHORT = "steps=4 batch.prompts=4 data.eval_size=4 plan.prompts=4 plan.probe.steps=1 plan.probe.mini_batches=1"
_ONE_PROCESS = "cluster.backend=inline learner.world_size=1 rollout.engine=transformers rollout.engines=1"
_SHIM = f"""\
#!{sys.executable}
# `hybrid-rl` as it is, of four small steps and, where the command allows it, in one process.
import sys
from hybrid_rl.cli import main

words = sys.argv[1:]
if words[0] in ("train", "rank", "eval", "import", "doctor", "estimate") and words[1:2] not in ([], ["--json"]):
    if not {{"async", "cluster", "sync"}} & {{word.partition(".")[0] for word in words[2:] if "=" in word}}:
        words += "{_ONE_PROCESS}".split()
    words += "{_SHORT}".split()
elif words[0] == "warm-start":
    words += ["warm_start.steps=20"]
sys.exit(main(words))
"""
_PYTEST = f"""\
#!/bin/sh
# All tests are only collected; named ones are run.
[ $# -gt 0 ] || set -- --collect-only -q tests/test_config.py
exec {sys.executable} -m pytest "$@"
"""


def _run(place: Path, script: str) -> None:
    """Run a reader's commands in a copy of the repository. Fails with the end of what they printed; a command's exit
    status counts wherever it stands."""
    path = f"{place}/.bin:{place}/.venv/bin:{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        [
            "bash",
            "-euxo",
            "pipefail",
            "-c",
            re.sub(r"\b(CONFIG|RUN|FILE\.jsonl)\b", lambda w: _STANDS_FOR[w[1]], script),
        ],
        cwd=place,
        env={**os.environ, "PATH": path, "PYTHONPATH": str(place), "HYBRID_RL_DEVICE": "cpu"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=3000,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-6000:]


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the working tree, with a base policy and a run in it, in which commands are shorter."""
    place = tmp_path_factory.mktemp("docs") / "hybrid-rl"
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    for name in filter(None, names):
        if (ROOT / name).is_file():
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, place / name)
    (place / ".bin").mkdir()
    installed = "#!/bin/sh\n"  # what set-up would install is there
    for name, text in ((".bin/hybrid-rl", _SHIM), (".bin/pytest", _PYTEST), ("launch/setup.sh", installed)):
        (place / name).write_text(text, encoding="utf-8")
        (place / name).chmod(0o755)
    _run(place, f"hybrid-rl warm-start {_RECIPE}; hybrid-rl train {_RECIPE} run.dir=RUN")
    return place


@pytest.mark.slow
@pytest.mark.timeout(3300)
@pytest.mark.parametrize(
    "page", [page for page in GUIDES if any(not block.not_run for block in shell_blocks(page))], ids=by_name
)
def test_commands_run(workshop: Path, tmp_path: Path, page: Path):
    """From the page's beginning to its end in one shell, with the files that it has the reader make."""
    script = []
    for block in blocks(page):
        if block.file_name is not None:
            script.append(f"cat > {block.file_name} <<'END_OF_FILE'\n{block.text}END_OF_FILE\n")
        elif block.language == "bash" and not block.not_run:
            script.append(block.text)
    place = tmp_path / "hybrid-rl"
    shutil.copytree(workshop, place)
    _run(place, "\n".join(script))
