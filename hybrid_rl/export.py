"""Trained policies that leave the project: `hybrid-rl export`, and what opens them again.

An export is a directory of one of three formats, `peft`, `merged` or `delta`, with `plan.json`, a model card and
`export.json`: its format, base model, step and metrics, how to load it, and digests of its files. It is written aside,
synced and renamed; tensors are in safetensors files alone. Everything is on the CPU, without Ray or DeepSpeed.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors import safe_open
from torch import Tensor

from hybrid_rl.adaptation import WEIGHTS, AdaptedModel, apply_plan, read_start, read_weights
from hybrid_rl.adaptation.delta import write_delta
from hybrid_rl.adaptation.peft_files import PEFT_CONFIG, NotPeft, peft_plan, write_peft
from hybrid_rl.checkpoint import STATE, TrainerState, checkpoints, load_state
from hybrid_rl.components import Anatomy, read_model
from hybrid_rl.config import Config, ConfigError, ModelConfig
from hybrid_rl.config_file import load_config
from hybrid_rl.data import load_tokenizer
from hybrid_rl.files import sync_path, sync_tree, write_atomically
from hybrid_rl.merged_files import NotInFiles, write_merged
from hybrid_rl.model_card import load_commands, model_card
from hybrid_rl.plan import AdaptationPlan, architecture_of
from hybrid_rl.stored_policy import load_base
from hybrid_rl.tracking import RunDirectory, read_metrics
from hybrid_rl.weight_sync import BaseFiles, digest

logger = logging.getLogger(__name__)

FORMATS = ("peft", "merged", "delta")
MANIFEST = "export.json"
_VERSION = 1
_CARD, _PLAN = "README.md", "plan.json"
_PROBE = (2, 32)
"""Sequences and tokens on which a reloaded export is compared with the policy."""
_ROUNDING_ERROR = 1e-3
"""Of logits, relative to the largest: what arithmetic in another order may come to where nothing is rounded."""


@dataclass(frozen=True)
class Export:
    """An export whose files are whole, or a PEFT directory made elsewhere."""

    directory: Path
    format: str
    """A name of `FORMATS`."""
    plan: AdaptationPlan | None
    """Of the run that it was exported from; `None` of what was made elsewhere."""
    manifest: Mapping[str, Any]
    """`export.json`; empty of what was made elsewhere."""
    setting: str = "DIR"
    """What gives the directory, for error messages."""

    def check_base(self, model_path: str) -> None:
        """Refuse another base model than the export's, by digests of its tensors."""
        if not self.manifest:
            return
        wanted, held = self.manifest["base"]["tensors"], dict(_base_digests(BaseFiles(model_path)))
        differing = sorted(name for name in wanted.keys() | held.keys() if wanted.get(name) != held.get(name))
        if differing:
            raise ConfigError(
                f"model.path={model_path!r} is not the base model of {self.named}: {len(differing)} tensors differ, "
                f"e.g. {differing[0]}; use {self.manifest['base']['model']!r} as it was"
            )

    def trained_plan(self, anatomy: Anatomy, model_path: str, seed: int = 0) -> AdaptationPlan:
        """The plan under which training goes on from it: of `peft`, what its files hold, folded as they are."""
        if self.format == "merged":
            raise ConfigError(f"{self.named} is a whole model, which training starts from with model.path")
        if self.format == "delta":
            assert self.plan is not None
            return self.plan
        try:
            return peft_plan(self.directory, anatomy, model_path, seed, self.plan)
        except NotPeft as error:
            raise ConfigError(f"{self.named} cannot be trained further: {error}") from None

    @property
    def named(self) -> str:
        """For error messages."""
        return f"{self.setting}={str(self.directory)!r}"


