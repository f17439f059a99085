"""A small base policy from nothing: a Qwen3, or a hybrid of attention and recurrence, that imitates flawed
demonstrations.

It stands in for a pretrained model where none can be downloaded, and like one it has picked up a mistake from its data:
most demonstrations forget the carry. It ends roughly half right, with the right answer often enough among its samples
for reinforcement learning to find. With `runs_on` it has, like one, learnt from documents of many problems: after its
answer it invents the next problem. The model and its tokenizer are ordinary Hugging Face files, loaded by the same code
as any other.
"""

from __future__ import annotations

import random
import re
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForCausalLM,
    FalconH1Config,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3_5TextConfig,
    Qwen3Config,
)
from transformers.utils import logging as transformers_logging

from hybrid_rl.config import Config, ConfigError, WarmStartConfig
from hybrid_rl.data import load_rows
from trainers.planted import plant

_PAD, _EOS, _BOX, _MARK = "<|pad|>", "<|end|>", "\\boxed{", "####"
_AROUND = {"boxed": (_BOX, "}"), "marked": (f"{_MARK} ", "")}
"""Form of a demonstrated answer -> what stands before and after it."""
_PROBE = 512
"""Training problems on which the finished policy is measured."""


def warm_start(config: Config, console: Console) -> Path:
    """Train `config.warm_start`'s model on `config.data.train` and save it at `config.model.path`.

    Does nothing if a model is there already. Raises `ConfigError` without a `warm_start` section.
    """
    settings = config.warm_start
    if settings is None:
        raise ConfigError("the configuration has no warm_start section, so there is nothing to make")
    target = Path(config.model.path)
    if (target / "config.json").is_file():
        console.print(f"base policy {target} is there already")
        return target
    aside = target.with_name(f".writing_{target.name}")
    shutil.rmtree(aside, ignore_errors=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    transformers_logging.disable_progress_bar()
    if settings.planted is not None:
        plant(settings, settings.planted, aside)
        aside.rename(target)
        console.print(f"base policy {target}: a planted task, with its problems beside it")
        return target
    source, setting = (settings.data, "warm_start.data") if settings.data else (config.data.train, "data.train")
    rows = load_rows(source, setting=setting, columns=config.data.columns, answer_after=config.data.answer_after)
    tokenizer = build_tokenizer(_MARK if settings.form == "marked" else _BOX)
    model = build_model(settings, tokenizer)
    started = time.perf_counter()
    problems = _train(model, tokenizer, rows, config, settings, console)
    seconds = time.perf_counter() - started
    model.save_pretrained(aside)
    tokenizer.save_pretrained(aside)
    aside.rename(target)
    probe = problems[:_PROBE]
    end = [] if settings.runs_on else [int(tokenizer.eos_token_id)]  # type: ignore[arg-type]
    right = sum(_writes(model, [(p.prompt, p.answer + end) for p in probe])) / len(probe)
    parameters = sum(p.numel() for p in model.parameters())
    console.print(
        f"base policy {target}: {parameters:,} parameters, {settings.steps} steps in {seconds:.0f} s; "
        f"{right:.0%} of its greedy answers are right"
    )
    return target


def build_tokenizer(mark: str = _BOX) -> PreTrainedTokenizerFast:
    """Byte-level, so that it can read any text; digits one by one, and what answers are marked by as one token."""
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(  # type: ignore[assignment]
        [
            pre_tokenizers.Split(Regex(re.escape(mark)), "isolated"),
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)  # type: ignore[assignment]
    trainer = trainers.BpeTrainer(
        vocab_size=len(alphabet) + 16, special_tokens=[_PAD, _EOS], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([mark] * 64, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=_PAD, eos_token=_EOS)


def build_model(settings: WarmStartConfig, tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    """A random model of the configured architecture and shape, in float32."""
    torch.manual_seed(settings.seed)
    head = settings.hidden_size // settings.heads
    common: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": settings.hidden_size,
        "intermediate_size": 3 * settings.hidden_size,
        "num_hidden_layers": settings.layers,
        "num_attention_heads": settings.heads,
        "num_key_value_heads": settings.kv_heads,
        "head_dim": max(32, head),  # vLLM's CPU attention refuses 16
        "max_position_embeddings": 4096,
        "initializer_range": 0.08,  # learns in half the steps that the usual 0.02 takes at this width
        # What placements of LoRA in a parallel hybrid reach (`all_eligible`) includes an output head of its own.
        "tie_word_embeddings": settings.architecture != "falcon_h1",
        "pad_token_id": tokenizer.convert_tokens_to_ids(_PAD),
        "eos_token_id": tokenizer.convert_tokens_to_ids(_EOS),
        "bos_token_id": None,
    }
    shape: PreTrainedConfig
    if settings.architecture == "qwen3_5":
        shape = Qwen3_5TextConfig(
            **common,
            linear_num_key_heads=settings.kv_heads,
            linear_num_value_heads=settings.heads,
            linear_key_head_dim=head,
            linear_value_head_dim=head,
        )
    elif settings.architecture == "falcon_h1":
        # Sequences are padded to whole chunks, which are 256 tokens by default.
        sizes: dict[str, Any] = {"mamba_d_ssm": head * settings.heads, "mamba_d_state": 16, "mamba_chunk_size": 32}
        shape = FalconH1Config(**common, mamba_n_heads=settings.heads, mamba_d_head=head, **sizes)
    else:
        shape = Qwen3Config(**common)
    return AutoModelForCausalLM.from_config(shape, dtype=torch.float32)


def _train(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    rows: list[dict[str, Any]],
    config: Config,
    settings: WarmStartConfig,
    console: Console,
) -> list[_Problem]:
    """Supervised training on prompt + answer or slip, and what comes after it. Returns the problems it drew from."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # two threads on shared cores stall each other
    draw = random.Random(settings.seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.lr, weight_decay=0.01, betas=(0.9, 0.95))
    problems = [_Problem.of(row, tokenizer, config, settings) for row in rows]
    with Progress(console=console, transient=True) as progress:
        bar = progress.add_task("warm start", total=settings.steps)
        for step in range(1, settings.steps + 1):
            for group in optimizer.param_groups:
                group["lr"] = settings.lr * min(1.0, step / 20, (settings.steps - step + 1) / (0.4 * settings.steps))
            shown = [
                (p.prompt, _document(p, problems, tokenizer, config.sampling.max_completion_length, settings, draw))
                for p in draw.choices(problems, k=settings.batch)
            ]
            loss = _imitation_loss(model, shown, int(tokenizer.pad_token_id))  # type: ignore[arg-type]
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            progress.update(bar, completed=step)
    torch.set_num_threads(threads)
    return problems


@dataclass(frozen=True)
class _Problem:
    """Token ids of a prompt and of what may be demonstrated after it."""

    prompt: list[int]
    answer: list[int]
    slip: list[int]

    @staticmethod
    def of(
        row: dict[str, Any], tokenizer: PreTrainedTokenizerFast, config: Config, settings: WarmStartConfig
    ) -> _Problem:
        before, after = _AROUND[settings.form]

        def marked(text: object) -> list[int]:
            return tokenizer(f"{before}{text}{after}")["input_ids"]  # type: ignore[return-value]

        prompt = tokenizer(config.data.template.replace("{prompt}", str(row["prompt"])))["input_ids"]
        return _Problem(prompt, marked(row["answer"]), marked(row.get("slip", row["answer"])))  # type: ignore[arg-type]

    def demonstrated(self, slips: float, draw: random.Random) -> list[int]:
        return self.slip if draw.random() < slips else self.answer


def _document(
    problem: _Problem,
    problems: Sequence[_Problem],
    tokenizer: PreTrainedTokenizerFast,
    limit: int,
    settings: WarmStartConfig,
    draw: random.Random,
) -> list[int]:
    """What is demonstrated after a prompt: its answer, others of `problems` with theirs as long as the document runs
    on, and its end; or the first `limit` tokens, if it runs on further."""
    text = problem.demonstrated(settings.slips, draw)
    gap: list[int] = tokenizer("\n")["input_ids"]  # type: ignore[assignment]
    while settings.runs_on and draw.random() < settings.runs_on:
        following = draw.choice(problems)
        text = [*text, *gap, *following.prompt, *following.demonstrated(settings.slips, draw)]
        if len(text) >= limit:
            return text[:limit]
    return [*text, int(tokenizer.eos_token_id)]  # type: ignore[arg-type]


def _imitation_loss(model: PreTrainedModel, shown: list[tuple[list[int], list[int]]], pad: int) -> torch.Tensor:
    """Cross-entropy of the answers, given the prompts."""
    length = max(len(prompt) + len(answer) for prompt, answer in shown)
    ids = torch.full((len(shown), length), pad)
    labels = torch.full_like(ids, -100)
    for i, (prompt, answer) in enumerate(shown):
        ids[i, : len(prompt) + len(answer)] = torch.tensor(prompt + answer)
        labels[i, len(prompt) : len(prompt) + len(answer)] = torch.tensor(answer)
    return model(input_ids=ids, labels=labels, use_cache=False).loss


@torch.no_grad()
def _writes(model: PreTrainedModel, texts: list[tuple[list[int], list[int]]]) -> list[bool]:
    """For each (prompt, answer): would greedy decoding write exactly this answer? It would if every token is the
    likeliest one after those before it."""
    result = [False] * len(texts)
    for shape in {(len(prompt), len(answer)) for prompt, answer in texts}:
        rows = [i for i, (prompt, answer) in enumerate(texts) if (len(prompt), len(answer)) == shape]
        ids = torch.tensor([texts[i][0] + texts[i][1] for i in rows])
        best = model(input_ids=ids, use_cache=False).logits[:, shape[0] - 1 : -1].argmax(-1)
        for i, same in zip(rows, (best == ids[:, shape[0] :]).all(1).tolist(), strict=True):
            result[i] = same
    return result
