"""What a run shows in the terminal while it works."""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from hybrid_rl.config import Config
from hybrid_rl.plan import AdaptationPlan
from hybrid_rl.run_directory import RunDirectory
from hybrid_rl.tables import plan_table


def _progress(console: Console) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console, disable=not console.is_terminal)


class RunScreen:
    """Progress of a run in the terminal: a bar where there is one, a line every few steps where there is not."""

    def __init__(self, config: Config, too_long: int) -> None:
        self._console = Console(soft_wrap=True)
        self._steps = config.steps
        self._held_out = ""
        if too_long:
            self._console.print(f"training prompts longer than data.max_prompt_length, left out: {too_long}")
        self._progress = _progress(self._console)
        self._task = self._progress.add_task("starting workers", total=self._steps)

    def __enter__(self) -> RunScreen:
        self._console.print("starting workers (about half a minute on a CPU) ...")
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def show_ranking(self, what: str, done: int, of: int) -> None:
        """How far the ranking of the modules has come."""
        text = f"ranking modules: {what} {done}/{of}"
        self._progress.update(self._task, description=text)
        if not self._console.is_terminal and done == 0:
            self._console.print(f"{text} ...")

    def show_plan(self, plan: AdaptationPlan) -> None:
        self._console.print(plan_table(plan))

    def show_start(self, step: int, evaluation: Mapping[str, float], evaluated: int) -> None:
        """Where training starts from: step 0, or the one that is resumed, last evaluated at step `evaluated`."""
        self._held_out = f"{evaluation['eval/accuracy']:.3f} at step {evaluated}"
        if step:
            left = "nothing is left to do" if step == self._steps else f"{self._steps - step} steps are left"
            self._console.print(f"resumed after step {step} of {self._steps}; {left}")

    def show_step(self, row: Mapping[str, float]) -> None:
        step = int(row["step"])
        if "eval/accuracy" in row:
            self._held_out = f"{row['eval/accuracy']:.3f} at step {step}"
        text = f"step {step}  reward {row['reward/mean']:.3f}  {row['time/step']:.2f} s  held-out {self._held_out}"
        self._progress.update(self._task, completed=step, description=text)
        if not self._console.is_terminal and (step % max(1, self._steps // 20) == 0 or step == self._steps):
            self._console.print(text)

    def show_result(self, run: RunDirectory, before: Mapping[str, float], after: Mapping[str, float]) -> None:
        self._progress.stop()
        table = Table("held out", "before", "after", "change", title="Before and after")
        for name in ("eval/accuracy", "eval/mean_at_k"):
            if name in before:
                change = 100 * (after[name] - before[name])
                table.add_row(
                    name.removeprefix("eval/"), f"{before[name]:.3f}", f"{after[name]:.3f}", f"{change:+.1f} points"
                )
        self._console.print(table)
        self._console.print(f"run directory   {run.path}")
        self._console.print(f"learning curve  {run.curve}")


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
