"""Sequences -> ranks -> micro-batches -> padded tensors.

The split changes speed and memory only: the loss is a weighted sum over sequences, so its gradient is the same for any
number of ranks, any token budget and any order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hybrid_rl.types import TrainSequence


def micro_batches(lengths: Sequence[int], ranks: int, tokens: int) -> list[list[list[int]]]:
    """Share out sequences of `lengths` tokens: `result[rank][i]` holds the indices of rank's i-th micro-batch.

    Sequences are dealt longest first, so ranks get equal counts (to within one) and like lengths; a micro-batch is as
    many neighbours in length as fit `tokens`, padding included. Every rank gets the same number of micro-batches,
    because each is a collective operation; a rank that has fewer is given empty ones.
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    shares = []
    for rank in range(ranks):
        batches: list[list[int]] = []
        for i in order[rank::ranks]:
            # The first sequence of a micro-batch is its longest.
            if batches and lengths[batches[-1][0]] * (len(batches[-1]) + 1) <= tokens:
                batches[-1].append(i)
            else:
                batches.append([i])
        shares.append(batches)
    most = max(len(batches) for batches in shares)
    return [batches + [[] for _ in range(most - len(batches))] for batches in shares]


@dataclass(frozen=True)
class PaddedBatch:
    """Right-padded sequences. Causal models need no attention mask for padding on the right: tokens never see it."""

    input_ids_N_L: Tensor
    """Prompts and completions, all but the last token."""
    columns_T: Tensor
    """The positions whose next-token distribution is needed: from the first that predicts a completion token on."""
    targets_N_T: Tensor
    """Token that each kept position predicts."""
    mask_N_T: Tensor
    """1 where the target is a completion token."""
    rollout_logprobs_N_T: Tensor
    advantages_N: Tensor


def pad(sequences: Sequence[TrainSequence], device: torch.device | str = "cpu") -> PaddedBatch:
    """Tensors of one micro-batch. An empty one becomes a masked token, so that collectives still happen."""
    if not sequences:
        sequences = [TrainSequence((0,), (0,), (0.0,), 0.0)]
        return replace(pad(sequences, device), mask_N_T=torch.zeros(1, 1, device=device))
    rows = [(*s.prompt_ids, *s.completion_ids) for s in sequences]
    length = max(len(row) for row in rows)
    first = min(len(s.prompt_ids) for s in sequences) - 1
    ids = torch.zeros(len(rows), length, dtype=torch.long)
    mask = torch.zeros(len(rows), length)
    rollout = torch.zeros(len(rows), length)
    for i, (s, row) in enumerate(zip(sequences, rows, strict=True)):
        ids[i, : len(row)] = torch.tensor(row)
        mask[i, len(s.prompt_ids) : len(row)] = 1.0
        rollout[i, len(s.prompt_ids) : len(row)] = torch.tensor(s.rollout_logprobs)
    return PaddedBatch(
        input_ids_N_L=ids[:, :-1].to(device),  # nothing is predicted from the last token
        columns_T=torch.arange(first, length - 1, device=device),
        targets_N_T=ids[:, first + 1 :].to(device),
        mask_N_T=mask[:, first + 1 :].to(device),
        rollout_logprobs_N_T=rollout[:, first + 1 :].to(device),
        advantages_N=torch.tensor([s.advantage for s in sequences], device=device),
    )
