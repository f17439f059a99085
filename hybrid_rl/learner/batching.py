"""Sequences -> ranks -> micro-batches -> tensors.

The split changes speed and memory only: the loss is a sum over tokens with weights that are known beforehand, so its
gradient is the same for any number of ranks, any token budget, any layout and any order.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hybrid_rl.algorithms import Tokens
from hybrid_rl.learner.layout import PACKED, Layout, ModelInput, arrange
from hybrid_rl.types import Completion, TrainSequence


def micro_batches(
    lengths: Sequence[int],
    ranks: int,
    tokens: int,
    layout: Layout,
    prompts: Sequence[tuple[int, ...]] | None = None,
) -> list[list[list[int]]]:
    """Share out sequences of `lengths` tokens: `result[rank][i]` holds the indices of rank's i-th micro-batch.

    A micro-batch takes at most `tokens`, padding included; where `prompts` are shared, as if they were not, since
    attention holds their keys and values for each sequence. Sequences of one prompt stay together then, as far as ranks
    come to near-equal work. Every rank gets the same number of micro-batches, because
    each is a collective operation; a rank that has fewer is given empty ones.
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    if layout == "shared" and prompts is not None:
        pieces = _of_one_prompt(lengths, prompts, ranks, tokens)
        sizes = [sum(lengths[i] for i in piece) for piece in pieces]
        shares = _packed(sorted(range(len(pieces)), key=lambda p: -sizes[p]), sizes, ranks, tokens)
        return [[[i for p in batch for i in pieces[p]] for batch in share] for share in shares]
    if layout in PACKED:
        return _packed(order, lengths, ranks, tokens)
    shares = [_padded(order[rank::ranks], lengths, tokens if layout == "padded" else 0) for rank in range(ranks)]
    most = max(len(batches) for batches in shares)
    return [batches + [[] for _ in range(most - len(batches))] for batches in shares]


def _of_one_prompt(
    lengths: Sequence[int], prompts: Sequence[tuple[int, ...]], ranks: int, tokens: int
) -> list[list[int]]:
    """Sequences by prompt, in pieces of at most `tokens`, and of a quarter of what a rank gets if there are several."""
    most = tokens if ranks == 1 else min(tokens, sum(lengths) // (4 * ranks))
    groups: dict[tuple[int, ...], list[int]] = {}
    for i, prompt in enumerate(prompts):
        groups.setdefault(prompt, []).append(i)
    pieces: list[list[int]] = []
    for members in groups.values():
        pieces.append([])
        for i in members:
            if pieces[-1] and sum(lengths[j] for j in pieces[-1]) + lengths[i] > most:
                pieces.append([])
            pieces[-1].append(i)
    return pieces


def _padded(order: Sequence[int], lengths: Sequence[int], tokens: int) -> list[list[int]]:
    """Neighbours in length, longest first, as many as fit."""
    batches: list[list[int]] = []
    for i in order:
        if batches and lengths[batches[-1][0]] * (len(batches[-1]) + 1) <= tokens:
            batches[-1].append(i)
        else:
            batches.append([i])
    return batches


def _packed(order: Sequence[int], lengths: Sequence[int], ranks: int, tokens: int) -> list[list[list[int]]]:
    """As few micro-batches a rank as do, of near-equal tokens: the longest sequence left goes to the emptiest."""
    each = max(1, math.ceil(sum(lengths) / (ranks * tokens)))
    while True:
        bins: list[list[int]] = [[] for _ in range(each * ranks)]
        filled = [(0, b) for b in range(len(bins))]
        for i in order:
            load, emptiest = filled[0]
            bins[emptiest].append(i)
            heapq.heapreplace(filled, (load + lengths[i], emptiest))
        if max(filled)[0] <= tokens or each >= len(lengths):
            return [bins[rank::ranks] for rank in range(ranks)]
        each += 1 + each // 16


def sampled(completion: Completion | TrainSequence) -> list[int]:
    """Which of a completion's tokens the policy sampled: those outside its `given` spans."""
    ids = completion.token_ids if isinstance(completion, Completion) else completion.completion_ids
    starts, ends = [0, *(end for _, end in completion.given)], [*(start for start, _ in completion.given), len(ids)]
    return [t for start, end in zip(starts, ends, strict=True) for t in range(start, end)]


@dataclass(frozen=True)
class MicroBatch:
    """Sequences in a layout, and the T tokens that the policy sampled of them, one after another.

    Given tokens are part of the input and of nothing else.
    """

    inputs: ModelInput
    at_T: Tensor
    """Flat position in the input whose next token is the sampled token."""
    targets_T: Tensor
    sequence_T: Tensor
    """Which sequence the token belongs to, from 0."""
    sequences: int
    rollout_logprobs_T: Tensor
    advantages_T: Tensor
    weights_T: Tensor
    padding: int
    """Positions of the input that hold no token."""

    def tokens(self, logprobs_T: Tensor, old_T: Tensor, **measured: Tensor | None) -> Tokens:
        """What a loss sees, with the policy's and the old log-probabilities; `measured`: its optional fields."""
        return Tokens(
            logprobs_T=logprobs_T,
            old_logprobs_T=old_T,
            rollout_logprobs_T=self.rollout_logprobs_T,
            advantages_T=self.advantages_T,
            weights_T=self.weights_T,
            sequence_T=self.sequence_T,
            sequences=self.sequences,
            **measured,
        )


def collate(sequences: Sequence[TrainSequence], layout: Layout, device: torch.device | str = "cpu") -> MicroBatch:
    """Tensors of one micro-batch. An empty one is a row without sampled tokens, so that collectives still happen."""
    # Nothing is predicted from the last token.
    rows = [(*s.prompt_ids, *s.completion_ids)[:-1] for s in sequences]
    inputs = arrange(rows, layout, device, [len(s.prompt_ids) for s in sequences])
    picked = [(i, t) for i, s in enumerate(sequences) for t in sampled(s)]
    # Each token is predicted from the one before it.
    at = [inputs.at(i, len(sequences[i].prompt_ids) - 1 + t) for i, t in picked]

    def integers(values: Sequence[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.long, device=device)

    return MicroBatch(
        inputs=inputs,
        at_T=integers(at),
        targets_T=integers([sequences[i].completion_ids[t] for i, t in picked]),
        sequence_T=integers([i for i, _ in picked]),
        sequences=len(sequences),
        rollout_logprobs_T=torch.tensor([sequences[i].rollout_logprobs[t] for i, t in picked], device=device),
        advantages_T=torch.tensor([sequences[i].advantage for i, _ in picked], device=device),
        weights_T=torch.tensor([sequences[i].weight for i, _ in picked], device=device),
        padding=inputs.input_ids.numel() + inputs.saved - sum(len(row) for row in rows),
    )
