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
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from peft import PeftModel
from pydantic import BaseModel, ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from hybrid_rl.adaptation import AdaptedModel, Start, apply_plan, read_start
from hybrid_rl.adaptation.delta import write_delta
from hybrid_rl.adaptation.peft_files import PEFT_CONFIG, NotPeft, peft_plan, write_peft
from hybrid_rl.components import Anatomy, read_model
from hybrid_rl.config import Config, ConfigError, ModelConfig
from hybrid_rl.config_file import load_config
from hybrid_rl.data import load_tokenizer
from hybrid_rl.digests import digest
from hybrid_rl.files import sync_path, sync_tree, write_atomically
from hybrid_rl.merged_files import NotInFiles, write_merged
from hybrid_rl.model_card import load_commands, model_card, shown_model
from hybrid_rl.plan import AdaptationPlan, architecture_of
from hybrid_rl.run_directory import RunDirectory, read_metrics
from hybrid_rl.stored_policy import StoredPolicy, check_ranks, find_policy, load_base
from hybrid_rl.weight_sync import BaseFiles

logger = logging.getLogger(__name__)

FORMATS = ("peft", "merged", "delta")
MANIFEST = "export.json"
_VERSION = 1
_CARD, _PLAN = "README.md", "plan.json"
_EVALUATION = "eval"
"""What results of `hybrid-rl eval` begin with, which it puts beside the policy."""
_ORIGIN = ("format", "step", "rank", "plan", "started_from")
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

    @property
    def start(self) -> Start:
        """The trained values, for whoever trains on."""
        return Start(str(self.directory.resolve()), self.format, self.manifest.get("tensors", {}))

    def check_base(self, model_path: str) -> None:
        """Refuse another base model than the export's, by digests of its tensors."""
        if not self.manifest:
            return
        wanted, held = self.manifest["base"]["tensors"], _base_digests(model_path)
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

    def load(self, model: ModelConfig, components: Mapping[str, str] = {}) -> AdaptedModel:
        """The policy of a `delta` or `peft`, in fp32 on the CPU. `components`: `plan.components`, where the export has
        none. Raises `ConfigError` if `model` is not the base model, or the files do not fit it."""
        self.check_base(model.path)
        return self.apply(load_base(model), model.path, components)

    def apply(self, base: Any, model_path: str, components: Mapping[str, str] = {}) -> AdaptedModel:
        """Make the base model, in fp32 on the CPU, the policy."""
        anatomy = read_model(base, self.components or components)
        plan = self.trained_plan(anatomy, model_path)
        plan.check_against(anatomy)
        adapted = apply_plan(base, plan)
        try:
            read_start(adapted, self.start)
        except ValueError as error:
            raise ConfigError(f"{self.named}: {error}") from None
        return adapted

    @property
    def components(self) -> dict[str, str]:
        """`plan.components` of the run that it was exported from."""
        return dict(self.manifest.get("base", {}).get("components", {}))

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
    config: Config | None = None,
) -> Export:
    """Write a run's policy to the directory `out`, which must not be there yet.

    `rank`: its Matryoshka adapters' first so many ranks alone, without P. `checkpoint`: by default the last finished
    one. `config`: the run's settings, where its base model is elsewhere now. Raises `ConfigError` for what cannot be
    exported so.
    """
    if to not in FORMATS:
        raise ConfigError(f"--to {to}: use one of {', '.join(FORMATS)}")
    if out.exists() or out.is_symlink():
        raise ConfigError(f"--out {out} exists already; choose another")
    source = _read_run(run, checkpoint, config)
    if rank is not None:
        check_ranks(source.policy.plan, [rank], f"--rank {rank}")
        if to == "delta":
            raise ConfigError(f"--rank {rank}: --to delta keeps all that was trained; use --to peft or merged")
    load_tokenizer(source.config)  # also brings a hub model's tokenizer here
    plan, state = source.policy.plan, source.policy.state
    with _written_aside(out) as directory:
        report = _write(source, to, directory, rank)
        lora = report.pop("lora", 0)
        manifest = {
            "version": _VERSION,
            "format": to,
            "step": state.step,
            "rank": rank,
            "plan": plan.hash,
            "started_from": dict(state.started_from),
            "metrics": source.metrics,
            "summary": source.summary,
            "commands": load_commands(to, shown_model(source.config.model.path), lora),
            **report,
        }
        plan.save(directory / _PLAN)
        manifest["files"] = _file_digests(directory)
        write_atomically(directory / MANIFEST, json.dumps(manifest, indent=1) + "\n")
        write_atomically(directory / _CARD, model_card(source.config, plan, manifest))
    return open_export(out, "--out")


