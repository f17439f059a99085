"""Learner ranks as processes, without a cluster."""

from __future__ import annotations

import multiprocessing
import pickle
import random
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import deepspeed.comm
import torch
from transformers import AutoModelForCausalLM

from hybrid_rl.cluster.inline import free_port
from hybrid_rl.components import read_model
from hybrid_rl.config import LoraConfig, PlanConfig
from hybrid_rl.learner.shards import Shards, shard_path, write_shard
from hybrid_rl.plan import AdaptationPlan
from hybrid_rl.plan_building import build_plan
from hybrid_rl.types import TrainSequence

ENGINE_VARIANTS: dict[str, dict[str, Any]] = {
    f"ZeRO-{stage}, {dtype}, {offload}": {"zero_stage": stage, "dtype": dtype, "offload": offload}
    for stage, dtype, offload in (
        (1, "float32", "none"),
        (2, "float32", "none"),
        (3, "float32", "none"),
        (1, "bfloat16", "none"),
        (2, "bfloat16", "none"),
        (3, "bfloat16", "none"),
        (1, "float32", "optimizer"),
        (2, "bfloat16", "optimizer"),
        (3, "float32", "all"),
    )
}
"""Ways that DeepSpeed keeps and steps its fp32 weights, each by another optimizer of its own."""


def on_ranks(world: int, function: Callable[..., Any], *arguments: Any) -> Any:
    """`function(rank, port, *arguments)` on every rank; returns what it gave on rank 0."""
    context = multiprocessing.get_context("spawn")
    queue, port = context.Queue(), free_port()
    ranks = [context.Process(target=_call, args=(queue, function, r, port, *arguments)) for r in range(world)]
    for process in ranks:
        process.start()
    try:
        failure, result = queue.get(timeout=400)
        if failure:
            raise AssertionError(failure)
        for process in ranks:
            process.join(60)
    finally:
        for process in ranks:
            process.kill()
    return pickle.loads(result)


def _call(queue: Any, function: Callable[..., Any], rank: int, *arguments: Any) -> None:
    torch.set_num_threads(1)
    try:
        result = function(rank, *arguments)
    except BaseException:
        queue.put((traceback.format_exc(), None))
        raise
    if rank == 0:
        queue.put((None, pickle.dumps(result)))  # tensors by value: this process ends


def save_engine(engine: Any, directory: str, rank: int) -> None:
    """This rank's part of a checkpoint, without a worker around the engine."""
    write_shard(shard_path(Path(directory), rank), *engine.state())


def load_engine(engine: Any, directory: str) -> None:
    """Read back what all ranks saved, once they all have."""
    deepspeed.comm.barrier()
    engine.restore(Shards(Path(directory)))


def random_sequences(seed: int, count: int = 11, advantage: float = 2.0) -> list[TrainSequence]:
    """Ragged ones; 11 is not a multiple of the ranks."""
    draw = random.Random(seed)
    result = []
    for _ in range(count):
        prompt = tuple(draw.randrange(2, 250) for _ in range(draw.randrange(2, 9)))
        completion = tuple(draw.randrange(2, 250) for _ in range(draw.randrange(1, 12)))
        rollout = tuple(draw.uniform(-5.7, -5.3) for _ in completion)
        result.append(TrainSequence(prompt, completion, rollout, draw.uniform(-advantage, advantage)))
    return result


def hybrid_plan(model: Path) -> AdaptationPlan:
    """Some matrices full, the others LoRA."""
    anatomy = read_model(AutoModelForCausalLM.from_pretrained(model))
    scores = {c.name: float(("v_proj" in c.name) + ("up_proj" in c.name)) for c in anatomy.candidates}
    options = {"model": "tiny", "method": {}, "seed": 0, "settings": PlanConfig(), "lora": LoraConfig(rank=4, alpha=8)}
    return build_plan(anatomy, scores, ratio=0.2, **options)
