"""From a YAML file and `key=value` overrides to a checked `Config`, with errors worded for a person.

Whatever a file holds, nothing in it is run, and reading it gives settings or a `ConfigError`: see `yaml_reader.py`.
"""

from __future__ import annotations

import difflib
import re
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from hybrid_rl.algo import PRESETS, AlgoConfig
from hybrid_rl.config import Config
from hybrid_rl.settings import ConfigError
from hybrid_rl.yaml_reader import NotSettings, read_yaml, refuse_secrets, short

LARGEST_FILE = 2**20
"""Characters."""


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read `path` (YAML), apply `key=value` overrides (dots are nesting), and check the result.

    Raises `ConfigError` with a message that fits one screen.
    """
    tree = load_tree(path)
    if any(override.partition("=")[0].strip() == "algorithm" for override in overrides):
        _forget_preset(tree)
    apply_overrides(tree, overrides)
    return parse_config(tree, source=str(path))


def apply_overrides(tree: dict[str, Any], overrides: Sequence[str]) -> None:
    """Put `key=value` texts into a tree of settings. Raises `ConfigError` for what is no override."""
    for override in overrides:
        _apply_override(tree, override)


def set_in(tree: dict[str, Any], name: str, value: Any) -> None:
    """Put a value under a dotted name. Raises `ConfigError` where a part of the name holds a value already."""
    *parents, leaf = name.split(".")
    node = tree
    for depth, parent in enumerate(parents, start=1):
        child = node.setdefault(parent, {})
        if child is None:
            child = node[parent] = {}
        if not isinstance(child, dict):
            raise ConfigError(f"{name}: {'.'.join(parents[:depth])} holds a value, not settings")
        node = child
    node[leaf] = value


def load_tree(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file, unchecked. Raises `ConfigError` if there is none."""
    path = Path(path)
    try:
        with path.open(encoding="utf-8") as file:
            text = file.read(LARGEST_FILE + 1)
        if len(text) > LARGEST_FILE:
            raise ConfigError(f"config file {path} is larger than {LARGEST_FILE:,} characters, which no settings are")
        tree = read_yaml(text)
    except FileNotFoundError:
        raise ConfigError(f"config file {path} does not exist") from None
    except (OSError, ValueError) as error:
        what = "is not valid YAML" if isinstance(error, NotSettings) else "cannot be read"
        raise ConfigError(f"config file {path} {what}: {error}") from None
    if tree is None:
        tree = {}
    if not isinstance(tree, dict):
        raise ConfigError(f"config file {path} must hold a mapping of settings, not a {type(tree).__name__}")
    return tree


def parse_config(tree: dict[str, Any], source: str = "configuration") -> Config:
    """Check a tree of settings; every problem found is listed in one `ConfigError`."""
    refuse_secrets(tree)
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        problems = _explained(tree, [dict(detail) for detail in error.errors(include_url=False)])
        shown = problems[:12] + ([f"... and {len(problems) - 12} more"] if len(problems) > 12 else [])
        raise ConfigError(f"{source}:\n" + "\n".join(f"  - {_cut(line)}" for line in shown)) from None


def setting_names() -> list[str]:
    """Every setting's dotted name, in order."""
    return list(_names(Config, ""))


def _forget_preset(tree: dict[str, Any]) -> None:
    """Drop what the file's `algo` has from its own preset: a run's resolved settings list every field, and with them
    another `algorithm` would change nothing."""
    algo, name = tree.get("algo"), tree.get("algorithm", "grpo")
    if isinstance(algo, dict) and isinstance(name, str) and name in PRESETS:
        preset = AlgoConfig(**PRESETS[name])
        tree["algo"] = {k: v for k, v in algo.items() if not hasattr(preset, k) or v != getattr(preset, k)}


