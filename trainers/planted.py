"""The planted task: which matrices need a full-rank repair is known.

A random transformer is the teacher. The base policy is the teacher with full-rank noise in a known set of matrices and,
if wanted, with noise of low rank and the same norm in decoys, of the same kinds and sizes, that LoRA could repair.
Prompt: a few random letters; answer: the teacher's most likely next letter. There is no simple rule to restore, and
problems without end, so that what is measured is how far the function is repaired.
"""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from hybrid_rl.components import read_model
from hybrid_rl.config import PlantedConfig, WarmStartConfig
from hybrid_rl.scoring import Evidence, ScoreContext, register_score

LETTERS = "abcdefghijklmnopqrstuvwxyz012345"
PROMPT_LENGTH = 4
MLP, VO = ("gate_proj", "up_proj", "down_proj"), ("v_proj", "o_proj")
_PAD, _EOS = "<|pad|>", "<|end|>"


def plant(settings: WarmStartConfig, task: PlantedConfig, target: Path) -> None:
    """Write the base policy, its tokenizer and the problems."""
    teacher = make_teacher(settings.seed, len(LETTERS) + 2, settings.hidden_size, settings.layers, settings.heads)
    teacher.lm_head.weight.data[len(LETTERS) :] = 0  # it never says padding, and never ends
    student = copy.deepcopy(teacher)
    names = [weight.name for weight in read_model(student).candidates]
    planted, others = draw_sets(settings.seed, settings.layers, names)
    generator = torch.Generator().manual_seed(900 + settings.seed)
    damage(student, planted, task.strength, "gaussian", 0, generator)
    if task.decoy_rank:
        damage(student, others, task.strength, "low rank", task.decoy_rank, generator)
    student.config.pad_token_id, student.config.eos_token_id = len(LETTERS), len(LETTERS) + 1
    student.generation_config.eos_token_id = len(LETTERS) + 1
    student.save_pretrained(target)
    _tokenizer().save_pretrained(target)
    draws = torch.Generator().manual_seed(7000 + settings.seed)
    for name, count in (("train", task.train), ("validation", task.held_out), ("test", task.held_out)):
        ids = torch.randint(len(LETTERS), (count, PROMPT_LENGTH), generator=draws)
        with torch.no_grad():
            gold = torch.cat([last_logits(teacher, part)[:, : len(LETTERS)].argmax(-1) for part in ids.split(4096)])
        rows = zip(ids.tolist(), gold.tolist(), strict=True)
        lines = [json.dumps({"prompt": "".join(LETTERS[i] for i in row), "answer": LETTERS[a]}) for row, a in rows]
        (target / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


@register_score("planted", needs="structure")
def planted(modules: Sequence[Evidence], context: ScoreContext) -> list[float]:
    """The planted matrices first: an oracle, which needs a run of the task's seed."""
    return _first(modules, context, 0)


@register_score("unplanted", needs="structure")
def unplanted(modules: Sequence[Evidence], context: ScoreContext) -> list[float]:
    """Undamaged matrices (or decoys) of the planted ones' kinds and sizes first."""
    return _first(modules, context, 1)


def _first(modules: Sequence[Evidence], context: ScoreContext, which: int) -> list[float]:
    names = [m.weight.name for m in modules]
    layers = 1 + max(m.weight.layer or 0 for m in modules)
    chosen = draw_sets(context.seed, layers, names)[which]
    return [float(name in chosen) for name in names]


def make_teacher(seed: int, vocabulary: int, hidden: int, layers: int, heads: int = 4) -> Any:
    """A random Qwen3 whose logits have a standard deviation of about 6: it is sure of its answers."""
    shape = Qwen3Config(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // 2,
        head_dim=hidden // heads,
        max_position_embeddings=64,
        tie_word_embeddings=False,
    )
    model: Any = Qwen3ForCausalLM(shape)
    generator = torch.Generator().manual_seed(500 + seed)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.weight.data = torch.randn(module.weight.shape, generator=generator) / module.in_features**0.5
    model.model.embed_tokens.weight.data = torch.randn(vocabulary, hidden, generator=generator)
    model.lm_head.weight.data *= 6
    return model.requires_grad_(False)


def draw_sets(seed: int, layers: int, names: Sequence[str]) -> tuple[list[str], list[str]]:
    """Two sets of matrices of the same kinds and sizes: v_proj and o_proj of a layer, another one for each, and an MLP
    matrix of any layer."""
    draw = random.Random(4000 + seed)
    order = draw.sample(range(layers), layers)
    matrices = draw.sample([n for n in names if n.rpartition(".")[2] in MLP], 2)
    one, other = (
        [n for n in names if f".layers.{layer}." in n and n.rpartition(".")[2] in VO] + [matrix]
        for layer, matrix in zip(order[:2], matrices, strict=True)
    )
    return one, other


def damage(
    model: nn.Module, names: Sequence[str], strength: float, kind: str, rank: int, generator: torch.Generator
) -> None:
    """Add noise of `strength` times its norm to each matrix: `gaussian`, `orthogonal` (all singular values equal), or
    of low `rank`."""
    for name in names:
        weight: Any = model.get_submodule(name).weight
        noise = _noise(kind, tuple(weight.shape), rank, generator)
        weight.data += strength * weight.norm() * noise / noise.norm()


def last_logits(model: Any, ids: Tensor) -> Tensor:
    """Logits of the token after each row of `ids`, in fp32."""
    return model(input_ids=ids, use_cache=False, logits_to_keep=1).logits[:, -1].float()


def _noise(kind: str, shape: tuple[int, int], rank: int, generator: torch.Generator) -> Tensor:
    if kind == "gaussian":
        return torch.randn(shape, generator=generator)
    if kind == "orthogonal":
        basis = torch.linalg.qr(torch.randn(max(shape), min(shape), generator=generator)).Q
        return basis if tuple(basis.shape) == shape else basis.T
    return torch.randn(shape[0], rank, generator=generator) @ torch.randn(rank, shape[1], generator=generator)


def _tokenizer() -> PreTrainedTokenizerFast:
    """A token a letter."""
    vocabulary = {text: i for i, text in enumerate([*LETTERS, _PAD, _EOS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=_PAD))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")  # type: ignore[assignment]
    tokenizer.decoder = decoders.Fuse()  # type: ignore[assignment]
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=_PAD, eos_token=_EOS)
