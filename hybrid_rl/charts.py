"""Which metrics are drawn together, in what order: the one list behind the report and the dashboards."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase

from hybrid_rl.step_clock import STEP_PARTS


@dataclass(frozen=True)
class Chart:
    title: str
    metrics: tuple[str, ...]
    """Names, or shell patterns of names."""
    unit: str = ""
    stacked: bool = False
    """Whether the metrics sum to a whole."""
    counts: bool = False
    """Whether steps that are drawn as one add up; else they are averaged."""

    def among(self, names: Iterable[str]) -> list[str]:
        """Those of `names` that it draws, in its own order."""
        there = list(names)
        found = [name for pattern in self.metrics for name in there if fnmatchcase(name, pattern)]
        return list(dict.fromkeys(found))

    @property
    def expression(self) -> str:
        """A regular expression of its metrics' names."""
        return "|".join(re.escape(pattern).replace(r"\*", "[^/]*") for pattern in self.metrics)


CHARTS: dict[str, tuple[Chart, ...]] = {
    "Learning": (
        Chart("Reward", ("reward/mean",), "reward"),
        Chart("Held-out score", ("eval/accuracy", "eval/mean_at_k", "eval/maj_at_k"), "share"),
        Chart("Reward by part", ("reward/*/mean",), "score"),
        Chart("Entropy", ("policy/entropy",), "nats a token"),
        Chart("Divergence from the base policy", ("policy/kl",), "nats a token"),
        Chart("Engines against learner", ("policy/rollout_kl", "policy/rollout_kl_p99"), "nats a token"),
        Chart("Clipped tokens", ("policy/clip_fraction",), "share"),
        Chart("Completion length", ("completions/mean_length",), "tokens"),
        Chart("Completions cut off", ("completions/truncated",), "share"),
        Chart("Groups that teach nothing", ("reward/zero_variance_groups",), "prompts"),
    ),
    "Norms": (
        Chart("Gradient norm", ("grad_norm/full", "grad_norm/lora")),
        Chart("Gradient norm by part and component", ("part/*/*/grad_norm",)),
        Chart("Update norm by part and component", ("part/*/*/update_norm",)),
        Chart("Updates by expert", ("molf/weight_share", "molf/expert_*_share"), "share"),
    ),
    "Time and throughput": (
        Chart("Seconds of a step", tuple(f"time/{part}" for part in (*STEP_PARTS, "other")), "seconds", stacked=True),
        Chart("Training speed", ("throughput/train_tokens",), "tokens/s"),
        Chart("Share of the GPUs' peak", ("throughput/mfu",), "share"),
        Chart("Tokens", ("tokens/generated", "tokens/trained"), "tokens"),
    ),
    "Weight sync and staleness": (
        Chart("Bytes sent to each engine", ("sync/bytes", "sync/full_model_bytes"), "bytes"),
        Chart("Staleness", ("staleness/mean", "staleness/max"), "updates"),
        Chart("Log-probability gate", ("sync/logprob_diff", "sync/logprob_diff_p99"), "nats"),
    ),
    "Faults": (
        Chart("Engines", ("faults/engine_*", "sync/repaired_engines"), "events", stacked=True, counts=True),
        Chart("Rewards", ("faults/reward_*", "reward/unscored"), "completions", stacked=True, counts=True),
        Chart("Environments", ("faults/environment_*",), "completions", stacked=True, counts=True),
        Chart("Updates skipped", ("faults/skipped_updates",), "updates", stacked=True, counts=True),
        Chart("Files", ("faults/*_checkpoints", "faults/unwritten_files"), "files", stacked=True, counts=True),
        Chart("Trackers", ("faults/tracking_*",), "events", stacked=True, counts=True),
    ),
}
