"""`hybrid-rl import`: training goes on from what was exported, in a run like any other."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from hybrid_rl.adaptation import WEIGHTS
from hybrid_rl.checkpoint import load_state
from hybrid_rl.cli import main
from hybrid_rl.config_file import load_config, parse_config
from hybrid_rl.export import export_run, load_export
from hybrid_rl.learner import LearnerGroup
from hybrid_rl.plan import AdaptationPlan
from hybrid_rl.run_directory import RunDirectory, read_metrics
from hybrid_rl.weight_sync import digest, served_tensors
from trainers.grpo import train

PLUGIN = """
def shortness(completions, **columns):
    return [1.0 / (1 + len(set(c))) + (sum(map(ord, c)) % 7) * 0.01 for c in completions]
"""


@pytest.fixture(scope="module")
def recipe(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict:
    """A run within this process, which a random policy gets something out of."""
    plugin = tmp_path_factory.mktemp("rewards") / "shortness.py"
    plugin.write_text(PLUGIN)
    return {
        "model": {"path": str(tiny_model)},
        "data": {"train": "arithmetic@train", "eval": "arithmetic@eval", "eval_size": 8, "max_prompt_length": 16},
        "sampling": {"max_completion_length": 6},
        "steps": 2,
        "batch": {"prompts": 4, "num_generations": 4},
        "lora": {"rank": 4},
        "full": {"lr": 1e-3},
        "eval": {"k": 0},
        "tracking": {"wandb": "disabled"},
        "cluster": {"backend": "inline"},
        "learner": {"world_size": 1},
        "rollout": {"engine": "transformers"},
        "rewards": [{"plugin": f"{plugin}:shortness"}],
    }


@pytest.fixture(scope="module")
def first(recipe: dict, tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    """Two steps of full matrices beside Matryoshka adapters, which PEFT has as plain LoRA."""
    plan = {"score": "manual", "manual": {"*": 1.0}, "rest": "matryoshka", "budget": {"ratio": 0.2}}
    directory = tmp_path_factory.mktemp("runs") / "first"
    tree = recipe | {"plan": plan, "matryoshka": {"ranks": [2, 4]}, "run": {"dir": str(directory)}}
    return train(parse_config(tree), name="first")


def imported(directory: Path, config: Path, out: Path, *overrides: str) -> RunDirectory:
    assert main(["import", str(directory), "--config", str(config), f"run.dir={out}", *overrides]) == 0
    return RunDirectory(out)


def sent(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, str]]:
    """Digests of every update's tensors, as the runs from here on send them."""
    from hybrid_rl.rollout import RolloutPool

    seen: list[dict[str, str]] = []
    update = RolloutPool.update

    def watched(pool: Any, weights: Any, in_flight: str = "keep") -> Any:
        seen.append(dict(weights.digests))
        return update(pool, weights, in_flight)

    monkeypatch.setattr(RolloutPool, "update", watched)
    return seen


@pytest.mark.parametrize("to", ["delta", "peft", "merged"])
def test_training_goes_on_from_each_format(
    to: str, first: RunDirectory, recipe: dict, tmp_path: Path, write_config: Callable, monkeypatch: pytest.MonkeyPatch
):
    out = export_run(first.path, to, tmp_path / "out").directory
    updates = sent(monkeypatch)
    # The run's own recipe, with a KL penalty: what it refers to stays the base model.
    config = write_config(recipe | {"adaptation": "lora", "algo": {"kl_coef": 0.1}, "steps": 1})
    run = imported(out, config, tmp_path / "second", "seed=1")

    before, rows = first.read_summary()["eval_after"], read_metrics(run.metrics)
    assert run.read_summary()["eval_before"] == pytest.approx(before)
    assert len(rows) == 1
    assert rows[0]["grad_norm/lora"] > 0
    settings = load_config(run.config)
    if to == "merged":
        assert settings.model.path == str(out)
        assert rows[0]["policy/kl"] == pytest.approx(0, abs=1e-6)  # the export is the base model
        return
    assert settings.plan.start == str(out)
    assert rows[0]["policy/kl"] > 1e-3
    plan = AdaptationPlan.load(run.plan)
    assert {m.treatment for m in plan.modules} == {"full", "matryoshka" if to == "delta" else "lora"}
    assert (plan == AdaptationPlan.load(first.plan)) is (to == "delta")
    policy = load_export(out, settings.model)
    assert updates[0] == {name: digest(tensor) for name, tensor in served_tensors(policy)}, "another policy was sent"
    trained = load_file(run.checkpoints / "step_000001" / "weights.safetensors")
    assert trained.keys() == policy.trained.keys()
    assert not any(torch.equal(trained[name], p) for name, p in policy.trained.items())


