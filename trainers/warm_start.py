"""A small base policy from nothing: a Qwen3-architecture model that imitates flawed demonstrations.

It stands in for a pretrained model where none can be downloaded, and like one it has picked up a mistake from its data:
most demonstrations forget the carry. It ends roughly half right, with the right answer often enough among its samples
for reinforcement learning to find. The model and its tokenizer are ordinary Hugging Face files, loaded by the same code
as any other.
"""

from __future__ import annotations

import random
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM
from transformers.utils import logging as transformers_logging

from hybrid_rl.config import Config, ConfigError, WarmStartConfig
from hybrid_rl.data import load_rows

_PAD, _EOS, _BOX = "<|pad|>", "<|end|>", "\\boxed{"
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
    rows = load_rows(
        config.data.train, setting="data.train", columns=config.data.columns, answer_after=config.data.answer_after
    )
    tokenizer = build_tokenizer()
    model = build_model(settings, tokenizer)
    started = time.perf_counter()
    problems = _train(model, tokenizer, rows, config, settings, console)
    seconds = time.perf_counter() - started
    aside = target.with_name(f".writing_{target.name}")
    shutil.rmtree(aside, ignore_errors=True)
    transformers_logging.disable_progress_bar()
    model.save_pretrained(aside)
    tokenizer.save_pretrained(aside)
    target.parent.mkdir(parents=True, exist_ok=True)
    aside.rename(target)
    probe = problems[:_PROBE]
    right = sum(_writes(model, [(p.prompt, p.answer) for p in probe])) / len(probe)
    parameters = sum(p.numel() for p in model.parameters())
    console.print(
        f"base policy {target}: {parameters:,} parameters, {settings.steps} steps in {seconds:.0f} s; "
        f"{right:.0%} of its greedy answers are right"
    )
    return target


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level, so that it can read any text; digits one by one, and the opening of a box as one token."""
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(  # type: ignore[assignment]
        [
            pre_tokenizers.Split(Regex(r"\\boxed\{"), "isolated"),
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)  # type: ignore[assignment]
    trainer = trainers.BpeTrainer(
        vocab_size=len(alphabet) + 16, special_tokens=[_PAD, _EOS], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([_BOX] * 64, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=_PAD, eos_token=_EOS)


def build_model(settings: WarmStartConfig, tokenizer: PreTrainedTokenizerFast) -> Qwen3ForCausalLM:
    """A random Qwen3 of the configured shape."""
    torch.manual_seed(settings.seed)
    shape = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=settings.hidden_size,
        intermediate_size=3 * settings.hidden_size,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.kv_heads,
        head_dim=max(32, settings.hidden_size // settings.heads),  # vLLM's CPU attention refuses 16
        max_position_embeddings=4096,
        initializer_range=0.08,  # learns in half the steps that the usual 0.02 takes at this width
        tie_word_embeddings=True,
        pad_token_id=tokenizer.convert_tokens_to_ids(_PAD),  # type: ignore[arg-type]
        eos_token_id=tokenizer.convert_tokens_to_ids(_EOS),
        bos_token_id=None,
    )
    return Qwen3ForCausalLM(shape)


def _train(
    model: Qwen3ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    rows: list[dict[str, Any]],
    config: Config,
    settings: WarmStartConfig,
    console: Console,
) -> list[_Problem]:
    """Supervised training on prompt + boxed answer or slip. Returns the problems it drew from."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # two threads on shared cores stall each other
    draw = random.Random(settings.seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.lr, weight_decay=0.01, betas=(0.9, 0.95))
    problems = [_Problem.of(row, tokenizer, config) for row in rows]
    with Progress(console=console, transient=True) as progress:
        bar = progress.add_task("warm start", total=settings.steps)
        for step in range(1, settings.steps + 1):
            for group in optimizer.param_groups:
                group["lr"] = settings.lr * min(1.0, step / 20, (settings.steps - step + 1) / (0.4 * settings.steps))
            shown = [
                (p.prompt, p.slip if draw.random() < settings.slips else p.answer)
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
    def of(row: dict[str, Any], tokenizer: PreTrainedTokenizerFast, config: Config) -> _Problem:
        def boxed(text: object) -> list[int]:
            return tokenizer(f"{_BOX}{text}}}{_EOS}")["input_ids"]  # type: ignore[return-value]

        prompt = tokenizer(config.data.template.replace("{prompt}", str(row["prompt"])))["input_ids"]
        return _Problem(prompt, boxed(row["answer"]), boxed(row.get("slip", row["answer"])))  # type: ignore[arg-type]


def _imitation_loss(model: Qwen3ForCausalLM, shown: list[tuple[list[int], list[int]]], pad: int) -> torch.Tensor:
    """Cross-entropy of the answers, given the prompts."""
    length = max(len(prompt) + len(answer) for prompt, answer in shown)
    ids = torch.full((len(shown), length), pad)
    labels = torch.full_like(ids, -100)
    for i, (prompt, answer) in enumerate(shown):
        ids[i, : len(prompt) + len(answer)] = torch.tensor(prompt + answer)
        labels[i, len(prompt) : len(prompt) + len(answer)] = torch.tensor(answer)
    return model(input_ids=ids, labels=labels, use_cache=False).loss


@torch.no_grad()
def _writes(model: Qwen3ForCausalLM, texts: list[tuple[list[int], list[int]]]) -> list[bool]:
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
