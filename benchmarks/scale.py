"""Seconds of a training step, predicted by `hybrid_rl.scale` and measured, on this machine's CPU cores.

    python benchmarks/scale.py [--steps 6] [--only NAME ...] [--keep FILE]

First the constants: matrix products and copies of several sizes, bare passes of small random Qwen3 models, and whole
short runs marked `calibrates`, from which what is left (rounds of engines, optimizer steps, calls) is fitted by least
squares with nothing below 0. Then whole runs of other sizes, layouts and plans, of which nothing goes into the
constants but the lengths of their completions. Every run is a process of its own, one thread a worker.

Inline runs are timed by their process's CPU seconds, which is what they take where nothing else wants the core; what
other programs on the cores do then hardly counts. Runs on Ray are timed by the clock on the wall, `--rounds` times, of
which the fastest counts: other load only adds. Figures are medians over steps, but for the first two and the last; of
runs on Ray, lower quartiles. The last line of output is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean, median
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("DS_ACCELERATOR", "cpu")

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from transformers import Qwen3Config, Qwen3ForCausalLM

from hybrid_rl.config import Config
from hybrid_rl.config_file import parse_config
from hybrid_rl.hardware import CPU, EngineOverheads, Hardware, Overheads
from hybrid_rl.plan import AdaptationPlan
from hybrid_rl.scale import TOUCHES, Lengths, Shape, StepTime, read_shape, step_time

VOCABULARY = 2048
WARM_UP = 2
REWARD = "def parity(completions, **columns):\n    return [float(len(c) % 7) for c in completions]\n"
PARTS = ("generate", "logprob", "train", "sync", "step")
"""Those that are shown; rewards here take no time."""


@dataclass(frozen=True)
class Case:
    """One run."""

    name: str
    hidden: int
    layers: int
    prompts: int = 8
    generations: int = 8
    length: int = 32
    adaptation: str = "hybrid"
    engine: str = "transformers"
    backend: str = "inline"
    ranks: int = 1
    engines: int = 1
    mini_batches: int = 1
    staleness: int = 0
    calibrates: bool = False


CASES = (
    Case("inline, 2 layers", 64, 2, calibrates=True),
    Case("inline, 6 layers", 128, 6, prompts=4, calibrates=True),
    Case("inline, all full", 96, 4, adaptation="full", calibrates=True),
    Case("vLLM, 2 layers", 64, 2, engine="vllm", calibrates=True),
    Case("vLLM, 6 layers", 128, 6, prompts=4, engine="vllm", calibrates=True),
    Case("vLLM, 128 at once", 64, 4, prompts=16, engine="vllm", calibrates=True),
    Case("Ray, vLLM, 2 + 2", 96, 4, engine="vllm", backend="ray", ranks=2, engines=2, calibrates=True),
    Case("inline", 224, 6, length=64),
    Case("inline, LoRA", 256, 5, prompts=4, length=80, adaptation="lora"),
    Case("inline, all full", 320, 5, generations=4, adaptation="full"),
    Case("inline, 4 mini-batches", 192, 4, prompts=16, generations=4, length=40, mini_batches=4),
    Case("vLLM", 288, 5, length=56, engine="vllm"),
    Case("vLLM, 128 at once", 320, 4, prompts=16, length=40, engine="vllm"),
    Case("Ray, vLLM, 2 + 2", 224, 6, length=64, engine="vllm", backend="ray", ranks=2, engines=2),
    Case("Ray, vLLM, 1 + 2", 256, 4, prompts=16, engine="vllm", backend="ray", engines=2),
    Case("Ray, 2 + 1", 160, 6, length=40, backend="ray", ranks=2),
    Case("Ray, vLLM, 1 + 1, beside", 224, 5, length=56, engine="vllm", backend="ray", staleness=1),
)  # fmt: skip


def qwen3(hidden: int, layers: int, **special: Any) -> Qwen3ForCausalLM:
    torch.manual_seed(0)
    heads = max(1, hidden // 64)
    shape = {"num_attention_heads": heads, "num_key_value_heads": heads // 2 if heads % 2 == 0 else 1, "head_dim": 64}
    shape |= {"hidden_size": hidden, "intermediate_size": 3 * hidden, "num_hidden_layers": layers}
    return Qwen3ForCausalLM(Qwen3Config(vocab_size=VOCABULARY, tie_word_embeddings=True, **shape, **special))


def settings(case: Case, directory: Path, steps: int) -> Config:
    return parse_config(
        {
            "model": {"path": str(directory / "model")},
            "data": {"train": "arithmetic@train", "eval": "arithmetic@eval", "eval_size": 2, "max_prompt_length": 16},
            "sampling": {"max_completion_length": case.length},
            "steps": steps + WARM_UP + 1,
            "batch": {
                "prompts": case.prompts,
                "num_generations": case.generations,
                "mini_batches": case.mini_batches,
                "tokens_per_micro_batch": 2048,
            },
            "adaptation": case.adaptation,
            "plan": {"score": "random"} if case.adaptation == "hybrid" else {},
            "learner": {"world_size": case.ranks},
            "rollout": {"engine": case.engine, "engines": case.engines},
            "cluster": {"backend": case.backend},
            "async": {"max_staleness": case.staleness},
            "sync": {"gate": {"every": 0}},
            "eval": {"k": 0},
            "rewards": [{"plugin": f"{directory / 'reward.py'}:parity"}],
            "tracking": {"wandb": "disabled"},
            "run": {"dir": str(directory / "run")},
        }
    )


def measured(case: Case, directory: Path, steps: int) -> dict[str, Any]:
    """A run's seconds by part, and the lengths of what it sampled."""
    if case.backend == "inline":
        assert "hybrid_rl.step_clock" not in sys.modules  # it takes the clock as it finds it
        time.perf_counter = time.process_time
    from hybrid_rl.run_directory import read_metrics
    from trainers.grpo import train
    from trainers.warm_start import build_tokenizer

    tokenizer: Any = build_tokenizer()
    special = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    for part in (qwen3(case.hidden, case.layers, **special), tokenizer):
        part.save_pretrained(directory / "model")
    (directory / "reward.py").write_text(REWARD)
    config = settings(case, directory, steps)
    run = train(config, name="scale")
    rows = read_metrics(run.metrics)[WARM_UP:-1]  # the last one saves and evaluates
    share = 50 if case.backend == "inline" else 25
    every = {name: [row[f"time/{name}"] for row in rows] for name in (*PARTS, "reward", "other")}
    seconds = {name: float(np.percentile(values, share)) for name, values in every.items()}
    longest, alike = [], []
    for path in sorted((run.path / "rollouts").glob("*.jsonl"))[WARM_UP:-1]:
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        batches: dict[int, int] = {}
        for line in lines:
            length = len(tokenizer(line["prompt"])["input_ids"]) if case.engine == "transformers" else 0
            batches[length] = max(batches.get(length, 0), line["tokens"])
        longest.append(fmean(batches.values()))
        alike.append(len(batches))
    mean = fmean(row["completions/mean_length"] for row in rows)
    trained = fmean(row["throughput/train_tokens"] * row["time/train"] for row in rows)
    prompt = max(0.0, trained / config.completions_per_step - mean) if case.mini_batches == 1 else 6.0
    lengths = {
        "prompt": prompt,
        "completion": mean,
        "longest": max(mean, fmean(longest)),
        "prompt_lengths": fmean(alike),
    }
    plan = AdaptationPlan.load(str(run.path / "plan.json")).to_json()
    sent = fmean(row["sync/bytes"] for row in rows)
    return {"seconds": seconds, "lengths": lengths, "plan": plan, "sync_bytes": sent}


