"""What a run writes down."""

from __future__ import annotations

import json
from pathlib import Path

from hybrid_rl.config_file import parse_config
from hybrid_rl.run_directory import RunDirectory, read_metrics
from hybrid_rl.tracking import MetricsLog


def test_metrics_are_json_also_where_a_number_is_not_finite(tiny_tree: dict):
    config = parse_config({**tiny_tree, "tracking": {"wandb": "offline"}})
    run = RunDirectory.create(config, "run")
    log = MetricsLog(run, config)
    log.write({"step": 1, "policy/loss": 0.5}, {"policy/advantages": [0.0, 1.0, -1.0], "nothing": []})
    log.write({"step": 2, "policy/loss": float("nan")})
    log.close()
    lines = run.metrics.read_text(encoding="utf-8").splitlines()
    assert [json.loads(line, parse_constant=_refuse)["policy/loss"] for line in lines] == [0.5, None]
    assert read_metrics(run.metrics)[1] == {"step": 2, "policy/loss": None}
    assert list(Path(run.path).glob("wandb/offline-run-*"))


def _refuse(constant: str) -> None:
    raise AssertionError(f"{constant} is not JSON")
