"""What a run tells while it works: to its own file always, to trackers as far as they take it."""

from __future__ import annotations

import json
import logging
import shutil
import socket
import struct
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import wandb
from PIL import Image

from hybrid_rl.config import Config, ConfigError
from hybrid_rl.config_file import parse_config
from hybrid_rl.run_directory import RunDirectory, read_metrics
from hybrid_rl.tracking import MetricsLog, check_trackers
from hybrid_rl.tracking.alerts import Alert

HOSTILE = '<script>alert(1)</script>\x1b[31m\x00\u202e[link](javascript:alert(2))"' + "x" * 10_000


@pytest.fixture
def start(tiny_tree: dict) -> Iterator[Callable[..., tuple[RunDirectory, MetricsLog, Config]]]:
    """A run with what trackers are shown of it, and its log, with these settings of `tracking`."""
    logs: list[MetricsLog] = []

    def begin(last: Mapping[str, float] | None = None, **tracking: Any) -> tuple[RunDirectory, MetricsLog, Config]:
        tree = {**tiny_tree, "steps": 6, "tracking": {"wandb": "disabled", "timeout": 5, **tracking}}
        config = parse_config(tree)
        run = RunDirectory(Path(config.run.dir or "")) if last else RunDirectory.create(config, "run")
        run.plan.write_text("{}")
        Image.new("RGB", (8, 8)).save(run.plan_image)
        rollout = {
            **{"prompt": HOSTILE, "completion": HOSTILE, "advantage": 0.5, "finish_reason": "stop", "tokens": 9},
            **{"weight_version": 0, "failures": {}, "columns": {}},
        }
        rows = [{**rollout, "reward": i / 40, "rewards": {"a": i / 40, "<b>": None}} for i in range(40)]
        run.rollouts_of(1).write_text("\n".join(map(json.dumps, rows)))
        logs.append(MetricsLog(run, config, last=last))
        return run, logs[-1], config

    yield begin
    for log in logs:
        log.close()


def step(log: MetricsLog, i: int, **more: float) -> dict[str, float]:
    row = {"step": i, "reward/mean": i / 10, "faults/engine_restarts": 0, "tokens/trained": 5, **more, **log.faults()}
    log.write(row, {"policy/advantages": [0.0, 1.0, -1.0], "nothing": []})
    return row


def test_metrics_are_json_also_where_a_number_is_not_finite(start: Callable):
    run, log, _ = start()
    step(log, 1)
    log.write({"step": 2, "policy/loss": float("nan")})
    lines = run.metrics.read_text(encoding="utf-8").splitlines()
    assert [json.loads(line, parse_constant=_refuse).get("policy/loss", 1) for line in lines] == [1, None]
    assert read_metrics(run.metrics)[1] == {"step": 2, "policy/loss": None}


def _refuse(constant: str) -> None:
    raise AssertionError(f"{constant} is not JSON")


def test_wandb_has_metrics_plan_and_rollouts_in_which_nothing_acts(start: Callable):
    run, log, _ = start(wandb="offline", group="a group", tags=["a tag"], rollouts_rows=5, timeout=60)
    assert step(log, 1)["faults/tracking_wandb"] == 0
    log.close()
    assert log.faults() == {"faults/tracking_wandb": 0}
    (directory,) = run.path.glob("wandb/offline-run-*")
    (written,) = directory.glob("*.wandb")
    # wandb's own process writes on for a moment after `finish`; the table and the plan are behind the metrics.
    _until(lambda: b"plan.json" in written.read_bytes())
    content = written.read_bytes()
    for told in (b"reward/mean", b"policy/advantages", b"a group", b"a tag", run.identity().encode(), b"plan.json"):
        assert told in content, told
    assert list(directory.glob("files/media/images/plan_*.png"))
    (table,) = directory.glob("files/media/table/rollouts_*.json")
    data = json.loads(table.read_text())
    assert data["columns"][:5] == ["prompt", "completion", "reward", "a", "<b>"]
    assert [row[2] for row in data["data"]] == [39 / 40, 29 / 40, 19 / 40, 10 / 40, 0.0]  # best to worst
    for row in data["data"]:
        assert not set(row[1]) & {"\x1b", "\x00", "\u202e"}
        assert len(row[1]) < 5000
        assert row[1].startswith("<script>alert(1)</script>\\x1b[31m\\x00\\u202e")  # as text: escaping is wandb's


