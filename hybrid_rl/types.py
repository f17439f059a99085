"""The data that flows through one step, and the protocols by which workers are reached.

`Prompt -> Completion -> ScoredGroup -> TrainBatch -> StepStats`. Everything is frozen; lengths are in tokens. Dimension
suffixes: P prompts, G completions of one prompt, N completions of a batch, T tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol


@dataclass(frozen=True)
class Prompt:
    """One problem as the policy sees it."""

    id: str
    """`<epoch>/<row>` for training problems, `<row>` for held-out ones."""
    text: str
    token_ids: tuple[int, ...]
    columns: Mapping[str, Any]
    """The data set's row, passed to the rewards by column name."""


@dataclass(frozen=True)
class Sampling:
    """How to sample. Two calls with the same prompts, weights and sampling give the same completions."""

    n: int
    """Completions a prompt."""
    temperature: float
    """0 is greedy."""
    top_p: float
    max_tokens: int
    stop: tuple[str, ...]
    seed: int


@dataclass(frozen=True)
class Completion:
    """One answer of the policy."""

    text: str
    token_ids: tuple[int, ...]
    """Sampled tokens, the end-of-sequence token included where there is one."""
    logprobs: tuple[float, ...]
    """Log-probability of each sampled token under the engine's policy, at the sampling temperature."""
    finish_reason: str
    """`stop` (end of sequence or stop string) or `length`."""
    weight_version: int
    """Version of the weights that produced it."""


@dataclass(frozen=True)
class ScoredGroup:
    """One prompt, its G completions and what they earned."""

    prompt: Prompt
    completions: tuple[Completion, ...]
    rewards_G: tuple[float | None, ...]
    """Weighted sum of the rewards; `None` where no reward could be computed, and the completion is not trained on."""
    parts: Mapping[str, tuple[float | None, ...]]
    """Each plugin's own scores, unweighted."""


@dataclass(frozen=True)
class TrainSequence:
    """One sequence to train on."""

    prompt_ids: tuple[int, ...]
    completion_ids: tuple[int, ...]
    rollout_logprobs: tuple[float, ...]
    advantage: float
    weight: float = 0.0
    """Factor of each of its tokens' losses; their sum over a mini-batch is the loss."""

    @property
    def length(self) -> int:
        """Tokens of prompt and completion."""
        return len(self.prompt_ids) + len(self.completion_ids)


@dataclass(frozen=True)
class TrainBatch:
    """What the learner trains on in one step; sequences of mini-batch m are `mini_batches[m]`."""

    mini_batches: tuple[tuple[TrainSequence, ...], ...]
    lr_scale: Mapping[str, float]
    """Factor of each part's learning rate at this step."""


@dataclass(frozen=True)
class StepStats:
    """What one step of the learner did: metric name -> value, and seconds by part."""

    metrics: Mapping[str, float]
    seconds: Mapping[str, float]


@dataclass(frozen=True)
class Receipt:
    """What an engine holds after a weight update."""

    engine: str
    version: int
    digests: Mapping[str, str]
    """Tensor name -> digest of the bytes that the engine computes with."""


@dataclass(frozen=True)
class WeightUpdate:
    """Everything the plan trains, at one version: the complete difference from the base model."""

    version: int
    tensors: bytes
    """A safetensors file: fully fine-tuned matrices by their Hugging Face name, LoRA factors by PEFT's, scaling folded
    into B."""
    digests: Mapping[str, str]
    """Tensor name -> digest, as computed by the learner."""
    adapter_rank: int
    """LoRA rank, 0 without an adapter."""


@dataclass(frozen=True)
class Resources:
    """What one worker reserves."""

    cpus: float
    gpus: float


class WorkerDied(Exception):
    """A worker process is gone or does not answer; the call it was serving did not complete."""


class Pending(Protocol):
    """A call under way."""

    def result(self, timeout: float | None = None) -> Any:
        """Wait for the value. Raises `WorkerDied`, or the worker's own exception."""
        ...

    def ready(self, timeout: float) -> bool:
        """Wait at most `timeout` seconds; is there a result, or a failure?"""
        ...


class WorkerHandle(Protocol):
    """A worker, wherever it lives."""

    name: str

    def submit(self, method: str, /, *args: Any, **kwargs: Any) -> Pending: ...

    def kill(self) -> None: ...


def call_all(workers: Sequence[WorkerHandle], method: str, /, *args: Any, **kwargs: Any) -> list[Any]:
    """Call `method` on every worker at once and wait for all results, in order.

    The first failure is raised as soon as it happens: the other workers may be waiting for the one that failed.
    """
    pending = [w.submit(method, *args, **kwargs) for w in workers]
    waiting = set(range(len(pending)))
    while waiting:
        pending[min(waiting)].ready(_POLL_SECONDS)
        for i in [i for i in waiting if pending[i].ready(0)]:
            pending[i].result()
            waiting.remove(i)
    return [p.result() for p in pending]


_POLL_SECONDS = 0.5
