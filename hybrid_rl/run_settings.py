"""Settings of where a run takes place and of what it leaves behind, not of what it trains. Imports nothing heavy."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from hybrid_rl.settings import Positive, PositiveInt, Probability, Settings


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


class AlertConfig(Settings):
    reward_drop: Probability | None = 0.5
    """Share of its best that `reward/mean` may lose, both as means over 10 steps; `null`: say nothing."""
    rollout_kl: Positive | None = 0.1
    """Nats a token that `policy/rollout_kl`, engine against learner, may reach; `null`: say nothing."""
    kl: Positive | None = 1.0
    """Nats a token that `policy/kl`, policy against base policy, may reach; `null`: say nothing."""


class TrackingConfig(Settings):
    wandb: Literal["offline", "online", "disabled"] = "offline"
    """`online` without a server goes on as `offline`; `wandb sync` uploads that later."""
    project: str = "hybrid-rl"
    """Project of wandb and trackio, experiment of MLflow."""
    entity: str | None = None
    """wandb user or team; by default the key's own."""
    group: str | None = None
    """What the run is shown together with, in wandb and trackio."""
    tags: list[str] = []
    """Of the run, in wandb and MLflow."""
    tensorboard: bool = False
    """Event files in `RUN/tensorboard`."""
    mlflow: str | None = None
    """MLflow tracking URI, as `http://host:5000` or `sqlite:///mlflow.db`; its password is taken from
    `MLFLOW_TRACKING_PASSWORD`."""
    trackio: bool = False
    """Log to trackio's local database; `trackio show` serves it."""
    prometheus: Annotated[int, Field(gt=0, lt=65536)] | None = None
    """Port at which `/metrics` is served while the run lasts."""
    prometheus_host: str = "127.0.0.1"
    """Address that it is served at. There is no password: `0.0.0.0` lets everyone who reaches the machine read it."""
    rollouts_every: Annotated[int, Field(ge=0)] = 10
    """Steps between samples of rollouts for the trackers that have tables; 0: none."""
    rollouts_rows: PositiveInt = 16
    """Completions in a sample, from the best reward to the worst."""
    timeout: Positive = 30.0
    """Seconds that a tracker gets to be reached, and all of them together to finish when the run is done."""
    alerts: AlertConfig = AlertConfig()


class RunConfig(Settings):
    dir: str | None = None
    """Exactly the run's directory. By default `runs/<run.name or config name>-<time>`."""
    name: str | None = None
    """What it is called in the name of that directory, and on the screen."""
