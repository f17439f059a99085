"""LoRA served natively and merged into the weights (`sync.adapter`): what each costs, and how near the learner it is.

    python benchmarks/adapters.py [--rounds 5]

One vLLM engine after the other, each in a process of its own, on a random Qwen3 (15 M parameters, LoRA of rank 16 on
every linear layer, B of deviation 1e-3, as after some hundred steps at 1e-5). `sync`: from the update to the receipt.
`generate`: 64 completions of 32 tokens. `differs`: mean |engine's - learner's log-probability| of a sampled token, in
nats, where the learner computes base and adapter apart, in the engine's type; `moved` is what the adapter itself
changes. The last line of output is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM

from hybrid_rl.adaptation import apply_plan
from hybrid_rl.cluster.base import worker_environment
from hybrid_rl.cluster.inline import Memory
from hybrid_rl.components import read_model
from hybrid_rl.config import Config
from hybrid_rl.plan import AdaptationPlan, PlannedModule
from hybrid_rl.rollout.engine import EngineSettings, run_requests
from hybrid_rl.types import Request, Sampling
from hybrid_rl.weight_sync import Publisher, served_tensors
from trainers.warm_start import build_tokenizer

RANK, SPREAD = 16, 1e-3
PROMPTS, TOKENS = 64, 32
MODES = ("native", "merged")
DTYPES = ("float32", "bfloat16")


def make_model(path: Path) -> None:
    """A random model with the quick start's tokenizer."""
    tokenizer = build_tokenizer()
    torch.manual_seed(0)
    shape = {"hidden_size": 384, "num_hidden_layers": 8, "num_attention_heads": 6, "num_key_value_heads": 2}
    sizes = {"head_dim": 64, "intermediate_size": 1152, "vocab_size": 256, "max_position_embeddings": 128}
    Qwen3ForCausalLM(Qwen3Config(**shape, **sizes, tie_word_embeddings=True)).save_pretrained(path)
    tokenizer.save_pretrained(path)


def measure(path: Path, mode: str, dtype: str, rounds: int) -> dict[str, float]:
    config = Config.model_validate({"model": {"path": "m"}, "data": {"train": "a.json", "eval": "a.json"}})
    os.environ.update(worker_environment(config, gpus=False))
    from hybrid_rl.rollout.vllm_engine import VllmEngine

    kind = getattr(torch, dtype)
    model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=kind).eval()
    modules = tuple(
        PlannedModule(c.name, c.component, c.layer, c.shape, c.params, None, RANK, float(RANK), "lora")
        for c in read_model(model).candidates
    )
    transport = Memory()
    names = tuple(m.name for m in modules)
    settings = EngineSettings(
        "engine", str(path), dtype, False, 128, RANK, PROMPTS, 0.5, 0, transport, adapter=mode, lora_modules=names
    )
    engine = VllmEngine(settings)
    adapted = apply_plan(model, AdaptationPlan(str(path), "attention-only", {}, 0, modules))
    publisher = Publisher(transport, dtype=kind, bucket_bytes=2**28, anchor_every=10**6, sparse=True)
    syncs, generations, differs, moved = [], [], [], []
    for version in range(1, rounds + 2):
        torch.manual_seed(version)
        with torch.no_grad():
            for adapter in adapted.adapters.values():
                adapter.factors()[0].b.normal_(0, SPREAD)
        update = publisher.publish(served_tensors(adapted), version, RANK)
        started = time.perf_counter()
        engine.apply_updates([update])
        syncs.append(time.perf_counter() - started)
        how = Sampling(1, 1.0, 1.0, TOKENS, (), version)
        asked = [
            Request(f"{version}/{i}", tuple(2 + (7 * i + j) % 200 for j in range(16)), how, i) for i in range(PROMPTS)
        ]
        started = time.perf_counter()
        answers = run_requests(engine, asked)
        generations.append(time.perf_counter() - started)
        ids = [(r.prompt_ids, c.token_ids, torch.tensor(c.logprobs)) for r, (c,) in zip(asked, answers, strict=True)]
        differs += [(logprobs(model, p, c) - theirs).abs() for p, c, theirs in ids]
        with _BaseModel(model):
            base = [logprobs(model, p, c) for p, c, _ in ids]
        moved += [(logprobs(model, p, c) - b).abs() for (p, c, _), b in zip(ids, base, strict=True)]
    found = {"sync": median(syncs[1:]), "generate": median(generations[1:])}
    return found | {"differs": float(torch.cat(differs).mean()), "moved": float(torch.cat(moved).mean())}


@torch.no_grad()
def logprobs(model: Any, prompt: tuple[int, ...], completion: tuple[int, ...]) -> Tensor:
    logits = model(input_ids=torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1].float()
    return torch.log_softmax(logits, -1).gather(-1, torch.tensor(completion)[:, None])[:, 0]


class _BaseModel:
    """The base model, inside."""

    def __init__(self, model: Any) -> None:
        self._layers = [m for m in model.modules() if hasattr(m, "lora_A")]

    def __enter__(self) -> None:
        for layer in self._layers:
            layer.enable_adapters(False)

    def __exit__(self, *_: object) -> None:
        for layer in self._layers:
            layer.enable_adapters(True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    found: dict[str, dict[str, float]] = {}
    table = Table("", "sync", "generate", "differs", "moved", title="LoRA, native and merged")
    with tempfile.TemporaryDirectory() as scratch:
        make_model(Path(scratch))
        for dtype in DTYPES:
            for mode in MODES:
                with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as alone:
                    row = alone.submit(measure, Path(scratch), mode, dtype, options.rounds).result()
                found[f"{mode} {dtype}"] = row
                times = (f"{row['sync'] * 1e3:.1f} ms", f"{row['generate']:.2f} s")
                table.add_row(f"{mode}, {dtype}", *times, f"{row['differs']:.2g}", f"{row['moved']:.2g}")
    Console().print(table)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
