"""Speed and memory of the learner on one GPU, by model size and kind of training. Needs no hub and no data.

    python benchmarks/gpu/learner.py [--shapes 0.5B,1.7B] [--adaptations full,lora,hybrid] [--tokens 8192] [--steps 4]
                                     [key=value ...]

Random models of the Qwen3 architecture train through the learner's own worker: bf16, ZeRO-2 on one rank, packed ragged
sequences of up to 2,048 tokens with a mean of 0.4 of that, `--tokens` a micro-batch. Every case is a process of its
own, so that memory is clean; one that runs out of memory is tried again with gradient checkpointing, and one that fails
has its error in its row. `--shapes tiny` tries the script itself, without a GPU too. It ends within `--minutes`;
`key=value` changes settings of the learner.

Goal: an MFU of 0.4 with full fine-tuning on an H100 or H200. Frozen matrices are counted with the four operations a
weight and token that they need, trained ones with six (`hybrid_rl/flops.py`); only real tokens count, and nothing that
is computed twice. Figures are medians over the steps after the first. Tokens/s, TFLOP/s and MFU are those of
`throughput/*`; memory is the peak of the device's tensors while training. A Markdown table, and on the last line one
JSON object.
"""

from __future__ import annotations

import argparse
import datetime
import json
import multiprocessing
import sys
import tempfile
import time
import traceback
from importlib.metadata import distributions
from pathlib import Path
from queue import Empty
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))  # from a checkout that is not installed
sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import yaml
from learner_sides import GROUP, LARGE_VOCABULARY, make_model, peak_memory, reset_peak, sequences, start_worker

QWEN2, QWEN3 = {"intermediate_size": 4864, "num_key_value_heads": 2}, {"head_dim": 128}
SHAPES = {  # `make_model`'s sizes and vocabulary; longest sequence, sequences
    "0.5B": ((896, 24, 14), {**QWEN2, "vocab_size": LARGE_VOCABULARY}, 2048, 64),
    "1.7B": ((2048, 28, 16), {**QWEN3, "vocab_size": LARGE_VOCABULARY}, 2048, 64),
    "tiny": ((128, 2, 2), {"vocab_size": 2000}, 128, 16),
}
PACKAGES = ("hybrid-rl", "torch", "transformers", "deepspeed", "peft", "flash-attn")
COLUMNS = ("tokens/s", "TFLOP/s", "MFU", "peak GiB", "s a step", "of it train", "of it logprob")


def save_model(shape: str, path: str) -> None:
    """In bf16, made on the GPU: the processor would take minutes."""
    torch.set_default_dtype(torch.bfloat16)
    torch.set_default_device("cuda" if torch.cuda.is_available() else "cpu")
    sizes, more, *_ = SHAPES[shape]
    make_model(path, *sizes, **more)