def open_export(directory: Path, setting: str = "DIR") -> Export:
    """Check that an export's files are what was written. `setting` is what error messages call it.

    Raises `ConfigError` if it is none, or a file of it is missing or damaged, or one is there that it does not list.
    """
    named = f"{setting}={str(directory)!r}"
    manifest = _manifest(directory, named)
    if not manifest:
        return Export(directory, "peft", None, {}, setting)
    files = manifest["files"]
    for name in files:
        if Path(name).name != name or not (directory / name).is_file():
            raise ConfigError(f"{named} has no {name}, which {MANIFEST} lists; export it again")
    for name in sorted({path.name for path in directory.iterdir()} - files.keys()):
        if name not in (_CARD, MANIFEST) and not name.startswith((".", _EVALUATION)):
            raise ConfigError(f"{named} has {name}, which {MANIFEST} does not list; move it elsewhere")
    for name, wanted in files.items():
        if _sha256(directory / name) != wanted:
            raise ConfigError(f"{named}: {name} is not what was exported (its sha256 differs); export it again")
    return Export(directory, manifest["format"], AdaptationPlan.load(directory / _PLAN, setting), manifest, setting)


def load_export(directory: Path, model: ModelConfig, setting: str = "DIR") -> AdaptedModel:
    """The policy of a `delta` or `peft` export, or of a PEFT directory made elsewhere, in fp32 on the CPU.

    Raises `ConfigError` if the files are damaged, or `model` is not the base model.
    """
    return open_export(directory, setting).load(model)


def starting_from(directory: Path, components: Mapping[str, str]) -> list[str]:
    """Settings, as `key=value`, with which training goes on from an export: its plan and values, or it as the model.

    `components`: `plan.components` where the export has none.
    """
    manifest = _manifest(directory, f"DIR={str(directory)!r}")
    if manifest and manifest["format"] == "merged":
        return [f"model.path={json.dumps(str(directory))}"]
    components = (manifest["base"]["components"] if manifest else {}) or components
    plan = {"start": str(directory)} | ({"components": dict(components)} if components else {})
    return [f"plan={json.dumps(plan)}", "adaptation=hybrid"]


def start_plan(config: Config, anatomy: Anatomy) -> tuple[AdaptationPlan, Start]:
    """Plan and values of the export `plan.start`, whose files and base model are checked."""
    assert config.plan.start is not None
    export = open_export(Path(config.plan.start), "plan.start")
    plan = export.trained_plan(anatomy, config.model.path, config.seed)
    plan.check_against(anatomy)
    export.check_base(config.model.path)
    if export.plan is None:
        logger.warning(
            "%s has no digests; that model.path=%r is its base model is taken on trust", export.named, config.model.path
        )
    return plan, export.start


def provenance(config: Config) -> dict[str, Any]:
    """Of the export that training starts from, as plan and values or as the model: its `format`, `step`, `rank`, hash
    of its `plan`, and what that one was `started_from`. Empty without any."""
    directory = Path(config.plan.start or config.model.path)
    if config.plan.start is None and not (directory / MANIFEST).is_file():
        return {}
    manifest = _manifest(directory, f"{'plan.start' if config.plan.start else 'model.path'}={str(directory)!r}")
    return {name: manifest[name] for name in _ORIGIN if name in manifest} or {"format": "peft"}


class _Base(BaseModel):
    model: str
    architecture: str
    components: dict[str, str]
    tensors: dict[str, str]


class _Manifest(BaseModel):
    """What of `export.json` is read again."""

    format: Literal["peft", "merged", "delta"]
    step: int
    rank: int | None
    plan: str
    base: _Base
    files: dict[str, str]
    tensors: dict[str, str] = {}


def _manifest(directory: Path, named: str) -> dict[str, Any]:
    """`export.json`; empty for a PEFT directory made elsewhere. Raises `ConfigError` if it is damaged, or neither."""
    path = directory / MANIFEST
    if not path.is_file():
        if (directory / PEFT_CONFIG).is_file():
            return {}
        raise ConfigError(f"{named} is no export: it has neither {MANIFEST} nor {PEFT_CONFIG}")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        version = manifest["version"]
        if version != _VERSION:
            raise ConfigError(f"{named} is of version {version}; this program reads version {_VERSION}")
        _Manifest.model_validate(manifest)
    except ValidationError as error:
        first = error.errors()[0]
        reason = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
        raise ConfigError(f"{named}: {MANIFEST} cannot be read: {reason}") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{named}: {MANIFEST} cannot be read: {type(error).__name__}: {error}") from None
    return manifest


# --- a run, as it is read ---


@dataclass(frozen=True)
class _Source:
    config: Config
    policy: StoredPolicy
    metrics: Mapping[str, Any]
    """Of the step."""
    summary: Mapping[str, Any]
    """The run's, without what is said of its last step, where that is another."""