def export_run(
    run: Path,
    to: str,
    out: Path,
    rank: int | None = None,
    *,
    checkpoint: Path | None = None,
    overrides: Sequence[str] = (),
) -> Export:
    """Write a run's policy to the directory `out`, which must not be there yet.

    `rank`: its Matryoshka adapters' first so many ranks alone, without P. `checkpoint`: by default the last finished
    one. `overrides`: of the run's settings, for a base model that is elsewhere now. Raises `ConfigError` for what
    cannot be exported so.
    """
    if to not in FORMATS:
        raise ConfigError(f"--to {to}: use one of {', '.join(FORMATS)}")
    if out.exists() or out.is_symlink():
        raise ConfigError(f"--out {out} exists already; choose another")
    other = [o for o in overrides if o.partition("=")[0].strip() not in ("model.path", "model.trust_remote_code")]
    if other:
        raise ConfigError(f"{other[0]} does nothing for an export, which takes only model.path; drop it")
    source = _read_run(run, checkpoint, overrides)
    _check_rank(source.plan, to, rank)
    load_tokenizer(source.config)  # also brings a hub model's tokenizer here
    with _written_aside(out) as directory:
        report = _write(source, to, directory, rank)
        lora = report.pop("lora", 0)
        manifest = {
            "version": _VERSION,
            "format": to,
            "step": source.state.step,
            "rank": rank,
            "plan": source.plan.hash,
            "metrics": source.metrics,
            "summary": source.summary,
            "commands": load_commands(to, source.config.model.path, lora),
            **report,
        }
        source.plan.save(directory / _PLAN)
        manifest["files"] = _file_digests(directory)
        write_atomically(directory / MANIFEST, json.dumps(manifest, indent=1) + "\n")
        write_atomically(directory / _CARD, model_card(source.config, source.plan, manifest))
    return open_export(out, "--out")


