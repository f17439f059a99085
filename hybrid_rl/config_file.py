"""From a YAML file and `key=value` overrides to a checked `Config`, with errors worded for a person."""

from __future__ import annotations

import difflib
import re
import types
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from hybrid_rl.algo import PRESETS, AlgoConfig
from hybrid_rl.config import Config
from hybrid_rl.settings import ConfigError


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read `path` (YAML), apply `key=value` overrides (dots are nesting), and check the result.

    Raises `ConfigError` with a message that fits one screen.
    """
    tree = load_tree(path)
    if any(override.partition("=")[0].strip() == "algorithm" for override in overrides):
        _forget_preset(tree)
    for override in overrides:
        _apply_override(tree, override)
    return parse_config(tree, source=str(path))


def load_tree(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file, unchecked. Raises `ConfigError` if there is none."""
    path = Path(path)
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"config file {path} does not exist") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"config file {path} cannot be read: {error}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"config file {path} is not valid YAML: {error}") from None
    if tree is None:
        tree = {}
    if not isinstance(tree, dict):
        raise ConfigError(f"config file {path} must hold a mapping of settings, not a {type(tree).__name__}")
    return tree


def parse_config(tree: dict[str, Any], source: str = "configuration") -> Config:
    """Check a tree of settings; every problem found is listed in one `ConfigError`."""
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        problems = [_explain(dict(detail)) for detail in error.errors()]
        shown = problems[:12] + ([f"... and {len(problems) - 12} more"] if len(problems) > 12 else [])
        raise ConfigError(f"{source}:\n" + "\n".join(f"  - {line}" for line in shown)) from None


def setting_names() -> list[str]:
    """Every setting's dotted name, in order."""
    return list(_names(Config, ""))


def _forget_preset(tree: dict[str, Any]) -> None:
    """Drop what the file's `algo` has from its own preset: a run's resolved settings list every field, and with them
    another `algorithm` would change nothing."""
    algo, name = tree.get("algo"), str(tree.get("algorithm", "grpo"))
    if isinstance(algo, dict) and name in PRESETS:
        preset = AlgoConfig(**PRESETS[name])
        tree["algo"] = {k: v for k, v in algo.items() if not hasattr(preset, k) or v != getattr(preset, k)}


def _apply_override(tree: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key.strip():
        raise ConfigError(f"override {override!r} is not of the form key=value")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        if text.lstrip()[:1] in ("[", "{"):
            raise ConfigError(
                f"override {override!r}: the value is not valid YAML; put quotes around a pattern that starts with *, "
                "as in "
                "'plan.also_full=[\"*norm*\"]'"
            ) from None
        value = text
    *parents, leaf = key.strip().split(".")
    node = tree
    for depth, parent in enumerate(parents, start=1):
        child = node.setdefault(parent, {})
        if child is None:
            child = node[parent] = {}
        if not isinstance(child, dict):
            raise ConfigError(f"override {override!r}: {'.'.join(parents[:depth])} holds a value, not settings")
        node = child
    node[leaf] = value


_TRL_NAMES = {
    "beta": "algo.kl_coef",
    "epsilon": "algo.clip_low",
    "epsilon_high": "algo.clip_high",
    "delta": "algo.dual_clip",
    "loss_type": "algorithm",
    "num_iterations": "batch.epochs",
    "off_policy_mask_threshold": "algo.off_policy_mask",
}


def _explain(detail: dict[str, Any]) -> str:
    name = ".".join(str(part) for part in detail["loc"])
    message = detail["msg"].removeprefix("Value error, ")
    if detail["type"] == "extra_forbidden":
        known = setting_names()
        close = [_TRL_NAMES[leaf]] if (leaf := name.rpartition(".")[2]) in _TRL_NAMES else []
        close = close or difflib.get_close_matches(name, known, n=1, cutoff=0.5)
        if not close:  # the right name in the wrong section
            close = [other for other in known if other.rsplit(".", 1)[-1] == name.rsplit(".", 1)[-1]][:1]
        hint = f"; did you mean {close[0]}?" if close else ""
        return f"unknown setting {name}{hint}"
    if detail["type"] == "missing":
        return f"{name} is required and was not given"
    if not name:
        return message
    if isinstance(detail["input"], dict) and detail["type"] == "value_error":  # of a section: it names its settings
        return message if message.startswith(f"{name}.") else f"{name}.{message}"
    if detail["type"] == "literal_error":
        options = re.findall(r"'([^']*)'", detail["ctx"]["expected"])
        close = difflib.get_close_matches(str(detail["input"]).lower(), options, n=1)
        message += f"; did you mean {close[0]}?" if close else ""
    return f"{name}={detail['input']!r}: {message[0].lower() + message[1:]}"


def _names(model: type[BaseModel], prefix: str) -> Iterator[str]:
    for name, field in model.model_fields.items():
        section = _section(field.annotation)
        name = field.alias or name
        yield prefix + name
        if section is not None:
            yield from _names(section, f"{prefix}{name}.")


def _section(annotation: Any) -> type[BaseModel] | None:
    options = typing.get_args(annotation) if isinstance(annotation, types.UnionType) else (annotation,)
    return next((o for o in options if isinstance(o, type) and issubclass(o, BaseModel)), None)
