"""Completions of some prompts and nothing else."""

from __future__ import annotations

from collections.abc import Sequence

from hybrid_rl.rollout import Episodes
from hybrid_rl.types import Completion, Prompt, Sampling


def generate(
    episodes: Episodes, prompts: Sequence[Prompt], sampling: Sampling, tag: str = "generate"
) -> list[list[Completion]]:
    """`sampling.n` completions of each prompt, in order."""
    episodes.submit(prompts, sampling, tag, first=True)
    while episodes.unfinished(tag):
        episodes.poll(1.0)
    taken = episodes.take_next(len(prompts), tag)
    episodes.forget(tag)
    return [list(completions) for _, completions in taken]