def open_export(directory: Path, setting: str = "DIR") -> Export:
    """Check that an export's files are what was written. `setting` is what error messages call it.

    Raises `ConfigError` if it is none, or a file of it is missing or damaged.
    """
    named = f"{setting}={str(directory)!r}"
    path = directory / MANIFEST
    if not path.is_file():
        if (directory / PEFT_CONFIG).is_file():
            return Export(directory, "peft", None, {}, setting)
        raise ConfigError(f"{named} is no export: it has neither {MANIFEST} nor {PEFT_CONFIG}")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        version, kind, files = manifest["version"], manifest["format"], dict(manifest["files"])
        manifest["base"]["tensors"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{named}: {MANIFEST} cannot be read: {type(error).__name__}: {error}") from None
    if version != _VERSION or kind not in FORMATS:
        raise ConfigError(
            f"{named} is of format {kind!r}, version {version}; this program reads version {_VERSION} of "
            f"{', '.join(FORMATS)}"
        )
    for name, wanted in files.items():
        if Path(name).name != name or not (directory / name).is_file():
            raise ConfigError(f"{named} has no {name}, which {MANIFEST} lists; export it again")
        if _sha256(directory / name) != wanted:
            raise ConfigError(f"{named}: {name} is not what was exported (its sha256 differs); export it again")
    return Export(directory, kind, AdaptationPlan.load(directory / _PLAN, setting), manifest, setting)


def load_export(directory: Path, model: ModelConfig, setting: str = "DIR") -> AdaptedModel:
    """The policy of a `delta` or `peft` export, or of a PEFT directory made elsewhere, in fp32 on the CPU.

    Raises `ConfigError` if the files are damaged, or `model` is not the base model.
    """
    export = open_export(directory, setting)
    export.check_base(model.path)
    base = load_base(model)
    anatomy = read_model(base, export.manifest.get("base", {}).get("components", {}))
    plan = export.trained_plan(anatomy, model.path)
    plan.check_against(anatomy)
    adapted = apply_plan(base, plan)
    read_start(adapted, directory)
    wanted = export.manifest.get("tensors", {})
    wrong = [name for name, parameter in adapted.trained.items() if wanted and digest(parameter) != wanted[name]]
    if wrong:
        raise RuntimeError(f"{export.named}: {wrong[0]} was not restored as it was exported")
    return adapted


def starting_from(directory: Path) -> list[str]:
    """Settings, as `key=value`, with which training goes on from an export: its plan and values, or it as the model."""
    export = open_export(directory)
    if export.format == "merged":
        return [f"model.path={json.dumps(str(directory))}"]
    plan: dict[str, Any] = {"start": str(directory)}
    if export.manifest and export.manifest["base"]["components"]:
        plan["components"] = export.manifest["base"]["components"]
    return [f"plan={json.dumps(plan)}", "adaptation=hybrid"]


def start_plan(config: Config, anatomy: Anatomy) -> AdaptationPlan:
    """The plan of the export `plan.start`, whose files and base model are checked."""
    assert config.plan.start is not None
    export = open_export(Path(config.plan.start), "plan.start")
    plan = export.trained_plan(anatomy, config.model.path, config.seed)
    plan.check_against(anatomy)
    export.check_base(config.model.path)
    if export.plan is None:
        logger.warning(
            "%s has no digests; that model.path=%r is its base model is taken on trust", export.named, config.model.path
        )
    return plan


# --- a run, as it is read ---


@dataclass(frozen=True)
class _Source:
    config: Config
    plan: AdaptationPlan
    state: TrainerState
    weights: Path
    metrics: Mapping[str, Any]
    """Of the step."""
    summary: Mapping[str, Any]


def _read_run(path: Path, checkpoint: Path | None, overrides: Sequence[str]) -> _Source:
    run = RunDirectory(path)
    for needed in (run.config, run.plan):
        if not needed.is_file():
            raise ConfigError(f"RUN={str(path)!r} is no run: it has no {needed.name}")
    config, plan = load_config(run.config, overrides), AdaptationPlan.load(run.plan, "RUN's plan.json")
    chosen = checkpoint or next(iter(checkpoints(run.checkpoints)[::-1]), None)
    if chosen is None:
        raise ConfigError(f"RUN={str(path)!r} has no finished checkpoint")
    if not ((chosen / STATE).is_file() and (chosen / WEIGHTS).is_file()):
        raise ConfigError(f"--checkpoint {chosen} is no finished checkpoint: it has no {STATE} or no {WEIGHTS}")
    state = load_state(chosen)
    if state.plan_hash != plan.hash:
        raise ConfigError(f"{run.plan} was changed since {chosen.name} was saved; restore it")
    rows = read_metrics(run.metrics) if run.metrics.is_file() else []
    metrics = next((row for row in rows if row["step"] == state.step), dict(state.row))
    summary = run.read_summary() if run.summary.is_file() else {}
    return _Source(config, plan, state, chosen / WEIGHTS, metrics, summary)


def _check_rank(plan: AdaptationPlan, to: str, rank: int | None) -> None:
    if rank is None:
        return
    largest = max((m.rank or 0 for m in plan.named("matryoshka")), default=0)
    if not largest:
        raise ConfigError(f"--rank {rank}: only matryoshka adapters have ranks to choose from, and the plan has none")
    if to == "delta":
        raise ConfigError(f"--rank {rank}: --to delta keeps all that was trained; use --to peft or merged")
    if not 1 <= rank <= largest:
        raise ConfigError(f"--rank {rank}: the plan's adapters have ranks from 1 to {largest}")


# --- writing ---


@contextmanager
def _written_aside(out: Path) -> Iterator[Path]:
    """A directory that becomes `out` once it is whole and on the disk; nothing is left of it otherwise."""
    aside = out.parent / f".writing_{out.name}"
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir()
    except OSError as error:
        raise ConfigError(f"--out {out} cannot be written: {error}") from None
    try:
        yield aside
        sync_tree(aside)
        aside.rename(out)
        sync_path(out.parent)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise


@torch.no_grad()
def _write(source: _Source, to: str, directory: Path, rank: int | None) -> dict[str, Any]:
    """Write the tensors, and say what they are, what they are based on, and what the policy lost on the way."""
    model = source.config.model
    files = BaseFiles(model.path)
    if not files.by_file():
        raise ConfigError(f"model.path={model.path!r} has no safetensors files, by which exports know their base model")
    base = load_base(model)
    components = source.config.plan.components
    anatomy = read_model(base, components)
    source.plan.check_against(anatomy)
    packed = next((w.name for w in anatomy.weights if w.quantised), None)
    if packed is not None and to == "merged":
        raise ConfigError(f"--to merged: {packed} is quantised in model.path={model.path!r}; use --to peft or delta")
    report: dict[str, Any] = {
        "base": {
            "model": model.path,
            "architecture": architecture_of(anatomy),
            "components": dict(components),
            "tensors": dict(_base_digests(files)),
        },
    }
    adapted = apply_plan(base, source.plan)
    originals = {name: p.detach().clone() for name, p in adapted.full.items()} if to == "delta" else {}
    try:
        read_weights(adapted, source.weights)
    except ValueError as error:
        raise ConfigError(f"the checkpoint is not of the run's plan: {error}") from None
    if to == "delta":
        trained = adapted.trained
        beside = [(name, p) for name, p in trained.items() if name not in adapted.full]
        write_delta(((name, p, originals[name]) for name, p in adapted.full.items()), beside, directory)
        return report | {"tensors": {name: digest(p) for name, p in trained.items()}}
    adapted.use_rank(rank)
    wanted = _probe(adapted.model)
    if to == "peft":
        try:
            report["lora"] = write_peft(adapted, source.plan, directory, model.path)
        except NotPeft as error:
            raise ConfigError(f"--to peft: PEFT cannot hold this policy: {error}; use --to merged or delta") from None
        del adapted, base
        reloaded: Any = PeftModel.from_pretrained(load_base(model), str(directory)).eval()
        exact = True
    else:
        try:
            rounding = write_merged(adapted, model.path, directory)
        except NotInFiles as error:
            raise ConfigError(f"--to merged: {error}; use --to peft or delta") from None
        del adapted, base
        report["rounding"] = {name: asdict(r) for name, r in rounding.items()}
        reloaded = load_base(model.model_copy(update={"path": str(directory)}))
        exact = not any(r.max_error for r in rounding.values())
    return report | {"probe": _compared(_probe(reloaded), wanted, exact)}


def _probe(model: Any) -> Tensor:
    """Logits [sequences, tokens, vocabulary] of token ids that depend on nothing but the size of the vocabulary."""
    size = model.get_input_embeddings().weight.shape[0]
    ids = torch.randint(size, _PROBE, generator=torch.Generator().manual_seed(0))
    return model(input_ids=ids, use_cache=False).logits.float()


def _compared(found: Tensor, wanted: Tensor, exact: bool) -> dict[str, Any]:
    """How far the reloaded model's logits are from the policy's. Raises `RuntimeError` where that is a mistake."""
    apart = (found - wanted).abs()
    largest = float(apart.max())
    if not largest <= (_ROUNDING_ERROR * float(wanted.abs().max()) if exact else float("inf")):
        raise RuntimeError(f"the reloaded export computes logits that are {largest:.3g} from the policy's")
    return {
        "shape": list(_PROBE),
        "max_logit_difference": largest,
        "mean_logit_difference": float(apart.mean()),
        "max_logit": float(wanted.abs().max()),
    }


def _base_digests(files: BaseFiles) -> Iterator[tuple[str, str]]:
    """Digests of the base model's tensors by their names in its files."""
    for path, names in files.by_file().items():
        with safe_open(path, "pt") as file:
            for name in names:
                tensor = file.get_tensor(name)
                yield name, digest(tensor if tensor.dim() else tensor[None])


def _file_digests(directory: Path) -> dict[str, str]:
    return {path.name: _sha256(path) for path in sorted(directory.iterdir()) if path.name != _CARD}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
