"""Sequence parallelism (DeepSpeed-Ulysses, arXiv 2309.14509): ranks share a packed row, each with a slice of it.

Only attention looks across tokens; there, an all-to-all gives each rank the whole row for its share of the heads, and a
second one turns that back. The loss is computed from the log-probabilities of the whole row on every rank, of which
each has the gradient of its own slice; DeepSpeed's sum over ranks makes the whole of it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from hybrid_rl.learner.batching import MicroBatch
from hybrid_rl.learner.layout import ModelInput


@dataclass(frozen=True)
class Slice:
    """What one rank computes of a micro-batch."""

    inputs: ModelInput
    own_T: Tensor
    """Which of the micro-batch's completion tokens."""
    at_T: Tensor
    """Where these are predicted in the slice."""


class SequenceGroup:
    """The ranks that work on one micro-batch together."""

    def __init__(self, rank: int, world_size: int, size: int) -> None:
        """Collective over all ranks; neighbours in rank form a group."""
        groups = [dist.new_group(range(first, first + size)) for first in range(0, world_size, size)]
        self.size = size
        self.rank = rank % size
        self._group: Any = groups[rank // size]

    def cut(self, batch: MicroBatch) -> Slice:
        """This rank's slice of a packed row, which is filled up to a multiple of the ranks by a sequence of its own."""
        ids, kwargs = batch.inputs.input_ids, dict(batch.inputs.kwargs)
        fill = -ids.shape[1] % self.size
        each = (ids.shape[1] + fill) // self.size
        mine = slice(self.rank * each, (self.rank + 1) * each)
        if fill:
            ends = torch.tensor([ids.shape[1] + fill], dtype=torch.int32, device=ids.device)
            for name in ("cu_seq_lens_q", "cu_seq_lens_k"):
                kwargs[name] = torch.cat([kwargs[name], ends])
            ids = torch.nn.functional.pad(ids, (0, fill))
            positions = torch.arange(fill, device=ids.device)[None]
            kwargs["position_ids"] = torch.cat([kwargs["position_ids"], positions], dim=1)
        kwargs["position_ids"] = kwargs["position_ids"][:, mine]
        kwargs.pop("seq_idx", None)  # of recurrent mixers, which are refused
        own_T = ((batch.at_T >= mine.start) & (batch.at_T < mine.stop)).nonzero()[:, 0]
        inputs = replace(batch.inputs, input_ids=ids[:, mine], kwargs={**kwargs, "sequence_group": self._group})
        return Slice(inputs, own_T, batch.at_T[own_T] - mine.start)

    def join(self, own_T: Tensor, values_T: Tensor, total: int) -> Tensor:
        """The values of all `total` tokens; this rank's, which are the `own_T`-th, keep their gradient."""
        whole_T = torch.zeros(total, dtype=values_T.dtype, device=values_T.device)
        whole_T[own_T] = values_T.detach()
        dist.all_reduce(whole_T, group=self._group)
        return whole_T.index_copy(0, own_T, values_T)
