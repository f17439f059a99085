"""Bad settings, files and surroundings: refused on one screen, by setting, value and fix, with status 2, before any
worker starts."""

from __future__ import annotations

import json
import shutil
import socket
from collections import namedtuple
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub.utils import httpx

from hybrid_rl.cli import main

LINES, WIDTH = 24, 600
"""Most lines of an error, and characters of one of them."""


def nested(tree: dict, name: str, value: object) -> dict:
    *parents, leaf = name.split(".")
    node = tree
    for parent in parents:
        node = node.setdefault(parent, {})
    node[leaf] = value
    return tree


@pytest.fixture(autouse=True)
def no_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Starting any worker fails the test."""

    def refuse(*args: object, **kwargs: object) -> None:
        pytest.fail("a worker was started")

    monkeypatch.setattr("hybrid_rl.cluster.ray.RayCluster.start", refuse)
    monkeypatch.setattr("hybrid_rl.cluster.inline.InlineCluster.start", refuse)


@pytest.fixture
def refused(write_config: Callable, tiny_tree: dict, capsys: pytest.CaptureFixture) -> Callable:
    """Train with these settings changed: refused in words that have these parts."""

    def run(changes: dict[str, Any], *parts: str, words: tuple[str, ...] = ()) -> str:
        for name, value in changes.items():
            nested(tiny_tree, name, value)
        assert main(["train", str(write_config(tiny_tree)), *words]) == 2
        error = capsys.readouterr().err
        for part in parts:
            assert part in error
        assert "Traceback" not in error
        assert len(error.splitlines()) <= LINES
        assert max(map(len, error.splitlines())) <= WIDTH
        return error

    return run


WRONG: list[tuple[dict[str, Any], list[str]]] = [
    # Names and kinds of values.
    ({"learning_rate": 1.0}, ["unknown setting learning_rate"]),
    ({"zero_stage": 3}, ["unknown setting zero_stage; did you mean learner.zero_stage?"]),
    ({"algo.beta": 0.1}, ["unknown setting algo.beta; did you mean algo.kl_coef?"]),
    ({"full.lr": "fast"}, ["full.lr='fast'", "number"]),
    ({"full.lr": float("nan")}, ["full.lr=nan", "finite"]),
    ({"steps": True}, ["steps=true"]),
    ({"steps": 0}, ["steps=0", "greater than 0"]),
    ({"seed": 10**30}, ["more than 64 bits"]),
    ({"learner.zero_stage": 4}, ["learner.zero_stage=4", "1, 2 or 3"]),
    ({"rollout.engine": "vlm"}, ["rollout.engine='vlm'", "did you mean vllm?"]),
    ({"sampling.stop": "x"}, ["sampling.stop='x'", "list"]),
    ({"model": "qwen"}, ["model='qwen'", "mapping of settings"]),
    ({"checkpoint.keep_last": 0}, ["checkpoint.keep_last=0"]),
    ({"tracking.prometheus": 70000}, ["tracking.prometheus=70000", "65536"]),
    # Rewards.
    ({"rewards": []}, ["rewards", "at least 1"]),
    ({"rewards": [{"plugin": "rewards.math:accuracy", "wieght": 2}]}, ["rewards[0].wieght", "rewards[0].weight?"]),
    ({"rewards": [{"plugin": "a:b", "weight": "x"}]}, ["rewards[0].weight='x'", "a number or a mapping"]),
    ({"rewards": [{"plugin": "a:b", "weight": {"first": 1}}]}, ["rewards[0].weight={'first': 1}", "integer"]),
    ({"rewards": [{"name": "x"}]}, ["rewards[0].plugin is required"]),
    ({"rewards": [{"plugin": "nowhere.py:f"}]}, ["nowhere.py:f", "cannot be loaded"]),
    ({"rewards": [{"plugin": "no_such_reward"}]}, ["no_such_reward"]),
    ({"rewards": [{"plugin": "rewards.math:acuracy"}]}, ["rewards.math", "acuracy"]),
    ({"rewards": [{"plugin": "rewards.math:accuracy"}] * 2}, ["two are called", "name"]),
    ({"rewards": [{"plugin": "rewards.math:accuracy", "when": {"kind": 1}}]}, ["when", "column 'kind'"]),
    ({"eval.reward": "style"}, ["eval.reward='style'", "rewards.math:accuracy"]),
    # Settings that contradict each other.
    ({"batch.mini_batches": 3}, ["batch.mini_batches", "learner.world_size", "multiple of 6"]),
    ({"learner.world_size": 3}, ["learner.world_size", "16 completions", "multiple of 3"]),
    ({"cluster.backend": "inline"}, ["cluster.backend=inline", "learner.world_size=2"]),
    ({"cluster.placement": "colocate", "rollout.engines": 3}, ["cluster.placement=colocate", "rollout.engines=3"]),
    ({"learner.offload": "all"}, ["learner.offload=all", "learner.zero_stage=2"]),
    ({"adaptation": "lora", "plan.budget.ratio": 0.5}, ["adaptation=lora", "plan.budget"]),
    ({"sync.transport": "directory"}, ["sync.transport=directory needs sync.directory"]),
    ({"async.in_flight": "wait"}, ["async.in_flight=wait", "async.max_staleness=0"]),
    ({"data.template": "no slot"}, ["data.template='no slot'", "{prompt}"]),
    ({"sampling.max_completion_length": 9000}, ["batch.tokens_per_micro_batch", "9016"]),
    # Data and model.
    ({"data.train": "nowhere.jsonl"}, ["data.train='nowhere.jsonl'", "does not exist"]),
    ({"data.columns": {"prompt": "question"}}, ["no column 'question'", "data.columns.prompt"]),
    ({"data.answer_after": "####"}, ["row 0", "data.answer_after='####'"]),
    ({"data.max_prompt_length": 2}, ["data.max_prompt_length=2"]),
    ({"sampling.max_completion_length": 8000}, ["8006 tokens", "4096 positions", "data.max_prompt_length"]),
    ({"model.path": "no/such-model"}, ["model.path='no/such-model' cannot be fetched", "HF_HUB_OFFLINE"]),
    ({"lora.rank": 65}, ["lora.rank=65 is more than any candidate has", "at most 64"]),
    ({"plan.placement": "recurrent"}, ["plan.placement=recurrent", "attention-only"]),
    ({"plan.exclude": ["*nothing*"]}, ["plan.exclude", "'*nothing*'"]),
    ({"plan.score": "best"}, ["plan.score='best'"]),
    ({"plan.path": "nowhere.json"}, ["plan.path='nowhere.json'", "does not exist"]),
    # The machine, its services and its directories.
    ({"learner.cpus": 1000}, ["needs 2000.5 CPUs", "this machine has", "learner.cpus (now 1000.0)", "(now 0.5)"]),
    ({"rollout.gpus": 64}, ["needs 64 GPUs", "rollout.engines=1", "has none; leave out rollout.gpus=64"]),
    ({"rollout.cpu_kv_cache_gib": 90_000}, ["of memory, and this machine has", "KV cache", "rollout.cpu_kv_cache_gib"]),
    ({"cluster.address": "127.0.0.1:1"}, ["cluster.address='127.0.0.1:1' cannot be reached", "ray start --head"]),
    ({"run.dir": "/proc/nowhere"}, ["run.dir='/proc/nowhere'", "cannot be written"]),
    ({"sync.transport": "directory", "sync.directory": "/nowhere"}, ["sync.directory='/nowhere'", "make it"]),
    ({"model.attention": "flash_attention_2"}, ["model.attention=flash_attention_2", "model.dtype=float32"]),
    # Secrets.
    ({"tracking.mlflow": "http://me:hunter2@host"}, ["tracking.mlflow", "environment variable"]),
    ({"rewards": [{"plugin": "a:b", "arguments": {"api_key": "hunter2"}}]}, ["arguments.api_key", "environment"]),
    ({"rewards": [{"plugin": "a:b", "arguments": {"x": {"password": "hunter2"}}}]}, ["x.password", "environ"]),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "parts"), WRONG, ids=[",".join(changes) for changes, _ in WRONG])
def test_wrong_settings(refused: Callable, changes: dict, parts: list[str]):
    error = refused(changes, *parts)
    assert "hunter2" not in error


def test_files_that_are_no_data_or_model(refused: Callable, tmp_path: Path):
    def file(name: str, content: str | bytes) -> str:
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return str(path)

    refused({"data.train": file("empty.jsonl", "")}, "data.train", "has no rows")
    refused({"data.train": file("broken.jsonl", '{"prompt": "1", "answer": "1"}\n{"prompt"')}, "data.train", "broken")
    refused({"data.train": file("noise.parquet", bytes(range(256)))}, "data.train", "noise.parquet")
    refused({"data.train": file("notes.txt", "hello")}, "data.train", "notes.txt")
    (tmp_path / "notes").mkdir()
    refused(
        {"data.train": "arithmetic@train", "model.path": str(tmp_path / "notes")}, "model.path=", "has no config.json"
    )


def test_a_model_without_weights_or_of_no_language(refused: Callable, tiny_model: Path, tmp_path: Path):
    bare = tmp_path / "bare"
    shutil.copytree(tiny_model, bare, ignore=shutil.ignore_patterns("*.safetensors"))
    refused({"model.path": str(bare)}, f"model.path='{bare}'", "has no weights")
    (bare / "config.json").write_text("{")
    refused({"model.path": str(bare)}, f"model.path='{bare}'")


@pytest.mark.parametrize("command", ["estimate", "train"])
def test_a_model_that_is_not_here(
    write_config: Callable,
    tiny_tree: dict,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
    command: str,
):
    """Refused alike by every command that reads it, without a second question to the hub."""
    asked: list[str] = []

    def unreachable(url: str) -> None:
        asked.append(url)
        raise httpx.ConnectError("no such host")

    monkeypatch.setattr("trainers.base_model.get_hf_file_metadata", unreachable)

    def refusal(**changes: Any) -> str:
        assert main([command, str(write_config(tiny_tree | changes))]) == 2
        return capsys.readouterr().err

    elsewhere = {"path": "no/such-model"}
    assert "no hub can be reached" in refusal(model=elsewhere)
    assert len(asked) == 1
    assert "make it with `hybrid-rl warm-start`" in refusal(model=elsewhere, warm_start={"slips": 0.5})
    assert "no name of a hub's model" in refusal(model={"path": "/nowhere/model"})
    assert len(asked) == 1


def test_plans_that_do_not_fit(refused: Callable, tiny_tree: dict, write_config: Callable, tmp_path: Path):
    plan = tmp_path / "plan.json"
    plan.write_text("{}")
    refused({"plan": {"path": str(plan)}}, f"plan.path='{plan}' is not a plan")
    module = {"name": "model.layers.9.mlp.up_proj", "component": "mlp", "layer": 9, "shape": [8, 8], "params": 64}
    module |= {"score": None, "rank": None, "alpha": None, "treatment": "full"}
    other = {
        "version": 1,
        "model": "another",
        "topology": "attention-only",
        "method": {},
        "seed": 0,
        "modules": [module],
    }
    plan.write_text(json.dumps(other))
    refused({"plan": {"path": str(plan)}}, "the plan was made for another model (another)", "model.layers.9")


def test_reward_files_that_are_broken(refused: Callable, tmp_path: Path):
    def plugin(source: str) -> dict:
        path = tmp_path / f"reward_{len(list(tmp_path.iterdir()))}.py"
        path.write_text(source)
        return {"rewards": [{"plugin": f"{path}:score"}]}

    refused(plugin("def score(completion:\n"), "SyntaxError")
    refused(plugin("import no_such_package\n"), "no_such_package")
    refused(plugin("def other(completion): return 1.0\n"), "score")
    refused(plugin("def score(completion, colour): return 1.0\n"), "colour")


def test_configuration_files(write_config: Callable, tmp_path: Path, capsys: pytest.CaptureFixture):
    for name, content in {
        "tabs.yaml": "model:\n\tpath: m",
        "bomb.yaml": "a: &a [x, x]\nb: &b [*a, *a]\n" + "".join(f"c{i}: &c{i} [*b, *b]\n" for i in range(9)),
        "object.yaml": "model: !!python/object/apply:os.system ['echo']",
        "list.yaml": "- a",
        "empty.yaml": "",
    }.items():
        (tmp_path / name).write_text(content)
        assert main(["train", str(tmp_path / name)]) == 2
        error = capsys.readouterr().err
        assert name in error
        assert len(error.splitlines()) <= LINES
    for words, part in {
        ("nowhere.yaml",): "does not exist",
        (str(tmp_path),): "cannot be read",
        (str(tmp_path / "empty.yaml"), "steps.x=2", "steps=2"): "model is required",
    }.items():
        assert main(["train", *words]) == 2
        assert part in capsys.readouterr().err


def test_runs_that_cannot_be_resumed_or_begun(refused: Callable, tmp_path: Path):
    refused({"run": {}}, "--resume needs run.dir=DIRECTORY", words=("--resume",))
    run = tmp_path / "another"
    refused({"run.dir": str(run)}, f"run.dir='{run}' holds no run", words=("--resume",))
    run.mkdir()
    (run / "metrics.jsonl").write_text("{}\n")
    refused({}, f"run.dir='{run}' holds a run already", "--resume")
    file = tmp_path / "file"
    file.write_text("")
    refused({"run.dir": str(file)}, f"run.dir='{file}' cannot be written")


def test_no_room_for_checkpoints(refused: Callable, monkeypatch: pytest.MonkeyPatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("trainers.preflight.shutil.disk_usage", lambda path: usage(10**12, 10**12 - 1000, 1000))
    refused({"checkpoint": {"every": 1}}, "run.dir=", "GiB of disk", "checkpoint.keep_last=2")


def test_no_memory_for_the_run(refused: Callable, monkeypatch: pytest.MonkeyPatch):
    from trainers.sizing import Machine

    monkeypatch.setattr("trainers.preflight.Machine.here", lambda: Machine(0, None, 2**20))
    refused({}, "of memory, and this machine has 1.00 MiB", "learner.world_size=2", "What helps")


@pytest.fixture
def taken_port() -> Iterator[int]:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        yield server.getsockname()[1]


def test_a_port_that_is_taken(refused: Callable, taken_port: int):
    refused({"tracking.prometheus": taken_port}, f"tracking.prometheus={taken_port}", "choose another port")


def test_wandb_online_without_a_key(refused: Callable, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.setenv("HOME", str(tmp_path))
    refused({"tracking": {"wandb": "online"}}, "tracking.wandb=online", "wandb login", "tracking.wandb=offline")


def test_a_judge_without_its_key(refused: Callable, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    arguments = {
        "base_url": "http://127.0.0.1:1/v1",
        "model": "m",
        "template": "{completion}",
        "api_key_env": "NO_SUCH_KEY",
    }
    refused({"rewards": [{"plugin": "rewards.judge:Judge", "arguments": arguments}]}, "NO_SUCH_KEY")
