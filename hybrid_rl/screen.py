"""What a run shows in the terminal while it works."""

from __future__ import annotations

import logging
import math
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from types import TracebackType

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from hybrid_rl.config import Config
from hybrid_rl.plain_text import span, visible
from hybrid_rl.plan import AdaptationPlan
from hybrid_rl.run_directory import RunDirectory
from hybrid_rl.tables import plan_table
from hybrid_rl.tracking import NO_COUNTS, Alert

logger = logging.getLogger(__name__)

_SPARKS = "▁▂▃▄▅▆▇█"
_SEEN = 48
"""Steps that the sparkline shows, and that speeds are averaged over."""
_TIMES = {
    "generate": "blue",
    "reward": "magenta",
    "logprob": "cyan",
    "train": "green",
    "sync": "yellow",
    "gate": "bright_black",
    "eval": "bright_blue",
    "checkpoint": "red",
    "other": "white",
}


class RunScreen:
    """A run in the terminal: a panel that is kept up to date where there is a terminal, elsewhere a line every few
    steps."""

    def __init__(self, config: Config, too_long: int, console: Console | None = None) -> None:
        self._console = console or Console(soft_wrap=True, highlight=False)
        self._config, self._steps = config, config.steps
        self._doing = "starting workers"
        self._held_out = ""
        self._rows: deque[Mapping[str, float]] = deque(maxlen=_SEEN)
        self._faults: Counter[str] = Counter()
        self._alert: Alert | None = None
        if too_long:
            self._console.print(f"training prompts longer than data.max_prompt_length, left out: {too_long}")
        self._live = Live(
            console=self._console, get_renderable=self._panel, refresh_per_second=2, transient=True, auto_refresh=True
        )

    def __enter__(self) -> RunScreen:
        self._console.print("starting workers (about half a minute on a CPU) ...")
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.stop()

    def show_ranking(self, what: str, done: int, of: int) -> None:
        """How far the ranking of the modules has come."""
        self._doing = f"ranking modules: {what} {done}/{of}"
        if not self._console.is_terminal and done == 0:
            self._console.print(f"{self._doing} ...")

    def show_plan(self, plan: AdaptationPlan) -> None:
        self._doing = "preparing the learner and the engines"
        self._console.print(plan_table(plan))

    def show_start(self, step: int, evaluation: Mapping[str, float], evaluated: int) -> None:
        """Where training starts from: step 0, or the one that is resumed, last evaluated at step `evaluated`."""
        self._doing = "first step"
        self._held_out = f"{evaluation['eval/accuracy']:.3f} at step {evaluated}"
        if step:
            left = "nothing is left to do" if step == self._steps else f"{self._steps - step} steps are left"
            self._console.print(said := f"resumed after step {step} of {self._steps}; {left}")
            logger.info("%s", said)

    def show_step(self, row: Mapping[str, float], alerts: Sequence[Alert] = ()) -> None:
        step = int(row["step"])
        self._rows.append(row)
        self._doing = ""
        self._faults.update({n: int(v) for n, v in row.items() if n.startswith("faults/") and n not in NO_COUNTS and v})
        if "eval/accuracy" in row:
            self._held_out = f"{row['eval/accuracy']:.3f} at step {step}"
        if alerts:
            self._alert = alerts[-1]  # all of them are logged
        said = f"step {step}  reward {row['reward/mean']:.3f}  {row['time/step']:.2f} s  held-out {self._held_out}"
        logger.info("%s", said)
        if not self._console.is_terminal and (step % max(1, self._steps // 20) == 0 or step == self._steps):
            self._console.print(said)

    def show_result(self, run: RunDirectory, before: Mapping[str, float], after: Mapping[str, float]) -> None:
        self._live.stop()
        table = Table("held out", "before", "after", "change", title="Before and after")
        for name in ("eval/accuracy", "eval/mean_at_k"):
            if name in before:
                change = 100 * (after[name] - before[name])
                table.add_row(
                    name.removeprefix("eval/"), f"{before[name]:.3f}", f"{after[name]:.3f}", f"{change:+.1f} points"
                )
        self._console.print(table)
        for what, path in (("run directory", run.path), ("learning curve", run.curve), ("report", run.report)):
            self._console.print(f"{what:15} {path}", markup=False, highlight=False)

    def _panel(self) -> Panel:
        title = f"hybrid-rl  {self._config.run.name or self._config.model.path}"
        body: list[RenderableType] = []
        step = int(self._rows[-1]["step"]) if self._rows else 0
        bar = Table.grid(padding=(0, 1), expand=True)
        bar.add_column(no_wrap=True)
        bar.add_column(ratio=1)
        bar.add_column(no_wrap=True, justify="right")
        bar.add_row(f"step {step}/{self._steps}", ProgressBar(total=self._steps, completed=step), self._time_left())
        body.append(bar)
        if self._rows:
            body += [self._figures(), *self._time_split()]
        if self._doing:
            body.append(Text(f"{self._doing} ...", style="dim"))
        if self._alert is not None:
            said = f"step {self._alert.step}  {self._alert.name}: {self._alert.text}"
            body.append(Text(visible(said, 400), style="bold yellow"))
        return Panel(Group(*body), title=Text(visible(title, 80)), border_style="dim", expand=True)

    def _figures(self) -> Table:
        row = self._rows[-1]
        rewards = [r["reward/mean"] for r in self._rows if math.isfinite(r.get("reward/mean", math.nan))]
        seconds = sum(r["time/step"] for r in self._rows)
        figures = Table.grid(padding=(0, 2))
        figures.add_column(style="dim", no_wrap=True)
        figures.add_column(overflow="fold")
        figures.add_row("reward", f"{row.get('reward/mean', math.nan):.3f}  {sparkline(rewards)}")
        figures.add_row("held-out", self._held_out)
        generated = sum(r["tokens/generated"] for r in self._rows) / seconds
        figures.add_row(
            "tokens/s", f"{generated:,.0f} sampled  {row.get('throughput/train_tokens', 0):,.0f} trained on"
        )
        figures.add_row("staleness", f"{row['staleness/mean']:.2f} updates, at most {row['staleness/max']:.0f}")
        found = ", ".join(f"{name.removeprefix('faults/')} {n}" for name, n in self._faults.most_common(6))
        figures.add_row("faults", Text(visible(found, 300), style="yellow") if found else "none")
        return figures

    def _time_left(self) -> str:
        if not self._rows:
            return ""
        mean = sum(r["time/step"] for r in self._rows) / len(self._rows)
        return f"{mean:.1f} s a step, {span(mean * (self._steps - self._rows[-1]['step']))} left"

    def _time_split(self) -> list[RenderableType]:
        """A bar of where the seconds of the steps shown went, and its legend."""
        sums = {part: sum(r.get(f"time/{part}", 0.0) for r in self._rows) for part in _TIMES}
        total = max(1e-9, sum(sums.values()))
        width = max(20, self._console.width - 4)
        ends, cells, at = 0.0, Text(no_wrap=True), 0
        legend = Text()
        for part, colour in _TIMES.items():
            ends += width * sums[part] / total
            cells.append("█" * (round(ends) - at), style=colour)
            at = round(ends)
            if sums[part] >= 0.005 * total:
                legend.append("■ ", style=colour).append(f"{part} {sums[part] / total:.0%}  ")
        return [cells, legend]


def sparkline(values: Sequence[float]) -> str:
    low, high = min(values, default=0.0), max(values, default=0.0)
    scale = (len(_SPARKS) - 1) / (high - low) if high > low else 0.0
    return "".join(_SPARKS[round((value - low) * scale)] for value in values)


def _progress(console: Console) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console, disable=not console.is_terminal)


class Bar:
    """A progress bar for work whose parts are named as they come; plain lines where there is no terminal."""

    def __init__(self, console: Console) -> None:
        self._progress = _progress(console)
        self._console = console
        self._task = self._progress.add_task("", total=1)
        self._shown = ""

    def __enter__(self) -> Bar:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def show(self, what: str, done: int, of: int) -> None:
        """`done` of `of` parts of `what` are finished."""
        self._progress.update(self._task, description=what, completed=done, total=of)
        if not self._console.is_terminal and what != self._shown:
            self._console.print(f"{what} ...")
        self._shown = what
