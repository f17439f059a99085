"""Dashboards have the charts of the report, by the names under which trackers have the metrics."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from hybrid_rl.charts import CHARTS
from hybrid_rl.config import ConfigError
from hybrid_rl.tracking.dashboard import grafana, save_wandb_workspace, write_grafana

ROOT = Path(__file__).parents[2]


def test_grafana_has_a_panel_a_chart(tmp_path: Path):
    tree = json.loads(write_grafana(tmp_path / "dashboard.json").read_text())
    assert tree == grafana()
    charts = [chart for listed in CHARTS.values() for chart in listed]
    panels = [panel for panel in tree["panels"] if panel["type"] == "timeseries"]
    assert [panel["title"] for panel in panels] == [chart.title for chart in charts]
    assert [panel["title"] for panel in tree["panels"] if panel["type"] == "row"] == list(CHARTS)
    queries = {target["expr"] for panel in panels for target in panel["targets"]}
    assert 'hybrid_rl_reward_mean{run=~"$run"}' in queries
    assert '{__name__=~"hybrid_rl_faults_tracking_.+_total", run=~"$run"}' in queries
    assert len({panel["id"] for panel in tree["panels"]}) == len(tree["panels"])


def test_charts_draw_documented_metrics():
    """Each name's last part stands in the table of metrics, behind its first."""
    table = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
    for chart in (chart for listed in CHARTS.values() for chart in listed):
        for metric in chart.metrics:
            first, *_, last = metric.split("/")
            rows = [row for row in table.splitlines() if re.match(rf"\| `{re.escape(first)}/", row)]
            words = [word for word in last.split("*") if word]
            assert any(all(word.strip("_") in row for word in words) for row in rows), metric


def test_a_workspace_needs_a_project_and_its_package(monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(ConfigError, match="not of the form ENTITY/PROJECT"):
        save_wandb_workspace("project")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="pip install wandb-workspaces"):
        save_wandb_workspace("entity/project")
