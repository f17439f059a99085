"""The README.md of an export: what was trained how, what came of it, and how to load it.

Strings of the user's are escaped; files and models of theirs are named without their directories.
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
from hybrid_rl.treatments import ROUTED, TREATMENTS

_IMPORT = "from transformers import AutoModelForCausalLM"
_SHOWN = 8
"""Tensors in the table of rounding errors."""


def model_card(config: Config, plan: AdaptationPlan, manifest: Mapping[str, Any]) -> str:
    """Markdown with a header for the hub."""
    kind, step, model = manifest["format"], manifest["step"], shown_model(config.model.path)
    hub = {"base_model": model} if model == config.model.path else {}
    head = {
        **hub,
        "library_name": {"peft": "peft", "merged": "transformers"}.get(kind, "hybrid-rl"),
        "pipeline_tag": "text-generation",
        "tags": ["hybrid-rl", "reinforcement-learning", config.algorithm],
    }
    what = {
        "peft": "a PEFT adapter of the base model"
        + (", with the fully fine-tuned modules in it" if any(m.trains_weight for m in plan.modules) else ""),
        "merged": "a whole model, with everything that was trained merged in",
        "delta": "what differs from the base model, exactly as it was trained",
    }[kind]
    rank = f", the adapters cut to rank {manifest['rank']}" if manifest["rank"] else ""
    parts = [
        f"---\n{yaml.safe_dump(head, sort_keys=False, allow_unicode=True)}---",
        f"# {escape(model)}, trained by {escape(config.algorithm)}",
        f"This is {what}{rank}. It was trained by reinforcement learning with verifiable rewards under an adaptation "
        f"plan (`plan.json`, {plan.hash}), and exported after step {step} of {config.steps}."
        + _origin(manifest.get("started_from", {})),
        "## How to load it\n\n" + _commands(manifest["commands"]),
        "## Metrics\n\n"
        + ("Of the policy as it was trained, not of this rank.\n\n" if manifest["rank"] else "")
        + _table(("metric", "value"), _metrics(manifest)),
        f"## Plan\n\n{escape(plan.topology)}; {plan.totals['trainable_params']:,} trained parameters.\n\n"
        + _plan(plan),
        "## Settings\n\n" + _table(("setting", "value"), _settings(config, plan)),
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


def shown_model(path: str) -> str:
    """A local model's own name; a hub name as it is."""
    return Path(path).resolve().name if Path(path).exists() or path[:1] in ("/", ".", "~") else path


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


def _origin(started_from: Mapping[str, Any]) -> str:
    """The exports that training started from, the latest first."""
    chain = []
    while started_from:
        step = f" after step {started_from['step']}" if "step" in started_from else ", made elsewhere"
        plan = f", plan {started_from['plan']}" if "plan" in started_from else ""
        chain.append(f"an export (`{started_from['format']}`){step}{plan}")
        started_from = started_from.get("started_from") or {}
    return f" Training started from {', which started from '.join(chain)}." if chain else ""


def _plan(plan: AdaptationPlan) -> str:
    used = [name for name in TREATMENTS if any(m.treatment == name for m in plan.modules)]
    rows = []
    for component in dict.fromkeys(m.component for m in plan.modules):
        members = [m for m in plan.modules if m.component == component]
        counts = [str(sum(m.treatment == t for m in members)) for t in used]
        rows.append((component, str(len(members)), f"{sum(m.params for m in members):,}", *counts))
    return _table(("component", "weights", "parameters", *used), rows)


def _settings(config: Config, plan: AdaptationPlan) -> list[tuple[str, str]]:
    settings: dict[str, Any] = {
        "adaptation": config.adaptation if config.plan.given is None else "a finished plan",
        **_adapters(config, plan),
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
    return [(name, _text(value)) for name, value in settings.items()]


def _adapters(config: Config, plan: AdaptationPlan) -> dict[str, Any]:
    """Of each treatment with an adapter, what the plan says of all its modules, and the settings that training has."""
    found: dict[str, Any] = {}
    for treatment in (name for name in TREATMENTS if TREATMENTS[name].adapter):
        modules = plan.named(treatment)
        said = [("rank", m.rank) for m in modules] + [("alpha", m.alpha) for m in modules]
        said += [item for m in modules for item in m.options.items()]
        for name in dict.fromkeys(name for name, value in said if value is not None):
            values = dict.fromkeys(_text(value) for other, value in said if other == name)
            found[f"{treatment}: {name}"] = " or ".join(values)
    for section, treatments in {"molf": ROUTED, "adalora": ("adalora",)}.items():
        if any(plan.named(treatment) for treatment in treatments):
            settings = getattr(config, section).model_dump()
            found |= {f"{section}.{name}": settings[name] for name in _WHILE_TRAINING[section]}
    return found


_WHILE_TRAINING = {
    "molf": ("score", "top_k", "calibration", "lr_factors"),
    "adalora": ("warmup", "final", "every", "beta1", "beta2", "orth_reg_weight"),
}
"""Settings of treatments that are not in the plan."""


def _text(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(list(value) if isinstance(value, tuple) else value)


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