def test_wandb_that_cannot_be_reached_goes_on_offline(
    start: Callable, tiny_tree: dict, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    wandb.teardown()  # it keeps what the environment said first
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef" * 3)
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{_free_port()}")
    began = time.monotonic()
    check_trackers(parse_config({**tiny_tree, "tracking": {"wandb": "online"}}))
    assert time.monotonic() - began < 5, "the server is not asked"
    run, log, _ = start(wandb="online", timeout=2)
    for i in range(1, 4):
        step(log, i)
    assert not list(run.path.glob("wandb/offline-run-*")), "the run does not wait"
    _until(lambda: list(run.path.glob("wandb/offline-run-*")))
    assert step(log, 4)["faults/tracking_wandb"] == 1
    log.close()
    assert [row["step"] for row in read_metrics(run.metrics)] == [1, 2, 3, 4]
    (said,) = (r.getMessage() for r in caplog.records if "tracking by" in r.getMessage())
    assert "tracking by wandb fails" in said
    assert "kept offline" in said
    wandb.teardown()


def test_tensorboard_has_each_step_once_after_a_resumption(start: Callable):
    run, log, _ = start(tensorboard=True)
    rows = [step(log, i) for i in range(1, 5)]
    log.close()
    run, log, _ = start(last=rows[1], tensorboard=True)  # steps 3 and 4 are done again
    for i in range(3, 7):
        step(log, i, **{"reward/mean": i})
    log.close()
    found: dict[int, float] = {}
    for event in _events(run.path / "tensorboard"):
        if event.HasField("session_log"):  # what TensorBoard does on reading it
            found = {at: value for at, value in found.items() if at < event.step}
        for value in event.summary.value:
            if value.tag == "reward/mean":
                assert event.step not in found
                found[event.step] = value.simple_value
    assert found == pytest.approx({1: 0.1, 2: 0.2, 3: 3, 4: 4, 5: 5, 6: 6})
    tags = {v.tag.split("/text_summary")[0] for e in _events(run.path / "tensorboard") for v in e.summary.value}
    assert {"plan", "config", "policy/advantages", "rollouts/00", "rollouts/15"} <= tags


def _events(directory: Path) -> Iterator[Any]:
    """The records of its files: length, checksum, data, checksum."""
    from tensorboardX.proto.event_pb2 import Event

    for path in sorted(directory.iterdir(), key=lambda path: path.stat().st_mtime):
        data = path.read_bytes()
        at = 0
        while at < len(data):
            (length,) = struct.unpack("<Q", data[at : at + 8])
            yield Event.FromString(data[at + 12 : at + 12 + length])
            at += 16 + length


def test_prometheus_serves_the_latest_step_and_totals_on_loopback(start: Callable):
    port = _free_port()
    _, log, config = start(prometheus=port)
    _until(lambda: _reachable(port))
    with pytest.raises(ConfigError, match=f"tracking.prometheus={port}, .*127.0.0.1: something listens there already"):
        check_trackers(config)
    step(log, 1, **{"faults/engine_restarts": 2, "eval/accuracy": 0.5})
    step(log, 2, **{"faults/engine_restarts": 1})
    _until(lambda: "hybrid_rl_step" in _get(port) and 'hybrid_rl_step{run="run"} 2.0' in _get(port))
    told = _get(port)
    for line in (
        'hybrid_rl_reward_mean{run="run"} 0.2',
        'hybrid_rl_eval_accuracy{run="run"} 0.5',
        'hybrid_rl_faults_engine_restarts_total{run="run"} 3.0',
        'hybrid_rl_tokens_trained_total{run="run"} 10.0',
    ):
        assert line in told
    log.close()
    assert not _reachable(port)
    check_trackers(config)


def _get(port: int) -> str:
    return urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5).read().decode()


