"""The data that flows through one step, and the protocols by which workers are reached.

`Prompt -> Completion -> ScoredGroup -> TrainBatch -> StepStats`. Everything is frozen; lengths are in tokens. Dimension
suffixes: P prompts, G completions of one prompt, N completions of a batch, T tokens.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
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
    max_seconds: float | None = None
    """Longest that a prompt's completions may take once an engine has taken them on; cut ones end as `time`."""


@dataclass(frozen=True)
class Request:
    """What an engine is asked: `sampling.n` completions of one prompt."""

    id: str
    prompt_ids: tuple[int, ...]
    sampling: Sampling
    seed: int
    """Decides the randomness of this request alone: the same prompt, weights and seed give the same completions on any
    engine of the same kind."""


@dataclass(frozen=True)
class Progress:
    """What an engine did since it was last asked."""

    finished: Mapping[str, tuple[Completion, ...]]
    """Request id -> its completions, in order."""
    version: int
    """Weight version that the engine serves."""


@dataclass(frozen=True)
class Completion:
    """One answer of the policy."""

    text: str
    token_ids: tuple[int, ...]
    """Sampled tokens, the end-of-sequence token included where there is one."""
    logprobs: tuple[float, ...]
    """Log-probability of each sampled token under the engine's policy, at the sampling temperature."""
    finish_reason: str
    """`stop` (end of sequence or stop string), `length` (also by `rollout.max_turns`), `time` (`Sampling.max_seconds`),
    or `environment`, which failed."""
    weight_version: int
    """Version of the weights that sampled its first token: the oldest that it has tokens of."""
    later_versions: tuple[tuple[int, int], ...] = ()
    """(Token, version) for every update that came in while it was sampled: from this token on, this version."""
    given: tuple[tuple[int, int], ...] = ()
    """Spans [start, end) of `token_ids` that the environment gave; no policy sampled them (their `logprobs` are 0)."""

    @property
    def truncated(self) -> bool:
        """Whether a limit ended it."""
        return self.finish_reason in ("length", "time")


@dataclass(frozen=True)
class Outcome:
    """What became of one completion with one reward."""

    kind: str
    """`score`, `not_applicable`, or why there is neither: `timeout`, `error`, `crash`."""
    score: float | None = None
    detail: str = ""
    """What went wrong, or why the reward was not asked."""
    extra: Mapping[str, Any] = field(default_factory=dict)
    """What the plugin noted of it (`log_extra`)."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """What it measured (`log_metric`)."""

    @property
    def failed(self) -> bool:
        return self.kind in FAILURES


FAILURES = ("timeout", "error", "crash")


@dataclass(frozen=True)
class ScoredGroup:
    """One prompt, its G completions and what they earned."""

    prompt: Prompt
    completions: tuple[Completion, ...]
    rewards_G: tuple[float | None, ...]
    """Weighted sum of the rewards; `None` where no reward could be computed, and the completion is not trained on."""
    outcomes: Mapping[str, tuple[Outcome, ...]]
    """By reward, what became of each completion; scores are unweighted."""

    def scores(self, reward: str) -> tuple[float | None, ...]:
        """One reward's scores."""
        return tuple(outcome.score for outcome in self.outcomes[reward])


@dataclass(frozen=True)
class TrainSequence:
    """One sequence to train on."""

    prompt_ids: tuple[int, ...]
    completion_ids: tuple[int, ...]
    rollout_logprobs: tuple[float, ...]
    advantage: float
    weight: float = 0.0
    """Factor of each of its tokens' losses; their sum over a mini-batch is the loss."""
    given: tuple[tuple[int, int], ...] = ()
    """Spans [start, end) of `completion_ids` that the policy did not sample: read, never trained on."""

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
    step: int
    """Which step it is, from 1: what training draws at random depends on it."""


@dataclass(frozen=True)
class StepStats:
    """What one step of the learner did: metric name -> value, and seconds by part."""

    metrics: Mapping[str, float]
    seconds: Mapping[str, float]
    stepped: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """Of MoLF, by module: how many of the step's updates that were applied stepped each of its experts."""
    applied: int = 0
    """How many updates that were."""


@dataclass(frozen=True)
class Receipt:
    """What an engine holds after a weight update."""

    engine: str
    version: int
    digests: Mapping[str, str]
    """Tensor name -> digest of the bytes that the engine computes with."""
    adapter: str
    """How LoRA is served: `none`, `native`, `merged`, or `mixed` (by module)."""


