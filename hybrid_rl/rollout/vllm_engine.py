"""The production engine: vLLM, on GPU or CPU, inside the worker's own process.

A request's completions are requests of their own to vLLM, which batches all that there are at every step. Blocks of the
prefix cache are found only by requests that were taken on under the same weights: each prompt carries the number of
updates before it as salt, so that `keep` need not wait until the cache can be emptied.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic import ValidationError

from hybrid_rl.config import ConfigError
from hybrid_rl.rollout.engine import ADAPTER_RANKS, EngineSettings
from hybrid_rl.types import Completion, Progress, Receipt, Request, WeightUpdate
from hybrid_rl.weight_sync import Meeting
from hybrid_rl.weight_sync.apply import NotServed
from hybrid_rl.weight_sync.chain import Updates

_CPU_BATCH_TOKENS = 8192
"""Prompt tokens that vLLM takes into one batch on CPU."""


@dataclass
class _Group:
    """A request under way."""

    request: Request
    started: float
    done: dict[int, Completion] = field(default_factory=dict)
    running: dict[int, str] = field(default_factory=dict)
    """Completion -> vLLM's own id of it."""


class VllmEngine:
    """`RolloutEngine` on vLLM."""

    def __init__(self, settings: EngineSettings) -> None:
        from vllm import LLM
        from vllm.lora.request import LoRARequest
        from vllm.model_executor.model_loader import get_model_cls
        from vllm.model_executor.models import supports_lora
        from vllm.platforms import current_platform

        from hybrid_rl.weight_sync.vllm_worker import ADAPTER_ID, HybridWeightSync

        model = _model_config(settings)
        self._on_cpu = current_platform.is_cpu()
        # On CPU, vLLM's LoRA for mixtures of experts does not load: its kernels are for GPUs.
        adapts = supports_lora(get_model_cls(model)) and not (self._on_cpu and model.is_moe)
        if settings.adapter == "native" and settings.adapter_rank and not adapts:
            raise ConfigError(
                f"sync.adapter=native: vLLM serves no LoRA for {settings.model_path}; set sync.adapter=merged"
            )
        native = bool(settings.adapter_rank) and settings.adapter != "merged" and adapts
        self._name = settings.name
        options: dict[str, Any] = {}
        if native:
            reserved = next(r for r in ADAPTER_RANKS if r >= settings.adapter_rank)
            options |= {"enable_lora": True, "max_loras": 1, "max_lora_rank": reserved}
        if self._on_cpu:
            # A prompt cut across batches makes vLLM rewind the request's random generator, which a CPU one cannot.
            options |= {"enable_chunked_prefill": False, "enforce_eager": True}
            options |= {"max_num_batched_tokens": max(settings.max_length, _CPU_BATCH_TOKENS)}
            if model.is_hybrid or model.is_attention_free:
                options |= {"enable_prefix_caching": False}  # of recurrent states, it would need prompts cut
        else:
            options |= {"gpu_memory_utilization": settings.gpu_memory_utilization}
            options |= {"enable_sleep_mode": settings.sleeps}
        if settings.tensor_parallel > 1:
            options |= {"tensor_parallel_size": settings.tensor_parallel, "distributed_executor_backend": "mp"}
        self._llm = LLM(
            model=settings.model_path,
            dtype=settings.dtype,  # type: ignore[arg-type]
            trust_remote_code=settings.trust_remote_code,
            max_model_len=settings.max_length,
            max_num_seqs=settings.max_concurrent,
            seed=settings.seed,
            # Log-probabilities of the distribution that was sampled from, temperature included.
            logprobs_mode="processed_logprobs",
            worker_extension_cls=f"{HybridWeightSync.__module__}.{HybridWeightSync.__qualname__}",
            # A step is computed when it returns: no token of the old weights is counted to the new ones.
            async_scheduling=False,
            disable_log_stats=True,
            **options,
        )
        self._engine = self._llm.llm_engine
        self._engine.set_weight_version("0")
        self._tokenizer = self._llm.get_tokenizer()
        self._lora = LoRARequest("policy", ADAPTER_ID, "/held/in/memory") if native else None
        self._updates = Updates(settings.transport)
        self._weights = _Workers(self._llm)
        self._salt = 0
        self._groups: dict[str, _Group] = {}
        self._finished: dict[str, tuple[Completion, ...]] = {}
        self._asleep = False
        self._weights.call("start_weight_sync", settings.adapter)
        if refusal := self._weights.refusal("check_lora", settings.lora_modules):
            raise ConfigError(
                f"sync.adapter={settings.adapter}: vLLM cannot serve LoRA on {refusal}; set sync.adapter=merged, or "
                f"leave it out with plan.exclude"
            )
        if refusal := self._weights.refusal("check_full", settings.full_names):
            raise ConfigError(
                f"vLLM cannot take updates of {refusal}; leave it out with plan.exclude, or use "
                "rollout.engine=transformers"
            )

    def advance(self, requests: Sequence[Request], cancelled: Sequence[str], seconds: float) -> Progress:
        self._ensure_ready()
        for name in cancelled:
            self._forget(name)
        for request in requests:
            self._take(request)
        self._work(time.monotonic() + seconds)
        finished, self._finished = self._finished, {}
        return Progress(finished, self._updates.version)

    def apply_updates(self, updates: Sequence[WeightUpdate], in_flight: str = "keep") -> Receipt:
        if self._asleep:
            raise RuntimeError("the engine is asleep; wake it before an update")
        self._updates.apply(updates, self._weights)
        self._engine.set_weight_version(str(self._updates.version))
        self._salt += 1
        if in_flight == "recompute":
            self._engine.reset_prefix_cache(reset_running_requests=True)
        self._resubmit_unbegun()
        digests = self._weights.call("held_digests")
        return Receipt(self._name, self._updates.version, digests, self._weights.call("adapter_kind"))

    def join(self, meeting: Meeting, rank: int) -> None:
        self._updates.join(meeting, rank)

    def sleep(self) -> None:
        """On a CPU, memory is kept: vLLM has no sleep mode there."""
        self._engine.reset_prefix_cache(reset_running_requests=True)
        if not self._on_cpu:
            self._engine.sleep(level=1, mode="keep")
        self._asleep = True

    def wake(self) -> None:
        if not self._on_cpu and self._asleep:
            self._engine.wake_up()
        self._asleep = False

    def info(self) -> dict[str, Any]:
        return {
            "pid": os.getpid(),
            "version": self._updates.version,
            "engine": self._name,
            "adapter": self._weights.call("adapter_kind"),
        }

    def _ensure_ready(self) -> None:
        self._updates.ensure_whole()
        if self._asleep:
            raise RuntimeError("the engine is asleep")

    def _take(self, request: Request) -> None:
        group = self._groups[request.id] = _Group(request, time.monotonic())
        for index in range(request.sampling.n):
            self._submit(group, index)

    def _submit(self, group: _Group, index: int) -> None:
        from vllm import SamplingParams
        from vllm.inputs.engine import tokens_input
        from vllm.sampling_params import RequestOutputKind

        sampling = group.request.sampling
        parameters = SamplingParams(
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            max_tokens=sampling.max_tokens,
            stop=list(sampling.stop),
            seed=None if sampling.temperature == 0 else group.request.seed + index,
            logprobs=0,
            detokenize=bool(sampling.stop),  # vLLM's incremental decoding is needed to find stop strings only
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        group.running[index] = self._engine.add_request(
            f"{index}/{group.request.id}",
            tokens_input(list(group.request.prompt_ids), cache_salt=str(self._salt)),
            parameters,
            lora_request=self._lora,
        )

    def _work(self, deadline: float) -> None:
        """Step until `deadline`, at least once, or until nothing is under way."""
        while self._groups:
            outputs: list[Any] = self._engine.step()
            for output in outputs:
                index, _, name = output.request_id.partition("/")
                self._end(self._groups[name], int(index), output.outputs[0], None)
            self._cut_overdue()
            if time.monotonic() >= deadline:
                return

    def _cut_overdue(self) -> None:
        from vllm.v1.engine import FinishReason

        now = time.monotonic()
        for group in list(self._groups.values()):
            limit = group.request.sampling.max_seconds
            if limit is None or now - group.started < limit:
                continue
            for index, running in list(group.running.items()):
                state = self._engine.output_processor.request_states[running]
                output: Any = state.make_request_output([], None, FinishReason.ABORT, None)
                self._engine.abort_request([running], internal=True)
                self._end(group, index, output.outputs[0], "time")

    def _end(self, group: _Group, index: int, output: Any, reason: str | None) -> None:
        del group.running[index]
        group.done[index] = self._completion(output, bool(group.request.sampling.stop), reason or output.finish_reason)
        if not group.running:
            del self._groups[group.request.id]
            self._finished[group.request.id] = tuple(group.done[i] for i in range(len(group.done)))

    def _forget(self, name: str) -> None:
        group = self._groups.pop(name, None)
        if group is not None:
            self._engine.abort_request(list(group.running.values()), internal=True)
        self._finished.pop(name, None)

    def _resubmit_unbegun(self) -> None:
        """Requests without a token yet are taken on anew, so that they find no block of the old weights."""
        for group in self._groups.values():
            for index, running in list(group.running.items()):
                if self._engine.output_processor.request_states[running].is_prefilling:
                    self._engine.abort_request([running], internal=True)
                    self._submit(group, index)

    def _completion(self, output: Any, decoded: bool, reason: str) -> Completion:
        if reason not in ("stop", "length", "time"):
            raise RuntimeError(f"vLLM ended a completion as {reason}")
        token_ids = tuple(output.token_ids)
        logprobs = tuple(entry[token].logprob for entry, token in zip(output.logprobs or (), token_ids, strict=True))
        text = output.text if decoded else self._tokenizer.decode(token_ids, skip_special_tokens=True)
        spans = [(span.start, int(span.version)) for span in output.weight_versions or () if span.end > span.start]
        first = spans[0][1] if spans else self._updates.version
        return Completion(text, token_ids, logprobs, reason, first, tuple(spans[1:]))


class _Workers:
    """`Target` in vLLM's workers."""

    def __init__(self, llm: Any) -> None:
        self._llm = llm

    def call(self, method: str, *args: Any) -> Any:
        """The first worker's answer."""
        return self._llm.collective_rpc(method, args=args)[0]

    def refusal(self, method: str, *args: Any) -> str | None:
        """The first of any worker."""
        return next((answer for answer in self._llm.collective_rpc(method, args=args) if answer), None)

    def begin(self, names: Sequence[str], rank: int, anchor: bool) -> None:
        if refusal := self.refusal("begin_update", names, rank, anchor):
            raise NotServed(refusal)

    def write(self, payload: bytes) -> None:
        self.call("write_update", payload)

    def finish(self) -> None:
        self.call("finish_update")


def _model_config(settings: EngineSettings) -> Any:
    """What vLLM makes of the model, before it is loaded."""
    from vllm.engine.arg_utils import EngineArgs

    arguments = EngineArgs(
        model=settings.model_path,
        dtype=settings.dtype,  # type: ignore[arg-type]
        trust_remote_code=settings.trust_remote_code,
    )
    try:
        return arguments.create_model_config()
    except ValidationError as error:  # an architecture that it does not know, or lacks a package for
        reason = "; ".join(e["msg"] for e in error.errors())
        raise ConfigError(
            f"rollout.engine=vllm cannot serve model.path={settings.model_path!r}: {reason} (where it knows the "
            "architecture, a package is missing: its log names it); use rollout.engine=transformers"
        ) from error
