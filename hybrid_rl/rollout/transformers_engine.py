"""The engine for debugging and for architectures that vLLM cannot serve: transformers' own `generate`."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from hybrid_rl.adaptation import AdaptedModel, apply_plan, remove_adapters
from hybrid_rl.plan import AdaptationPlan, PlannedModule, Treatment
from hybrid_rl.rollout.engine import EngineSettings
from hybrid_rl.types import Completion, Receipt, Sampling, WeightUpdate
from hybrid_rl.weight_sync import decode_update, digest, lora_names


class TransformersEngine:
    """`RolloutEngine` on transformers. It holds the base model with the plan applied, its adapter scaled by 1."""

    def __init__(self, settings: EngineSettings) -> None:
        self._settings = settings
        self._version = 0
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._tokenizer = AutoTokenizer.from_pretrained(
            settings.model_path, trust_remote_code=settings.trust_remote_code
        )
        model: Any = AutoModelForCausalLM.from_pretrained(
            settings.model_path,
            dtype=getattr(torch, settings.dtype),
            trust_remote_code=settings.trust_remote_code,
        )
        self._model = model.to(self._device).eval()
        self._adapted: AdaptedModel | None = None
        self._names: frozenset[str] = frozenset()
        self._stop: tuple[str, ...] = ()
        eos = self._model.generation_config.eos_token_id
        eos = eos if eos is not None else self._tokenizer.eos_token_id
        self._eos = set(eos if isinstance(eos, list) else [eos])
        self._pad = self._tokenizer.pad_token_id if self._tokenizer.pad_token_id is not None else min(self._eos)

    @torch.no_grad()
    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, seeds: Sequence[int]
    ) -> list[list[Completion]]:
        """Prompts are run one at a time, so that each one's seed decides its completions alone."""
        self._stop = sampling.stop
        greedy = sampling.temperature == 0
        sample: dict[str, Any] = {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0}
        # Complete, so that nothing of the model's own generation settings (penalties, top_k) shapes the samples.
        settings = GenerationConfig(
            do_sample=not greedy,
            max_new_tokens=sampling.max_tokens,
            eos_token_id=sorted(self._eos),
            pad_token_id=self._pad,
            stop_strings=list(sampling.stop) or None,
            output_logits=greedy,
            output_scores=not greedy,
            return_dict_in_generate=True,
            **({} if greedy else sample),
        )
        groups = []
        for prompt, seed in zip(prompts, seeds, strict=True):
            torch.manual_seed(seed)
            ids = torch.tensor([list(prompt)] * sampling.n, device=self._device)
            output = self._model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                generation_config=settings,
                tokenizer=self._tokenizer if sampling.stop else None,
            )
            scores_T_N_V = torch.stack(output.logits if greedy else output.scores).float()
            chosen_N_T = output.sequences[:, len(prompt) :]
            logprobs_N_T = torch.log_softmax(scores_T_N_V, -1).transpose(0, 1).gather(-1, chosen_N_T[..., None])[..., 0]
            groups.append(
                [self._completion(*row) for row in zip(chosen_N_T.tolist(), logprobs_N_T.tolist(), strict=True)]
            )
        return groups

    def apply_update(self, update: WeightUpdate) -> Receipt:
        full, lora = decode_update(update)
        adapted = self._adapt(full, lora, update.adapter_rank)
        holders: dict[str, Tensor] = dict(adapted.full)
        for module, pair in adapted.lora.items():
            name_a, name_b = lora_names(module)
            holders |= {name_a: pair.a, name_b: pair.b}
        with torch.no_grad():
            for name, tensor in {**full, **lora}.items():
                holders[name].copy_(tensor)
        self._version = update.version
        return Receipt(self._settings.name, self._version, {name: digest(holders[name]) for name in update.digests})

    def info(self) -> dict[str, Any]:
        return {"pid": os.getpid(), "version": self._version, "engine": self._settings.name}

    def _adapt(self, full: Mapping[str, Tensor], lora: Mapping[str, Tensor], rank: int) -> AdaptedModel:
        """Build the adapted model that the update describes, unless the last one described the same.

        Raises `RuntimeError` if a weight that an earlier update replaced is not in this one: its base value is gone.
        """
        names = frozenset((*full, *lora))
        if self._adapted is None or names != self._names:
            if self._adapted is not None:
                lost = sorted(self._adapted.full.keys() - full.keys())
                if lost:
                    raise RuntimeError(f"the update lacks {lost[0]}, which an earlier one replaced")
                remove_adapters(self._model)
            self._names = names
            modules = [_planned(name.removesuffix(".weight"), "full", None) for name in full]
            modules += [
                _planned(name.removeprefix("base_model.model.").removesuffix(".lora_A.weight"), "lora", rank)
                for name in lora
                if name.endswith(".lora_A.weight")
            ]
            plan = AdaptationPlan(self._settings.model_path, "", {}, self._settings.seed, tuple(modules))
            self._adapted = apply_plan(self._model, plan)
            self._model.to(self._device)
        return self._adapted

    def _completion(self, token_ids: list[int], logprobs: list[float]) -> Completion:
        end = next((i + 1 for i, token in enumerate(token_ids) if token in self._eos), None)
        if end is None and token_ids[-1] == self._pad:  # ended by a stop string, then padded
            end = max(i + 1 for i, token in enumerate(token_ids) if token != self._pad)
        kept = token_ids[:end]
        text = self._tokenizer.decode(kept, skip_special_tokens=True)
        for stop in self._stop:
            text, found, _ = text.partition(stop)
            end = len(kept) if found else end
        return Completion(text, tuple(kept), tuple(logprobs[:end]), "length" if end is None else "stop", self._version)


def _planned(name: str, treatment: Treatment, rank: int | None) -> PlannedModule:
    """A plan's entry for a module of which only the treatment matters; alpha = rank makes the LoRA scaling 1."""
    return PlannedModule(name, "", 0, (0, 0), 0, None, rank, float(rank) if rank else None, treatment)