def _apply_override(tree: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key.strip():
        raise ConfigError(f"override {override!r} is not of the form key=value")
    try:
        value = read_yaml(text)
    except NotSettings:
        if text.lstrip()[:1] in ("[", "{"):
            raise ConfigError(
                f"override {override!r}: the value is not valid YAML; put quotes around a pattern that starts with *, "
                "as in "
                "'plan.also_full=[\"*norm*\"]'"
            ) from None
        value = text
    try:
        set_in(tree, key.strip(), value)
    except ConfigError as error:
        raise ConfigError(f"override {override!r}: {error}") from None


_TRL_NAMES = {
    "beta": "algo.kl_coef",
    "epsilon": "algo.clip_low",
    "epsilon_high": "algo.clip_high",
    "delta": "algo.dual_clip",
    "loss_type": "algorithm",
    "num_iterations": "batch.epochs",
    "off_policy_mask_threshold": "algo.off_policy_mask",
}


def _explained(tree: Any, details: Sequence[dict[str, Any]]) -> list[str]:
    """A line a problem. Where a setting may be of several kinds, pydantic reports what is wrong with each of them."""
    lines: dict[str, None] = {}
    for detail in details:
        path, value, rest = _found(tree, detail["loc"])
        tags = [str(part) for part in rest]
        if detail["type"] in ("missing", "extra_forbidden") or not tags:
            lines[_explain(detail)] = None
        elif isinstance(value, dict) and any(tag.startswith("dict") for tag in tags):  # what is wrong inside it
            lines[f"{_dotted(path)}={short(value)}: {_lowered(detail['msg'])}"] = None
        elif not (isinstance(value, dict) and any(_kind(d, path) == _KINDS["dict"] for d in details)):
            kinds = list(dict.fromkeys(kind for d in details if (kind := _kind(d, path))))
            said = f"input should be {' or '.join(kinds)}" if kinds else _lowered(detail["msg"])
            lines[f"{_dotted(path)}={short(value)}: {said}"] = None
    return list(lines)


def _found(tree: Any, loc: Sequence[str | int]) -> tuple[list[str | int], Any, list[str | int]]:
    """How far `loc` leads in what was given, what is there, and what of `loc` is left."""
    path: list[str | int] = []
    node: Any = tree
    for part in loc:
        in_list = isinstance(node, list) and isinstance(part, int) and part < len(node)
        if in_list or (isinstance(node, dict) and part in node):
            inner: Any = node
            node = inner[part]
            path.append(part)
        else:
            break
    return path, node, list(loc[len(path) :])


_KINDS = {"int": "a whole number", "float": "a number", "str": "text", "bool": "true or false", "dict": "a mapping"}


def _kind(detail: Mapping[str, Any], path: Sequence[str | int]) -> str | None:
    """The kind of value that a problem at `path` is about, where the setting may be of several."""
    tag = str(detail["loc"][len(path)]) if len(detail["loc"]) > len(path) else ""
    if list(detail["loc"][: len(path)]) != list(path):
        return None
    return next((said for kind, said in _KINDS.items() if tag.startswith((kind, f"constrained-{kind}"))), None)


def _dotted(loc: Sequence[str | int]) -> str:
    """`rewards[0].weight`"""
    name = "".join(f"[{part}]" if isinstance(part, int) else f".{_named(part)}" for part in loc)
    return name.removeprefix(".")


def _cut(line: str) -> str:
    return line if len(line) <= 320 else f"{line[:220]} ... {line[-80:]}"


def _named(key: str) -> str:
    return key if key.isprintable() and 0 < len(key) <= 60 else short(key)


def _lowered(message: str) -> str:
    return message[:1].lower() + message[1:]


def _explain(detail: dict[str, Any]) -> str:
    name = _dotted(detail["loc"])
    message = detail["msg"].removeprefix("Value error, ")
    if detail["type"] == "extra_forbidden":
        hint = _suggestion(detail["loc"])
        return f"unknown setting {name}{f'; did you mean {hint}?' if hint else ''}"
    if detail["type"] == "missing":
        return f"{name} is required and was not given"
    if not name:
        return message
    if isinstance(detail["input"], dict) and detail["type"] == "value_error":  # of a section: it names its settings
        return message if message.startswith(f"{name}.") else f"{name}.{message}"
    if detail["type"] == "model_type":
        message = "input should be a mapping of settings"
    if detail["type"] == "literal_error":
        options = re.findall(r"'([^']*)'", detail["ctx"]["expected"])
        close = difflib.get_close_matches(str(detail["input"])[:60].lower(), options, n=1)
        message += f"; did you mean {close[0]}?" if close else ""
    return f"{name}={short(detail['input'])}: {_lowered(message)}"


def _suggestion(loc: Sequence[str | int]) -> str | None:
    """The setting that an unknown one may stand for."""
    leaf = str(loc[-1])[:60]
    if leaf in _TRL_NAMES:
        return _TRL_NAMES[leaf]
    section: type[BaseModel] | None = Config
    for part in loc[:-1]:
        if section is not None and isinstance(part, str):
            names = {field.alias or name: field for name, field in section.model_fields.items()}
            section = _section(names[part].annotation) if part in names else None
    if section is not None and any(isinstance(part, int) for part in loc):  # in a list, of which no names are known
        options = [field.alias or name for name, field in section.model_fields.items()]
        close = difflib.get_close_matches(leaf, options, n=1, cutoff=0.5)
        return _dotted([*loc[:-1], close[0]]) if close else None
    known, name = setting_names(), ".".join(str(part)[:60] for part in loc)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    if not close:  # the right name in the wrong section
        close = [other for other in known if other.rsplit(".", 1)[-1] == leaf][:1]
    return close[0] if close else None


def _names(model: type[BaseModel], prefix: str) -> Iterator[str]:
    for name, field in model.model_fields.items():
        section = _section(field.annotation)
        name = field.alias or name
        yield prefix + name
        if section is not None and typing.get_origin(field.annotation) is not list:
            yield from _names(section, f"{prefix}{name}.")


def _section(annotation: Any) -> type[BaseModel] | None:
    of = typing.get_origin(annotation)
    options = typing.get_args(annotation) if isinstance(annotation, types.UnionType) or of is list else (annotation,)
    return next((o for o in options if isinstance(o, type) and issubclass(o, BaseModel)), None)
