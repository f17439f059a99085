"""The engine for small machines, for debugging, and for architectures that vLLM cannot serve: transformers' model.

Requests whose prompts have the same length are decoded together (`batch_decoding`), one batch after another.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from hybrid_rl.adaptation import apply_plan, remove_adapters
from hybrid_rl.config import ConfigError
from hybrid_rl.plan import AdaptationPlan, PlannedModule
from hybrid_rl.rollout.batch_decoding import Batch, Row, Run, next_batch
from hybrid_rl.rollout.engine import EngineSettings
from hybrid_rl.types import Completion, Progress, Receipt, Request, WeightUpdate
from hybrid_rl.weight_sync import Meeting
from hybrid_rl.weight_sync.apply import HeldWeights, NotServed, Piece, assemble
from hybrid_rl.weight_sync.base import BaseFiles
from hybrid_rl.weight_sync.chain import Updates


class TransformersEngine:
    """`RolloutEngine` on transformers."""

    def __init__(self, settings: EngineSettings) -> None:
        if settings.tensor_parallel > 1:
            raise ConfigError(
                f"rollout.tensor_parallel={settings.tensor_parallel}: rollout.engine=transformers runs in one process"
            )
        self._settings = settings
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._tokenizer = AutoTokenizer.from_pretrained(
            settings.model_path, trust_remote_code=settings.trust_remote_code
        )
        dtype = getattr(torch, settings.dtype)
        model: Any = AutoModelForCausalLM.from_pretrained(
            settings.model_path, dtype=dtype, trust_remote_code=settings.trust_remote_code
        )
        self._model = model.to(self._device).eval()
        self._updates = Updates(settings.transport)
        layout = _Layout(self._model, settings)
        self._weights = HeldWeights(layout, BaseFiles(settings.model_path), settings.adapter, dtype)
        try:
            self._weights.check_lora(settings.lora_modules)
        except NotServed as error:
            raise ConfigError(
                f"sync.adapter={settings.adapter}: {error}; leave the module out with plan.exclude"
            ) from error
        try:
            self._weights.check_full(settings.full_names)
        except NotServed as error:
            raise ConfigError(f"transformers cannot take updates of {error}; leave it out with plan.exclude") from error
        self._waiting: deque[Run] = deque()
        self._batch: Batch | None = None
        self._finished: dict[str, tuple[Completion, ...]] = {}
        self._asleep = False
        eos = self._model.generation_config.eos_token_id
        eos = eos if eos is not None else self._tokenizer.eos_token_id
        self._eos = set(eos if isinstance(eos, list) else [eos])

    def advance(self, requests: Sequence[Request], cancelled: Sequence[str], seconds: float) -> Progress:
        self._ensure_ready()
        if cancelled:
            self._waiting = deque(run for run in self._waiting if run.request.id not in cancelled)
            if self._batch is not None:
                self._batch.drop(cancelled)
            for name in cancelled:
                self._finished.pop(name, None)
        for request in requests:
            generator = torch.Generator(self._device).manual_seed(request.seed)
            rows = [Row() for _ in range(request.sampling.n)]
            self._waiting.append(Run(request, time.monotonic(), rows, generator))
        self._work(time.monotonic() + seconds)
        finished, self._finished = self._finished, {}
        return Progress(finished, self._updates.version)

    @torch.no_grad()
    def apply_updates(self, updates: Sequence[WeightUpdate], in_flight: str = "keep") -> Receipt:
        if self._asleep:
            raise RuntimeError("the engine is asleep; wake it before an update")
        self._updates.apply(updates, self._weights)
        if in_flight == "recompute":
            self._forget_cache()
        held = self._weights
        return Receipt(self._settings.name, self._updates.version, held.digests(), held.adapter)

    def join(self, meeting: Meeting, rank: int) -> None:
        self._updates.join(meeting, rank)

    def sleep(self) -> None:
        """On a CPU, the weights stay where they are."""
        self._forget_cache()
        if self._device.type == "cuda":
            self._move("cpu")
            torch.cuda.empty_cache()
        self._asleep = True

    def wake(self) -> None:
        self._move(self._device)
        self._asleep = False

    def info(self) -> dict[str, Any]:
        return {
            "pid": os.getpid(),
            "version": self._updates.version,
            "engine": self._settings.name,
            "adapter": self._weights.adapter,
        }

    def _ensure_ready(self) -> None:
        self._updates.ensure_whole()
        if self._asleep:
            raise RuntimeError("the engine is asleep")

    def _move(self, device: torch.device | str) -> None:
        for tensor in (*self._model.parameters(), *self._model.buffers()):
            tensor.data = tensor.data.to(device)

    def _forget_cache(self) -> None:
        if self._batch is not None:
            self._batch.forget_cache()

    def _work(self, deadline: float) -> None:
        """Sample tokens until `deadline`, at least one of each row of a batch, or until nothing is under way."""
        while self._waiting or (self._batch is not None and self._batch.runs):
            if self._batch is None or not self._batch.runs:
                most = self._settings.max_concurrent
                self._batch = next_batch(self._waiting, self._model, most, self._device)
            self._step(self._batch)
            now = time.monotonic()
            for run in (*self._batch.runs, *self._waiting):
                limit = run.request.sampling.max_seconds
                if limit is not None and now - run.started >= limit:
                    for row in run.rows:
                        row.reason = row.reason or "time"
            late = [run for run in self._waiting if run.ended]
            for run in (*self._batch.finished(), *late):
                self._finished[run.request.id] = tuple(self._completion(run, row) for row in run.rows)
            if late:
                self._waiting = deque(run for run in self._waiting if not run.ended)
            if now >= deadline:
                return

    @torch.no_grad()
    def _step(self, batch: Batch) -> None:
        """Sample one token of every completion."""
        for run in batch.runs:
            if run.request.sampling.max_tokens < 1:
                for row in run.rows:
                    row.reason = "length"
            elif not run.versions or run.versions[-1][1] != self._updates.version:
                run.versions.append((batch.length, self._updates.version))
        room = self._settings.max_length - len(batch.runs[0].request.prompt_ids)
        for run, row, token, logprob in batch.sample():
            sampling = run.request.sampling
            row.token_ids.append(token)
            row.logprobs.append(logprob)
            if token in self._eos or (sampling.stop and self._cut(row, sampling.stop)[1]):
                row.reason = "stop"
            elif len(row.token_ids) >= min(sampling.max_tokens, room):
                row.reason = "length"

    def _cut(self, row: Row, stop: tuple[str, ...]) -> tuple[str, bool]:
        """A completion's text up to the first stop string, and whether it has one."""
        text = self._tokenizer.decode(row.token_ids, skip_special_tokens=True)
        ends = [at for at in map(text.find, stop) if at >= 0]
        return (text[: min(ends)], True) if ends else (text, False)

    def _completion(self, run: Run, row: Row) -> Completion:
        text, _ = self._cut(row, run.request.sampling.stop)
        versions = [v for v in run.versions if v[0] < len(row.token_ids)] or [(0, self._updates.version)]
        assert row.reason is not None
        return Completion(
            text, tuple(row.token_ids), tuple(row.logprobs), row.reason, versions[0][1], tuple(versions[1:])
        )


