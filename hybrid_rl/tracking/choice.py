"""Which trackers a run is shown by, and whether they can be."""

from __future__ import annotations

import errno
import importlib
import importlib.util
import socket
from collections.abc import Callable
from urllib.parse import urlsplit

from hybrid_rl.config import Config, ConfigError
from hybrid_rl.run_settings import TrackingConfig
from hybrid_rl.tracking.tracker import Opening, Tracker

_PACKAGES = {
    "tensorboard": ("tensorboardX", "tensorboardX"),
    "mlflow": ("mlflow", "mlflow-skinny"),
    "trackio": ("trackio", "trackio"),  # not of the extra: its Pillow is older than other packages'
    "prometheus": ("prometheus_client", "prometheus-client"),
}
"""What a tracker imports, and what is installed for it; wandb comes with this package."""
_DATABASES = ("sqlite", "postgresql", "mysql", "mssql")
"""What MLflow opens by SQLAlchemy (its `store/db/db_types.py`), with or without a driver's name behind."""


def chosen(config: Config) -> list[tuple[str, Callable[[Opening], Tracker]]]:
    """The trackers that are asked for, by name, and what opens each; their packages are not imported before."""
    return [(name, lambda opening, name=name: _opener(name)(opening)) for name in _names(config.tracking)]


def check_trackers(config: Config) -> None:
    """Raises `ConfigError` for what is asked for and cannot be had: a package, a key, a port."""
    tracking = config.tracking
    for name in _names(tracking):
        module, package = _PACKAGES.get(name, ("wandb", "wandb"))
        if importlib.util.find_spec(module) is None:
            value = getattr(tracking, name)
            also = "(or 'hybrid-rl[tracking]' for all trackers but trackio)"
            if name == "trackio":
                also = "in an environment made for it (docs/watching.md)"
            raise ConfigError(
                f"tracking.{name}={'true' if value is True else value} needs {package}, which is not installed; "
                f"pip install '{package}' {also}"
            )
    if tracking.wandb == "online":
        _check_key()
    if tracking.mlflow is not None:
        _check_uri(tracking.mlflow)
    if tracking.prometheus is not None:
        _check_port(tracking.prometheus_host, tracking.prometheus)


def _names(tracking: TrackingConfig) -> list[str]:
    asked = {
        "wandb": tracking.wandb != "disabled",
        "tensorboard": tracking.tensorboard,
        "mlflow": tracking.mlflow is not None,
        "trackio": tracking.trackio,
        "prometheus": tracking.prometheus is not None,
    }
    return [name for name, wanted in asked.items() if wanted]


def _opener(name: str) -> Callable[[Opening], Tracker]:
    return importlib.import_module(f"hybrid_rl.tracking.to_{name}").open_tracker


def _check_key() -> None:
    """That there is one: whether the server takes it shows when the run is opened, which goes on offline if not."""
    import wandb

    try:
        # Not silent, it asks the server whose key it is, to greet by name; WANDB_MODE is not what counts here.
        wandb.setup(wandb.Settings(silent=True, mode="online"))
        known = wandb.login(prompt=False, verify=False)
    except (wandb.Error, ValueError) as error:
        raise ConfigError(f"tracking.wandb=online: {error}; run `wandb login`, or use tracking.wandb=offline") from None
    if not known:
        raise ConfigError(
            "tracking.wandb=online needs a key; run `wandb login`, set WANDB_API_KEY, or use tracking.wandb=offline "
            "and `wandb sync` later"
        )


def _check_uri(uri: str) -> None:
    if urlsplit(uri).scheme.startswith(_DATABASES) and importlib.util.find_spec("sqlalchemy") is None:
        raise ConfigError(f"tracking.mlflow={uri} needs more than mlflow-skinny; pip install sqlalchemy alembic")


def _check_port(host: str, port: int) -> None:
    where = f"tracking.prometheus={port}, tracking.prometheus_host={host}"
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the server will
            probe.bind(address)
    except OSError as error:
        why = "something listens there already; choose another port" if error.errno == errno.EADDRINUSE else str(error)
        raise ConfigError(f"{where}: {why}") from None