@dataclass(frozen=True)
class WeightUpdate:
    """One version of everything the plan trains, as an anchor (complete) or as what changed since the version before.

    Fully fine-tuned matrices have their Hugging Face name, LoRA factors PEFT's, scaling folded into B.
    """

    version: int
    base_version: int | None
    """The version that it is the difference to; `None` for an anchor, which is against the base model."""
    buckets: tuple[Bucket, ...]
    digests: Mapping[str, str]
    """Tensor name -> digest of the whole tensor at this version, of every tensor the plan trains."""
    adapter_rank: int
    """LoRA rank, 0 without an adapter."""

    @property
    def bytes(self) -> int:
        """Encoded size."""
        return sum(b.bytes for b in self.buckets)


@dataclass(frozen=True)
class Bucket:
    """A part of an update on its way."""

    ticket: Any
    """By which the transport gets it for an engine."""
    bytes: int
    digest: str
    """Of the encoded bytes."""
    tensors: tuple[str, ...]
    """Names of what it holds."""


@dataclass(frozen=True)
class Resources:
    """What one worker reserves."""

    cpus: float
    gpus: float


class WorkerDied(Exception):
    """A worker process is gone or does not answer; the call it was serving did not complete."""

    def __init__(self, message: str, worker: str = "", lines: Sequence[str] = ()) -> None:
        """`lines`: the last that the process printed."""
        super().__init__(message)
        self.worker, self.lines = worker, tuple(lines)


class InWorker(Exception):
    """The cause (`__cause__`) of an exception that a worker raised: where it did."""

    def __init__(self, worker: str, traceback: str) -> None:
        super().__init__(f"in {worker}:\n{traceback}")
        self.worker, self.traceback = worker, traceback


class RewardFailed(RuntimeError):
    """A reward that does not answer, or one that must not fail and did."""


class Pending(Protocol):
    """A call under way."""

    @property
    def name(self) -> str:
        """The worker's."""
        ...

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


def wait_any(pending: Sequence[Pending], seconds: float) -> None:
    """Return once one of `pending` has a result or a failure, or after `seconds`."""
    until = time.monotonic() + seconds
    while not any(p.ready(0) for p in pending) and (left := until - time.monotonic()) > 0:
        pending[0].ready(min(left, _POLL_SECONDS if len(pending) == 1 else _TURN_SECONDS))


def gather(pending: Sequence[Pending], timeout: float | None = None, since: float | None = None) -> list[Any]:
    """All results, in order. Raises `WorkerDied` if one is not there `timeout` seconds after `since`
    (`time.monotonic`), or after now.

    The first failure is raised as soon as it happens: the other workers may be waiting for the one that failed. Where
    it `follows` from another worker's, that one is waited for and raised.
    """
    until = math.inf if timeout is None else timeout + (time.monotonic() if since is None else since)
    results: dict[int, Any] = {}
    while waiting := [i for i in range(len(pending)) if i not in results]:
        wait_any([pending[i] for i in waiting], _POLL_SECONDS)
        for i in waiting:
            if pending[i].ready(0):
                try:
                    results[i] = pending[i].result()
                except Exception as failure:
                    others = [pending[j] for j in waiting if j != i and j not in results]
                    cause = _first_cause(failure, others)
                    raise cause from cause.__cause__
        late = [pending[i].name for i in waiting if i not in results]
        if late and time.monotonic() > until:
            raise WorkerDied(f"{' and '.join(late)} did not answer within {timeout:g} s", late[0])
    return [results[i] for i in range(len(pending))]


def follows(failure: BaseException) -> bool:
    """Whether it says no more than that another worker was lost."""
    said = [str(failure), *(failure.lines if isinstance(failure, WorkerDied) else ())]
    return _LOST_PEER.search("\n".join(said)) is not None


_LOST_PEER = re.compile(
    r"(closed|reset) by (peer|remote)|remote process exited|ncclRemoteError|ncclSystemError|ncclInternalError|"
    r"Socket (Timeout|Closed)|Broken pipe|Connection (refused|was closed|closed)|gloo.*(error|timed? ?out|Timeout)|"
    r"Watchdog caught collective|recvValue failed|got 0 bytes|[Ww]ait timeout after|Timed out after \d+ms",
)
"""What torch, gloo and NCCL say at one end of a connection whose other end is gone."""


def _first_cause(failure: Exception, others: list[Pending]) -> Exception:
    """`failure`, or of what happens to the other workers meanwhile, what it follows from."""
    until = time.monotonic() + _NOTICE_SECONDS
    while follows(failure) and others and time.monotonic() < until:
        wait_any(others, _POLL_SECONDS)
        for other in [each for each in others if each.ready(0)]:
            others.remove(other)
            try:
                other.result()
            except Exception as another:
                if not follows(another):
                    return another
    return failure


_NOTICE_SECONDS = 30.0
"""Longest that a lost process or machine takes to be noticed, after those connected to it have noticed."""
_POLL_SECONDS = 0.5
_TURN_SECONDS = 0.005
"""Longest that one of several is waited for before the others are looked at."""
