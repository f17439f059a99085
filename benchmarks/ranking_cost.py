"""What ranking costs: time against a plain pass over the same tokens, memory against the training that follows.

    python benchmarks/ranking_cost.py --sizes tiny
    python benchmarks/ranking_cost.py --sizes 100M --length 16 --rounds 1 --repeats 1      # a quarter of an hour

Every measurement runs in a process of its own, through the learner's own worker. Memory is the peak resident set above
what the process held once the model was loaded, in bytes a parameter of the model.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import resource
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from rich.console import Console
from rich.table import Table
from transformers import Qwen3Config, Qwen3ForCausalLM

from hybrid_rl.cluster.inline import Memory, free_port
from hybrid_rl.config import Config
from hybrid_rl.config_file import parse_config
from hybrid_rl.learner.assemble import mini_batches
from hybrid_rl.learner.batching import micro_batches
from hybrid_rl.plan_building import build_plan, select_candidates
from hybrid_rl.scoring import find_score, score_names, sketch_floats
from hybrid_rl.types import TrainSequence

SIZES = {"tiny": (128, 4, 512), "100M": (768, 12, 8192)}
PROMPTS, SAMPLES = 64, 8


def sequences(seed: int, count: int, vocabulary: int, length: int) -> list[TrainSequence]:
    """Random ones; what they say does not change what they cost."""
    draw = random.Random(seed)

    def tokens(n: int) -> tuple[int, ...]:
        return tuple(draw.randrange(2, vocabulary) for _ in range(n))

    return [
        TrainSequence(tokens(length // 2), tokens(length // 2), (-9.0,) * (length // 2), draw.gauss(0, 1))
        for _ in range(count)
    ]


def make_model(size: str, path: Path) -> None:
    hidden, layers, vocabulary = SIZES[size]
    torch.manual_seed(0)
    shape = Qwen3Config(
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 128,
        head_dim=64,
        vocab_size=vocabulary,
        tie_word_embeddings=True,
    )
    Qwen3ForCausalLM(shape).save_pretrained(path)


def settings(path: str, tokens: int, length: int) -> Config:
    return parse_config(
        {
            "model": {"path": path},
            "data": {"train": "none", "eval": "none", "max_prompt_length": length // 2},
            "sampling": {"max_completion_length": length // 2},
            "batch": {"tokens_per_micro_batch": tokens, "prompts": PROMPTS, "num_generations": SAMPLES},
            "full": {"lr": 1e-5},
            "learner": {"world_size": 1, "zero_stage": 2},
        }
    )


def measured(what: str, path: str, vocabulary: int, options: argparse.Namespace, queue: Any) -> None:
    """One measurement: median seconds of a pass over all sequences, peak memory above the loaded model's, in bytes."""
    from hybrid_rl.learner.worker import LearnerWorker

    torch.set_num_threads(1)
    config = settings(path, options.tokens, options.length)
    worker = LearnerWorker(config, 0, Memory())
    worker.connect("127.0.0.1", free_port())
    data = sequences(0, PROMPTS * SAMPLES, vocabulary, options.length)
    halves = [data[0::2], data[1::2]]
    before = resident()
    seconds = []
    if what == "forward and backward":
        weights = [worker._model.get_parameter(w.parameter) for w in worker._anatomy.candidates]
        worker._model.requires_grad_(False)
        for weight in weights:
            weight.requires_grad_(True)
        for _ in range(options.repeats):
            started = time.perf_counter()
            for indices in micro_batches([s.length for s in data], 1, options.tokens, worker._layout)[0]:
                share = len(indices) / len(data)
                (worker._ranking_loss(worker._model, [data[i] for i in indices]) * share).backward()
            seconds.append(time.perf_counter() - started)
            worker._model.zero_grad(set_to_none=True)
    elif what == "hybrid training":
        scores = {c.name: random.Random(c.name).random() for c in select_candidates(worker._anatomy, config.plan)}
        plan = build_plan(
            worker._anatomy,
            scores,
            model=path,
            method={},
            seed=0,
            ratio=0.1,
            settings=config.plan,
            lora=config.lora,
        )
        worker.build(plan.to_json())
        for _ in range(options.repeats):
            started = time.perf_counter()
            worker.train(mini_batches(data, config, {"full": 1.0, "lora": 1.0}, 1))
            seconds.append(time.perf_counter() - started)
    else:
        for _ in range(1 + options.repeats if what == "update_tail_split_by_type" else 1):
            if not hasattr(worker, "_scorer"):
                worker.begin_ranking(find_score(what))
            started = time.perf_counter()
            worker.observe(halves, 1e-4)
            seconds.append(time.perf_counter() - started)
        seconds = seconds[-options.repeats :]  # a probe passes its first rollouts through twice
        started = time.perf_counter()
        worker.finish_ranking()
        if what != "update_tail_split_by_type":
            seconds[0] += time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    queue.put((statistics.median(seconds), peak - before))


def resident() -> int:
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="tiny,100M")
    parser.add_argument("--tokens", type=int, default=1024, help="tokens a micro-batch")
    parser.add_argument("--length", type=int, default=32, help="tokens a sequence")
    parser.add_argument("--repeats", type=int, default=3, help="passes a measurement, where it can be repeated")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    console = Console(width=130)
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as directory:
        for size in options.sizes.split(","):
            path = Path(directory) / size
            make_model(size, path)
            model = Qwen3ForCausalLM.from_pretrained(path)
            parameters = sum(p.numel() for p in model.parameters())
            from hybrid_rl.components import read_model

            candidates = read_model(model).candidates
            del model
            found: dict[str, list[tuple[float, int]]] = {}
            kinds = (
                "forward and backward",
                "hybrid training",
                "grad_tail_split",
                "adam_tail_split",
                "update_tail_split_by_type",
            )
            for _ in range(options.rounds):
                for what in kinds:
                    queue = context.Queue()
                    job = (what, str(path), SIZES[size][2], options, queue)
                    process = context.Process(target=measured, args=job)
                    process.start()
                    found.setdefault(what, []).append(queue.get(timeout=1800))
                    process.join()
            table = Table("", "seconds", "/ forward and backward", "peak memory, bytes a parameter", "of it by formula")
            tokens = f"{PROMPTS} x {SAMPLES} x {options.length} tokens"
            table.title = f"{size}: {parameters:,} parameters, {tokens}, {options.rounds} rounds"
            plain = statistics.median(s for s, _ in found[kinds[0]])
            for what in kinds:
                seconds = statistics.median(s for s, _ in found[what])
                memory = statistics.median(m for _, m in found[what])
                views = len(find_score(what).kinds) if what in score_names() else 0
                formula = 4 * sketch_floats(candidates, views, 2) / parameters if views else 0.0
                table.add_row(
                    what,
                    f"{seconds:.2f}",
                    f"{seconds / plain:.2f}",
                    f"{memory / parameters:.2f}",
                    f"{formula:.2f} sketches" if views else "-",
                )
            console.print(table)


if __name__ == "__main__":
    main()
