"""Whole runs on real parts: Ray actors, vLLM (CPU build) or transformers, DeepSpeed on gloo, PEFT, math-verify."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from hybrid_rl.answers import Answered, Answers
from hybrid_rl.config import Config, ConfigError
from hybrid_rl.config_file import parse_config
from hybrid_rl.plan import AdaptationPlan
from hybrid_rl.run_directory import read_metrics
from trainers import setup
from trainers.grpo import check_run, train
from trainers.stopping import Stopped

METRICS = {
    *("step", "reward/mean", "reward/zero_variance_groups", "policy/clip_fraction", "policy/rollout_kl"),
    *("grad_norm/full", "grad_norm/lora", "lr/full", "lr/lora", "tokens/generated", "tokens/trained"),
    *("sync/bytes", "sync/full_model_bytes", "sync/verified_engines", "sync/version", "time/step", "time/generate"),
    *("time/reward", "time/logprob", "time/train", "time/sync", "time/eval", "time/checkpoint", "time/other"),
}

PLUGIN = '''
def shortness(completions, **columns):
    """Never the same for a whole group, so that every step trains."""
    return [1.0 / (1 + len(set(c))) + (hash(c) % 7) * 0.01 for c in completions]
'''


@pytest.fixture
def learnable(tiny_tree: dict, tmp_path: Path) -> dict:
    """The tiny run with a reward that a random policy gets something out of."""
    path = tmp_path / "shortness.py"
    path.write_text(PLUGIN.replace("hash(c)", "sum(map(ord, c))"))
    tiny_tree["rewards"] = [{"plugin": f"{path}:shortness"}]
    tiny_tree["full"] = {"lr": 1e-3}
    return tiny_tree


def check_rows(rows: list[dict[str, Any]], steps: int) -> None:
    assert [row["step"] for row in rows] == list(range(1, steps + 1))
    for row in rows:
        assert not METRICS - row.keys()
        parts = [v for k, v in row.items() if k.startswith("time/") and k != "time/step"]
        assert sum(parts) == pytest.approx(row["time/step"], abs=1e-6)
        assert row["sync/version"] == row["step"]


def test_a_run_survives_kill_9_of_its_engine_and_stays_in_step_with_it(
    learnable: dict, monkeypatch: pytest.MonkeyPatch
):
    """Two learner ranks, one vLLM engine, everything through Ray; the engine is killed while it generates."""
    killed: list[int] = []
    generate = Answers.generate

    def kill_while_generating(answers: Answers, prompts: Any, sampling: Any, **named: Any) -> list[Answered]:
        pool = answers._episodes._pool
        if prompts[0].id.startswith("0/") and sampling.n > 1 and pool._log and not killed:
            pid = pool._slots[0].engine.submit("info").result()["pid"]
            killed.append(pid)
            assert pid != os.getpid()
            timer = threading.Timer(0.02, os.kill, (pid, signal.SIGKILL))
            timer.start()
            groups = generate(answers, prompts, sampling, **named)
            timer.join()
            return groups
        return generate(answers, prompts, sampling, **named)

    monkeypatch.setattr(Answers, "generate", kill_while_generating)
    learnable |= {"steps": 3, "batch": {"prompts": 8, "num_generations": 4}}
    run = train(parse_config(learnable), name="tiny")

    rows = read_metrics(run.metrics)
    check_rows(rows, 3)
    assert killed
    # The engine may die just after it answered; then the next call to it finds out.
    assert sum(row["faults/engine_restarts"] for row in rows) == 1
    for row in rows:
        assert row["policy/rollout_logprob_diff_max"] < 1e-4, "learner and engine disagree right after a sync"
        assert row["sync/verified_engines"] == 1
        assert 0 < row["sync/bytes"] < row["sync/full_model_bytes"]
        assert row["grad_norm/full"] > 0
        assert row["grad_norm/lora"] > 0
        assert row["lr/lora"] == pytest.approx(10 * row["lr/full"])
        lines = (run.rollouts / f"step_{row['step']:06d}.jsonl").read_text().splitlines()
        assert len(lines) == 32, "no prompt was lost"
        assert {json.loads(line)["weight_version"] for line in lines} == {row["step"] - 1}

    plan = AdaptationPlan.load(run.plan)
    assert plan.totals["full_params"] <= 0.1 * plan.totals["candidate_params"]
    assert plan.method["score"] == "update_tail_split"
    summary = run.read_summary()
    assert set(summary) >= {"eval_before", "eval_after", "steps", "wall_seconds", "plan_hash"}
    assert summary["plan_hash"] == plan.hash
    for path in (run.config, run.curve, run.plan_image):
        assert path.stat().st_size > 0
    weights = load_file(run.checkpoints / "step_000003" / "weights.safetensors")
    assert {f"{m.name}.weight" for m in plan.named("full")} == {n for n in weights if ".lora_" not in n}


def timeless(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What does not depend on the clock."""
    return [{k: v for k, v in row.items() if not k.startswith(("time/", "throughput/"))} for row in rows]


