"""Where the time of training steps goes, as a flame graph.

    python benchmarks/profile_step.py [--steps 30] [--out profile.svg] [key=value ...]

Runs configs/quickstart.yaml in one process (`cluster.backend=inline`, one learner rank, the transformers engine), and
looks every `PERIOD` seconds at what the loop's thread is doing, from after the first `WARM_UP` steps to the end of the
last but one; rewards are computed in other processes, and show as the wait for them. The picture is an SVG: a box's
width is its share of the samples, what it calls stands on it, and its figures show on hovering. The table below lists
the calls that most samples are in themselves.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from types import FrameType
from typing import Any

from rich.console import Console
from rich.table import Table

from hybrid_rl.config_file import load_config
from trainers import grpo

CONFIG = "configs/quickstart.yaml"
LAYOUT = ("cluster.backend=inline", "learner.world_size=1", "rollout.engine=transformers", "rollout.engines=1")
QUIET = ("eval.every=0", "checkpoint.every=0", "eval.k=0", "data.eval_size=8")
PERIOD = 0.002
WARM_UP = 5
COLOURS = {
    "hybrid-rl": "#e8743b",
    "transformers": "#f2b134",
    "peft": "#8ab17d",
    "deepspeed": "#5b8db8",
    "other": "#c9c4bc",
}
_HIDDEN = ("torch/nn/modules/module.py", "torch/utils/_contextlib.py", "utils/generic.py", "output_capturing.py")
_HIDDEN += ("contextlib.py", "nvtx.py", "modeling_layers.py")
"""Wrappers, which are as many frames again and say nothing."""
_WIDTH, _ROW, _LETTER, _LEAST = 1200, 17, 6.3, 0.002


@dataclass
class Box:
    """A call, and the samples that were taken in it."""

    name: str
    package: str
    samples: int = 0
    inner: dict[str, Box] = field(default_factory=dict)

    def add(self, stack: Sequence[tuple[str, str]]) -> None:
        self.samples += 1
        if stack:
            (name, package), *rest = stack
            self.inner.setdefault(name, Box(name, package)).add(rest)

    @property
    def depth(self) -> int:
        return 1 + max((box.depth for box in self.inner.values()), default=0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--out", type=Path, default=Path("profile.svg"))
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    options = parser.parse_args()
    if options.steps < WARM_UP + 3:
        parser.error(f"--steps must be at least {WARM_UP + 3}")
    with tempfile.TemporaryDirectory(prefix="profile_step_") as scratch:
        settings = [f"steps={options.steps}", *LAYOUT, *QUIET, *options.overrides, f"run.dir={scratch}/run"]
        root = profile(load_config(CONFIG, settings), options.steps)
    threads = os.environ.get("OMP_NUM_THREADS", "all")
    seconds = root.samples * PERIOD / (options.steps - WARM_UP - 1)
    title = f"{options.steps - WARM_UP - 1} steps of the quick start in one process, {threads} OpenMP thread(s)"
    options.out.write_text(draw(root, f"{title}: {seconds:.3f} s each"), encoding="utf-8")
    console = Console(soft_wrap=True)
    table = Table("call", "share of the samples in itself", title=title)
    for name, samples in own_samples(root).most_common(25):
        table.add_row(name, f"{samples / root.samples:.1%}")
    console.print(table, f"written to {options.out}")


def profile(config: Any, steps: int) -> Box:
    """Sample the loop of a run from the end of step `WARM_UP` to that of step `steps - 1`."""
    root = Box("step", "other")
    thread, on, over = threading.get_ident(), threading.Event(), threading.Event()
    write_of = grpo.Recorder.write

    def write(recorder: Any, step: int, *rest: Any) -> None:
        write_of(recorder, step, *rest)
        (on.set if WARM_UP <= step < steps - 1 else on.clear)()

    def watch() -> None:
        due = time.perf_counter()
        while not over.is_set():
            due = max(due + PERIOD, time.perf_counter())
            time.sleep(max(0.0, due - time.perf_counter()))
            if on.is_set() and (frame := sys._current_frames().get(thread)) is not None:
                root.add(list(stack_of(frame)))

    grpo.Recorder.write = write  # type: ignore[method-assign]
    sys.setswitchinterval(PERIOD / 4)
    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        grpo.train(config, name="quickstart")
    finally:
        over.set()
        watcher.join()
    return root


def stack_of(frame: FrameType | None) -> Iterator[tuple[str, str]]:
    """Calls from the loop inwards, each with its package."""
    frames: list[FrameType] = []
    while frame is not None and frame.f_code.co_name != "_loop":
        frames.append(frame)
        frame = frame.f_back
    for each in reversed(frames):
        path = each.f_code.co_filename
        if not path.endswith(_HIDDEN):
            yield f"{Path(path).stem}.{each.f_code.co_qualname}", _package(path)


def _package(path: str) -> str:
    if "site-packages" not in path:
        return "hybrid-rl" if any(f"/{room}/" in path for room in ("hybrid_rl", "trainers", "rewards")) else "other"
    return next((name for name in COLOURS if f"site-packages/{name}/" in path), "other")


def own_samples(box: Box) -> Counter[str]:
    """By name, samples in a call and in nothing that it calls."""
    found = Counter({box.name: box.samples - sum(inner.samples for inner in box.inner.values())})
    for inner in box.inner.values():
        found += own_samples(inner)
    return found


def draw(root: Box, title: str) -> str:
    """The flame graph as an SVG that needs nothing else; boxes too narrow to see are left out."""
    height = root.depth * _ROW + 30
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" font-family="sans-serif" '
        f'font-size="11" role="img" aria-label="{escape(title)}"><rect width="100%" height="100%" fill="#fff"/>',
        f'<text x="4" y="14" font-size="13">{escape(title)}</text>',
    ]
    for i, (name, colour) in enumerate(COLOURS.items()):
        x = _WIDTH - 90 * (len(COLOURS) - i)
        parts.append(
            f'<rect x="{x}" y="5" width="10" height="10" fill="{colour}"/><text x="{x + 14}" y="14">{name}</text>'
        )
    parts += _boxes(root, root.samples, 0.0, 0, height)
    return "\n".join([*parts, "</svg>", ""])


def _boxes(box: Box, total: int, left: float, level: int, height: int) -> Iterator[str]:
    width = _WIDTH * box.samples / total
    y = height - (level + 1) * _ROW
    share = f"{box.samples / total:.1%}"
    yield (
        f"<g><title>{escape(box.name)}: {share}</title>"
        f'<rect x="{left:.1f}" y="{y}" width="{max(width - 0.5, 0.3):.1f}" '
        f'height="{_ROW - 1}" fill="{COLOURS[box.package]}"/>'
    )
    letters = int((width - 4) / _LETTER)
    if letters > 3:
        text = f"{box.name} {share}" if len(box.name) + len(share) < letters else box.name[:letters]
        yield f'<text x="{left + 3:.1f}" y="{y + 12}">{escape(text)}</text>'
    yield "</g>"
    for inner in box.inner.values():
        if inner.samples / total >= _LEAST:
            yield from _boxes(inner, total, left, level + 1, height)
        left += _WIDTH * inner.samples / total


if __name__ == "__main__":
    main()
