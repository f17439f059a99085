"""What `learner.py` and `gpu/learner.py` measure: models and sequences made on the spot, and the sides, each a function
that gets ready and returns its step."""

from __future__ import annotations

import gc
import math
import multiprocessing
import os
import random
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import NormalDist, fmean
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

from torch import Tensor
from transformers import Qwen3Config, Qwen3ForCausalLM
from transformers.utils import logging

from hybrid_rl.config import Config
from hybrid_rl.config_file import parse_config
from hybrid_rl.types import TrainSequence

logging.disable_progress_bar()
VOCABULARY, LARGE_VOCABULARY = 2000, 151_936
COUNT, GROUP, LONGEST, RATIO, TOKENS = 48, 8, 512, 0.4, 4096
"""Sequences, completions a prompt, most tokens of a sequence, mean length over it, tokens a micro-batch."""
Step = Callable[[], dict[str, Any]]


def take_turns(sides: dict[str, tuple[Callable[..., Step], tuple[Any, ...]]], rounds: int) -> dict[str, list[dict]]:
    """What every side's step gave, in a process a side; the first result comes before the rounds."""
    context = multiprocessing.get_context("spawn")
    found: dict[str, list[dict]] = {name: [] for name in sides}
    running = {}
    for name, (make, arguments) in sides.items():
        pipe, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(theirs, make, arguments), daemon=True)
        process.start()
        theirs.close()  # so that a side that dies is noticed
        running[name] = (pipe, process)
        found[name].append(pipe.recv())
    for _ in range(rounds):
        for name, (pipe, _) in running.items():
            pipe.send("step")
            found[name].append(pipe.recv())
    for pipe, process in running.values():
        pipe.send(None)
        process.join()
    return found