def _reachable(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _until(there: Callable[[], Any], seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not there():
        assert time.monotonic() < end
        time.sleep(0.02)


class Kept:
    """A tracker that keeps what it is told, fails or hangs as it is asked to."""

    def __init__(self, after: int = 0, error: Exception | None = None, hold: threading.Event | None = None) -> None:
        self.after, self._error, self._hold = after, error, hold
        self.steps: list[int] = []
        self.alerts: list[Alert] = []
        self.finished: bool | None = None

    def step(self, step: int, row: Mapping[str, float], histograms: Mapping[str, Sequence[float]]) -> None:
        if self._hold is not None:
            self._hold.wait()
        self.steps.append(step)
        if self._error is not None:
            raise self._error

    def rollouts(self, step: int, sample: Sequence[Mapping[str, Any]]) -> None:
        assert len(sample) == 16

    def alert(self, alert: Alert) -> None:
        self.alerts.append(alert)

    def close(self, finished: bool) -> None:
        self.finished = finished


def _use(monkeypatch: pytest.MonkeyPatch, opener: Callable[..., Any]) -> None:
    monkeypatch.setattr("hybrid_rl.tracking.log.chosen", lambda config: [("fake", opener)])


def test_a_tracker_that_fails_is_counted_and_said_once(
    start: Callable, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setenv("SOME_API_KEY", "marker-of-a-secret")
    tracker = Kept(error=OSError("refused marker-of-a-secret"))
    _use(monkeypatch, lambda opening: tracker)
    run, log, _ = start()
    for i in range(1, 7):
        step(log, i)
        _until(lambda i=i: tracker.steps[-1:] == [i])
    log.close()
    assert log.faults()["faults/tracking_fake"] + sum(r["faults/tracking_fake"] for r in read_metrics(run.metrics)) == 6
    assert tracker.finished is True
    (said,) = (r.getMessage() for r in caplog.records if "tracking by" in r.getMessage())
    assert "OSError: refused (SOME_API_KEY, left out)" in said


def test_a_tracker_that_cannot_be_opened_loses_what_it_is_sent(start: Callable, monkeypatch: pytest.MonkeyPatch):
    def fail(opening: Any) -> Any:
        raise RuntimeError("no server")

    _use(monkeypatch, fail)
    _, log, _ = start(rollouts_every=0)
    for i in range(1, 4):
        step(log, i)
    log.close()
    # opening, three steps, closing; some may have been counted in the steps' rows
    assert log._outlets[0]._failures + sum(r["faults/tracking_fake"] for r in read_metrics(log._run.metrics)) == 5


def test_a_tracker_that_hangs_slows_nothing_and_is_left_behind(
    start: Callable, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    hold = threading.Event()
    _use(monkeypatch, lambda opening: Kept(hold=hold))
    monkeypatch.setattr("hybrid_rl.tracking.tracker.Outlet._WAITING", 3)
    run, log, _ = start(timeout=1)
    began = time.monotonic()
    for i in range(1, 7):
        step(log, i)
    assert time.monotonic() - began < 5
    assert log.faults()["faults/tracking_fake"] > 0, "what does not fit the queue"
    began = time.monotonic()
    log.close()
    assert 0.9 < time.monotonic() - began < 5
    assert log.faults()["faults/tracking_fake"] > 0
    assert len(read_metrics(run.metrics)) == 6
    assert len([r for r in caplog.records if "tracking by fake fails" in r.getMessage()]) == 1
    hold.set()


def test_a_resumed_run_is_the_same_to_its_trackers(start: Callable, monkeypatch: pytest.MonkeyPatch):
    seen: list[tuple[str, int, int]] = []

    def opened(opening: Any) -> Kept:
        seen.append((opening.identity, opening.told, opening.first))
        return trackers[len(seen) - 1]

    trackers = [Kept(), Kept(after=4)]
    _use(monkeypatch, opened)
    _, log, _ = start()
    rows = [step(log, i) for i in range(1, 5)]
    log.close()
    run, log, _ = start(last=rows[2])
    for i in range(4, 7):
        step(log, i)
    log.close()
    assert seen == [(run.identity(), 0, 1), (run.identity(), 4, 4)]
    assert [t.steps for t in trackers] == [[1, 2, 3, 4], [5, 6]]
    assert [t.finished for t in trackers] == [False, True]
    assert [row["step"] for row in read_metrics(run.metrics)] == [1, 2, 3, 4, 5, 6]


def test_an_alert_is_logged_and_reaches_trackers(
    start: Callable, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    tracker = Kept()
    _use(monkeypatch, lambda opening: tracker)
    _, log, _ = start()
    step(log, 1, **{"policy/rollout_kl": 0.5})
    step(log, 2, **{"policy/rollout_kl": 0.6})
    log.close()
    (alert,) = tracker.alerts
    assert (alert.name, alert.step) == ("engines and learner disagree", 1)
    assert [r.levelno for r in caplog.records if alert.text in r.getMessage()] == [logging.WARNING]


@pytest.mark.parametrize(
    ("tracking", "message"),
    [
        ({"tensorboard": True}, r"tracking.tensorboard=true needs tensorboardX, .* pip install 'tensorboardX' \(or"),
        (
            {"mlflow": "http://127.0.0.1:5000"},
            r"needs mlflow-skinny, which is not installed; pip install 'mlflow-skinny'",
        ),
        ({"trackio": True}, r"tracking.trackio=true .* pip install 'trackio' in an environment made for it"),
        ({"prometheus": 9400}, r"tracking.prometheus=9400 needs prometheus-client"),
    ],
)
def test_a_tracker_that_is_not_installed_is_refused(
    tiny_tree: dict, monkeypatch: pytest.MonkeyPatch, tracking: dict, message: str
):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    config = parse_config({**tiny_tree, "tracking": {"wandb": "disabled", **tracking}})
    with pytest.raises(ConfigError, match=message):
        check_trackers(config)


def test_what_a_tracker_needs_is_looked_for_first(tiny_tree: dict, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    for tracking, message in (
        ({"wandb": "online"}, "tracking.wandb=online needs a key; run `wandb login`"),
        (
            {"wandb": "disabled", "prometheus": 9400, "prometheus_host": "no.such.host.invalid"},
            "prometheus_host=no.such",
        ),
    ):
        with pytest.raises(ConfigError, match=message):
            check_trackers(parse_config({**tiny_tree, "tracking": tracking}))


@pytest.mark.parametrize("scheme", ["sqlite", "postgresql", "mysql+pymysql", "mssql"])
def test_mlflow_needs_sqlalchemy_for_a_database(tiny_tree: dict, monkeypatch: pytest.MonkeyPatch, scheme: str):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "sqlalchemy" else object())
    for uri in ("http://host:5000", "https://host", "databricks://profile", "file:///mlruns"):
        check_trackers(parse_config({**tiny_tree, "tracking": {"wandb": "disabled", "mlflow": uri}}))
    config = parse_config({**tiny_tree, "tracking": {"wandb": "disabled", "mlflow": f"{scheme}://host/name"}})
    with pytest.raises(ConfigError, match=r"tracking.mlflow=.* pip install sqlalchemy alembic"):
        check_trackers(config)


@pytest.mark.slow
def test_mlflow_has_each_step_once_after_a_resumption(
    start: Callable, tiny_tree: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    pytest.importorskip("mlflow")
    pytest.importorskip("sqlalchemy")
    from mlflow import MlflowClient

    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    tiny_tree["plan"] = {**tiny_tree.get("plan", {}), "components": {"*.q_proj": "attention"}}
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    _, log, _ = start(mlflow=uri, tags=["a tag"], timeout=60)
    rows = [step(log, i) for i in range(1, 5)]
    log.close()
    _, log, config = start(last=rows[1], mlflow=uri, timeout=60)
    for i in range(3, 7):
        step(log, i)
    log.close()
    assert log.faults() == {"faults/tracking_mlflow": 0}
    client = MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name(config.tracking.project)
    (found,) = client.search_runs([experiment.experiment_id])
    assert [m.step for m in client.get_metric_history(found.info.run_id, "reward/mean")] == [1, 2, 3, 4, 5, 6]
    assert (found.info.status, found.data.tags["tags"]) == ("FINISHED", "a tag")
    assert found.data.params["model.path"] == config.model.path
    assert found.data.params["plan.components._.q_proj"] == "attention"
    assert found.info.artifact_uri.startswith((tmp_path / "mlruns").as_uri())
    assert {f.path for f in client.list_artifacts(found.info.run_id)} >= {"config.yaml", "plan.json", "rollouts"}
    assert not list(elsewhere.iterdir())


@pytest.mark.slow
def test_trackio_has_each_step_once_after_a_resumption(
    start: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    pytest.importorskip("trackio")
    import sqlite3

    _, log, _ = start(trackio=True, rollouts_every=0, timeout=60)
    rows = [step(log, i) for i in range(1, 5)]
    log.close()
    _, log, _ = start(last=rows[1], trackio=True, rollouts_every=0, timeout=60)
    for i in range(3, 7):
        step(log, i)
    log.close()
    assert log.faults() == {"faults/tracking_trackio": 0}
    (path,) = (tmp_path / "trackio").glob("*.db")
    with sqlite3.connect(path) as database:
        assert [s for (s,) in database.execute("SELECT step FROM metrics ORDER BY step")] == [1, 2, 3, 4, 5, 6]
    shutil.rmtree(tmp_path / "trackio")
