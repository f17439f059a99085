"""Ready dashboards of the metrics, from the same list of charts as the report: a wandb workspace, Grafana's JSON."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

from hybrid_rl.charts import CHARTS, Chart
from hybrid_rl.settings import ConfigError
from hybrid_rl.tracking.to_prometheus import is_total, metric_name

_GRAFANA_UNITS = {"seconds": "s", "bytes": "bytes", "share": "percentunit"}


def save_wandb_workspace(project: str) -> str:
    """Save the dashboard as a workspace view of `project` (`entity/project`). Returns its address.

    Raises `ConfigError` without wandb-workspaces, a key, or the right to write there.
    """
    entity, _, name = project.partition("/")
    if not entity or not name:
        raise ConfigError(f"--wandb {project!r} is not of the form ENTITY/PROJECT")
    if importlib.util.find_spec("wandb_workspaces") is None:
        raise ConfigError("--wandb needs wandb-workspaces, which is not installed; pip install wandb-workspaces")
    try:
        return wandb_workspace(entity, name).save().url
    except Exception as error:  # wandb's, requests' and GraphQL's, by what went wrong
        raise ConfigError(f"--wandb {project}: {error}; run `wandb login`, and look at the names") from None


def wandb_workspace(entity: str, project: str) -> Any:
    """The dashboard as wandb has it, not saved."""
    import wandb_workspaces.reports.v2 as panels  # pyright: ignore[reportMissingImports]
    import wandb_workspaces.workspaces as workspaces  # pyright: ignore[reportMissingImports]

    def panel(chart: Chart) -> Any:
        if any("*" in metric for metric in chart.metrics):
            return panels.LinePlot(title=chart.title, x="Step", metric_regex=chart.expression)
        plot_type = "stacked-area" if chart.stacked else "line"
        return panels.LinePlot(title=chart.title, x="Step", y=list(chart.metrics), plot_type=plot_type)

    sections = [
        workspaces.Section(name=name, panels=[panel(chart) for chart in charts], is_open=name == "Learning")
        for name, charts in CHARTS.items()
    ]
    sections.append(workspaces.Section(name="Rollouts", panels=[panels.WeavePanelSummaryTable(table_name="rollouts")]))
    return workspaces.Workspace(entity=entity, project=project, name="Hybrid-RL", sections=sections)


def write_grafana(path: Path) -> Path:
    """Write a dashboard for Grafana to import, over what `tracking.prometheus` serves."""
    try:
        path.write_text(json.dumps(grafana(), indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--grafana {path}: {error}") from None
    return path


def grafana() -> dict[str, Any]:
    """The dashboard as Grafana has it: a choice of source and run, and a panel a chart."""
    panels: list[dict[str, Any]] = []
    top = 0
    for name, charts in CHARTS.items():
        panels.append({"type": "row", "title": name, "gridPos": {"x": 0, "y": top, "w": 24, "h": 1}, "panels": []})
        for i, chart in enumerate(charts):
            place = {"x": 8 * (i % 3), "y": top + 1 + 8 * (i // 3), "w": 8, "h": 8}
            panels.append({**_grafana_panel(chart), "gridPos": place})
        top += 1 + 8 * -(-len(charts) // 3)
    source = {"name": "source", "label": "Source", "type": "datasource", "query": "prometheus"}
    run = {
        "name": "run",
        "label": "Run",
        "type": "query",
        "datasource": {"type": "prometheus", "uid": "${source}"},
        "query": "label_values(hybrid_rl_step, run)",
        "refresh": 2,
        "multi": True,
        "includeAll": True,
    }
    return {
        "title": "Hybrid-RL",
        "uid": "hybrid-rl",
        "schemaVersion": 39,
        "refresh": "30s",
        "time": {"from": "now-3h", "to": "now"},
        "templating": {"list": [source, run]},
        "panels": [{"id": i, **panel} for i, panel in enumerate(panels, start=1)],
    }


def _grafana_panel(chart: Chart) -> dict[str, Any]:
    stacking = {"stacking": {"mode": "normal"}, "fillOpacity": 30} if chart.stacked else {}
    return {
        "type": "timeseries",
        "title": chart.title,
        "datasource": {"type": "prometheus", "uid": "${source}"},
        "fieldConfig": {
            "defaults": {"unit": _GRAFANA_UNITS.get(chart.unit, "short"), "custom": stacking},
            "overrides": [],
        },
        "targets": [
            {"refId": f"{i}", "expr": _query(metric), "legendFormat": "{{run}} {{__name__}}"}
            for i, metric in enumerate(chart.metrics)
        ],
    }


def _query(metric: str) -> str:
    """PromQL of a metric, or of the pattern of several; of counts, the total so far."""
    name = metric_name(metric.replace("*", "STAR")).replace("STAR", ".+")
    name += "_total" if is_total(metric) else ""
    return f'{{__name__=~"{name}", run=~"$run"}}' if "*" in metric else f'{name}{{run=~"$run"}}'
