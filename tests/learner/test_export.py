"""What ranks export is what they hold, whole and in part, on every ZeRO stage; one module at a time is whole."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from hybrid_rl.adaptation import WEIGHTS
from hybrid_rl.cluster.inline import Memory
from hybrid_rl.config_file import parse_config
from hybrid_rl.learner.assemble import mini_batches
from hybrid_rl.weight_sync import digest, lora_names, served_tensors
from tests.held import receive
from tests.learner.processes import hybrid_plan, on_ranks, random_sequences

PARTS = ("full", "lora")


def _tree(model: Path, stage: int, world: int, dtype: str) -> dict:
    return {
        "model": {"path": str(model), "dtype": dtype},
        "data": {"train": "arithmetic@train", "eval": "arithmetic@eval", "max_prompt_length": 16},
        "sampling": {"max_completion_length": 16, "temperature": 0.7},
        "batch": {"prompts": 8, "num_generations": 2, "tokens_per_micro_batch": 60},
        "full": {"lr": 1e-4},
        "lora": {"lr": 1e-3, "rank": 4},
        "learner": {"world_size": world, "zero_stage": stage},
        "sync": {"bucket_mib": 1},
    }


def _gathered(worker: Any) -> dict[str, Tensor]:
    """What the ranks hold together, in the engines' type."""
    everything = [*worker._adapted.full.values(), *worker._adapted.adapter_parameters]
    with worker._engine.gathered(*everything):
        tensors = {name: p.detach().clone() for name, p in worker._adapted.full.items()}
        for module, adapter in worker._adapted.adapters.items():
            [pair] = adapter.factors()
            name_a, name_b = lora_names(module)
            tensors |= {name_a: pair.a.detach().clone(), name_b: pair.b.detach().float() * pair.scaling}
    return {name: t.to(worker._dtype) for name, t in tensors.items()}


def _ranks(rank: int, port: int, tree: dict, plan: str, directory: str) -> None:
    from hybrid_rl.learner.worker import LearnerWorker

    config, transport = parse_config(tree), Memory()
    worker = LearnerWorker(config, rank, transport)
    worker.connect("127.0.0.1", port)
    worker.build(plan)
    bf16, chain = tree["model"]["dtype"] == "bfloat16", []

    def export(version: int, parts: Sequence[str] = PARTS) -> dict[str, Tensor]:
        update = worker.export(version, parts)
        if rank:
            assert update is None
            return {}
        chain[:] = [*(chain if update.base_version is not None else []), update]
        held = receive(transport, chain)
        assert {name: digest(t) for name, t in held.items()} == update.digests
        return held

    def assert_exports(version: int) -> dict[str, Tensor]:
        held, expected = export(version), _gathered(worker)
        if rank == 0:
            assert held.keys() == expected.keys()
            assert all(torch.equal(t, expected[name]) for name, t in held.items())
        return held

    def train(step: int) -> None:
        worker.train(mini_batches(random_sequences(step), config, {"full": 1.0, "lora": 1.0}, step))

    start = assert_exports(0)
    train(0)
    for step in (1, 2):
        train(step)
        trained = assert_exports(step)
    if rank == 0:
        assert len(chain) == (3 if bf16 else 1)
        assert all(not torch.equal(t, start[name]) for name, t in trained.items() if "lora_A" not in name)

    # A perturbation lasts: it is in the masters too.
    worker.perturb(1, 0.05)
    moved = assert_exports(3)
    train(3)
    trained = assert_exports(4)
    for name, tensor in moved.items():
        distance = float((tensor.float() - start[name].float()).std())
        assert distance == pytest.approx(0.05 * (2 if "lora_B" in name else 1), rel=0.2), name
        assert float((trained[name].float() - tensor.float()).abs().max()) < 0.01, name
    worker.begin_save(directory)
    worker.saved(wait=True)
    if rank == 0:
        saved = safetensors.torch.load_file(Path(directory) / WEIGHTS)
        assert all(t.dtype == torch.float32 for t in saved.values())
        stems = {name.removeprefix("base_model.model.").replace(".weight", ".default.weight"): name for name in trained}
        stems |= {name: name for name in trained if "lora" not in name}
        assert saved.keys() == worker._adapted.trained.keys()
        for name, tensor in saved.items():
            if "lora_B" not in name:  # which is sent scaled
                assert torch.equal(tensor.to(worker._dtype), trained[stems[name]]), name

    # Parts alone: the model's own files in place of the full matrices, zeros in place of B.
    base = AutoModelForCausalLM.from_pretrained(tree["model"]["path"], dtype=worker._dtype).state_dict()
    for version, parts in enumerate([("full",), ("lora",), ()], start=5):
        for name, tensor in export(version, parts).items():
            expected = trained[name]
            if name in base and "full" not in parts:
                expected = base[name]
            elif "lora_B" in name and "lora" not in parts:
                expected = torch.zeros_like(tensor)
            assert torch.equal(tensor, expected), name
    after = assert_exports(8)
    assert all(torch.equal(t, trained[name]) for name, t in after.items()), "nothing of it is left behind"

    # Log-probabilities of parts alone, again and again, against a model made of what was exported.
    sequences = random_sequences(9)
    references: dict[Sequence[str], Tensor] = {}
    for parts in [PARTS, ("full",), ("lora",), ()] * 3:
        found = worker.logprobs(sequences, parts)
        assert [len(f) for f in found] == [len(s.completion_ids) for s in sequences]
        if rank == 0:
            references[parts] = _reference(tree["model"]["path"], trained, parts, sequences)
            error = (torch.cat([torch.tensor(f) for f in found]) - references[parts]).abs().mean()
            assert error < (0.02 if bf16 else 1e-5), parts
    for one, other in itertools.combinations(references.values(), 2):
        assert (one - other).abs().mean() > 0.05, "parts differ by more than what is allowed"
    assert_exports(9)
    if tree["learner"]["zero_stage"] == 3:
        _at_most_a_module_is_whole(worker)


