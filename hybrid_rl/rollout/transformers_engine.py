"""The engine for debugging and for architectures that vLLM cannot serve: transformers' model, one request at a time."""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, TemperatureLogitsWarper, TopPLogitsWarper

from hybrid_rl.adaptation import apply_plan, remove_adapters
from hybrid_rl.config import ConfigError
from hybrid_rl.plan import AdaptationPlan, PlannedModule
from hybrid_rl.rollout.engine import EngineSettings
from hybrid_rl.types import Completion, Progress, Receipt, Request, WeightUpdate
from hybrid_rl.weight_sync import Meeting
from hybrid_rl.weight_sync.apply import HeldWeights, NotServed, Piece, assemble
from hybrid_rl.weight_sync.base import BaseFiles
from hybrid_rl.weight_sync.chain import Updates


@dataclass
class _Row:
    """One completion under way."""

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    reason: str | None = None
    """Why it ended, once it has."""


@dataclass
class _Run:
    """A request; its completions are decoded together, those that have ended too, until all have."""

    request: Request
    started: float
    rows: list[_Row]
    generator: torch.Generator
    versions: list[tuple[int, int]] = field(default_factory=list)
    """(Token, version): the weights that sampled from this token on."""
    cache: dict[str, Any] | None = None
    """What the model wants beside tokens, `None` until the prompt was read."""


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
        self._runs: deque[_Run] = deque()
        self._finished: dict[str, tuple[Completion, ...]] = {}
        self._asleep = False
        eos = self._model.generation_config.eos_token_id
        eos = eos if eos is not None else self._tokenizer.eos_token_id
        self._eos = set(eos if isinstance(eos, list) else [eos])

    def advance(self, requests: Sequence[Request], cancelled: Sequence[str], seconds: float) -> Progress:
        self._ensure_ready()
        self._runs = deque(run for run in self._runs if run.request.id not in cancelled)
        for name in cancelled:
            self._finished.pop(name, None)
        for request in requests:
            generator = torch.Generator(self._device).manual_seed(request.seed)
            rows = [_Row() for _ in range(request.sampling.n)]
            self._runs.append(_Run(request, time.monotonic(), rows, generator))
        self._work(time.monotonic() + seconds)
        finished, self._finished = self._finished, {}
        return Progress(finished, self._updates.version)

    @torch.no_grad()
    def apply_updates(self, updates: Sequence[WeightUpdate], in_flight: str = "keep") -> Receipt:
        if self._asleep:
            raise RuntimeError("the engine is asleep; wake it before an update")
        self._updates.apply(updates, self._weights)
        if in_flight == "recompute":
            self._forget_caches()
        held = self._weights
        return Receipt(self._settings.name, self._updates.version, held.digests(), held.adapter)

    def join(self, meeting: Meeting, rank: int) -> None:
        self._updates.join(meeting, rank)

    def sleep(self) -> None:
        """On a CPU, the weights stay where they are."""
        self._forget_caches()
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

    def _forget_caches(self) -> None:
        for run in self._runs:
            run.cache = None

    def _work(self, deadline: float) -> None:
        """Sample tokens until `deadline`, at least one, or until nothing is under way."""
        while self._runs:
            self._step(self._runs[0])
            now = time.monotonic()
            for run in list(self._runs):
                limit = run.request.sampling.max_seconds
                if limit is not None and now - run.started >= limit:
                    for row in run.rows:
                        row.reason = row.reason or "time"
                if all(row.reason for row in run.rows):
                    self._runs.remove(run)
                    self._finished[run.request.id] = tuple(self._completion(run, row) for row in run.rows)
            if now >= deadline:
                return

    @torch.no_grad()
    def _step(self, run: _Run) -> None:
        """Sample one token of every completion."""
        sampling = run.request.sampling
        if sampling.max_tokens < 1:
            for row in run.rows:
                row.reason = "length"
            return
        length = max(len(row.token_ids) for row in run.rows)
        if not run.versions or run.versions[-1][1] != self._updates.version:
            run.versions.append((length, self._updates.version))
        scores = self._logits(run, length)
        if sampling.temperature == 0:
            chosen = scores.argmax(-1)
        else:
            scores = TemperatureLogitsWarper(sampling.temperature)(None, scores)  # type: ignore[arg-type]
            if sampling.top_p < 1:
                scores = TopPLogitsWarper(sampling.top_p)(None, scores)  # type: ignore[arg-type]
            chosen = torch.multinomial(scores.softmax(-1), 1, generator=run.generator)[:, 0]
        logprobs = scores.log_softmax(-1).gather(-1, chosen[:, None])[:, 0]
        room = self._settings.max_length - len(run.request.prompt_ids)
        for row, token, logprob in zip(run.rows, chosen.tolist(), logprobs.tolist(), strict=True):
            if row.reason is not None:
                continue
            row.token_ids.append(token)
            row.logprobs.append(logprob)
            if token in self._eos or (sampling.stop and self._cut(row, sampling.stop)[1]):
                row.reason = "stop"
            elif len(row.token_ids) >= min(sampling.max_tokens, room):
                row.reason = "length"

    def _logits(self, run: _Run, length: int) -> Tensor:
        """Logits [N, vocabulary] of the next token, in fp32."""
        # Rows that have ended are filled up with a token that nobody reads.
        filler = min(self._eos)
        ids = torch.tensor(
            [
                [*run.request.prompt_ids, *row.token_ids, *([filler] * (length - len(row.token_ids)))]
                for row in run.rows
            ],
            device=self._device,
        )
        if run.cache is None:
            run.cache = {"attention_mask": torch.ones_like(ids), "use_cache": True}
            inputs = self._model.prepare_inputs_for_generation(ids, is_first_iteration=True, **run.cache)
        else:
            inputs = self._model.prepare_inputs_for_generation(ids, next_sequence_length=1, **run.cache)
        output = self._model(**inputs, return_dict=True)
        run.cache = self._model._update_model_kwargs_for_generation(output, run.cache)
        return output.logits[:, -1].float()

    def _cut(self, row: _Row, stop: tuple[str, ...]) -> tuple[str, bool]:
        """A completion's text up to the first stop string, and whether it has one."""
        text = self._tokenizer.decode(row.token_ids, skip_special_tokens=True)
        ends = [at for at in map(text.find, stop) if at >= 0]
        return (text[: min(ends)], True) if ends else (text, False)

    def _completion(self, run: _Run, row: _Row) -> Completion:
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