def _read_run(path: Path, checkpoint: Path | None, config: Config | None) -> _Source:
    run = RunDirectory(path)
    for needed in (run.config, run.plan):
        if not needed.is_file():
            raise ConfigError(f"RUN={str(path)!r} is no run: it has no {needed.name}")
    given = f"--checkpoint {checkpoint}" if checkpoint else f"RUN={str(path)!r}"
    policy = find_policy(checkpoint or path, given, path)
    step = policy.state.step
    rows = read_metrics(run.metrics) if run.metrics.is_file() else []
    metrics = next((row for row in rows if row.get("step") == step), dict(policy.state.row))
    try:
        summary = run.read_summary() if run.summary.is_file() else {}
    except ValueError as error:
        raise ConfigError(f"{run.summary} cannot be read: {error}") from None
    if summary.get("steps") != step:
        summary.pop("eval_after", None)
    return _Source(config or load_config(run.config), policy, metrics, summary)


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
    model, policy = source.config.model, source.policy
    base = load_base(model)
    policy.check_base(base, model.path)
    components = source.config.plan.components
    anatomy = read_model(base, components)
    policy.plan.check_against(anatomy)
    packed = next((w.name for w in anatomy.weights if w.quantised), None)
    if packed is not None and to == "merged":
        raise ConfigError(f"--to merged: {packed} is quantised in model.path={model.path!r}; use --to peft or delta")
    report: dict[str, Any] = {
        "base": {
            "model": model.path,
            "architecture": architecture_of(anatomy),
            "components": dict(components),
            "tensors": _base_digests(model.path),
        },
    }
    adapted = apply_plan(base, policy.plan)
    originals = {name: p.detach().clone() for name, p in adapted.full.items()} if to == "delta" else {}
    policy.restore(adapted)
    if to == "delta":
        trained = adapted.trained
        beside = [(name, p) for name, p in trained.items() if name not in adapted.full]
        write_delta(((name, p, originals[name]) for name, p in adapted.full.items()), beside, directory)
        return report | {"tensors": {name: digest(p) for name, p in trained.items()}}
    adapted.use_rank(rank)
    wanted = _probe(adapted.model)
    if to == "peft":
        try:
            report["lora"] = write_peft(adapted, policy.plan, directory, model.path)
        except NotPeft as error:
            raise ConfigError(f"--to peft: PEFT cannot hold this policy: {error}; use --to merged or delta") from None
        del adapted, base
        probe = _compared(_probe(PeftModel.from_pretrained(load_base(model), str(directory)).eval()), wanted)
        again = Export(directory, to, policy.plan, report).apply(load_base(model), model.path)
        _compared(_probe(again.model), wanted)  # what training would go on from
        return report | {"probe": probe, "tensors": {name: digest(p) for name, p in again.trained.items()}}
    else:
        try:
            rounding = write_merged(adapted, model.path, directory)
        except NotInFiles as error:
            raise ConfigError(f"--to merged: {error}; use --to peft or delta") from None
        rounded = _probe(adapted.model)
        del adapted, base
        report["rounding"] = {name: asdict(r) for name, r in rounding.items()}
        reloaded = _probe(load_base(model.model_copy(update={"path": str(directory)})))
        return report | {"probe": _compared(reloaded, wanted, rounded)}


def _probe(model: Any) -> Tensor:
    """Logits [sequences, tokens, vocabulary] of token ids that depend on nothing but the size of the vocabulary."""
    size = model.get_input_embeddings().weight.shape[0]
    ids = torch.randint(size, _PROBE, generator=torch.Generator().manual_seed(0))
    return model(input_ids=ids, use_cache=False).logits.float()


def _compared(found: Tensor, wanted: Tensor, rounded: Tensor | None = None) -> dict[str, Any]:
    """How far the reloaded model's logits are from the policy's. Raises `RuntimeError` where that is a mistake: where
    they are not those of the policy, or where its weights were rounded, of the policy `rounded` so."""
    wrong = float((found - (wanted if rounded is None else rounded)).abs().max())
    if not wrong <= _ROUNDING_ERROR * float(wanted.abs().max()):
        raise RuntimeError(f"the reloaded export computes logits that are {wrong:.3g} from the policy's")
    apart = (found - wanted).abs()
    return {
        "shape": list(_PROBE),
        "max_logit_difference": float(apart.max()),
        "mean_logit_difference": float(apart.mean()),
        "max_logit": float(wanted.abs().max()),
    }


def _base_digests(model_path: str) -> dict[str, str]:
    """Digests of a base model's tensors by their names in its files. Raises `ConfigError` if these cannot be read."""
    found = {}
    try:
        for path, names in BaseFiles(model_path).by_file().items():
            with safe_open(path, "pt") as file:
                found |= {name: digest(file.get_tensor(name)) for name in names}
    except (OSError, ValueError, SafetensorError) as error:
        raise ConfigError(f"model.path={model_path!r} cannot be read: {error}") from None
    if not found:
        raise ConfigError(f"model.path={model_path!r} has no safetensors files, by which exports know their base model")
    return found


def _file_digests(directory: Path) -> dict[str, str]:
    return {path.name: _sha256(path) for path in sorted(directory.iterdir()) if path.name != _CARD}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