def _at_most_a_module_is_whole(worker: Any) -> None:
    everything = [*worker._adapted.full.values(), *worker._adapted.adapter_parameters]
    most = 0
    for _ in served_tensors(worker._adapted, gathered=worker._gathered):
        most = max(most, sum(p.ds_status.name == "AVAILABLE" for p in everything))
    assert 1 <= most <= 2, f"{most} parameters of {len(everything)} were whole at once"


@torch.no_grad()
def _reference(path: str, trained: dict[str, Tensor], parts: Sequence[str], sequences: Sequence[Any]) -> Tensor:
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    weights = dict(model.named_parameters())
    for name, tensor in trained.items():
        if "full" in parts and name in weights:
            weights[name].copy_(tensor)
        elif "lora" in parts and "lora_A" in name:
            module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            weights[f"{module}.weight"] += trained[lora_names(module)[1]].float() @ tensor.float()
    found = []
    for s in sequences:
        ids = torch.tensor([s.prompt_ids + s.completion_ids])
        logits = model(input_ids=ids).logits[0, len(s.prompt_ids) - 1 : -1] / 0.7
        found.append(torch.log_softmax(logits, -1).gather(-1, torch.tensor(s.completion_ids)[:, None])[:, 0])
    return torch.cat(found)


@pytest.mark.parametrize(
    ("stage", "world", "dtype"),
    [
        (3, 2, "bfloat16"),
        (2, 2, "float32"),
        pytest.param(3, 2, "float32", marks=pytest.mark.slow),
        pytest.param(1, 2, "bfloat16", marks=pytest.mark.slow),
        pytest.param(1, 2, "float32", marks=pytest.mark.slow),
        pytest.param(2, 2, "bfloat16", marks=pytest.mark.slow),
        pytest.param(2, 1, "bfloat16", marks=pytest.mark.slow),
    ],
)
def test_ranks_export_what_they_hold(tiny_model: Path, tmp_path: Path, stage: int, world: int, dtype: str):
    tree = _tree(tiny_model, stage, world, dtype)
    on_ranks(world, _ranks, tree, hybrid_plan(tiny_model).to_json(), str(tmp_path / "learner"))
