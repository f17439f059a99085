"""The production engine: vLLM, on GPU or CPU, inside the worker's own process."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from hybrid_rl.rollout.engine import ADAPTER_RANKS, EngineSettings
from hybrid_rl.types import Completion, Receipt, Sampling, WeightUpdate

_CPU_BATCH_TOKENS = 8192
"""Prompt tokens that vLLM takes into one batch on CPU."""


class VllmEngine:
    """`RolloutEngine` on vLLM. Full matrices are loaded in place; the adapter is served as a native LoRA."""

    def __init__(self, settings: EngineSettings) -> None:
        from vllm import LLM
        from vllm.lora.request import LoRARequest
        from vllm.platforms import current_platform

        from hybrid_rl.weight_sync.vllm_worker import ADAPTER_ID, HybridWeightSync

        self._name = settings.name
        self._version = 0
        self._adapter: LoRARequest | None = None
        self._adapter_request = LoRARequest("policy", ADAPTER_ID, "/held/in/memory")
        options: dict[str, Any] = {}
        if settings.adapter_rank:
            reserved = next(r for r in ADAPTER_RANKS if r >= settings.adapter_rank)
            options |= {"enable_lora": True, "max_loras": 1, "max_lora_rank": reserved}
        if current_platform.is_cpu():
            # A prompt cut across batches makes vLLM rewind the request's random generator, which a CPU one cannot.
            options |= {"enable_chunked_prefill": False, "enforce_eager": True}
            options |= {"max_num_batched_tokens": max(settings.max_length, _CPU_BATCH_TOKENS)}
        else:
            options |= {"gpu_memory_utilization": settings.gpu_memory_utilization}
        extension = f"{HybridWeightSync.__module__}.{HybridWeightSync.__qualname__}"
        self._llm = LLM(
            model=settings.model_path,
            dtype=settings.dtype,  # type: ignore[arg-type]
            trust_remote_code=settings.trust_remote_code,
            max_model_len=settings.max_length,
            max_num_seqs=settings.max_concurrent,
            seed=settings.seed,
            # Log-probabilities of the distribution that was sampled from, temperature included.
            logprobs_mode="processed_logprobs",
            worker_extension_cls=extension,
            disable_log_stats=True,
            **options,
        )
        self._tokenizer = self._llm.get_tokenizer()

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, seeds: Sequence[int]
    ) -> list[list[Completion]]:
        from vllm import SamplingParams

        greedy = sampling.temperature == 0
        parameters = [
            SamplingParams(
                n=sampling.n,
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                max_tokens=sampling.max_tokens,
                stop=list(sampling.stop),
                seed=None if greedy else seed,
                logprobs=0,
                detokenize=bool(sampling.stop),  # vLLM's incremental decoding is needed to find stop strings only
            )
            for seed in seeds
        ]
        outputs = self._llm.generate(
            [{"prompt_token_ids": list(prompt)} for prompt in prompts],
            parameters,
            use_tqdm=False,
            lora_request=self._adapter,
        )
        decoded = bool(sampling.stop)
        return [[self._completion(c, decoded) for c in sorted(o.outputs, key=lambda c: c.index)] for o in outputs]

    def apply_update(self, update: WeightUpdate) -> Receipt:
        (digests,) = self._llm.collective_rpc("apply_weight_update", args=(update,))
        # Blocks computed with the old weights would be served for shared prefixes otherwise.
        if not self._llm.reset_prefix_cache():
            raise RuntimeError("vLLM kept its prefix cache across a weight update: requests are still running")
        self._adapter = self._adapter_request if update.adapter_rank else None
        self._version = update.version
        return Receipt(self._name, self._version, digests)

    def info(self) -> dict[str, Any]:
        return {"pid": os.getpid(), "version": self._version, "engine": self._name}

    def _completion(self, output: Any, decoded: bool) -> Completion:
        token_ids = tuple(output.token_ids)
        logprobs = tuple(entry[token].logprob for entry, token in zip(output.logprobs, token_ids, strict=True))
        text = output.text if decoded else self._tokenizer.decode(token_ids, skip_special_tokens=True)
        return Completion(text, token_ids, logprobs, output.finish_reason, self._version)