def test_what_trains_in_bf16_starts_at_the_exported_values(
    first: RunDirectory, recipe: dict, tmp_path: Path, write_config: Callable, monkeypatch: pytest.MonkeyPatch
):
    """In fp32, beside what is computed with; and a resumed run needs the export no more."""
    out = export_run(first.path, "delta", tmp_path / "out").directory
    build = LearnerGroup.build

    def saved(learner: Any, plan: Any, start: Any = None) -> None:
        build(learner, plan, start)
        if start is not None:
            learner.begin_save(str(tmp_path / "at_start"))
            learner.saved(wait=True)

    monkeypatch.setattr(LearnerGroup, "build", saved)
    model = {**recipe["model"], "dtype": "bfloat16"}
    config = write_config(recipe | {"model": model, "checkpoint": {"every": 1, "keep_last": 2}})
    run = imported(out, config, tmp_path / "second")
    wanted = load_export(out, load_config(first.config).model).trained
    found = load_file(tmp_path / "at_start" / WEIGHTS)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], value) for name, value in wanted.items())

    state = load_state(run.checkpoints / "step_000002")
    exported = load_state(first.checkpoints / "step_000002")
    assert state.base == exported.base != ""
    assert state.started_from["plan"] == exported.plan_hash
    assert (state.started_from["format"], state.started_from["step"]) == ("delta", 2)
    trained = load_file(run.checkpoints / "step_000002" / WEIGHTS)
    shutil.rmtree(run.checkpoints / "step_000002")
    shutil.rmtree(out)
    arguments = ["train", str(run.config), f"run.dir={run.path}", "--resume"]
    assert main([*arguments, "--dry-run"]) == 0
    assert main(arguments) == 0
    resumed = load_file(run.checkpoints / "step_000002" / WEIGHTS)
    assert all(torch.equal(resumed[name], value) for name, value in trained.items())
    assert load_state(run.checkpoints / "step_000002").started_from == state.started_from

    tensors = load_file(Path(model["path"]) / "model.safetensors")
    tensors["model.norm.weight"] += 1
    other = tmp_path / "other"
    shutil.copytree(model["path"], other)
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    shutil.rmtree(run.checkpoints / "step_000002")
    settings = yaml.safe_load(run.config.read_text())
    run.config.write_text(yaml.safe_dump(settings | {"model": {**settings["model"], "path": str(other)}}))
    assert main(arguments) == 2


def test_components_of_the_settings_are_kept_where_an_export_has_none(
    first: RunDirectory, recipe: dict, tmp_path: Path, write_config: Callable, monkeypatch: pytest.MonkeyPatch
):
    out = export_run(first.path, "delta", tmp_path / "out").directory
    seen: list[Any] = []
    monkeypatch.setattr("trainers.grpo.train", lambda config, **_: seen.append(config))
    components = {"*q_proj": "attention"}
    config = write_config(recipe | {"plan": {"components": components, "budget": {"ratio": 0.5}}})
    assert main(["import", str(out), "--config", str(config)]) == 0
    assert seen[0].plan.components == components
    assert seen[0].plan.start == str(out)


@pytest.mark.parametrize(
    ("damage", "parts"),
    [
        ("model", ["model.path=", "is not the base model of plan.start="]),
        ("byte", ["adapter.safetensors is not what was exported"]),
        ("nothing", ["is no export"]),
        ("both", ["plan.path=", "plan.start=", "drop one"]),
        ("adaptation", ["adaptation=lora", "plan.start="]),
        ("merged", ["is a whole model", "model.path"]),
    ],
)
def test_what_cannot_go_on_is_refused(
    damage: str,
    parts: list,
    first: RunDirectory,
    recipe: dict,
    tiny_model: Path,
    tmp_path: Path,
    write_config: Callable,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr("hybrid_rl.cluster.inline.InlineCluster.start", lambda *a, **k: pytest.fail("started"))
    out = export_run(first.path, "merged" if damage == "merged" else "delta", tmp_path / "out").directory
    arguments, config = ["import", str(out), "--config"], write_config(recipe)
    if damage == "model":
        other = tmp_path / "other"
        other.mkdir()
        for path in tiny_model.iterdir():
            (other / path.name).write_bytes(path.read_bytes())
        tensors = load_file(other / "model.safetensors")
        tensors["model.norm.weight"] += 1
        save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
        config = write_config(recipe | {"model": {"path": str(other)}})
    elif damage == "byte":
        data = bytearray((out / "adapter.safetensors").read_bytes())
        data[-1] ^= 1
        (out / "adapter.safetensors").write_bytes(data)
    elif damage == "nothing":
        arguments[1] = str(first.path)
    elif damage == "both":
        arguments += [str(config), f"plan.path={first.plan}"]
    elif damage == "adaptation":
        arguments = ["train", str(config), f"plan={json.dumps({'start': str(out)})}", "adaptation=lora"]
    elif damage == "merged":
        arguments = ["train", str(config), f"plan={json.dumps({'start': str(out)})}"]
    arguments += [str(config)] if arguments[-1] == "--config" else []
    assert main([*arguments, f"run.dir={tmp_path / 'second'}"]) == 2
    error = capsys.readouterr().err
    assert all(part in error for part in parts), error
    assert len(error.splitlines()) <= 15
    assert yaml.safe_load(first.config.read_text())["plan"]["start"] is None