class _Layout:
    """`Layout` of a transformers model; adapters are PEFT's, scaled by 1."""

    rearranges = False

    def __init__(self, model: Any, settings: EngineSettings) -> None:
        self._model = model
        self._settings = settings

    def weight(self, name: str, shape: tuple[int, ...] | None) -> list[Piece]:
        parent, _, leaf = name.rpartition(".")
        try:
            module = self._model.get_submodule(parent)
        except AttributeError:
            raise NotServed(f"{name}: {type(self._model).__name__} has no such tensor") from None
        parameter = getattr(getattr(module, "base_layer", module), leaf, None)
        if parameter is None or (shape is not None and parameter.shape != shape):
            raise NotServed(f"{name}: {type(self._model).__name__} has no such tensor of shape {shape}")
        return [Piece(parameter)]

    def adapts(self, module: str) -> str | None:
        return None

    def open_slots(self, modules: Sequence[str], rank: int) -> dict[str, tuple[list[Piece], list[Piece]]]:
        remove_adapters(self._model)
        if not modules:
            return {}
        planned = [PlannedModule(m, "", 0, (0, 0), 0, None, rank, float(rank), "lora") for m in modules]
        plan = AdaptationPlan(self._settings.model_path, "", {}, self._settings.seed, tuple(planned))
        adapted = apply_plan(self._model, plan)
        slots = {}
        for module, adapter in adapted.adapters.items():
            a, b = adapter.parameters.values()
            a.data.zero_()
            slots[module] = ([Piece(a)], [Piece(b)])
        return slots

    def whole(self, pieces: Sequence[Piece]) -> Tensor:
        return assemble(pieces)
