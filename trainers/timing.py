"""Predicted seconds of a step on so many GPUs, and on a ladder of numbers of them: what `hybrid-rl estimate` says of
time. Nothing here measures anything."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.table import Table

from hybrid_rl.config import Config, ConfigError
from hybrid_rl.hardware import Hardware, gpu
from hybrid_rl.scale import Lengths, Shape, StepTime, efficiency, step_time, sync_bytes
from trainers.sizing import Sizing, gpus_needed, laid_out, layouts, resized, unfit

LADDER = (1, 8, 64, 256, 1024)
"""Numbers of GPUs that are set side by side."""
ALTERNATIVES = {
    "cluster.placement=colocate": ("colocate", 0),
    "cluster.placement=split": ("split", 0),
    "cluster.placement=split async.max_staleness=1": ("split", 1),
}
"""Settings -> `cluster.placement` and `async.max_staleness`."""
HALF = 0.5
"""Scaling efficiency below which a number of GPUs is said to be too many."""


@dataclass(frozen=True)
class Rung:
    """A number of GPUs, and a layout on them."""

    gpus: int
    config: Config
    time: StepTime
    fits: bool | None
    """Whether memory suffices; `None` if a GPU's size is not known."""


@dataclass(frozen=True)
class Timing:
    """Predicted times of one run."""

    hardware: Hardware
    lengths: Lengths
    own: Rung
    """In the layout that memory is said for."""
    ladder: Sequence[Rung]
    """By number of GPUs, each in its fastest layout."""
    other: Mapping[str, Rung]
    """The fastest layout on as many GPUs under settings that change what is done at a time."""
    shape: Shape

    @property
    def best(self) -> float:
        """Most samples a second and GPU."""
        return max(r.time.samples_per_second / r.time.devices for r in (self.own, *self.ladder))

    @property
    def enough(self) -> Rung | None:
        """The first rung beyond the best that makes less than half of it out of a GPU."""
        rungs = sorted((self.own, *self.ladder), key=lambda r: r.gpus)
        return next((r for r in rungs if efficiency(r.time, self.best) < HALF), None)


