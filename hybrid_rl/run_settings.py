"""Settings of where a run takes place and of what it leaves behind, not of what it trains. Imports nothing heavy."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from hybrid_rl.settings import PositiveInt, Settings


class ClusterConfig(Settings):
    backend: Literal["ray", "inline"] = "ray"
    """`inline` runs the same workers in this process, for debugging."""
    address: str | None = None
    """Ray cluster to join (`auto`, `host:port`); one is started on this machine by default."""
    placement: Literal["split", "colocate"] = "split"
    """`colocate`: engine i and learner rank i share a GPU, and an engine's memory is released while the learner works
    (vLLM's sleep mode); `split`: each has its own."""


class CheckpointConfig(Settings):
    every: Annotated[int, Field(ge=0)] = 0
    """Steps between checkpoints; the last step is always saved. 0: only the last."""
    keep_last: PositiveInt = 2
    """Latest checkpoints kept."""
    keep_best: Annotated[int, Field(ge=0)] = 0
    """Checkpoints kept besides, those of the best `eval/accuracy` measured at their step."""
    background: bool = True
    """Write files while training goes on: a step waits only until the state is copied in the workers' memory."""


class TrackingConfig(Settings):
    wandb: Literal["offline", "online", "disabled"] = "offline"
    project: str = "hybrid-rl"
    """wandb project."""


class RunConfig(Settings):
    dir: str | None = None
    """Exactly the run's directory. By default `runs/<run.name or config name>-<time>`."""
    name: str | None = None
