"""What a training step depends on, in files that any number of ranks, under any ZeRO stage, can read back.

Each rank writes, of every trained parameter, the elements that it holds: of the fp32 master and of each of Adam's
moments, by the parameter's name and the place of the first of them. Whoever reads asks for places, not for ranks.
Tensors and JSON alone: to read a file that somebody else has made runs nothing, as DeepSpeed's own pickles might.
"""

from __future__ import annotations

import json
import random
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable, Mapping, MutableMapping
from pathlib import Path
from typing import Any

import numpy
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from hybrid_rl.adaptation.molf import Fragment

LEARNER = "learner"
"""Subdirectory of a checkpoint."""
_FACTS = "facts"
_RANDOM = "random"


def shard_path(checkpoint: Path, rank: int) -> Path:
    return checkpoint / LEARNER / f"rank_{rank:05d}.safetensors"


def piece_key(kind: str, offset: int, name: str) -> str:
    """Of the elements of a parameter from `offset` on; `kind`: `master`, or which moment."""
    return f"{kind}/{offset}/{name}"


def take_state(
    fragments: Iterable[tuple[str, Fragment]], states: Mapping[Tensor, Mapping[str, Any]]
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Copies on the CPU of what a rank holds: masters and moments by `piece_key`; and each parameter's Adam steps.

    `fragments`: by parameter's name; `states`: the optimizer's, by master.
    """
    tensors: dict[str, Tensor] = {}
    steps: dict[str, float] = {}
    for name, fragment in fragments:
        held = {"master": fragment.master, **states.get(fragment.master, {})}
        steps[name] = float(held.pop("step", 0))
        for kind, values in held.items():
            part = values.detach().view(-1)[fragment.start : fragment.start + fragment.length]
            tensors[piece_key(kind, fragment.offset, name)] = part.to("cpu", copy=True)
    return tensors, steps


@torch.no_grad()
def put_state(
    shards: Shards,
    fragments: Iterable[tuple[str, Fragment]],
    states: MutableMapping[Tensor, dict[str, Any]],
    whole: bool,
) -> None:
    """Give masters and the optimizer what all ranks' `take_state` was. `whole`: it counts steps in plain numbers.

    Raises `ValueError` if some of it is missing.
    """
    fragments = list(fragments)
    for master in {fragment.master for _, fragment in fragments}:
        master.detach().zero_()  # padding too
        states.pop(master, None)  # what was saved before the first update has no moments
    steps = {name: count for facts in shards.facts for name, count in facts["steps"].items()}
    moments = shards.kinds - {"master"}
    for name, fragment in fragments:
        held = {"master": fragment.master}
        if moments:
            state = states.setdefault(fragment.master, {})
            state["step"] = int(steps[name]) if whole else torch.tensor(steps[name])
            state |= {kind: torch.zeros_like(fragment.master) for kind in moments - state.keys()}
            held |= {kind: state[kind] for kind in moments}
        for kind, values in held.items():
            part = values.detach().view(-1)[fragment.start : fragment.start + fragment.length]
            part.copy_(shards.read(kind, name, fragment.offset, fragment.length))


def write_shard(path: Path, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
    """Write one rank's tensors, on the CPU, and facts, which JSON can say."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(dict(tensors), path, metadata={_FACTS: json.dumps(facts)})


class Shards:
    """What all ranks wrote."""

    def __init__(self, checkpoint: Path) -> None:
        """Raises `ValueError` if there is nothing, or what cannot be read."""
        self._files: list[Any] = []
        self._pieces: dict[tuple[str, str], list[tuple[int, int, str]]] = defaultdict(list)
        """By kind and parameter: first element, file and key of each piece."""
        directory = checkpoint / LEARNER
        paths = sorted(directory.glob("rank_*.safetensors"))
        if not paths:
            raise ValueError(f"{directory} has no learner state")
        try:
            for i, path in enumerate(paths):
                self._files.append(file := safe_open(path, "pt").__enter__())
                for key in file.keys():  # noqa: SIM118 (safetensors' own, no mapping)
                    kind, _, rest = key.partition("/")
                    offset, _, name = rest.partition("/")
                    if name and offset.isdecimal():
                        self._pieces[kind, name].append((int(offset), i, key))
            self.facts: list[dict[str, Any]] = [json.loads(file.metadata()[_FACTS]) for file in self._files]
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{directory} cannot be read: {error}") from None
        for pieces in self._pieces.values():
            pieces.sort()

    @property
    def kinds(self) -> set[str]:
        """`master`, and the moments there are."""
        return {kind for kind, _ in self._pieces}

    def read(self, kind: str, name: str, offset: int, length: int) -> Tensor:
        """Elements of a parameter, from `offset` on. Raises `ValueError` if no rank wrote some of them."""
        pieces, found = self._pieces.get((kind, name), []), []
        at = offset
        index = bisect_right(pieces, (offset, len(self._files), "")) - 1
        while 0 <= index < len(pieces) and at < offset + length:
            start, file, key = pieces[index]
            part = self._files[file].get_slice(key)
            stop = min(offset + length, start + part.get_shape()[0])
            if start > at or stop <= at:
                break
            found.append(part[at - start : stop - start])
            at, index = stop, index + 1
        if at != offset + length:
            raise ValueError(f"the {kind} of {name} is not saved from element {at} on")
        return torch.cat(found) if len(found) > 1 else found[0]

    def tensors(self, rank: int, prefix: str) -> dict[str, Tensor]:
        """The other tensors that a rank wrote under names with this prefix, without it."""
        file = self._files[rank]
        return {key.removeprefix(prefix): file.get_tensor(key) for key in file.keys() if key.startswith(prefix)}  # noqa: SIM118


def random_state() -> dict[str, Tensor]:
    """Of every generator that a rank's process has."""
    version, state, _ = random.getstate()
    numbers: Any = numpy.random.get_state(legacy=False)
    found = {
        f"{_RANDOM}/torch": torch.get_rng_state(),
        f"{_RANDOM}/python": torch.tensor([version, *state]),
        f"{_RANDOM}/numpy": torch.tensor([numbers["state"]["pos"], *numbers["state"]["key"].tolist()]),
    }
    if torch.cuda.is_available():
        found[f"{_RANDOM}/cuda"] = torch.cuda.get_rng_state()
    return found


def restore_random(shards: Shards, rank: int) -> None:
    """Set the generators to what the rank of this number had."""
    state = shards.tensors(rank, f"{_RANDOM}/")
    torch.set_rng_state(state["torch"])
    version, *numbers = state["python"].tolist()
    random.setstate((version, tuple(numbers), None))
    position, *key = state["numpy"].tolist()
    numpy.random.set_state(("MT19937", numpy.array(key, dtype=numpy.uint32), position, 0, 0.0))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