def default_gpu() -> str:
    """This machine's GPU if it is a known one, else H100."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "H100"
    try:
        return gpu(name).name
    except ConfigError:
        return "H100"


def lengths_of(config: Config, mean: int | None) -> Lengths:
    """What is assumed of a step's sequences: prompts of half their limit, completions of `mean` tokens (half of
    theirs), and one as long as it may be. Raises `ConfigError` for a mean above the limit."""
    limit = config.sampling.max_completion_length
    if mean is not None and mean > limit:
        raise ConfigError(f"--mean-length {mean} is more than sampling.max_completion_length={limit}; lower it")
    return Lengths(config.data.max_prompt_length / 2, mean or max(1.0, limit / 2), limit)


def predict(sizing: Sizing, gpus: int, hardware: Hardware, lengths: Lengths) -> Timing | None:
    """Times of the configured plan in the layout that `sizing` is of, and on the ladder. `None` where the model's cache
    is not known."""
    if sizing.shape is None:
        return None
    shape, config = sizing.shape, sizing.config

    def rung(gpus: int, chosen: Config) -> Rung:
        there = resized(sizing, chosen, gpus)
        cached = there.own.engine.device.get("KV cache") if sizing.machine.gpu_bytes else None
        room = cached * chosen.rollout.tensor_parallel if cached else None
        used = gpus_needed(chosen, chosen.learner.world_size, chosen.rollout.engines)
        time = step_time(chosen, shape, lengths, hardware, devices=max(used, 1.0), cache_bytes=room)
        return Rung(gpus, chosen, time, unfit(there) is None if sizing.machine.gpu_bytes else None)

    least = math.ceil(gpus_needed(config, config.learner.sequence_parallel, 1))

    def fastest(config: Config, count: int) -> Rung:
        every = [rung(count, laid_out(config, *layout)) for layout in layouts(config, count)]
        return min(every, key=lambda r: (r.fits is False, r.time.seconds))

    own = rung(gpus, config)
    ladder = [fastest(config, count) for count in sorted({max(each, least) for each in (*LADDER, gpus)})]
    ladder = [r for r in ladder if r.config != own.config or r.gpus != own.gpus]
    other = {}
    for what, (placement, staleness) in ALTERNATIVES.items():
        cluster = config.cluster.model_copy(update={"placement": placement})
        beside = config.asynchrony.model_copy(update={"max_staleness": staleness})
        changed = config.model_copy(update={"cluster": cluster, "asynchrony": beside})
        as_it_is = (config.cluster.placement, config.asynchrony.max_staleness)
        shared = config.learner.gpus is not None or config.rollout.gpus is not None
        if as_it_is != (placement, staleness) and not shared:
            with contextlib.suppress(ConfigError):  # too few GPUs for it
                other[what] = fastest(changed, gpus)
    return Timing(hardware, lengths, own, ladder, other, shape)


def time_table(timing: Timing) -> Table:
    """Predicted seconds by part: the layout of the memory above, then the ladder."""
    own, rungs = timing.own, [timing.own, *timing.ladder]
    title = f"Predicted step on {timing.hardware.name} GPUs, by arithmetic alone: nothing was measured"
    table = Table(title=title, title_justify="left")
    table.add_column("")
    for rung in rungs:
        gpus = f"{rung.gpus} GPU{'s' if rung.gpus != 1 else ''}"
        table.add_column(f"{gpus}, as above" if rung is own else gpus, justify="right", style="bold" * (rung is own))
    table.add_row(
        "learner ranks + engines", *(f"{r.config.learner.world_size} + {r.config.rollout.engines}" for r in rungs)
    )
    table.add_section()
    for part in own.time.parts:
        if any(r.time.parts[part] for r in rungs):
            table.add_row(f"{part}, s", *(_short(r.time.parts[part]) for r in rungs))
    whole = "step, s" if not own.time.overlapped else "step, s (generation beside training)"
    table.add_row(f"[bold]{whole}", *(f"[bold]{_short(r.time.seconds)}" for r in rungs))
    table.add_section()
    table.add_row("samples/s", *(_short(r.time.samples_per_second) for r in rungs))
    table.add_row("tokens/s", *(f"{r.time.tokens_per_second:,.0f}" for r in rungs))
    table.add_row("MFU while training", *(f"{r.time.mfu:.0%}" for r in rungs))
    table.add_row("scaling efficiency", *(f"{efficiency(r.time, timing.best):.0%}" for r in rungs))
    table.add_row("most time", *(r.time.bottleneck for r in rungs))
    if own.fits is not None:
        table.add_row("fits in memory", *("yes" if r.fits else "[yellow]no[/]" for r in rungs))
    table.caption = "\n".join(assumptions(timing))
    table.caption_justify = "left"
    return table


def assumptions(timing: Timing) -> list[str]:
    """What the predicted times rest on, and where they say that more GPUs are of little use."""
    own, hardware, lengths = timing.own, timing.hardware, timing.lengths
    engine = hardware.overheads.engines[own.config.rollout.engine]
    lines = [
        f"The batch stays {own.time.completions:,} completions a step: prompts of {lengths.prompt:,.0f} tokens, "
        f"completions of {lengths.completion:,.0f} (--mean-length), the longest {lengths.longest:,.0f}.",
        f"Of {hardware.peak_tflops:g} TFLOP/s, matrix products reach {hardware.matmul_share:.0%}; of "
        f"{hardware.memory_gbs:g} GB/s, decoding {hardware.memory_share:.0%}; links {hardware.link_gbs:g} GB/s in a "
        f"node of {hardware.per_node}, {hardware.network_gbs:g} a GPU between nodes; a round of decoding takes "
        f"{engine.round * 1e3:g} ms besides.",
        f"An update is {_size(sync_bytes(own.config, timing.shape))} on average; evaluation, checkpoints, the gate, "
        "slow rewards and faults are not counted.",
        "Efficiency: samples a second and GPU, over the best of the table. The ladder has the fastest layouts.",
    ]
    if (rung := timing.enough) is not None:
        most = rung.time.causes[rung.time.bottleneck]
        lines.append(
            f"At {rung.gpus} GPUs it is below {HALF:.0%}: {rung.time.bottleneck} takes {_short(most)} of "
            f"{_short(rung.time.seconds)} s, and more GPUs hardly shorten it at this batch."
        )
    if timing.other:
        said = "; ".join(f"{what}: {_short(r.time.seconds)} s" for what, r in timing.other.items())
        lines.append(f"A step on {own.gpus} GPUs otherwise, in the fastest layout: {said}.")
    lines.append("Formulas and how far they were off where they were checked: docs/scaling.md.")
    return lines


def as_object(timing: Timing) -> dict[str, Any]:
    """For `--json`: seconds, rates and shares under the names of the table."""

    def of(rung: Rung) -> dict[str, Any]:
        time = rung.time
        return {
            "gpus": rung.gpus,
            "learner.world_size": rung.config.learner.world_size,
            "rollout.engines": rung.config.rollout.engines,
            "seconds": dict(time.parts),
            "causes": dict(time.causes),
            "step_seconds": time.seconds,
            "samples_per_second": time.samples_per_second,
            "tokens_per_second": time.tokens_per_second,
            "mfu": time.mfu,
            "efficiency": efficiency(time, timing.best),
            "bottleneck": time.bottleneck,
            "fits": rung.fits,
        }

    return {
        "predicted": True,
        "hardware": timing.hardware.name,
        "lengths": {
            "prompt": timing.lengths.prompt,
            "completion": timing.lengths.completion,
            "longest": timing.lengths.longest,
        },
        "assumptions": assumptions(timing),
        "configured": of(timing.own),
        "ladder": [of(rung) for rung in timing.ladder],
        "otherwise": {what: of(rung) for what, rung in timing.other.items()},
    }


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _size(size: float) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.2f} MB"
