"""The README.md of an export: what was trained how, what came of it, and how to load it.

Strings of the user's are escaped; files of theirs are named without their directories, except the base model.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from hybrid_rl.config import Config
from hybrid_rl.plan import AdaptationPlan
from hybrid_rl.rollout.engine import ADAPTER_RANKS
from hybrid_rl.treatments import TREATMENTS

_IMPORT = "from transformers import AutoModelForCausalLM"
_SHOWN = 8
"""Tensors in the table of rounding errors."""


def model_card(config: Config, plan: AdaptationPlan, manifest: Mapping[str, Any]) -> str:
    """Markdown with a header for the hub."""
    kind, step = manifest["format"], manifest["step"]
    head = {
        "base_model": config.model.path,
        "library_name": {"peft": "peft", "merged": "transformers"}.get(kind, "hybrid-rl"),
        "pipeline_tag": "text-generation",
        "tags": ["hybrid-rl", "reinforcement-learning", config.algorithm],
    }
    what = {
        "peft": "a PEFT adapter of the base model, with the fully fine-tuned modules in it",
        "merged": "a whole model, with everything that was trained merged in",
        "delta": "what differs from the base model, exactly as it was trained",
    }[kind]
    rank = f", the adapters cut to rank {manifest['rank']}" if manifest["rank"] else ""
    parts = [
        f"---\n{yaml.safe_dump(head, sort_keys=False, allow_unicode=True)}---",
        f"# {escape(config.model.path)}, trained by {escape(config.algorithm)}",
        f"This is {what}{rank}. It was trained by reinforcement learning with verifiable rewards under an adaptation "
        f"plan (`plan.json`, {plan.hash}), and exported after step {step} of {config.steps}.",
        "## How to load it\n\n" + _commands(manifest["commands"]),
        "## Metrics\n\n" + _table(("metric", "value"), _metrics(manifest)),
        f"## Plan\n\n{escape(plan.topology)}; {plan.totals['trainable_params']:,} trained parameters.\n\n"
        + _plan(plan),
        "## Settings\n\n" + _table(("setting", "value"), _settings(config)),
    ]
    if manifest.get("rounding"):
        parts.insert(-2, "## Rounding\n\n" + _rounding(manifest))
    return "\n\n".join(parts) + "\n"


def load_commands(kind: str, model: str, lora: int) -> dict[str, str]:
    """By tool, how an export in a directory DIR is used. `lora`: the rank of a `peft` that is LoRA alone, else 0."""
    base, shell = json.dumps(model), shlex.quote(model.replace("\n", " "))
    carry_on = "hybrid-rl import DIR --config CONFIG"
    if kind == "merged":
        return {
            "transformers": f'{_IMPORT}\nmodel = AutoModelForCausalLM.from_pretrained("DIR", dtype="auto")',
            "vllm": "vllm serve DIR",
            "lm-evaluation-harness": "lm_eval --model hf --model_args pretrained=DIR --tasks TASK",
            "hybrid-rl": carry_on,
        }
    if kind == "delta":
        lines = ["from pathlib import Path", "from hybrid_rl.config import ModelConfig"]
        lines += ["from hybrid_rl.export import load_export"]
        lines += [f'model = load_export(Path("DIR"), ModelConfig(path={base})).model']
        return {"hybrid-rl": carry_on, "python": "\n".join(lines)}
    lines = ["from peft import PeftModel", _IMPORT]
    lines += [f'model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained({base}), "DIR")']
    commands = {"peft": "\n".join(lines)}
    if lora and (reserved := next((rank for rank in ADAPTER_RANKS if rank >= lora), None)):
        commands["vllm"] = f"vllm serve {shell} --enable-lora --max-lora-rank {reserved} --lora-modules policy=DIR"
    return {**commands, "hybrid-rl": carry_on}


def escape(text: str) -> str:
    """Text on one line of Markdown that is nothing but text."""
    return re.sub(r"([\\`*_{}\[\]<>()#+|!~&$])", r"\\\1", " ".join(text.split()))


def _commands(commands: Mapping[str, str]) -> str:
    fences = {name: "sh" if name in ("vllm", "hybrid-rl", "lm-evaluation-harness") else "python" for name in commands}
    return "\n\n".join(f"{name}:\n\n~~~~~{fences[name]}\n{text}\n~~~~~" for name, text in commands.items())


def _metrics(manifest: Mapping[str, Any]) -> list[tuple[str, str]]:
    row, summary = manifest["metrics"], manifest["summary"]
    rows = [(f"{name}, before training", value) for name, value in summary.get("eval_before", {}).items()]
    after = {name: value for name, value in row.items() if name.startswith("eval/")}
    if not after and summary.get("steps") == manifest["step"]:
        after = summary.get("eval_after", {})
    rows += [(name, value) for name, value in after.items()]
    rows += [(name, row[name]) for name in ("reward/mean", "policy/rollout_kl", "tokens/generated") if name in row]
    if (probe := manifest.get("probe")) is not None:
        rows.append(("largest logit difference from the policy in fp32, reloaded", probe["max_logit_difference"]))
    return [(name, "-" if value is None else f"{value:.4g}") for name, value in rows]


def _plan(plan: AdaptationPlan) -> str:
    used = [name for name in TREATMENTS if any(m.treatment == name for m in plan.modules)]
    rows = []
    for component in dict.fromkeys(m.component for m in plan.modules):
        members = [m for m in plan.modules if m.component == component]
        counts = [str(sum(m.treatment == t for m in members)) for t in used]
        rows.append((component, str(len(members)), f"{sum(m.params for m in members):,}", *counts))
    return _table(("component", "weights", "parameters", *used), rows)


def _settings(config: Config) -> list[tuple[str, str]]:
    settings = {
        "algorithm": config.algorithm,
        "algo.kl_coef": config.algo.kl_coef,
        "data.train": _named(config.data.train),
        "rewards": ", ".join(_named(spec.plugin) for spec in config.rewards),
        "steps": config.steps,
        "seed": config.seed,
        "batch.prompts": config.batch.prompts,
        "batch.num_generations": config.batch.num_generations,
        "batch.mini_batches": config.batch.mini_batches,
        "sampling.temperature": config.sampling.temperature,
        "sampling.max_completion_length": config.sampling.max_completion_length,
        "full.lr": config.full.lr,
        "lora.lr": config.lora_lr,
        "model.dtype": config.model.dtype,
    }
    return [(name, f"{value:g}" if isinstance(value, float) else str(value)) for name, value in settings.items()]


def _named(source: str) -> str:
    """A local file's or plugin's own name; anything else as it is."""
    return source.rpartition("/")[2] if Path(source.partition(":")[0]).exists() or source[:1] in "/.~" else source


def _rounding(manifest: Mapping[str, Any]) -> str:
    rounding = manifest["rounding"]
    worst = sorted(rounding, key=lambda name: -rounding[name]["max_error"])[:_SHOWN]
    rows = []
    for name in worst:
        r = rounding[name]
        numbers = (f"{r[key]:.3g}" for key in ("max_error", "mean_error", "mean_change"))
        rows.append((name, r["dtype"], *numbers, f"{r['undone']:.1%}"))
    header = ("tensor", "type", "largest error", "mean error", "mean change by training", "changes undone")
    return (
        "Trained weights were computed in fp32 and cast once to the types of the base model's files.\n\n"
        + _table(header, rows)
        + f"\n\n{len(worst)} of {len(rounding)} trained tensors, with the largest errors; all are in `export.json`."
    )


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(c if c == "---" else escape(c) for c in line) + " |" for line in lines)
