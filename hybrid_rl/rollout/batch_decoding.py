"""Completions of several prompts of one length, decoded together by a transformers model.

Equal lengths need neither padding nor a mask, so a batch is exact for every architecture. A prompt is read once for all
of its completions, and a completion that has ended takes no further part: where the model's cache is of keys and values
alone. Other states (recurrent ones, positions kept in the model) cannot be repeated or picked from the outside: there
each completion reads its prompt, and computes on until all of the batch have ended.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from transformers import TemperatureLogitsWarper, TopPLogitsWarper
from transformers.cache_utils import Cache, DynamicLayer, LinearAttentionCacheLayerMixin

from hybrid_rl.types import Request

BATCH_TOKENS = 2**15
"""Prompt and completion tokens, were each as long as it may be, that a batch of several requests may have: their keys
and values lie in memory."""


@dataclass
class Row:
    """One completion under way."""

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    reason: str | None = None
    """Why it ended, once it has."""


@dataclass
class Run:
    """A request."""

    request: Request
    started: float
    rows: list[Row]
    generator: torch.Generator
    """Of this request alone: what is sampled does not depend on what is decoded beside it."""
    versions: list[tuple[int, int]] = field(default_factory=list)
    """(Token, version): the weights that sampled from this token on."""

    @property
    def ended(self) -> bool:
        return all(row.reason for row in self.rows)


class Batch:
    """Runs whose rows have the same number of tokens, prompts included."""

    def __init__(self, model: Any, runs: Sequence[Run], device: torch.device) -> None:
        self._model, self._device = model, device
        self.runs = list(runs)
        self.length = 0
        """Tokens that each row has sampled."""
        self._rows = [(run, row) for run in self.runs for row in run.rows]
        prompts = [run.request.prompt_ids for run in self.runs]
        self._ids = torch.tensor(prompts, device=device).repeat_interleave(self._counts(), 0)
        self._inputs: dict[str, Any] | None = None
        """What the model wants beside tokens; `None` until they were read."""
        self._repeats = not _keeps_positions(model)

    def drop(self, names: Sequence[str]) -> None:
        """Forget these requests."""
        for run in self.runs:
            if run.request.id in names:
                for row in run.rows:
                    row.reason = row.reason or "cancelled"
        self._drop_ended()

    def forget_cache(self) -> None:
        """Read all tokens again before the next is sampled."""
        self._inputs = None

    def sample(self) -> list[tuple[Run, Row, int, float]]:
        """One token of each row that has not ended, and its log-probability."""
        scores = self._logits()
        chosen = torch.empty(len(self._rows), dtype=torch.long, device=self._device)
        logprobs = torch.empty(len(self._rows), device=self._device)
        for sampling, live in self._alike().items():
            # Where a cache cannot be picked from, rows that have ended are still among the scores.
            at = torch.tensor(live, dtype=torch.long, device=self._device)
            counts = Counter(id(self._rows[i][0]) for i in live)
            runs = [(run.generator, counts[id(run)]) for run in self.runs if id(run) in counts]
            chosen[at], logprobs[at] = _draw(scores if len(at) == len(scores) else scores[at], *sampling, runs)
        # Rows that have ended are filled up with a token that nobody reads.
        live = torch.tensor([row.reason is None for _, row in self._rows], device=self._device)
        chosen = torch.where(live, chosen, self._ids[:, -1])
        self._ids = torch.cat([self._ids, chosen[:, None]], 1)
        self.length += 1
        sampled = zip(self._rows, chosen.tolist(), logprobs.tolist(), strict=True)
        return [(run, row, token, logprob) for (run, row), token, logprob in sampled if row.reason is None]

    def finished(self) -> list[Run]:
        """Runs that have ended, which leave the batch."""
        done = [run for run in self.runs if run.ended]
        self._drop_ended()
        return done

    def _counts(self) -> Tensor:
        return torch.tensor([len(run.rows) for run in self.runs], device=self._device)

    def _alike(self) -> dict[tuple[float, float], list[int]]:
        """Rows that have not ended, by how their scores become probabilities: temperature and top-p."""
        found: dict[tuple[float, float], list[int]] = {}
        for i, (run, row) in enumerate(self._rows):
            if row.reason is None:
                found.setdefault((run.request.sampling.temperature, run.request.sampling.top_p), []).append(i)
        return found

    def _logits(self) -> Tensor:
        """Logits [rows, vocabulary] of the next token, in fp32."""
        if self._inputs is not None:
            return self._forward(self._ids, next_sequence_length=1)
        shared = self._repeats and self.length == 0 and len(self._rows) > len(self.runs)
        if not shared:
            self._inputs = {"attention_mask": torch.ones_like(self._ids), "use_cache": True}
            return self._forward(self._ids, is_first_iteration=True)
        counts = self._counts()
        ids = self._ids[counts.cumsum(0) - counts]
        self._inputs = {"attention_mask": torch.ones_like(ids), "use_cache": True}
        logits = self._forward(ids, is_first_iteration=True)
        if not self._pick(torch.arange(len(self.runs), device=self._device).repeat_interleave(counts)):
            self._repeats, self._inputs = False, None
            return self._logits()
        return logits.repeat_interleave(counts, 0)

    def _forward(self, ids: Tensor, **how: Any) -> Tensor:
        inputs = self._model.prepare_inputs_for_generation(ids, **how, **(self._inputs or {}))
        if self._model._supports_logits_to_keep():
            inputs["logits_to_keep"] = 1
        output = self._model(**inputs, return_dict=True)
        self._inputs = self._model._update_model_kwargs_for_generation(output, self._inputs)
        return output.logits[:, -1].float()

    def _pick(self, rows: Tensor) -> bool:
        """Have these rows alone in what the model is given, which may name one several times; whether it could be
        done."""
        assert self._inputs is not None
        cache = self._inputs.get("past_key_values")
        if not _of_keys_and_values(cache) or self._inputs.keys() - {"attention_mask", "use_cache", "past_key_values"}:
            return False
        cache.batch_select_indices(rows)
        self._inputs["attention_mask"] = self._inputs["attention_mask"][rows]
        return True

    def _drop_ended(self) -> None:
        live = [i for i, (_, row) in enumerate(self._rows) if row.reason is None]
        self.runs = [run for run in self.runs if not run.ended]
        if len(live) == len(self._rows) or not live:
            return
        at = torch.tensor(live, device=self._device)
        if self._inputs is None or (self._repeats and self._pick(at)):
            self._rows, self._ids = [self._rows[i] for i in live], self._ids[at]


def next_batch(waiting: deque[Run], model: Any, most_rows: int, device: torch.device) -> Batch:
    """The first of `waiting`, and of the others with a prompt of its length as many as fit: they are taken out."""
    first = waiting.popleft()
    length = len(first.request.prompt_ids)
    taken, rows, tokens = [first], len(first.rows), _tokens(first)
    for run in list(waiting):
        if len(run.request.prompt_ids) != length:
            continue
        rows, tokens = rows + len(run.rows), tokens + _tokens(run)
        if rows > most_rows or tokens > BATCH_TOKENS:
            break
        taken.append(run)
    chosen = {id(run) for run in taken}
    others = [run for run in waiting if id(run) not in chosen]
    waiting.clear()
    waiting.extend(others)
    return Batch(model, taken, device)


def _tokens(run: Run) -> int:
    return len(run.rows) * (len(run.request.prompt_ids) + run.request.sampling.max_tokens)


def _draw(
    scores: Tensor, temperature: float, top_p: float, generators: Sequence[tuple[torch.Generator, int]]
) -> tuple[Tensor, Tensor]:
    """A token for each row of `scores` (logits) and its log-probability. `generators`: in order, each with the number
    of rows that it is for."""
    if temperature == 0:
        chosen = scores.argmax(-1)
    else:
        scores = TemperatureLogitsWarper(temperature)(None, scores)  # type: ignore[arg-type]
        if top_p < 1:
            scores = TopPLogitsWarper(top_p)(None, scores)  # type: ignore[arg-type]
        # As `torch.multinomial` draws, but with the noise of each run from its own generator.
        noise, at = torch.empty_like(scores), 0
        for generator, count in generators:
            noise[at : at + count].exponential_(generator=generator)
            at += count
        chosen = (scores.softmax(-1) / noise).argmax(-1)
    return chosen, scores.log_softmax(-1).gather(-1, chosen[:, None])[:, 0]


def _of_keys_and_values(cache: Any) -> TypeGuard[Cache]:
    """Whether rows of a cache may be repeated and picked."""
    return isinstance(cache, Cache) and all(
        isinstance(layer, DynamicLayer) and not isinstance(layer, LinearAttentionCacheLayerMixin)
        for layer in getattr(cache, "layers", [None])
    )


def _keeps_positions(model: nn.Module) -> bool:
    """Whether the model itself keeps something of each row from one pass to the next, as ones that see images do."""
    return any(hasattr(module, "rope_deltas") for module in model.modules())
