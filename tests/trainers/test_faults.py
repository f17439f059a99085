"""Whole runs whose workers fail on cue, each in its own process: they mend themselves, or stop and say what it was.

The faults are in subclasses of the real workers, which travel to the actors by value.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from ray import cloudpickle

from hybrid_rl.config_file import parse_config
from hybrid_rl.learner import worker as learner_worker
from hybrid_rl.rollout import transformers_engine
from hybrid_rl.run_directory import read_metrics
from hybrid_rl.types import WeightUpdate, WorkerDied
from hybrid_rl.weight_sync import SyncMismatch
from tests.trainers.test_grpo import check_rows, inline, learnable  # noqa: F401
from trainers.gate import GateFailed
from trainers.grpo import train

cloudpickle.register_pickle_by_value(sys.modules[__name__])


def tamper(records: list[Any], fault: str) -> list[Any]:
    """A part of an update, spoilt after its digest was checked."""
    import torch

    from hybrid_rl.weight_sync.apply import is_factor

    # At the first step no factor A changes. A file's tensors come in any order.
    changing = sorted((r for r in records if "lora_A" not in r.name), key=lambda r: r.name)
    if fault == "drop a tensor":
        return [r for r in records if r is not changing[0]]
    if fault == "stale adapter":
        return [r for r in records if not is_factor(r.name)]
    if fault == "corrupt an element":
        first = changing[0]
        write = first.write_to

        def spoil(held: Any, shard: Any = None) -> None:
            write(held, shard)
            whole = held.clone()
            whole.view(torch.uint8).view(-1)[5] ^= 1
            held.copy_(whole)

        object.__setattr__(first, "write_to", spoil)
        return records
    assert fault == "swap two tensors"
    pairs = [(a, b) for a in changing for b in changing if a.name < b.name and a.shape == b.shape]
    a, b = pairs[0]
    names = a.name, b.name
    object.__setattr__(a, "name", names[1])
    object.__setattr__(b, "name", names[0])
    return records


def faulty(base: type, plan: dict[str, Any]) -> type:
    """`plan`: what happens -> at which update, or at the how-manieth `advance`; once, unless `plan["always"]`."""

    class Faulty(base):
        def apply_updates(self, updates: list[WeightUpdate], in_flight: str = "keep") -> Any:
            from hybrid_rl.weight_sync import apply

            due = [f for f, at in plan.get("updates", {}).items() if at == updates[-1].version and self._once(f)]
            if "die" in due:
                os.kill(os.getpid(), signal.SIGKILL)
            if "hang" in due:
                time.sleep(3600)
            unpack = apply.unpack
            if due:
                apply.unpack = lambda payload: tamper(unpack(payload), due[0])  # type: ignore[assignment]
            try:
                return super().apply_updates(updates, in_flight)
            finally:
                apply.unpack = unpack  # type: ignore[assignment]

        def advance(self, requests: Any, cancelled: Any, seconds: float) -> Any:
            self._advances = getattr(self, "_advances", 0) + 1
            due = [f for f, at in plan.get("advances", {}).items() if at == self._advances and self._once(f)]
            if "die" in due:
                os.kill(os.getpid(), signal.SIGKILL)
            if "hang" in due:
                time.sleep(3600)
            return super().advance(requests, cancelled, seconds)

        def _once(self, fault: str) -> bool:
            if plan.get("always"):
                return True
            mark = Path(plan["marks"]) / fault.replace(" ", "_")
            try:
                mark.touch(exist_ok=False)
            except FileExistsError:
                return False
            return True

    return Faulty


def with_faults(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, **plan: Any) -> None:
    plan["marks"] = str(tmp_path)
    engine = faulty(transformers_engine.TransformersEngine, plan)
    monkeypatch.setattr(transformers_engine, "TransformersEngine", engine)


def small(tree: dict, **changes: Any) -> dict:
    """Two engines and one learner rank as actors; no ranking, so that update k follows step k."""
    tree = {**tree, "learner": {"world_size": 1}, "plan": {"score": "random"}, **changes}
    tree["sync"] = {"timeout": 5, **changes.get("sync", {})}
    return {**tree, "rollout": {"engine": "transformers", "engines": 2, "timeout": 20, **changes.get("rollout", {})}}


def test_spoilt_weights_are_noticed_and_sent_again(
    learnable: dict,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    faults = {"drop a tensor": 1, "swap two tensors": 2, "corrupt an element": 3, "stale adapter": 4}
    with_faults(monkeypatch, tmp_path, updates=faults)
    rows = read_metrics(train(parse_config(small(learnable, steps=5)), name="spoilt").metrics)
    check_rows(rows, 5)
    assert [row["sync/repaired_engines"] for row in rows] == [1, 1, 1, 1, 0]
    assert [row["sync/verified_engines"] for row in rows] == [2] * 5
    assert all(row["policy/rollout_logprob_diff_max"] < 1e-4 for row in rows)
    assert all(row["faults/engine_restarts"] == 0 for row in rows)


@pytest.mark.parametrize("fault", ["drop a tensor", "swap two tensors", "corrupt an element", "stale adapter"])
def test_what_cannot_be_mended_stops_the_run_by_name(
    learnable: dict,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    fault: str,
):
    with_faults(monkeypatch, tmp_path, updates={fault: 1}, always=True)
    tree = inline(learnable, tmp_path / "run", plan={"score": "random"})
    with pytest.raises(SyncMismatch, match=r"engine-0 holds other bytes for \S+ \(version 1\)"):
        train(parse_config(tree), name="run")
    assert not read_metrics(tmp_path / "run" / "metrics.jsonl"), "no step was trained on it"


@pytest.mark.parametrize("transport", ["object_store", pytest.param("nccl", marks=pytest.mark.slow)])
def test_engines_that_die_or_hang_cost_time_and_no_prompt(
    learnable: dict,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    transport: str,
):
    """While generating and while receiving weights; two engines, so that work goes on."""
    with_faults(monkeypatch, tmp_path, updates={"die": 2, "hang": 4}, advances={"hang": 5})
    config = parse_config(small(learnable, steps=5, rollout={"timeout": 6}, sync={"transport": transport}))
    run = train(config, name="deaths")
    rows = read_metrics(run.metrics)
    check_rows(rows, 5)
    assert sum(row["faults/engine_restarts"] for row in rows) >= 2
    ids = [line.split('"prompt_id": "')[1].split('"')[0] for f in sorted(run.rollouts.iterdir()) for line in f.open()]
    assert len(ids) == 5 * 16
    assert len(set(ids)) == 5 * 4, "no prompt was lost or used twice"
    assert all(row["policy/rollout_logprob_diff_max"] < 1e-4 for row in rows)


def test_a_learner_that_dies_in_a_sync_stops_the_run_by_name(
    learnable: dict,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
):
    class DyingLearner(learner_worker.LearnerWorker):
        def export(self, version: int, *parts: Any) -> Any:
            if version == 2:
                os.kill(os.getpid(), signal.SIGKILL)
            return super().export(version, *parts)

    monkeypatch.setattr(learner_worker, "LearnerWorker", DyingLearner)
    learnable |= {"checkpoint": {"every": 1}}
    started = time.monotonic()
    with pytest.raises(Exception, match="learner-0"):
        train(parse_config(small(learnable, steps=3)), name="dying")
    assert time.monotonic() - started < 200
    monkeypatch.undo()
    run = train(parse_config(small(learnable, steps=3)), name="dying", resume=True)
    check_rows(read_metrics(run.metrics), 3)


@pytest.mark.slow
def test_a_learner_that_hangs_stops_the_run_by_name(
    learnable: dict,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
):
    class HangingLearner(learner_worker.LearnerWorker):
        def train(self, batch: Any) -> Any:
            time.sleep(3600)

    monkeypatch.setattr(learner_worker, "LearnerWorker", HangingLearner)
    tree = small(learnable, steps=3, **{"async": {"max_staleness": 1}})
    tree["learner"] |= {"timeout": 20}
    with pytest.raises(WorkerDied, match="learner-0 did not answer within 20 s"):
        train(parse_config(tree), name="hanging")


def test_weights_that_arrive_and_are_not_used_are_the_gate_s_to_find(
    learnable: dict,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    """The engine holds the right bytes, and multiplies its adapter by half: no receipt sees that."""

    class HalfAnAdapter(transformers_engine.TransformersEngine):
        def advance(self, requests: Any, cancelled: Any, seconds: float) -> Any:
            for module in self._model.modules():
                if hasattr(module, "lora_A"):
                    module.scaling = dict.fromkeys(module.scaling, 0.5)
            return super().advance(requests, cancelled, seconds)

    monkeypatch.setattr(transformers_engine, "TransformersEngine", HalfAnAdapter)
    tree = inline(learnable, tmp_path / "run", plan={"score": "random"}, steps=6, lora={"rank": 4, "lr": 0.05})
    tree["sync"] = {"gate": {"every": 1}}
    with pytest.raises(
        GateFailed, match=r"after step \d, engine 0 .* it is in the adapter\. Mean difference"
    ) as failed:
        train(parse_config(tree), name="run")
    assert "neither" in str(failed.value)
