"""Rows -> prompts, and an endless, seeded, resumable order of them."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from hybrid_rl.config import Config, ConfigError, DataConfig
from hybrid_rl.types import Prompt


def load_tokenizer(config: Config) -> PreTrainedTokenizerBase:
    """The model's tokenizer. Raises `ConfigError` where there is none, or no chat template for `data.chat`."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(config.model.path, trust_remote_code=config.model.trust_remote_code)
    except Exception as error:  # transformers raises many kinds for a path that is not a model
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(f"model.path={config.model.path!r} has no tokenizer that can be loaded: {reason}") from None
    if config.data.chat and not tokenizer.chat_template:
        raise ConfigError(f"data.chat=true, but the tokenizer of model.path={config.model.path!r} has no chat template")
    return tokenizer


def build_prompts(
    rows: Sequence[Mapping[str, Any]], settings: DataConfig, tokenizer: PreTrainedTokenizerBase, *, setting: str
) -> tuple[list[Prompt], int]:
    """Prompts of all rows, and how many were left out as longer than `data.max_prompt_length`.

    Raises `ConfigError` if none is short enough.
    """
    prompts = []
    for i, row in enumerate(rows):
        if row["prompt"] is None:
            raise ConfigError(f"{setting}: row {i} has no prompt; give it one, or set data.columns.prompt")
        text = settings.template.replace("{prompt}", str(row["prompt"]))
        if settings.chat:
            message = [{"role": "user", "content": text}]
            text = str(tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True))
        ids = tokenizer(text, add_special_tokens=not settings.chat)["input_ids"]
        if 0 < len(ids) <= settings.max_prompt_length:
            prompts.append(Prompt(str(i), text, tuple(ids), row))
    if not prompts:
        raise ConfigError(
            f"{setting}: all {len(rows)} prompts are longer than data.max_prompt_length="
            f"{settings.max_prompt_length} tokens; raise it"
        )
    return prompts, len(rows) - len(prompts)


class PromptSource:
    """Training prompts without end: each epoch is a new shuffle, decided by the seed and the epoch alone."""

    def __init__(self, prompts: Sequence[Prompt], seed: int, position: int = 0) -> None:
        self._prompts = list(prompts)
        self._seed = seed
        self._shuffled: tuple[int, list[int]] = (-1, [])
        self.position = position
        """Prompts drawn so far; giving it back to the constructor goes on from there."""

    def take(self, count: int) -> list[Prompt]:
        """The next `count` prompts, with ids `<epoch>/<row>`."""
        taken = [self._at(self.position + i) for i in range(count)]
        self.position += count
        return taken

    def _at(self, position: int) -> Prompt:
        epoch, offset = divmod(position, len(self._prompts))
        if self._shuffled[0] != epoch:
            order = list(range(len(self._prompts)))
            random.Random(f"{self._seed}/{epoch}").shuffle(order)
            self._shuffled = (epoch, order)
        prompt = self._prompts[self._shuffled[1][offset]]
        return dataclasses.replace(prompt, id=f"{epoch}/{prompt.id}")