def _serve(pipe: Any, make: Callable[..., Step], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    step = make(*arguments)
    pipe.send(step())
    while pipe.recv():
        pipe.send(step())


def make_model(path: str, hidden: int, layers: int, heads: int, **shape: Any) -> None:
    """Random weights; in torch's default precision, on its default device."""
    torch.manual_seed(0)
    defaults = {
        "intermediate_size": 3 * hidden,
        "num_key_value_heads": heads // 2,
        "head_dim": 64,
        "vocab_size": VOCABULARY,
        "tie_word_embeddings": True,
    }
    sizes = {"hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads}
    Qwen3ForCausalLM(Qwen3Config(**sizes, **defaults | shape)).save_pretrained(path)


def sequences(
    count: int = COUNT, longest: int = LONGEST, vocabulary: int = VOCABULARY, *, equal: bool = False
) -> list[TrainSequence]:
    """Completion lengths are log-normal and cut at the limit, as rollouts' are; a group shares its prompt."""
    draw = random.Random(0)
    shortest_prompt, longest_prompt, mean_prompt = longest // 16, longest // 8, 3 * longest // 32
    mean = RATIO * longest - mean_prompt
    normal = [NormalDist().inv_cdf((i + 0.5) / count) for i in range(count)]
    low, high, lengths = 1.0, float(longest), [round(mean)] * count
    for _ in range(0 if equal else 40):
        middle = (low + high) / 2
        lengths = [max(1, min(longest - longest_prompt, round(middle * math.exp(0.8 * z)))) for z in normal]
        low, high = (middle, high) if fmean(lengths) < mean else (low, middle)
    draw.shuffle(lengths)

    def tokens(size: int) -> tuple[int, ...]:
        return tuple(draw.randrange(2, vocabulary) for _ in range(size))

    sizes = [mean_prompt if equal else draw.randint(shortest_prompt, longest_prompt) for _ in range(0, count, GROUP)]
    prompts = [tokens(size) for size in sizes]
    result = []
    for i, length in enumerate(lengths):
        old = tuple(-math.log(vocabulary) + draw.uniform(-0.5, 0.3) for _ in range(length))
        result.append(TrainSequence(prompts[i // GROUP], tokens(length), old, draw.gauss(0, 1)))
    return result


def settings(path: str, **changes: Any) -> Config:
    tree = {
        "model": {"path": path},
        "data": {"train": "none", "eval": "none"},
        "sampling": {"max_completion_length": LONGEST},
        "batch": {"tokens_per_micro_batch": TOKENS, "prompts": COUNT // GROUP, "num_generations": GROUP},
        "full": {"lr": 1e-6},
        # The engine's log-probabilities as old ones: with the learner's own, the first loss would not depend on them.
        "algo": {"old_logprobs": "rollout"},
    }
    for name, value in changes.items():
        tree[name] = {**tree.get(name, {}), **value} if isinstance(value, dict) else value
    return parse_config({**tree, "learner": {"world_size": 1, **changes.get("learner", {})}})


def start_worker(config: Config) -> Any:
    from hybrid_rl.cluster.inline import Memory, free_port
    from hybrid_rl.learner.worker import LearnerWorker
    from hybrid_rl.plan_building import build_plan, select_candidates

    worker = LearnerWorker(config, 0, Memory())
    worker.connect("127.0.0.1", free_port())
    scores = {c.name: random.Random(c.name).random() for c in select_candidates(worker._anatomy, config.plan)}
    ratio = {"full": 1.0, "lora": 0.0, "hybrid": config.plan.budget.ratio}[config.adaptation]
    options = {"model": config.model.path, "method": {}, "seed": 0, "settings": config.plan, "lora": config.lora}
    worker.build(build_plan(worker._anatomy, scores, ratio=ratio, **options).to_json())
    return worker


def learner_side(config: Config, equal: bool, usual: bool) -> Step:
    """`LearnerWorker.train` on the sequences. `usual` pads in the order they come to the longest of all."""
    from hybrid_rl.learner import batching
    from hybrid_rl.learner import worker as worker_module
    from hybrid_rl.learner.assemble import mini_batches

    data = sequences(equal=equal)
    worker = start_worker(config)
    if usual:
        longest, arrange = max(s.length for s in data), batching.arrange
        each = TOKENS // longest

        def cut(lengths: list[int], ranks: int, *_: Any) -> list[list[list[int]]]:
            assert ranks == 1
            return [[list(range(len(lengths)))[i : i + each] for i in range(0, len(lengths), each)]]

        worker_module.micro_batches = cut
        batching.arrange = lambda rows, *more: arrange(
            [[*row, *[row[-1]] * (longest - 1 - len(row))] for row in rows], *more
        )
    batch = mini_batches(data, config, {"full": 1.0, "lora": 1.0}, 1)

    def step() -> dict[str, Any]:
        started = time.perf_counter()
        metrics = worker.train(batch).metrics
        seconds = time.perf_counter() - started
        names = ("policy/loss", "policy/entropy", "grad_norm/lora", "tokens/padding")
        keep = {name.replace("/", "_"): metrics[name] for name in names}
        trained = sum(p.numel() for p in worker._model.parameters() if p.requires_grad)
        return {"seconds": seconds, "layout": worker._layout, "trained": trained, **keep}

    return step


def trl_side(config: Config, equal: bool) -> Step:
    """One update of TRL's trainer. The batch is padded as a whole and then cut up, as TRL does it."""
    from datasets import Dataset
    from peft import LoraConfig
    from trl.trainer.grpo_config import GRPOConfig
    from trl.trainer.grpo_trainer import GRPOTrainer
    from trl.trainer.utils import pad

    data = sequences(equal=equal)
    width = max(len(s.prompt_ids) for s in data) + max(len(s.completion_ids) for s in data)
    each = max(n for n in range(1, COUNT + 1) if COUNT % n == 0 and n * width <= TOKENS)
    arguments = GRPOConfig(
        output_dir=config.model.path + "_trl",
        per_device_train_batch_size=each,
        gradient_accumulation_steps=COUNT // each,
        num_generations=GROUP,
        max_completion_length=LONGEST,
        beta=0.0,
        loss_type="grpo",
        temperature=1.0,
        learning_rate=config.lora_lr,
        lr_scheduler_type="constant",
        adam_beta1=config.learner.adam_betas[0],
        adam_beta2=config.learner.adam_betas[1],
        max_grad_norm=config.lora.max_grad_norm,
        use_cpu=not torch.cuda.is_available(),
        bf16=False,
        gradient_checkpointing=False,
        model_init_kwargs={"dtype": "float32", "attn_implementation": "sdpa"},
        report_to="none",
    )
    lora = LoraConfig(
        r=config.lora.rank, lora_alpha=int(config.lora.alpha_at(config.lora.rank)), target_modules="all-linear"
    )
    trainer = GRPOTrainer(
        model=config.model.path,
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=arguments,
        train_dataset=Dataset.from_list([{"prompt": "1"}] * COUNT),
        peft_config=lora,
    )
    trainer._prepare_inputs = lambda inputs: inputs  # it would generate
    trainer.current_gradient_accumulation_steps = arguments.gradient_accumulation_steps
    trainer.create_optimizer()
    model, trainer.optimizer = trainer.accelerator.prepare(trainer.model, trainer.optimizer)
    device, trained = trainer.accelerator.device, [p for p in model.parameters() if p.requires_grad]

    def padded(rows: Iterable[Any], side: str, dtype: torch.dtype = torch.long) -> Tensor:
        return pad([torch.tensor(row, dtype=dtype) for row in rows], 0, side).to(device)

    def step() -> dict[str, Any]:
        started = time.perf_counter()
        inputs = {
            "prompt_ids": padded([s.prompt_ids for s in data], "left"),
            "prompt_mask": padded([[1] * len(s.prompt_ids) for s in data], "left"),
            "completion_ids": padded([s.completion_ids for s in data], "right"),
            "completion_mask": padded([[1] * len(s.completion_ids) for s in data], "right"),
            "old_per_token_logps": padded([s.rollout_logprobs for s in data], "right", torch.float32),
            "advantages": torch.tensor([s.advantage for s in data], device=device),
        }
        losses = [
            trainer.training_step(model, {k: v[i : i + each] for k, v in inputs.items()}, None)
            for i in range(0, COUNT, each)
        ]
        norm = trainer.accelerator.clip_grad_norm_(model.parameters(), arguments.max_grad_norm)
        trainer.optimizer.step()
        model.zero_grad()
        loss, norm = float(sum(losses)), float(norm)
        seconds = time.perf_counter() - started
        found = {"policy_loss": loss, "grad_norm_lora": norm, "trained": sum(p.numel() for p in trained)}
        padding = COUNT * width - sum(s.length for s in data)
        return {"seconds": seconds, "layout": "padded", "tokens_padding": padding, **found}

    return step


def logits_side(kind: str, rows: int = 4, prompt: int = 64, completion: int = 512) -> Step:
    """Log-probabilities and entropies of the completions, and the gradient of a weighted sum in the decoder."""
    from trl.trainer.utils import add_fused_lm_head, entropy_from_logits, selective_log_softmax

    from hybrid_rl.learner.logprobs import PolicyModel

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    shape = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = Qwen3ForCausalLM(Qwen3Config(**shape, num_key_value_heads=2, head_dim=64, vocab_size=LARGE_VOCABULARY))
    model = model.to(device).train()
    model.get_input_embeddings().requires_grad_(False)
    model.get_output_embeddings().requires_grad_(False)  # neither is trained by default
    ids = torch.randint(2, LARGE_VOCABULARY, (rows, prompt + completion)).to(device)
    weights = torch.randn(rows, completion).to(device)
    at = torch.arange(rows * ids.shape[1], device=device).view_as(ids)[:, prompt - 1 : -1].flatten()
    targets = ids[:, prompt:]
    if kind == "hybrid-rl":
        policy = PolicyModel(model, temperature=1.0, chunk_mib=settings("none").learner.logits_mib)
    elif kind == "TRL, fused head":
        add_fused_lm_head(model, outputs=("log_probs", "entropy"))

    def pair() -> tuple[Tensor, Tensor]:
        if kind == "hybrid-rl":
            return policy(ids, at, targets.flatten(), entropy=True, use_cache=False)
        if kind == "TRL, fused head":
            labels = ids.clone()
            labels[:, :prompt] = -100
            output = model(ids, attention_mask=torch.ones_like(ids), labels=labels, fused_lm_head=True)
            return output.log_probs[:, -completion:], output.entropy[:, -completion:]
        logits = model(ids, logits_to_keep=completion + 1, use_cache=False).logits[:, :-1]
        every = torch.log_softmax(logits, -1) if kind == "log_softmax" else None
        logprobs = selective_log_softmax(logits, targets) if every is None else every.gather(-1, targets[..., None])
        with torch.no_grad():
            return logprobs, entropy_from_logits(logits)

    def step() -> dict[str, Any]:
        model.zero_grad(set_to_none=True)
        before = reset_peak()
        started = time.perf_counter()
        logprobs, entropy = pair()
        (logprobs.reshape(-1) * weights.flatten()).sum().backward()
        gradient = model.model.layers[0].self_attn.v_proj.weight.grad.flatten()[:4096].tolist()  # waits for the device
        seconds, peak = time.perf_counter() - started, peak_memory() - before
        values = {
            "logprobs": logprobs.flatten().tolist(),
            "entropy": float(entropy.detach().mean()),
            "gradient": gradient,
        }
        return {"seconds": seconds, "bytes": peak, **values}

    return step


def reset_peak() -> int:
    """Bytes in use now, from where the peak counts on: of the device's tensors, or this process's resident set."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    return peak_memory()


def peak_memory() -> int:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM"))) * 1024


def memory_side(config: Config) -> Step:
    """Tensors alive when DeepSpeed steps for the second time, so that the optimizer has its state."""
    from hybrid_rl.estimate import training_memory
    from hybrid_rl.learner.assemble import mini_batches

    worker = start_worker(config)
    engine, optimizer, found = worker._engine._engine, worker._engine._optimizer, {}
    step, setup_buckets = engine.step, optimizer.setup_buckets

    def counted_step() -> None:
        found.update(held(worker))
        step()

    def counted_buckets() -> None:
        setup_buckets()
        found["bucket"] = sum(t.nbytes for b in optimizer.ipg_buckets.values() for t in b.buffer)

    engine.step, optimizer.setup_buckets = counted_step, counted_buckets
    data = [s for s in sequences()[::GROUP] if s.length < LONGEST // 2]
    for _ in range(2):
        worker.train(mini_batches(data, config, {"full": 1.0, "lora": 1.0}, 1))
    trained = sum(p.numel() for p in worker._model.parameters() if p.requires_grad)
    estimate = training_memory(worker._anatomy, trained, config.model.dtype)
    formula = {name: getattr(estimate, name) for name in ("masters", "moments", "gradients")}
    return lambda: {"trained": trained, "held": found, "formula": formula}


def held(worker: Any) -> dict[str, int]:
    """Bytes of the storages of DeepSpeed's tensors by kind, and of all else that is not the model's."""
    engine, seen = worker._engine, set()
    masters = [t for tensors in engine._masters() for t in tensors]
    state = [t for m in masters for t in engine._optimizer.optimizer.state[m].values() if isinstance(t, Tensor)]
    kinds = {
        "model": [t for p in worker._policy.parameters() for t in (p.data, p.grad) if t is not None],
        "masters": masters,
        "moments": state,
        "gradients": [t for tensors in engine._gradients() for t in tensors],
        "other": [o for o in gc.get_objects() if issubclass(type(o), Tensor)],
    }
    sizes = dict.fromkeys(kinds, 0)
    for kind, tensors in kinds.items():
        for storage in (t.untyped_storage() for t in tensors):
            if storage.data_ptr() not in seen:
                seen.add(storage.data_ptr())
                sizes[kind] += storage.nbytes()
    return sizes
