"""AdaLoRA's allocation of ranks during training (arXiv 2303.10512), by PEFT's own allocator.

That one looks at whole weights and their gradients. Here it is shown, in fp32 on the CPU, what the ranks' shares of
them come to, so that it decides alike on every rank, as it would in one process; what it takes away is set to 0 in the
shares. Importance is of the gradient that the optimizer was given, after clipping, and of the weight after its step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from peft import AdaLoraConfig
from peft.tuners.adalora.layer import RankAllocator
from torch import Tensor, nn

from hybrid_rl.adaptation.adapters import AdaLora
from hybrid_rl.adaptation.inject import ADAPTER
from hybrid_rl.adaptation.molf import Fragment
from hybrid_rl.treatments import AdaloraConfig

Pieces = Mapping[Tensor, Sequence[Tensor]]
"""By master, flat tensors that have, one after another, something for each of its elements."""

_AVERAGES = ("exp_avg_ipt", "exp_avg_unc")


class RankAllocation:
    """Which ranks of a model's AdaLoRA adapters are left. An update is `regularise`, `see_gradients`, `allocate`."""

    def __init__(
        self,
        adapters: Mapping[str, AdaLora],
        fragments: Mapping[nn.Parameter, Fragment],
        settings: AdaloraConfig,
        updates: int,
        total: Callable[[Tensor], Tensor],
    ) -> None:
        """`adapters` by module name; `fragments`: what this rank holds of parameters; `updates`: of the whole run;
        `total`: the sum over the ranks, on the CPU.

        Raises `ValueError` if there are too few updates.
        """
        self._settings, self._total = settings, total
        parameters = {f"{m}.{name}": p for m, a in adapters.items() for name, p in a.parameters.items()}
        self._shapes = {name: _whole_shape(p) for name, p in parameters.items()}
        self._fragments = {name: fragments[p] for name, p in parameters.items() if p in fragments}
        self._adapters = dict(adapters)
        before, after = settings.phases(updates)
        self._last = updates - after
        self._allocator = RankAllocator(
            _Weights({name: torch.empty(shape) for name, shape in self._shapes.items()}),
            AdaLoraConfig(
                total_step=updates,
                tinit=before,
                tfinal=after,
                deltaT=settings.every,
                beta1=settings.beta1,
                beta2=settings.beta2,
            ),
            ADAPTER,
        )
        self._allocator.target_bgt = sum(a.target for a in adapters.values())  # PEFT knows one target for all modules
        self._updates = 0
        """Updates that were applied."""
        self._kept: dict[str, list[bool]] = {}
        """By E's name, PEFT's `rank_pattern`: empty until the first allocation."""
        self._gradients: dict[str, Tensor] = {}

    @property
    def budget(self) -> int:
        """Ranks that the schedule left at the last update, over all modules."""
        return self._allocator.budget_schedule(self._updates - 1)[0]

    @property
    def ranks(self) -> dict[str, int]:
        """Ranks that each module has left."""
        names = {m: f"{m}.lora_E.{ADAPTER}" for m in self._adapters}
        return {m: sum(self._kept[n]) if n in self._kept else self._shapes[n][0] for m, n in names.items()}

    @torch.no_grad()
    def regularise(self, masters: Pieces, gradients: Pieces) -> None:
        """Add the gradient of what keeps A and B orthogonal, as PEFT's AdaLoRA has it: the mean over all A and B of
        the Frobenius norm of A A^T - I and B^T B - I, times `orth_reg_weight`. It is of the weights alone, so that
        micro-batches and ranks do not matter."""
        if not self._settings.orth_reg_weight:
            return
        weights = self._whole(masters, [name for name in self._shapes if ".lora_E." not in name])
        for name, weight in weights.items():
            a = weight if ".lora_A." in name else weight.T
            off = a @ a.T - torch.eye(len(a))
            slope = self._settings.orth_reg_weight / len(weights) * 2 * off @ a / off.norm().clamp_min(1e-30)
            added = (slope if ".lora_A." in name else slope.T).flatten()
            for piece, places in self._held(name, gradients):
                piece += added[places].to(piece)

    def see_gradients(self, gradients: Pieces) -> None:
        """Take note of the gradients that are about to be stepped."""
        self._gradients = self._whole(gradients, list(self._shapes)) if self._updates < self._last else {}

    @torch.no_grad()
    def allocate(self, masters: Pieces) -> bool:
        """After a step: take ranks away in the masters, if it is time. Returns whether any was."""
        now, self._updates = self._updates, self._updates + 1
        kept = self._kept
        if now <= self._last:
            weights = self._whole(masters, list(self._shapes))
            for name, gradient in self._gradients.items():
                weights[name].grad = gradient
            self._gradients = {}
            _, kept = self._allocator.update_and_allocate(_Weights(weights), now, force_mask=now == self._last)
            self._kept = kept or self._kept
            if now == self._last:
                self._allocator.reset_ipt()
        for name, of_ranks in (kept or {}).items():
            taken = ~torch.tensor(of_ranks)
            for piece, places in self._held(name, masters):
                piece[taken[places].to(piece.device)] = 0
        return bool(kept)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What the coming allocations depend on: tensors, and the modules' ranks with what JSON can say besides."""
        averages = {f"{which}/{n}": t for which in _AVERAGES for n, t in getattr(self._allocator, which).items()}
        facts = {"updates": self._updates, "budget": self.budget, "ranks": self.ranks, "kept": self._kept}
        return {name: tensor.clone() for name, tensor in averages.items()}, facts

    def restore(self, averages: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Take back what `state` was."""
        self._updates, self._kept = facts["updates"], {name: list(kept) for name, kept in facts["kept"].items()}
        for which in _AVERAGES:
            found = {n.removeprefix(f"{which}/"): t for n, t in averages.items() if n.startswith(f"{which}/")}
            setattr(self._allocator, which, found)
        # PEFT begins anew with what it has none of; the values are unused.
        self._allocator.ipt = dict(getattr(self._allocator, _AVERAGES[0]))
        self._gradients = {}

    def _held(self, name: str, pieces: Pieces) -> Iterator[tuple[Tensor, slice]]:
        """What this rank has of a parameter, in views of `pieces`, and which of the parameter's elements that is."""
        if name not in self._fragments:
            return
        fragment, at = self._fragments[name], 0
        for piece in pieces[fragment.master]:
            start = max(fragment.start, at)
            stop = min(fragment.start + fragment.length, at + piece.numel())
            if start < stop:
                offset = fragment.offset - fragment.start
                yield piece.detach().view(-1)[start - at : stop - at], slice(start + offset, stop + offset)
            at += piece.numel()

    def _whole(self, pieces: Pieces, names: Sequence[str]) -> dict[str, Tensor]:
        """Parameters, or their gradients, put together from all ranks' shares: exact, as each element is in one."""
        sizes = [self._shapes[name].numel() for name in names]
        flat = torch.zeros(sum(sizes))
        for name, whole in zip(names, flat.split(sizes), strict=True):
            for piece, places in self._held(name, pieces):
                whole[places] = piece.to(whole)
        parts = self._total(flat).split(sizes)
        return {name: part.view(self._shapes[name]) for name, part in zip(names, parts, strict=True)}


class _Weights(nn.Module):
    """What PEFT's allocator sees as the model: whole tensors by name."""

    def __init__(self, named: Mapping[str, Tensor]) -> None:
        super().__init__()
        self._named = dict(named)

    def named_parameters(self, *_: object, **__: object) -> Iterator[tuple[str, Tensor]]:  # type: ignore[override]
        return iter(self._named.items())


def _whole_shape(parameter: nn.Parameter) -> torch.Size:
    """Also where ZeRO-3 holds a share of it."""
    return torch.Size(getattr(parameter, "ds_shape", parameter.shape))