def measure(shape: str, path: str, adaptation: str, checkpoints: bool, options: argparse.Namespace) -> dict[str, Any]:
    """One case, in this process."""
    from hybrid_rl.config_file import load_config
    from hybrid_rl.learner.assemble import mini_batches

    _, more, longest, count = SHAPES[shape]
    tree = {
        "model": {"path": path, "dtype": "bfloat16"},
        "data": {"train": "none", "eval": "none"},
        "adaptation": adaptation,
        "sampling": {"max_completion_length": longest},
        "batch": {"tokens_per_micro_batch": options.tokens, "prompts": count // GROUP, "num_generations": GROUP},
        "learner": {"world_size": 1, "zero_stage": 2, "gradient_checkpointing": checkpoints},
    }
    file = Path(path).with_suffix(".yaml")
    file.write_text(yaml.safe_dump(tree), encoding="utf-8")
    config = load_config(file, options.overrides)
    worker = start_worker(config)
    batch = mini_batches(sequences(count, longest, more["vocab_size"]), config, {"full": 1.0, "lora": 1.0}, 1)
    reset_peak()
    rows = []
    for _ in range(1 + options.steps):
        started = time.perf_counter()
        stats = worker.train(batch)
        seconds = time.perf_counter() - started
        metrics, parts = stats.metrics, stats.seconds
        rates = [metrics.get(f"throughput/{name}") for name in ("train_tokens", "tflops", "mfu")]
        rows.append((*rates, seconds, parts["train"] / seconds, parts["logprob"] / seconds))
    medians = [None if None in column else median(column) for column in zip(*rows[1:], strict=True)]
    medians.insert(3, peak_memory() / 2**30)
    trained = sum(p.numel() for p in worker._model.parameters() if p.requires_grad)
    return {"trained": trained, "layout": worker._layout, **dict(zip(COLUMNS, medians, strict=True))}


def _report(queue: Any, function: Any, arguments: tuple[Any, ...]) -> None:
    try:
        queue.put(function(*arguments))
    except BaseException as error:
        traceback.print_exc()
        what = f"{type(error).__name__}: {error}".replace("\n", " ").replace("|", "/")
        queue.put({"error": "out of memory" if "out of memory" in what else what[:120]})


def apart(function: Any, *arguments: Any, deadline: float) -> Any:
    """`function` in a process of its own, or why there is no result."""
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=_report, args=(queue, function, arguments), daemon=True)
    process.start()
    try:
        while time.monotonic() < deadline:
            try:
                return queue.get(timeout=2)
            except Empty:
                if not process.is_alive() and queue.empty():
                    return {"error": f"the process died with {process.exitcode}"}
        return {"error": "no time left"}
    finally:
        process.join(10 if time.monotonic() < deadline else 0)
        process.kill()


def cell(value: Any) -> str:
    return "-" if value is None else f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="0.5B,1.7B", help=f"of {', '.join(SHAPES)}")
    parser.add_argument("--adaptations", default="full,lora,hybrid")
    parser.add_argument("--tokens", type=int, default=8192, help="a micro-batch")
    parser.add_argument("--steps", type=int, default=4, help="timed steps, after one that is not")
    parser.add_argument("--minutes", type=float, default=9.5, help="cases that are not done by then are left out")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    options, cases = parser.parse_args(), []
    deadline = time.monotonic() + 60 * options.minutes
    for shape in options.shapes.split(","):
        with tempfile.TemporaryDirectory(prefix="learner_") as scratch:
            path = str(Path(scratch) / "model")
            failed = apart(save_model, shape, path, deadline=deadline)
            for adaptation in options.adaptations.split(","):
                checkpoints, found = False, failed
                if not failed:
                    found = apart(measure, shape, path, adaptation, False, options, deadline=deadline)
                if found.get("error") == "out of memory":
                    checkpoints = True
                    found = apart(measure, shape, path, adaptation, True, options, deadline=deadline)
                cases.append({"shape": shape, "adaptation": adaptation, "checkpointing": checkpoints, **found})
                print(cases[-1], file=sys.stderr, flush=True)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    print(f"\n{device}, {options.tokens} tokens a micro-batch {' '.join(options.overrides)}\n")
    print("| shape | adaptation | checkpointing | trained | layout | " + " | ".join(COLUMNS) + " |")
    print("|---" * (5 + len(COLUMNS)) + "|")
    for case in cases:
        figures = [case["error"]] if "error" in case else [cell(case[name]) for name in COLUMNS]
        known = (f"{case['trained']:,}", case["layout"]) if "trained" in case else ("-", "-")
        row = [case["shape"], case["adaptation"], "on" if case["checkpointing"] else "off", *known, *figures]
        print("| " + " | ".join(row) + " |" + " |" * (len(COLUMNS) - len(figures)))
    installed = {d.metadata["Name"]: d.version for d in distributions()}
    about = {
        "options": vars(options),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": device,
        "versions": {name: installed[name] for name in PACKAGES if name in installed},
    }
    print(json.dumps({"cases": cases, **about}))


if __name__ == "__main__":
    main()
