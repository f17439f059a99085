"""The live view: a panel on a terminal, lines elsewhere."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from hybrid_rl.config_file import parse_config
from hybrid_rl.screen import RunScreen, sparkline
from hybrid_rl.tracking import Alert


def row(step: int, **more: float) -> dict[str, float]:
    known = {"step": step, "reward/mean": step / 10, "time/step": 2.0, "time/generate": 1.0, "time/train": 1.0}
    return known | {"tokens/generated": 100, "staleness/mean": 0.5, "staleness/max": 1.0, **more}


def watched(tiny_tree: dict, console: Console) -> RunScreen:
    screen = RunScreen(parse_config({**tiny_tree, "steps": 8}), 0, console)
    with screen:
        screen.show_start(0, {"eval/accuracy": 0.25}, 0)
        alert = Alert("rewards fail", 2, "[red]half[/red]\x1b]0;owned\x07 of them")
        screen.show_step(row(1, **{"faults/engine_restarts": 1, "faults/skipped_in_a_row": 7}))
        screen.show_step(row(2, **{"faults/engine_restarts": 1, "eval/accuracy": 0.5}), [alert])
        screen.show_step(row(3))
    return screen


@pytest.mark.parametrize("width", [60, 110])
def test_the_panel_tells_how_the_run_stands(tiny_tree: dict, width: int):
    console = Console(file=io.StringIO(), force_terminal=True, width=width, record=True)
    screen = watched(tiny_tree, console)
    console.export_text()
    console.print(screen._panel())
    lines = console.export_text().splitlines()
    told = " ".join(" ".join(lines).replace("│", " ").split())
    for part in (
        *("step 3/8", "2.0 s a step, 10 s left", "reward 0.300 ▁▅█", "held-out 0.500 at step 2", "50 sampled"),
        *("0.50 updates, at most 1", "engine_restarts 2", "generate 50% ■ train 50%"),
        "step 2 rewards fail: [red]half[/red]\\x1b]0;owned\\x07 of them",
    ):
        assert part in told, part
    assert "skipped_in_a_row" not in told
    assert max(map(len, lines)) == width


def test_without_a_terminal_there_are_lines(tiny_tree: dict):
    out = io.StringIO()
    watched(tiny_tree, Console(file=out, width=100))
    assert out.getvalue().splitlines()[1:] == [
        "step 1  reward 0.100  2.00 s  held-out 0.250 at step 0",
        "step 2  reward 0.200  2.00 s  held-out 0.500 at step 2",
        "step 3  reward 0.300  2.00 s  held-out 0.500 at step 2",
    ]
    assert "\x1b" not in out.getvalue()


def test_a_sparkline_is_between_its_lowest_and_highest():
    assert sparkline([0, 1, 2, 3.5, 7]) == "▁▂▃▅█"
    assert sparkline([4, 4]) == "▁▁"
    assert sparkline([]) == ""
