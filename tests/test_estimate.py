"""Estimated memory against real tensors' bytes, what is made of it, and how `hybrid-rl estimate` says it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from hybrid_rl.cli import main
from hybrid_rl.cluster.inline import Memory
from hybrid_rl.components import read_model
from hybrid_rl.config import Config
from hybrid_rl.config_file import parse_config
from hybrid_rl.estimate import CONTEXT, GIB, LOADING, engine_memory, learner_memory, planned_memory, resident
from hybrid_rl.learner.assemble import mini_batches
from hybrid_rl.learner.layout import arrange, use_segment_attention
from hybrid_rl.plan import AdaptationPlan
from hybrid_rl.plan_building import configured_plan, select_candidates
from hybrid_rl.rehearsal import rehearse_cache, rehearse_pass
from tests.learner.processes import on_ranks, random_sequences
from trainers.base_model import meta_model
from trainers.sizing import Machine, layout_line, size_up, spread, unfit

H100 = Machine(8, 80 * GIB, None)


def _plan(config: Config) -> tuple[Any, Any, AdaptationPlan]:
    model = meta_model(config)
    anatomy = read_model(model)
    sizes = {c.name: float(c.params) for c in select_candidates(anatomy, config.plan)}
    return model, anatomy, configured_plan(anatomy, config, sizes, {})


def _held(rank: int, port: int, tree: dict, plan: str) -> dict[str, int]:
    """Bytes of a real engine's tensors when it steps for the second time."""
    from hybrid_rl.learner.worker import LearnerWorker

    config = parse_config(tree)
    worker = LearnerWorker(config, rank, Memory())
    worker.connect("127.0.0.1", port)
    worker.build(plan)
    engine, found = worker._engine, {}
    step = engine.step

    def looked_at(scale: Any) -> Any:
        masters = [master for group in engine._masters() for master in group]
        found["masters"] = sum(t.nbytes for t in masters)
        found["gradients"] = sum(t.nbytes for group in engine._gradients() for t in group)
        states = [engine._optimizer.optimizer.state.get(master, {}) for master in masters]
        found["moments"] = sum(state[m].nbytes for state in states for m in ("exp_avg", "exp_avg_sq") if m in state)
        return step(scale)

    engine.step = looked_at
    for _ in range(2):
        worker.train(mini_batches(random_sequences(0), config, {"full": 1.0, "lora": 1.0}, 1))
    found["weights"] = sum(p.nbytes for p in worker._model.parameters())
    found["originals"] = sum(t.nbytes for t in engine._originals or ())
    return found


def test_what_deepspeed_holds_is_what_is_estimated(tiny_tree: dict):
    tree = tiny_tree | {"learner": {"world_size": 1}, "algo": {"kl_coef": 0.1}}
    config = parse_config(tree)
    _, anatomy, plan = _plan(config)
    held = on_ranks(1, _held, tree, plan.to_json())
    estimate = planned_memory(config, anatomy, plan)
    for part in ("weights", "masters", "moments", "gradients", "originals"):
        assert held[part] == getattr(estimate, part), part


