"""TRL's GRPOTrainer on the task of one of our configurations, in processes of its own, for the benchmarks beside this.

    python benchmarks/trl_sides.py SPEC.json OUT

is one rank of a run that `run_trl` starts; it writes what it saw to OUT.<rank>.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

import psutil

from hybrid_rl.config import Config
from hybrid_rl.config_file import load_config

SMALL = (
    *("cluster.backend=inline", "learner.world_size=1", "rollout.engine=transformers", "rollout.engines=1"),
    "sync.adapter=merged",
)
"""Our layout for two cores: one process, LoRA merged into the engine's weights."""


@dataclass(frozen=True)
class Side:
    """A way in which TRL trains."""

    lr: float
    treatment: str = "lora"
    """`lora`, on every linear layer, or `full`."""
    processes: int = 1
    threads: int = 1
    """OpenMP threads of each."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Further settings of `GRPOConfig`."""

    @property
    def name(self) -> str:
        more = "".join(f" {key}={value}" for key, value in self.options.items())
        return f"TRL {self.treatment} {self.lr:g}, {self.processes} x {self.threads}{more}"


@dataclass
class Seen:
    """What came of a run, by rank 0's clock but for the rewards, which are means over ranks."""

    started: float
    """Seconds from the launch to the first step."""
    ends: list[float]
    """Seconds of training at the end of every step: evaluations are left out."""
    core_seconds: list[float]
    """The same in core seconds, of all ranks and since their start."""
    rewards: list[float]
    """Mean of every step."""
    accuracies: dict[int, float]
    """By step, on held-out problems."""


def run_trl(
    config: str, settings: Sequence[str], side: Side, out: Path, *, every: int = 0, target: float | None = None
) -> Seen:
    """Train as `config` with `settings` says. Evaluated each `every` steps; stops where `target` is reached."""
    spec = out.with_suffix(".spec")
    told = {"config": config, "settings": list(settings), "side": asdict(side), "every": every, "target": target}
    spec.write_text(json.dumps(told), encoding="utf-8")
    several = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={side.processes}"]
    launcher = several if side.processes > 1 else []
    launched = time.time()
    command = [sys.executable, *launcher, __file__, str(spec), str(out)]
    run_quietly(command, out.with_suffix(".log"), OMP_NUM_THREADS=str(side.threads))
    ranks = [json.loads(out.with_suffix(f".{rank}").read_text(encoding="utf-8")) for rank in range(side.processes)]
    rewards = [fmean(step) for step in zip(*(rank["rewards"] for rank in ranks), strict=True)]
    accuracies = {int(step): value for step, value in ranks[0]["accuracies"].items()}
    cores = [float(sum(each)) for each in zip(*(rank["cores"] for rank in ranks), strict=True)]
    return Seen(ranks[0]["began"] - launched, ranks[0]["ends"], cores, rewards, accuracies)


def run_quietly(
    command: list[str], log: Path, look: Callable[[psutil.Process], None] | None = None, **environment: str
) -> None:
    """Run to the end with the output in `log`; exit with its tail if the command fails. `look` is called with the
    process, ten times a second."""
    with log.open("w", encoding="utf-8") as stream:
        process = psutil.Popen(command, stdout=stream, stderr=subprocess.STDOUT, env=environment_of(environment))
        while process.poll() is None:
            if look is not None:
                look(process)
            time.sleep(0.1)
    if process.returncode:
        tail = "\n".join(log.read_text(encoding="utf-8").splitlines()[-80:])
        sys.exit(f"{tail}\n{' '.join(command)}: exit status {process.returncode}")