def measured_apart(case: str, steps: int) -> dict[str, Any]:
    """`measured` in a process of its own; `case` as JSON."""
    with tempfile.TemporaryDirectory(prefix="scale_") as name:
        command = [sys.executable, __file__, "--steps", str(steps), "--measure", case, name]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{case}: {done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def shape_of(config: Config, plan: AdaptationPlan) -> Shape:
    from hybrid_rl.components import read_model
    from hybrid_rl.rehearsal import rehearse_cache
    from trainers.base_model import meta_model

    model = meta_model(config)
    cache = rehearse_cache(model, torch.float32)
    assert cache is not None
    return read_shape(read_model(model), plan, model.config, cache)


def quickest(action: Callable[[], Any], seconds: float = 0.3) -> float:
    """Median CPU seconds of a call."""
    action()
    found, started = [], time.process_time()
    while len(found) < 5 or time.process_time() - started < seconds:
        before = time.process_time()
        action()
        found.append(time.process_time() - before)
    return median(found)


def bare_constants() -> dict[str, float]:
    """What matrix products, copies and bare passes of small models take in this process."""
    from hybrid_rl.adaptation import apply_plan
    from hybrid_rl.components import read_model
    from hybrid_rl.config import LoraConfig, PlanConfig
    from hybrid_rl.plan_building import build_plan

    torch.set_num_threads(1)
    rates, loads = [], []
    for width in (128, 512):
        x, few, weight = torch.randn(1024, width), torch.randn(1, width), torch.randn(4 * width, width)
        rates.append(2 * x.numel() * len(weight) / quickest(lambda x=x, w=weight: torch.nn.functional.linear(x, w)))
        seconds = quickest(lambda x=few, w=weight: torch.nn.functional.linear(x, w))
        loads.append(weight.nbytes / seconds)
    rate, load = median(rates), median(loads)
    found = {"peak_tflops": rate / 1e12, "memory_gbs": load / 1e9}

    def operations(model: Any, tokens: int) -> float:
        return 2.0 * sum(p.numel() for p in model.model.layers.parameters() if p.dim() > 1) * tokens

    def training(model: Any, sequences: int, tokens: int) -> float:
        """A forward and backward pass beside its matrix products."""
        model.get_input_embeddings().requires_grad_(False)  # not trained by default
        ids = torch.randint(2, VOCABULARY, (sequences, tokens))
        seconds = quickest(lambda: model.model(ids, use_cache=False)[0].sum().backward(), 0.6)
        return seconds - 3 * operations(model, sequences * tokens) / rate

    def decoding(model: Any) -> float:
        """A round of 8 tokens beside its matrix products."""
        with torch.no_grad():
            cache = model.model(torch.randint(2, VOCABULARY, (8, 16)), use_cache=True).past_key_values
            ids = torch.randint(2, VOCABULARY, (8, 1))
            return (
                quickest(lambda: model.model(ids, past_key_values=cache, use_cache=True)) - operations(model, 8) / rate
            )

    few, many = qwen3(64, 2).eval(), qwen3(64, 8).eval()
    found["engine_layer"] = (decoding(many) - decoding(few)) / 6
    # Of six layers: what does not grow with the tokens, and what does. The backward pass takes twice the forward's.
    short, long = (training(many, n, 64) - training(few, n, 64) for n in (1, 32))
    passed = sum(sum(p.shape) for p in many.model.layers.parameters() if p.dim() > 1) * 6 / 8
    each = (long - short) / (31 * 64) / passed
    found["activation_gbs"] = 3 * TOUCHES * 4 / each / 1e9
    found["layer"] = (short - each * passed * 64) / 6 / 3
    adapted = qwen3(64, 8).eval()
    anatomy = read_model(adapted)
    plan = build_plan(
        anatomy, {}, ratio=0.0, model="m", method={}, seed=0, settings=PlanConfig(), lora=LoraConfig(rank=8)
    )
    apply_plan(adapted, plan)
    found["adapter"] = (decoding(adapted) - decoding(many)) / len(anatomy.candidates)
    return found


FITTED: Mapping[str, Sequence[str]] = {
    "inline": ("transformers.round", "transformers.request", "update", "tensor", "call", "sync_tensor", "record"),
    "vllm": ("vllm.round", "vllm.sequence", "vllm.layer"),
    "ray": ("call", "update", "record"),
}
"""By the kind of run that they are fitted to, in order; each kind keeps what those before it found."""
PART_OF = {
    "call": ("sync",),
    "sync_tensor": ("sync",),
    "update": ("train",),
    "tensor": ("train",),
    "record": ("other",),
}
"""Which parts a constant is fitted to; of an engine, generate."""


def with_constant(hardware: Hardware, name: str, value: float) -> Hardware:
    over, (engine, _, field) = hardware.overheads, name.partition(".")
    if field:
        engines = {**over.engines, engine: replace(over.engines[engine], **{field: value})}
        return replace(hardware, overheads=replace(over, engines=engines))
    return replace(hardware, overheads=replace(over, **{name: value}))


def fit(hardware: Hardware, names: Sequence[str], found: Sequence[tuple[Any, ...]]) -> Hardware:
    """Set the constants `names` to what fits the measured parts best, as ratios; all of them enter linearly."""
    bare = hardware
    for name in names:
        bare = with_constant(bare, name, 0.0)
    parts = sorted({p for n in names for p in PART_OF.get(n, ("generate",))})
    rows, wanted = [], []
    for config, shape, lengths, seconds in found:
        for part in parts:
            base = step_time(config, shape, lengths, bare).parts[part]
            rows.append(
                [
                    (step_time(config, shape, lengths, with_constant(bare, n, 1.0)).parts[part] - base) / seconds[part]
                    if part in PART_OF.get(n, ("generate",))
                    else 0.0
                    for n in names
                ]
            )
            wanted.append((seconds[part] - base) / seconds[part])
    matrix, target, values = np.array(rows), np.array(wanted), np.zeros(len(names))
    for _ in range(20_000):  # coordinate descent, each step clipped at 0
        for j in range(len(names)):
            column = matrix[:, j]
            if norm := float(column @ column):
                values[j] = max(0.0, values[j] + column @ (target - matrix @ values) / norm)
    for name, value in zip(names, values.tolist(), strict=True):
        hardware = with_constant(hardware, name, value)
    return hardware


def kind_of(case: Case) -> str:
    return "ray" if case.backend == "ray" else "vllm" if case.engine == "vllm" else "inline"


def calibrated(bare: Mapping[str, float], runs: Sequence[tuple[Case, tuple[Any, ...]]]) -> dict[str, Hardware]:
    """By kind of run: inline runs' calls are no Ray's."""
    engine = EngineOverheads(round=0.0, sequence=0.0, layer=0.0, adapter=bare["adapter"], request=0.0)
    transformers = replace(engine, layer=bare["engine_layer"])
    overheads = Overheads(
        layer=bare["layer"], adapter=bare["adapter"], tensor=0.0, update=0.0, sync_tensor=0.0, call=0.0, reward=0.0,
        record=0.0, engines={"vllm": engine, "transformers": transformers},
    )  # fmt: skip
    rates = {name: bare[name] for name in ("peak_tflops", "memory_gbs", "activation_gbs")}
    hardware, by_kind = replace(CPU, overheads=overheads, **rates), {}
    for kind, names in FITTED.items():
        by_kind[kind] = hardware = fit(hardware, names, [of for case, of in runs if kind_of(case) == kind])
    return by_kind


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=6, help="that are measured, of each run")
    parser.add_argument("--rounds", type=int, default=2, help="of each run on Ray")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="of the runs that are held out")
    parser.add_argument(
        "--keep", type=Path, metavar="FILE", help="what was measured: read if it is there, else written"
    )
    parser.add_argument("--measure", nargs=2, metavar=("CASE", "DIRECTORY"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    logging.disable(logging.INFO)
    if options.measure:
        case, directory = Case(**json.loads(options.measure[0])), Path(options.measure[1])
        print(json.dumps(measured(case, directory, options.steps)))
        return
    cases = [case for case in CASES if case.calibrates or not options.only or case.name in options.only]
    kept = json.loads(options.keep.read_text()) if options.keep and options.keep.exists() else {}
    console = Console(width=150)
    bare = kept.setdefault("bare", {}) or bare_constants()
    kept["bare"] = bare
    runs: list[tuple[Case, tuple[Any, ...]]] = []
    for case in cases:
        key = json.dumps(asdict(case))
        with tempfile.TemporaryDirectory(prefix="scale_") as name:
            if key not in kept:
                times = options.rounds if case.backend == "ray" else 1
                kept[key] = min(
                    (measured_apart(key, options.steps) for _ in range(times)), key=lambda f: f["seconds"]["step"]
                )
            special = {"pad_token_id": 0, "eos_token_id": 1}
            qwen3(case.hidden, case.layers, **special).config.save_pretrained(Path(name) / "model")
            config, found = settings(case, Path(name), options.steps), kept[key]
            shape = shape_of(config, AdaptationPlan.from_json(found["plan"]))
        runs.append((case, (config, shape, Lengths(**found["lengths"]), found["seconds"])))
        if options.keep:
            options.keep.write_text(json.dumps(kept))
        console.print(f"{case.name}: {found['seconds']['step']:.2f} s a step")
    by_kind = calibrated(bare, [run for run in runs if run[0].calibrates])
    table, rows = Table("run", "model", "batch", *PARTS, "step, p/m"), []
    for case, (config, shape, lengths, seconds) in runs:
        predicted = step_time(config, shape, lengths, by_kind[kind_of(case)])
        of = predicted_parts(predicted)
        ratio = of["step"] / seconds["step"]
        # Beside training, `generate` is what the step still waits for.
        left = {"generate"} if predicted.overlapped else set()
        cells = ["-" if seconds[p] < 1e-4 or p in left else f"{of[p]:.3f} / {seconds[p]:.3f}" for p in PARTS]
        batch = f"{case.prompts} x {case.generations} x {case.length}"
        label = f"{case.name}{' (calibrates)' if case.calibrates else ''}"
        table.add_row(label, f"{case.hidden} x {case.layers}, {case.adaptation}", batch, *cells, f"{ratio:.2f}")
        rows.append({**asdict(case), "predicted": of, "measured": seconds, "ratio": ratio})
    console.print(table)
    held = [abs(row["ratio"] - 1) for row in rows if not row["calibrates"]]
    worst = f"{max(held):.0%}" if held else "-"
    console.print(f"held out: {sum(e <= 0.2 for e in held)} of {len(held)} within 20 %, the worst off by {worst}")
    constants = {kind: asdict(hardware) for kind, hardware in by_kind.items()}
    print(json.dumps({"bare": bare, "constants": constants, "rows": rows}))


def predicted_parts(predicted: StepTime) -> dict[str, float]:
    return {**predicted.parts, "step": predicted.seconds}


if __name__ == "__main__":
    main()