def inline(tree: dict, directory: Path, **changes: Any) -> dict:
    small = {"cluster": {"backend": "inline"}, "learner": {"world_size": 1}, "rollout": {"engine": "transformers"}}
    return {**tree, **small, "run": {"dir": str(directory)}, **changes}


def test_inline_runs_resume_where_they_stopped(learnable: dict, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    """A resumed run must equal one that was never interrupted, in every metric and every weight."""
    checkpoint = {"every": 3, "keep_last": 5}
    sync = {"anchor_every": 3, "gate": {"every": 2}}
    same = {"steps": 6, "checkpoint": checkpoint, "sync": sync, "eval": {"every": 2, "k": 2}}
    whole = train(parse_config(inline(learnable, tmp_path / "whole", **same)), name="whole")

    tree = inline(learnable, tmp_path / "parts", **same)
    ends: list[tuple[int, type[BaseException]]] = [(5, KeyboardInterrupt), (1, Stopped), (1, Stopped)]
    for resumed, (at, ended) in enumerate(ends):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("trainers.grpo.assemble", _Interrupt(at, ended))
            with pytest.raises(ended) as reason:
                train(parse_config(tree), name="parts", resume=bool(resumed))
        if ended is Stopped:  # the step is done to its end, and saved though it is not its turn
            assert str(reason.value) == f"and step_{3 + resumed:06d} is saved; --resume goes on"
    parts = train(parse_config(tree), name="parts", resume=True)

    rows, expected = read_metrics(parts.metrics), read_metrics(whole.metrics)
    check_rows(rows, 6)
    assert timeless(rows) == timeless(expected)
    assert {row["sync/anchor"] for row in rows} == {0.0, 1.0}
    weights, reference = (load_file(run.checkpoints / "step_000006/weights.safetensors") for run in (parts, whole))
    assert all(torch.equal(weights[name], reference[name]) for name in reference)

    with pytest.raises(ConfigError, match=r"started with other settings[^\n]*\n  seed: 0 -> 1"):
        train(parse_config({**tree, "seed": 1}), name="parts", resume=True)
    with pytest.raises(ConfigError, match="holds a run already"):
        train(parse_config(tree), name="parts")
    plan = json.loads(parts.plan.read_text())
    edited = {**plan, "modules": [{**plan["modules"][0], "treatment": "frozen", "rank": None}, *plan["modules"][1:]]}
    parts.plan.write_text(json.dumps(edited))
    with pytest.raises(ConfigError, match=rf"was changed since step_000006[^\n]*\n  {plan['modules'][0]['name']}: \w+"):
        train(parse_config(tree), name="parts", resume=True)
    parts.plan.write_text(json.dumps(plan))

    # More steps, other places: what may change is changed, and written down. A damaged checkpoint is passed over.
    damaged = parts.checkpoints / "step_000006/learner/rank_00000.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    more = {**tree, "steps": 7, "learner": {"world_size": 1, "zero_stage": 3}}
    train(parse_config(more), name="parts", resume=True)
    rows = read_metrics(parts.metrics)
    check_rows(rows, 7)
    assert [row["faults/damaged_checkpoints"] for row in rows] == [0] * 5 + [1, 0]
    said = " ".join(record.getMessage() for record in caplog.records)
    assert f"{damaged.resolve()} is not what was written; going back to step_000005" in said
    assert "learner.zero_stage: 2 -> 3" in said
    assert "zero_stage: 3" in parts.config.read_text()
    assert "zero_stage: 2" in (parts.path / "config.1.yaml").read_text()


class _Interrupt:
    """Stands in for `assemble`; the `at`-th step of training is interrupted, or the run asked to stop there."""

    def __init__(self, at: int, how: type[BaseException]) -> None:
        from hybrid_rl.learner.assemble import assemble

        self._assemble, self._left, self._how = assemble, at, how

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        self._left -= 1
        if not self._left:
            if self._how is KeyboardInterrupt:
                raise KeyboardInterrupt
            os.kill(os.getpid(), signal.SIGTERM)
        return self._assemble(*arguments, **named)


def test_a_run_that_is_stopped_before_its_first_step_begins_again(learnable: dict, tmp_path: Path):
    config = parse_config(inline(learnable, tmp_path / "run"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("trainers.step.InTurn.next", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(Stopped, match="before anything was saved; --auto-resume begins again"):
            train(config, name="run")
    with pytest.raises(ConfigError, match="has no finished checkpoint to resume from"):
        train(config, name="run", resume=True)
    for _ in range(2):  # begun again, then gone on with, though nothing is left to do
        check_rows(read_metrics(train(config, name="run", resume="auto").metrics), 2)
    _check_that_one_process_trains_in_it(config, tmp_path / "run")


HOLDER = """
import sys, time
from pathlib import Path
from hybrid_rl.run_directory import RunDirectory
with RunDirectory(Path(sys.argv[1])).alone():
    print("held", flush=True)
    time.sleep(600)
"""


def _check_that_one_process_trains_in_it(config: Config, run: Path) -> None:
    being_written = run / "checkpoints" / ".writing_step_000009_00000000"
    being_written.mkdir()
    with subprocess.Popen([sys.executable, "-c", HOLDER, run], stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        for resume in (True, "auto"):
            with pytest.raises(ConfigError, match=rf"is in use: process {holder.pid} on \S+ trains in it; wait for it"):
                train(config, name="run", resume=resume)
            check_run(config, resume)  # a look changes nothing
        (run / "metrics.jsonl").rename(run / "metrics.not_yet")
        before = (run / "config.yaml").read_text()
        with pytest.raises(ConfigError, match="is in use"):
            train(config.model_copy(update={"seed": 5}), name="run")
        assert (run / "config.yaml").read_text() == before
        (run / "metrics.not_yet").rename(run / "metrics.jsonl")
        holder.kill()
    assert being_written.is_dir()
    check_rows(read_metrics(train(config, name="run", resume="auto").metrics), 2)
    assert not being_written.exists()


@pytest.mark.parametrize("adaptation", ["lora", "full"])
def test_lora_alone_and_full_alone(learnable: dict, tmp_path: Path, adaptation: str):
    tree = {name: value for name, value in learnable.items() if name != "lora" or adaptation == "lora"}
    run = train(parse_config(inline(tree, tmp_path / adaptation, adaptation=adaptation)), name=adaptation)
    rows = read_metrics(run.metrics)
    check_rows(rows, 2)
    other = {"lora": "full", "full": "lora"}[adaptation]
    assert all(row[f"grad_norm/{adaptation}"] > 0 and row[f"grad_norm/{other}"] == 0 for row in rows)


def test_adalora_that_does_not_come_down_says_so(tiny_tree: dict, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    """Steps without a reward that tells completions apart train nothing, and take no ranks away."""
    plugin = tmp_path / "nothing.py"
    plugin.write_text("def nothing(completions, **columns):\n    return [0.0 for _ in completions]\n")
    tree = inline(tiny_tree, tmp_path / "run", steps=3, adaptation="adalora", lora={"rank": 4})
    train(parse_config({**tree, "rewards": [{"plugin": f"{plugin}:nothing"}]}), name="adalora")
    (warning,) = (r.getMessage() for r in caplog.records if r.name == "trainers.record")
    assert "ends with 84 ranks in its adalora modules, above the 56" in warning


def test_a_hand_edited_plan_is_what_is_trained(learnable: dict, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    first = train(parse_config(inline(learnable, tmp_path / "first", steps=1)), name="first")
    tree = json.loads(first.plan.read_text())
    for i, module in enumerate(tree["modules"]):
        full = i == 3
        module |= {"treatment": "full", "rank": None, "alpha": None} if full else {"treatment": "frozen", "rank": None}
    edited = tmp_path / "edited.json"
    other = inline(learnable, tmp_path / "other", plan={"path": str(first.plan)}, lora={"rank": 8})
    check_run(parse_config(other), False)
    assert f"lora.rank=8 does nothing: plan.path={str(first.plan)!r} has modules of rank 4" in caplog.text
    edited.write_text(json.dumps(tree))
    run = train(parse_config(inline(learnable, tmp_path / "second", plan={"path": str(edited)})), name="second")
    assert set(load_file(run.checkpoints / "step_000002/weights.safetensors")) == {
        tree["modules"][3]["name"] + ".weight"
    }


@pytest.mark.slow
def test_gsm8k_recipe_survives_rewards_of_zero(tiny_model: Path, tmp_path: Path):
    """The shipped recipe, three steps with the tiny model, which never answers right."""
    from hybrid_rl.config_file import load_config

    lines = [{"question": f"What is {i} plus {i}?", "answer": f"{i}+{i}={2 * i}\n#### {2 * i}"} for i in range(40)]
    data = tmp_path / "gsm8k.jsonl"
    data.write_text("\n".join(map(json.dumps, lines)))
    overrides = [
        *(f"model.path={tiny_model}", "model.dtype=float32", f"data.train={data}", f"data.eval={data}"),
        *("data.chat=false", "steps=3", "sampling.max_completion_length=16", "batch.prompts=4", "plan.prompts=4"),
        *(f"run.dir={tmp_path / 'run'}", "tracking.wandb=disabled", "eval.k=0"),
    ]
    config = load_config(Path(setup.__file__).parent.parent / "configs" / "gsm8k.yaml", overrides)
    run = train(config, name="gsm8k")
    rows = read_metrics(run.metrics)
    check_rows(rows, 3)
    assert all(row["reward/zero_variance_groups"] == 4 and row["tokens/trained"] == 0 for row in rows)