def environment_of(changes: Mapping[str, str]) -> dict[str, str]:
    """Of a side's processes."""
    inherited = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    return {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", **inherited, **changes}


def main() -> None:
    spec, out = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")), Path(sys.argv[2])
    config = load_config(spec["config"], spec["settings"])
    _train(config, Side(**spec["side"]), out, spec["every"], spec["target"])


def _train(config: Config, side: Side, out: Path, every: int, target: float | None) -> None:
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import TrainerCallback
    from trl.trainer.grpo_config import GRPOConfig
    from trl.trainer.grpo_trainer import GRPOTrainer

    from hybrid_rl.data import PromptSource, build_prompts, load_rows, load_tokenizer
    from hybrid_rl.plugins import load_plugin

    torch.set_num_threads(side.threads)
    world_size, rank = (int(os.environ.get(name, default)) for name, default in (("WORLD_SIZE", 1), ("RANK", 0)))
    tokenizer = load_tokenizer(config)
    rows = load_rows(config.data.train, setting="data.train", columns=config.data.columns)
    prompts, _ = build_prompts(rows, config.data, tokenizer, setting="data.train")
    drawn = PromptSource(prompts, config.seed).take(config.steps * config.batch.prompts)
    clock = {"began": 0.0, "paused": 0.0, "started": 0.0}
    ends: list[float] = []
    cores: list[float] = []
    means: list[float] = []
    accuracies: dict[int, float] = {}

    judge = load_plugin(config.rewards[0].plugin)

    def reward(completions: list[str], answer: list[str], **columns: Any) -> list[float | None]:
        scores = judge(completions, answer=answer)
        means.append(fmean(s for s in scores if s is not None))
        return scores

    class Clock(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            clock["began"], clock["started"] = time.time(), time.perf_counter()

        def on_step_end(self, _: Any, state: Any, control: Any, **__: Any) -> Any:
            ends.append(time.perf_counter() - clock["started"] - clock["paused"])
            cores.append(time.process_time())
            if every and state.global_step % every == 0:
                begun = time.perf_counter()
                found = accuracies[state.global_step] = sampled_accuracy(config, trainer, tokenizer)
                clock["paused"] += time.perf_counter() - begun
                control.should_training_stop = target is not None and found >= target
            return control

    lora = LoraConfig(
        r=config.lora.rank, lora_alpha=int(config.lora.alpha_at(config.lora.rank)), target_modules="all-linear"
    )
    settings: dict[str, Any] = {
        "output_dir": str(out),
        "seed": config.seed,
        "max_steps": config.steps,
        "per_device_train_batch_size": config.completions_per_step // world_size,
        "gradient_accumulation_steps": 1,
        "num_iterations": 1,
        "num_generations": config.batch.num_generations,
        "max_completion_length": config.sampling.max_completion_length,
        "temperature": config.sampling.temperature,
        "top_p": config.sampling.top_p,
        "beta": 0.0,
        "loss_type": "grpo",
        "epsilon": config.algo.clip_low,
        "epsilon_high": config.algo.clip_high,
        "learning_rate": side.lr,
        "lr_scheduler_type": {"constant": "constant_with_warmup"}.get(config.learner.schedule, config.learner.schedule),
        "warmup_steps": config.learner.warmup_steps,
        "adam_beta1": config.learner.adam_betas[0],
        "adam_beta2": config.learner.adam_betas[1],
        "max_grad_norm": config.lora.max_grad_norm,
        "shuffle_dataset": False,  # the prompts come in our order
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "model_init_kwargs": {"dtype": config.model.dtype, "attn_implementation": config.model.attention},
        "dataloader_pin_memory": False,
        "disable_tqdm": True,
        "logging_strategy": "no",
        "save_strategy": "no",
        "report_to": "none",
    }
    trainer = GRPOTrainer(
        model=config.model.path,
        reward_funcs=reward,
        args=GRPOConfig(**{**settings, **side.options}),
        train_dataset=Dataset.from_list([{"prompt": p.text, "answer": p.columns["answer"]} for p in drawn]),
        peft_config=lora if side.treatment == "lora" else None,
        callbacks=[Clock()],
    )
    trainer.train()
    seen = {"began": clock["began"], "ends": ends, "cores": cores, "rewards": means, "accuracies": accuracies}
    out.with_suffix(f".{rank}").write_text(json.dumps(seen), encoding="utf-8")


def sampled_accuracy(config: Config, trainer: Any, tokenizer: Any) -> float:
    """Mean score of `eval.k` completions of each held-out problem at the training temperature: what ours has as
    `eval/mean_at_k`, sampled by the code of our transformers engine."""
    import torch

    from hybrid_rl.data import build_prompts, load_rows
    from hybrid_rl.rollout import sampling_from
    from hybrid_rl.rollout.batch_decoding import Row, Run, next_batch
    from hybrid_rl.rollout.pool import prompt_seed
    from hybrid_rl.types import Request
    from rewards.math import accuracy

    name = config.data.eval
    assert isinstance(name, str)
    rows = load_rows(name, setting="data.eval", columns=config.data.columns)
    held_out = build_prompts(rows, config.data, tokenizer, setting="data.eval")[0][: config.data.eval_size]
    sampling = sampling_from(config, n=config.eval.k, temperature=config.sampling.temperature)
    model = trainer.accelerator.unwrap_model(trainer.model)
    model = getattr(model, "base_model", model).model if hasattr(model, "peft_config") else model
    waiting = deque(
        Run(
            Request(p.id, p.token_ids, sampling, prompt_seed(config.seed, p.id)),
            0.0,
            [Row() for _ in range(sampling.n)],
            torch.Generator().manual_seed(prompt_seed(config.seed, p.id)),
        )
        for p in held_out
    )
    texts, answers = [], {p.id: p.columns["answer"] for p in held_out}
    expected = []
    was_training = model.training
    model.eval()
    with torch.no_grad():
        while waiting:
            batch = next_batch(waiting, model, config.rollout.max_concurrent, torch.device("cpu"))
            while batch.runs:
                for _, row, token, logprob in batch.sample():
                    row.token_ids.append(token)
                    row.logprobs.append(logprob)
                    if token == tokenizer.eos_token_id:
                        row.reason = "stop"
                    elif len(row.token_ids) >= sampling.max_tokens:
                        row.reason = "length"
                for run in batch.finished():
                    texts += [tokenizer.decode(row.token_ids, skip_special_tokens=True) for row in run.rows]
                    expected += [answers[run.request.id]] * len(run.rows)
    model.train(was_training)
    return fmean(score or 0.0 for score in accuracy(texts, expected))


if __name__ == "__main__":
    main()
