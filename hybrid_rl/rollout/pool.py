"""Several rollout engines as one: prompts shared out, dead engines replaced, weights kept current."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Sequence
from typing import Any

from hybrid_rl.types import Completion, Pending, Prompt, Receipt, Sampling, WorkerDied, WorkerHandle

logger = logging.getLogger(__name__)


class RolloutPool:
    """Every call either returns complete results or raises; a dead engine costs time, never a prompt.

    A replacement starts from the base model and is brought to the current weights before it serves.
    """

    def __init__(
        self,
        spawn: Callable[[int], WorkerHandle],
        engines: int,
        *,
        max_restarts: int,
        timeout: float,
        verify: Callable[[Sequence[Receipt]], int],
    ) -> None:
        """`spawn(i)` starts engine i; `verify` checks receipts against the update in force and counts the engines."""
        self._spawn = spawn
        self._engines = [spawn(i) for i in range(engines)]
        self._timeout = timeout
        self._restarts_left = max_restarts
        self._verify = verify
        self._update: Any = None
        self.version = 0
        """Weight version that every engine serves."""
        self.restarts = 0
        """Engines replaced so far."""

    def wait_ready(self) -> None:
        """Wait until every engine has loaded its model."""
        self._on_all("info")

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[list[Completion]]:
        """`sampling.n` completions of each prompt, in order."""
        seeds = [prompt_seed(sampling.seed, p.id) for p in prompts]
        shares = [range(i, len(prompts), len(self._engines)) for i in range(len(self._engines))]
        requests = [([prompts[j].token_ids for j in s], sampling, [seeds[j] for j in s]) for s in shares]
        results = self._on_each("generate", requests)
        groups: list[list[Completion]] = [[] for _ in prompts]
        for share, share_groups in zip(shares, results, strict=True):
            for j, group in zip(share, share_groups, strict=True):
                groups[j] = group
        stale = {c.weight_version for group in groups for c in group} - {self.version}
        if stale:
            raise RuntimeError(
                f"engines answered with weights of version {stale.pop()}, the policy's is {self.version}"
            )
        return groups

    def update(self, update: Any, version: int) -> int:
        """Bring every engine to `update` (a `WeightUpdate`, or a reference to one). Returns how many were verified."""
        self._update, self.version = update, version
        return self._verify(self._on_all("apply_update", update))

    def _on_all(self, method: str, *args: Any) -> list[Any]:
        return self._on_each(method, [args] * len(self._engines))

    def _on_each(self, method: str, arguments: Sequence[tuple[Any, ...]]) -> list[Any]:
        """Call `method` on every engine with its own arguments; what a dead engine was doing is done again."""
        pending = [self._submit(i, method, args) for i, args in enumerate(arguments)]
        return [self._finish(i, method, args, pending[i]) for i, args in enumerate(arguments)]

    def _submit(self, index: int, method: str, args: tuple[Any, ...]) -> Pending | None:
        try:
            return self._engines[index].submit(method, *args)
        except WorkerDied:
            return None

    def _finish(self, index: int, method: str, args: tuple[Any, ...], pending: Pending | None) -> Any:
        while True:
            try:
                if pending is not None:
                    return pending.result(self._timeout)
                self._restart(index)
                pending = self._submit(index, method, args)
            except WorkerDied as death:
                logger.warning("rollout engine %d died during %s (%s); replacing it", index, method, death)
                pending = None

    def _restart(self, index: int) -> None:
        if self._restarts_left == 0:
            raise RuntimeError(
                f"rollout engine {index} died and rollout.max_restarts replacements are used up; "
                "its log tells why, raise the setting if the cause is outside the run"
            )
        self._restarts_left -= 1
        self.restarts += 1
        self._engines[index].kill()
        self._engines[index] = self._spawn(index)
        if self._update is not None:
            receipt = self._engines[index].submit("apply_update", self._update).result(self._timeout)
            self._verify([receipt])


def prompt_seed(run_seed: int, prompt_id: str) -> int:
    """Seed of one prompt's sampling, from the run's (or step's) seed and the prompt's id. 31 bits."""
    digest = hashlib.blake2b(f"{run_seed}/{prompt_id}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little") & 0x7FFF_FFFF
