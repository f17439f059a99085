"""What the engine promises beyond DeepSpeed: guarded steps, norms, the base policy, fp32 masters, offload."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from hybrid_rl.cluster.inline import Memory
from hybrid_rl.config_file import parse_config
from hybrid_rl.learner.assemble import mini_batches
from hybrid_rl.scoring import find_score
from hybrid_rl.types import TrainBatch
from tests.held import receive
from tests.learner.processes import hybrid_plan, on_ranks, random_sequences

FULL_SPEED = {"full": 1.0, "lora": 1.0}


def _tree(path: Path, **changes: Any) -> dict:
    tree = {
        "model": {"path": str(path)},
        "data": {"train": "arithmetic@train", "eval": "arithmetic@eval", "max_prompt_length": 16},
        "sampling": {"max_completion_length": 16},
        "batch": {"prompts": 8, "num_generations": 2, "tokens_per_micro_batch": 60},
        "full": {"lr": 1e-3, "weight_decay": 0.1},
        "lora": {"lr": 1e-2, "rank": 4},
        "learner": {"world_size": 1},
    }
    for name, value in changes.items():
        tree[name] = {**tree.get(name, {}), **value} if isinstance(value, dict) else value
    return tree


def _worker(rank: int, port: int, tree: dict, plan: str) -> Any:
    from hybrid_rl.learner.worker import LearnerWorker

    worker = LearnerWorker(parse_config(tree), rank, Memory())
    worker.connect("127.0.0.1", port)
    worker.build(plan)
    return worker


def _batch(tree: dict, seed: int = 0) -> TrainBatch:
    return mini_batches(random_sequences(seed), parse_config(tree), FULL_SPEED, 1)


def _trained(worker: Any) -> dict[str, torch.Tensor]:
    with worker._engine.gathered(*worker._adapted.full.values(), *worker._adapted.adapter_parameters):
        trained = {name: p.detach().clone() for name, p in worker._adapted.full.items()}
        for name, adapter in worker._adapted.adapters.items():
            [pair] = adapter.factors()
            trained |= {f"{name}.A": pair.a.detach().clone(), f"{name}.B": pair.b.detach().clone()}
    return trained


def _engine_checks(rank: int, port: int, tree: dict, plan: str) -> None:
    """On one engine, one after another: starting one costs more than the checks."""
    worker = _worker(rank, port, tree, plan)
    batch = worker._update._shard(random_sequences(7))[0]
    base = worker._update._logprobs(batch)

    # Norms: the reported update is the change of the weights, by component and by part.
    before = _trained(worker)
    metrics = worker.train(_batch(tree)).metrics
    after = _trained(worker)
    assert metrics["faults/skipped_updates"] == 0
    exact = tree["model"].get("dtype") != "bfloat16"
    changes: dict[str, float] = {}
    for name in before:
        part = "lora" if name[-2:] in (".A", ".B") else "full"
        component = "mlp" if ".mlp." in name else "attention"
        for key in (f"part/{part}/{component}/update_norm", f"part/{part}/update_norm"):
            changes[key] = changes.get(key, 0.0) + float((after[name] - before[name]).double().square().sum())
    for key, square in changes.items():
        if exact:
            assert metrics[key] == pytest.approx(math.sqrt(square), rel=1e-3), key
        assert metrics[key] > 0
    for part in ("full", "lora"):
        squares = [v**2 for k, v in metrics.items() if k.startswith(f"part/{part}/") and k.endswith("/grad_norm")]
        assert math.sqrt(sum(squares)) == pytest.approx(metrics[f"grad_norm/{part}"], rel=1e-6)

    # The base policy is what it was, also while the weights have moved, and leaves no trace.
    trained = worker._update._logprobs(batch)
    assert (trained - base).abs().max() > 1e-3
    with worker._engine.only(()):
        torch.testing.assert_close(worker._update._logprobs(batch), base, atol=1e-6, rtol=0)
    torch.testing.assert_close(worker._update._logprobs(batch), trained, atol=0, rtol=0)
    assert all(torch.equal(t, after[name]) for name, t in _trained(worker).items())

    # A gradient that is not finite, or whose norm is not, skips the update, and only that one.
    good = _batch(tree, 1)
    for advantage in (float("inf"), 1e30):
        poisoned = replace(good.mini_batches[0][0], advantage=advantage)
        skipped = worker.train(replace(good, mini_batches=((poisoned, *good.mini_batches[0][1:]),))).metrics
        assert skipped["faults/skipped_updates"] == skipped["policy/updates"] == 1
        assert skipped["faults/skipped_in_a_row"] == 1
        assert all(math.isfinite(v) for v in skipped.values()), "what was skipped is not in the means"
        assert all(torch.equal(t, after[name]) for name, t in _trained(worker).items())
    both = ((poisoned, *good.mini_batches[0][1:]), good.mini_batches[0])
    metrics = worker.train(replace(good, mini_batches=both)).metrics
    assert (metrics["faults/skipped_updates"], metrics["faults/skipped_in_a_row"]) == (1, 0)
    assert all(math.isfinite(v) for v in metrics.values())
    metrics = worker.train(good).metrics
    assert metrics["faults/skipped_updates"] == 0
    assert all(math.isfinite(v) for v in metrics.values())
    assert any(not torch.equal(t, after[name]) for name, t in _trained(worker).items())


@pytest.mark.parametrize(
    ("stage", "world", "dtype"),
    [
        (2, 1, "float32"),
        (3, 2, "float32"),
        (1, 1, "bfloat16"),
        pytest.param(1, 2, "float32", marks=pytest.mark.slow),
        pytest.param(2, 2, "float32", marks=pytest.mark.slow),
        pytest.param(1, 2, "bfloat16", marks=pytest.mark.slow),
        pytest.param(2, 2, "bfloat16", marks=pytest.mark.slow),
        pytest.param(3, 2, "bfloat16", marks=pytest.mark.slow),
    ],
)
def test_norms_base_policy_and_guard(tiny_model: Path, stage: int, world: int, dtype: str):
    learner = {"zero_stage": stage, "world_size": world}
    tree = _tree(tiny_model, learner=learner, model={"dtype": dtype}, algo={"kl_coef": 0.1})
    on_ranks(world, _engine_checks, tree, hybrid_plan(tiny_model).to_json())


def _after_three_steps(
    rank: int, port: int, trees: list[dict], plan: str, backwards: bool = False
) -> list[tuple[list[float], dict]]:
    """`backwards`: in the last of the runs, the sequences of a mini-batch come in the reverse order."""
    results = []
    for tree in trees:
        worker = _worker(rank, port, tree, plan)
        batches = [_batch(tree, step) for step in range(3)]
        if backwards and tree is trees[-1]:
            batches = [replace(b, mini_batches=tuple(m[::-1] for m in b.mini_batches)) for b in batches]
        losses = [worker.train(batch).metrics["policy/loss"] for batch in batches]
        update = worker.export(3)
        if rank == 0:
            results.append((losses, receive(worker._transport, [update])))
    return results


HARDEST = {
    "algorithm": "gspo",
    "algo": {
        "clip_low": 0.1,
        "clip_high": 0.1,
        "aggregation": "token_mean",
        "kl_coef": 0.05,
        "entropy_coef": 0.01,
        "mismatch": "mask",
        "mismatch_level": "sequence",
        "mismatch_min": 0.3,
        "mismatch_max": 3.0,
    },
}


@pytest.mark.parametrize("algorithm", [{"algorithm": "grpo"}, HARDEST], ids=["grpo", "gspo with everything"])
def test_micro_batches_packing_and_order_change_nothing(tiny_model: Path, algorithm: dict):
    def tree(packing: str, tokens: int, **learner: Any) -> dict:
        batch = {"prompts": 8, "num_generations": 2, "mini_batches": 2, "tokens_per_micro_batch": tokens}
        return _tree(tiny_model, **algorithm, batch=batch, learner={"packing": packing, **learner})

    trees = [
        tree("never", 10_000),
        tree("never", 33),
        tree("always", 10_000),
        tree("always", 50),
        tree("always", 50, gradient_checkpointing=True, logits_mib=1),
    ]
    first, *others = on_ranks(1, _after_three_steps, trees, hybrid_plan(tiny_model).to_json(), True)
    for tree_, (losses, tensors) in zip(trees[1:], others, strict=True):
        assert losses == pytest.approx(first[0], abs=1e-5), tree_
        for name, tensor in first[1].items():
            torch.testing.assert_close(tensors[name], tensor, atol=2e-5, rtol=0, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("stage", [2, pytest.param(3, marks=pytest.mark.slow)])
@pytest.mark.parametrize("algorithm", [pytest.param({"algorithm": "grpo"}, marks=pytest.mark.slow), HARDEST])
def test_sequence_parallel_changes_nothing(tmp_path: Path, stage: int, algorithm: dict):
    """Two ranks that share every sequence, against one; a third of the tokens' heads and keys cross between them."""
    from hybrid_rl.config import WarmStartConfig
    from trainers.warm_start import build_model, build_tokenizer

    build_model(WarmStartConfig(hidden_size=128, layers=2, heads=4, kv_heads=2), build_tokenizer()).save_pretrained(
        tmp_path
    )
    batch = {"prompts": 8, "num_generations": 2, "mini_batches": 2, "tokens_per_micro_batch": 50}
    results = []
    for world in (1, 2):
        learner = {"world_size": world, "sequence_parallel": world, "zero_stage": stage}
        trees = [_tree(tmp_path, **algorithm, batch=batch, learner=learner)]
        results += on_ranks(world, _after_three_steps, trees, hybrid_plan(tmp_path).to_json())
    (losses, tensors), (losses_sp, tensors_sp) = results
    assert losses_sp == pytest.approx(losses, abs=1e-5)
    for name, tensor in tensors.items():
        torch.testing.assert_close(tensors_sp[name], tensor, atol=2e-5, rtol=0, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("stage", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_offload_changes_nothing(tiny_model: Path, stage: int):
    trees = [
        _tree(tiny_model, learner={"zero_stage": stage, "offload": offload})
        for offload in ("none", "optimizer", "all")
        if stage == 3 or offload != "all"
    ]
    first, *others = on_ranks(1, _after_three_steps, trees, hybrid_plan(tiny_model).to_json())
    for losses, tensors in others:
        assert losses == pytest.approx(first[0], abs=1e-6)
        for name, tensor in first[1].items():
            torch.testing.assert_close(tensors[name], tensor, atol=1e-6, rtol=0)


def _scores(rank: int, port: int, trees: list[dict]) -> list[dict[str, float]]:
    from hybrid_rl.learner.worker import LearnerWorker

    results = []
    for tree in trees:
        worker = LearnerWorker(parse_config(tree), rank, Memory())
        worker.connect("127.0.0.1", port)
        worker.begin_ranking(find_score("grad_norm"))
        worker.observe([random_sequences(1), random_sequences(2)], 0.0)
        results.append(worker.finish_ranking()[0])
    return results


def test_ranking_does_not_depend_on_how_tight_the_run_clips(tiny_model: Path):
    """GSPO's clip of 3e-4 would take the engine's rounding for a move of the policy."""
    trees = [_tree(tiny_model, algorithm=name) for name in ("grpo", "gspo", "cispo")]
    first, *others = on_ranks(1, _scores, trees)
    assert any(first.values())
    assert others == [first, first]


@pytest.mark.slow
@pytest.mark.parametrize("offload", ["none", "optimizer"])
def test_deepspeed_adam_equals_torch_adam(tiny_model: Path, offload: str):
    """Compiles DeepSpeed's kernels where they are not yet: minutes."""
    trees = [_tree(tiny_model, learner={"optimizer": name, "offload": offload}) for name in ("torch", "deepspeed")]
    (losses, tensors), (losses_ds, tensors_ds) = on_ranks(
        1, _after_three_steps, trees, hybrid_plan(tiny_model).to_json()
    )
    assert losses_ds == pytest.approx(losses, abs=1e-5)
    for name, tensor in tensors.items():
        torch.testing.assert_close(tensors_ds[name], tensor, atol=1e-5, rtol=0)