@pytest.mark.parametrize("adaptation", ["full", "lora", "molf"])
def test_a_rehearsal_counts_what_a_pass_keeps(tiny_tree: dict, adaptation: str):
    from hybrid_rl.adaptation import apply_plan

    config = parse_config(tiny_tree | {"adaptation": adaptation})
    model, _, plan = _plan(config)
    lengths = [40, 40, 40, 17]
    passed = rehearse_pass(config, model, plan, lengths, 60)
    assert passed is not None
    real: Any = AutoModelForCausalLM.from_pretrained(config.model.path)
    apply_plan(real, plan)
    assert use_segment_attention(real)
    weights = {p.untyped_storage().data_ptr() for p in real.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    given = arrange([[1] * n for n in lengths], "segments")
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        hidden = real.train().get_decoder()(input_ids=given.input_ids, **given.kwargs)[0]
    assert hidden.requires_grad
    assert passed.activations == pytest.approx(sum(kept.values()) + hidden.nbytes, rel=0.03)
    checkpointed = config.model_copy(
        update={"learner": config.learner.model_copy(update={"gradient_checkpointing": True})}
    )
    assert rehearse_pass(checkpointed, model, plan, lengths, 60).activations < 0.6 * passed.activations


def test_a_cache_takes_what_a_real_one_takes(tiny_config: Config):
    found = rehearse_cache(meta_model(tiny_config), torch.float32)
    real: Any = AutoModelForCausalLM.from_pretrained(tiny_config.model.path)
    with torch.no_grad():
        cache = real(input_ids=torch.ones(1, 13, dtype=torch.long), use_cache=True).past_key_values
    assert found is not None
    assert found.of(13) == sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


def test_shares_of_ranks(tiny_config: Config):
    _, anatomy, plan = _plan(tiny_config)
    whole = planned_memory(tiny_config, anatomy, plan)

    def parts(**learner: Any) -> dict[str, int]:
        config = tiny_config.model_copy(update={"learner": tiny_config.learner.model_copy(update=learner)})
        memory = learner_memory(config, anatomy, plan, None, micro_batches=1, gpu=True)
        return {**memory.host, **memory.device, "on the device": memory.device_total}

    by_stage = {stage: parts(world_size=4, zero_stage=stage) for stage in (1, 2, 3)}
    assert [by_stage[s]["optimizer moments"] for s in (1, 2, 3)] == [whole.moments // 4] * 3
    assert [by_stage[s]["gradients"] for s in (1, 2, 3)] == [whole.gradients] + [whole.gradients // 4] * 2
    assert [by_stage[s]["weights"] for s in (1, 2, 3)] == [whole.weights] * 2 + [whole.weights // 4]
    assert parts(offload="optimizer")["on the device"] < parts()["on the device"] - whole.moments // 2


def changed(config: Config, **sections: dict[str, Any]) -> Config:
    updates = {name: getattr(config, name).model_copy(update=fields) for name, fields in sections.items()}
    return config.model_copy(update=updates)


def test_the_model_is_read_whole_before_it_is_shared_out(tiny_config: Config):
    real: Any = AutoModelForCausalLM.from_pretrained(tiny_config.model.path, dtype=torch.float32)
    whole = sum(parameter.nbytes for parameter in real.parameters())
    halves = {"model": {"dtype": "bfloat16"}, "learner": {"world_size": 4, "zero_stage": 3}}
    config = changed(tiny_config.model_copy(update={"adaptation": "lora"}), **halves)
    _, anatomy, plan = _plan(config)
    gpu = learner_memory(config, anatomy, plan, None, micro_batches=1, gpu=True)
    cpu = learner_memory(config, anatomy, plan, None, micro_batches=1, gpu=False, first=False)
    assert gpu.device_total == whole + CONTEXT
    assert cpu.host_total - cpu.host["the process itself"] == whole
    assert resident(config, gpu) == gpu.device_total
    sizing = size_up(config, replace(H100, gpu_bytes=whole + CONTEXT - 1), compared={}, rehearse=False)
    assert "each rank reads all of it in float32 onto its GPU" in (unfit(sizing) or "")
    fitting = learner_memory(tiny_config, anatomy, plan, None, micro_batches=1, gpu=False)
    assert LOADING not in fitting.host  # in float32, it is what is trained


def test_only_one_rank_sends_and_writes_what_is_trained(tiny_config: Config):
    config = changed(tiny_config, learner={"world_size": 4})
    _, anatomy, plan = _plan(config)
    memory = planned_memory(config, anatomy, plan)
    sizing = size_up(config, Machine(0, None, None), compared={}, rehearse=False)
    own = sizing.own.learner.host_total - memory.payload - memory.masters
    between = sizing.own.learner.host.get("optimizer and sync", 0)
    assert own - between <= sizing.own.other_rank.host_total <= own
    assert sizing.ranks(sizing.own) == sizing.own.learner.host_total + 3 * sizing.own.other_rank.host_total


def test_what_stays_on_a_gpu_that_is_shared(tiny_config: Config):
    """DeepSpeed's own buffers, and on the host what a sleeping engine puts aside."""
    _, anatomy, plan = _plan(tiny_config)

    def kept(dtype: str, stage: int) -> set[str]:
        config = changed(tiny_config, model={"dtype": dtype}, learner={"world_size": 1, "zero_stage": stage})
        parts = learner_memory(config, anatomy, plan, None, micro_batches=1, gpu=True)
        every = resident(config, replace(parts, loading=0))
        names = ("gradients", "gradient bucket")
        without = {n: replace(parts, loading=0, device={**parts.device, n: 0}) for n in names}
        return {n for n, memory in without.items() if resident(config, memory) < every}

    assert kept("bfloat16", 1) == {"gradients"}
    assert kept("float32", 1) == kept("bfloat16", 2) == set()
    assert kept("bfloat16", 3) == {"gradients", "gradient bucket"}
    together = changed(tiny_config, cluster={"placement": "colocate"})
    asleep, split = (
        engine_memory(config, anatomy, plan, None, 22, gpu=True, gpu_bytes=GIB) for config in (together, tiny_config)
    )
    aside = split.device["weights"] + split.device["adapter"]
    assert asleep.host_total == split.host_total + aside


def test_what_does_not_fit_is_refused_by_the_knob(tiny_config: Config):
    assert "learner.world_size=2 ranks" in (
        unfit(size_up(tiny_config, Machine(0, None, GIB), compared={}, rehearse=False)) or ""
    )
    gpu = size_up(tiny_config, H100)
    assert unfit(gpu) is None
    small = unfit(replace(gpu, machine=replace(H100, gpu_bytes=GIB))) or ""
    assert "a learner rank needs" in small
    assert "What helps: a GPU with more memory" in small
    assert "learner.world_size" not in small
    assert "needs 3 GPUs, and there are 2" in (unfit(replace(gpu, machine=replace(H100, gpus=2))) or "")
    tight = changed(tiny_config, rollout={"gpu_memory_utilization": 0.01})
    assert "rollout.gpu_memory_utilization=0.01" in (unfit(replace(gpu, config=tight)) or "")
    full = {"engines": 2, "gpu_memory_utilization": 0.999}
    together = changed(tiny_config, cluster={"placement": "colocate"}, rollout=full)
    assert "cluster.placement=colocate" in (unfit(replace(gpu, config=together)) or "")


@pytest.mark.parametrize(("gpus", "world_size", "engines"), [(2, 1, 1), (3, 2, 1), (6, 4, 2), (12, 8, 4), (64, 16, 48)])
def test_layouts_for_a_number_of_gpus(tiny_config: Config, gpus: int, world_size: int, engines: int):
    there = spread(tiny_config, gpus)  # 16 completions a step, twice as many ranks as engines
    assert (there.learner.world_size, there.rollout.engines) == (world_size, engines)


@pytest.mark.parametrize(
    ("changes", "gpus", "says"),
    [
        ({}, 3, "of 3 GPUs 3 are used: learner.world_size=2, rollout.engines=1"),
        ({"learner": {"world_size": 2}}, 8, "learner.world_size=2, rollout.engines=6 (configured: 2 and 1; "),
        ({"rollout": {"engines": 4}}, 8, "learner.world_size=4, rollout.engines=4 (configured: 2 and 4; "),
        ({"learner": {"world_size": 2}, "rollout": {"engines": 2}}, 8, "of 8 GPUs 4 are used: learner.world_size=2, "),
        ({"learner": {"world_size": 8}, "rollout": {"engines": 8}}, 8, "=4, rollout.engines=4 (configured: 8 and 8; "),
        ({"learner": {"gpus": 0.5, "world_size": 1}, "rollout": {"gpus": 0.5}}, 1, "of 1 GPU 1 is used: "),
        ({"learner": {"gpus": 0}, "rollout": {"gpus": 0}}, 1, "of 1 GPU 0 are used: "),
        ({"cluster": {"placement": "colocate"}, "rollout": {"engines": 2}}, 1, "=1, rollout.engines=1 (configured: 2 "),
    ],
)  # fmt: skip
def test_what_is_given_stays_where_it_fits(tiny_tree: dict, changes: dict, gpus: int, says: str):
    config = parse_config(tiny_tree | changes)
    assert says in layout_line(config, spread(config, gpus), gpus)


def test_the_command(tiny_tree: dict, write_config: Callable, capsys: pytest.CaptureFixture, tmp_path: Path):
    path = str(write_config(tiny_tree))
    assert main(["estimate", path, "adaptation=lora", "--json"]) == 0
    out = capsys.readouterr().out
    sizes = json.loads(out.splitlines()[-1])
    assert "learner rank" in out
    assert "export MALLOC_MMAP_THRESHOLD_=1048576" in " ".join(out.split())
    assert (sizes["configured"], sizes["fits"], sizes["gpus"], sizes["complete"]) == ("LoRA", True, 0, True)
    assert list(sizes["plans"]) == ["LoRA", "full", "hybrid", "MoLF"]
    assert sizes["plans"]["full"]["trained_parameters"] > 10 * sizes["plans"]["LoRA"]["trained_parameters"]
    assert main(["estimate", path, "--gpus", "8", "--gpu-memory", "1", "--json"]) == 2
    out, error = capsys.readouterr()
    assert not json.loads(out.splitlines()[-1])["fits"]
    assert "a GPU has 1.00 GiB" in error
    assert main(["estimate", path, "--gpus", "1"]) == 2
    error = capsys.readouterr().err
    assert "--gpus 1 is too few" in error
    assert "cluster.placement=colocate, or learner.gpus=0.5 rollout.gpus=0.5" in error
    assert main(["estimate", path, "--gpus", "1", "--gpu-memory", "80", "learner.gpus=0.5", "rollout.gpus=0.5"]) == 0
    out = capsys.readouterr().out
    assert "of 1 GPU 1 is used" in out
    assert "1 GPU of 80.00 GiB" in out
    assert not (tmp_path / "run").exists()
