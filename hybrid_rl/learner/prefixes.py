"""A packed row in which the completions of a prompt follow it once, each seeing the prompt and itself.

A causal model's states of a prompt do not depend on what follows, so one copy stands in for those of the whole group;
its gradient is the sum of theirs. The row has the prefixes first and then the tails; each tail is attended to with the
keys and values of its prefix too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

_WORTH = 0.125
"""Share of the tokens that must be saved: attention to a prefix needs a mask, which costs some kernels their speed."""

Attend = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]
"""Attention of [N, H, L, D] -> [N, L, H, D], with a mask [L, L of the keys]; without, causal and within the
window."""


@dataclass(frozen=True)
class Tails:
    """Neighbours in the row of one length, whose prefixes are of one length too."""

    length: int
    run: int
    """Which run of prefixes theirs are in."""
    prefix_N: Tensor
    """Which one of the run each has."""


@dataclass(frozen=True)
class SharedRow:
    """How a row is made up."""

    prefixes: tuple[tuple[int, int], ...]
    """Runs of prefixes of one length: the length, and how many."""
    tails: tuple[Tails, ...]

    def attend(self, query: Tensor, key: Tensor, value: Tensor, attention: Attend, window: int | None) -> Tensor:
        """Causal attention of [1, H, L, D] -> [1, L, H, D]; `window`: in which alone a token sees others."""
        sizes = [length * count for length, count in self.prefixes]
        sizes += [tails.length * len(tails.prefix_N) for tails in self.tails]
        # One `split` of the row: its gradient is put together once, where slices would add up as many rows.
        pieces = list(zip(*(x[0].split(sizes, dim=1) for x in (query, key, value)), strict=True))
        found, heads = [], []
        for (length, _), piece in zip(self.prefixes, pieces, strict=False):
            q, k, v = (_rows(x, length) for x in piece)
            heads.append((k, v))
            found.append(attention(q, k, v, None))
        for tails, piece in zip(self.tails, pieces[len(self.prefixes) :], strict=True):
            q, *own = (_rows(x, tails.length) for x in piece)
            k, v = (
                torch.cat([head.index_select(0, tails.prefix_N), x], dim=2)
                for head, x in zip(heads[tails.run], own, strict=True)
            )
            before = self.prefixes[tails.run][0]
            mask = q.new_ones(tails.length, before + tails.length, dtype=torch.bool).tril(before)
            if window is not None:
                mask = mask.triu(before + 1 - window)
            found.append(attention(q, k, v, mask))
        return torch.cat([x.flatten(0, 1) for x in found])[None]


@dataclass(frozen=True)
class Placed:
    """Rows laid out to share their prefixes."""

    tokens: list[int]
    lengths: list[int]
    """Of the pieces, one after another: prefixes, then tails."""
    positions: list[int]
    """Of each piece's first token in its sequence."""
    starts: tuple[int, ...]
    """Where each sequence's prefix begins."""
    tails: tuple[int, ...]
    """Where what follows it begins."""
    row: SharedRow


def saved_prefixes(rows: Sequence[Sequence[int]], prefixes: Sequence[int]) -> list[int]:
    """Lengths of the prefixes that another row's stands in for; none where it is not worth while."""
    groups = _groups(rows, prefixes)
    saved = [len(prefix) for prefix, members in groups.items() for _ in members[1:]]
    return saved if sum(saved) > _WORTH * sum(map(len, rows)) else []


def place(rows: Sequence[Sequence[int]], prefixes: Sequence[int], device: torch.device | str) -> Placed:
    """Lay out rows of which the first `prefixes[i]` tokens are shared by those that begin alike. Pieces of one length
    are neighbours, so that attention takes them in one call."""
    groups = _groups(rows, prefixes)
    heads = sorted(groups, key=lambda prefix: -len(prefix))
    runs = [list(run) for _, run in groupby(heads, key=len)]
    where = {prefix: (r, n) for r, run in enumerate(runs) for n, prefix in enumerate(run)}
    ends = sorted(
        ((where[prefix][0], -(len(rows[i]) - len(prefix)), prefix, i) for prefix, each in groups.items() for i in each),
        key=lambda end: end[:2],
    )
    tokens: list[int] = []
    starts: dict[tuple[int, ...], int] = {}
    for prefix in heads:
        starts[prefix] = len(tokens)
        tokens += prefix
    lengths, positions, tails = [len(prefix) for prefix in heads], [0] * len(heads), [0] * len(rows)
    together: list[Tails] = []
    for (run, negative), each in groupby(ends, key=lambda end: end[:2]):
        members = list(each)
        for _, _, prefix, i in members:
            tails[i] = len(tokens)
            tokens += rows[i][len(prefix) :]
        if negative:
            lengths += [-negative] * len(members)
            positions += [len(prefix) for _, _, prefix, _ in members]
            chosen = torch.tensor([where[prefix][1] for _, _, prefix, _ in members], device=device)
            together.append(Tails(-negative, run, chosen))
    row = SharedRow(tuple((len(run[0]), len(run)) for run in runs), tuple(together))
    of_rows = tuple(starts[tuple(r[:n])] for r, n in zip(rows, prefixes, strict=True))
    return Placed(tokens, lengths, positions, of_rows, tuple(tails), row)


def _groups(rows: Sequence[Sequence[int]], prefixes: Sequence[int]) -> dict[tuple[int, ...], list[int]]:
    """Rows by their prefix."""
    found: dict[tuple[int, ...], list[int]] = {}
    for i, (row, length) in enumerate(zip(rows, prefixes, strict=True)):
        found.setdefault(tuple(row[:length]), []).append(i)
    return found


def _rows(x: Tensor, length: int) -> Tensor:
    """[H, N * length, D] -> [N, H, length, D]"""
    return x.unflatten(1, (-1, length)).transpose(0, 1)
