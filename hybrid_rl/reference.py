"""`docs/configuration.md`, made from the settings themselves: `python -m hybrid_rl.reference` writes it.

Names, kinds, defaults and meanings are those of `config.py` and its neighbours, so that the page cannot say anything
else. Nothing here imports torch.
"""

from __future__ import annotations

import json
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from hybrid_rl.algo import PRESETS
from hybrid_rl.config import Config, RewardSpec
from hybrid_rl.placement import PLACEMENTS

PAGE = Path(__file__).parent.parent / "docs" / "configuration.md"

_HEAD = """\
<!-- Made by `python -m hybrid_rl.reference` from hybrid_rl/config.py and its neighbours; do not edit. -->
# Configuration

Every setting, its default and its meaning. A recipe is a YAML file that names those it changes
([configs/](../configs/)); `key=value` on the command line replaces what the file says, with dots for nesting:

```bash
hybrid-rl train configs/quickstart.yaml --dry-run batch.prompts=64 'sampling.stop=["\\n"]'
```

`--dry-run` prints all of them as they come out, defaults included; a run writes them to `config.yaml`. An unknown name,
a value of the wrong kind, and settings that contradict each other or would do nothing are refused with exit status 2.
`model.path`, `data.train` and `data.eval` alone have no default.

"""
_KINDS = {int: "whole number", float: "number", str: "text", bool: "`true`, `false`", type(None): "`null`", Any: "any"}
_BOUNDS = {"gt": ">", "ge": "≥", "lt": "<", "le": "≤"}


def page() -> str:
    """The whole page."""
    sections = [*_sections(Config, "")]
    contents = [f"- [{name or 'The run'}](#{_anchor(name)})" for name, _ in sections]
    parts = [_HEAD + "\n".join([*contents, "- [Presets](#presets)", "- [Placements](#placements)"])]
    parts += [_section(name, section) for name, section in sections]
    return "\n\n".join([*parts, _presets(), _placements()]) + "\n"


def _sections(model: type[BaseModel], prefix: str) -> Iterator[tuple[str, type[BaseModel]]]:
    """Dotted name and model of every section, the outer before the inner."""
    yield prefix, model
    for name, field in model.model_fields.items():
        inner = RewardSpec if name == "rewards" else _model(field.annotation)
        if inner is not None:
            dotted = f"{prefix}.{field.alias or name}".removeprefix(".")
            yield from _sections(inner, dotted)


def _section(name: str, model: type[BaseModel]) -> str:
    said = model.__dict__.get("__doc__")
    lines = [f"## {name or 'The run'}"]
    if name == "rewards":
        lines += ["", f"{_meaning(Config.model_fields['rewards'])} A list; each entry has:"]
    elif name and said:
        lines += ["", _one_line(said)]
    lines += ["", "| setting | kind | default | meaning |", "|---|---|---|---|"]
    for field_name, field in model.model_fields.items():
        if _model(field.annotation) is None and field_name != "rewards":
            own = field.alias or field_name
            dotted = f"{name}.{own}".removeprefix(".")
            cells = (_kind(field.annotation, field.metadata), _default(field), _meaning(field))
            lines.append(f'| <a id="{dotted}"></a>`{own if name == "rewards" else dotted}` | {" | ".join(cells)} |')
    return "\n".join(lines)


def _kind(annotation: Any, metadata: list[Any] | tuple[Any, ...] = ()) -> str:
    """What may be given, in words, with its bounds."""
    of, options = typing.get_origin(annotation), typing.get_args(annotation)
    if of is typing.Annotated:
        return _kind(options[0], _flat(options[1:]))
    if of is typing.Literal:
        return ", ".join(f"`{option}`" for option in options)
    if of in (types.UnionType, typing.Union):
        return " or ".join(_kind(option, metadata if option is not type(None) else ()) for option in options)
    if of in (list, tuple):
        entries = [_kind(option) for option in options] + (["..."] if of is list else [])
        return f"[{', '.join(entries)}]{_bounds(metadata)}"
    if of is dict:
        return f"{{{_kind(options[0])}: {_kind(options[1])}}}{_bounds(metadata)}"
    return _KINDS[annotation] + _bounds(metadata)


def _flat(metadata: typing.Iterable[Any]) -> list[Any]:
    """Bounds, those within pydantic's `Field` included."""
    return [each for m in metadata for each in (m.metadata if isinstance(m, FieldInfo) else [m])]


def _bounds(metadata: typing.Iterable[Any]) -> str:
    said = [f"{sign} {getattr(m, name):g}" for m in metadata for name, sign in _BOUNDS.items() if hasattr(m, name)]
    said += ["not empty" for m in metadata if hasattr(m, "min_length")]
    return f" {', '.join(said)}" if said else ""


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    return f"`{_plain(field.default)}`"


def _meaning(field: FieldInfo) -> str:
    return _one_line(field.description or "").replace("|", "\\|")


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _model(annotation: Any) -> type[BaseModel] | None:
    options = typing.get_args(annotation) or (annotation,)
    of = typing.get_origin(annotation)
    if of not in (None, types.UnionType, typing.Union):
        return None
    return next((o for o in options if isinstance(o, type) and issubclass(o, BaseModel)), None)


def _anchor(name: str) -> str:
    return name.replace(".", "") or "the-run"


def _presets() -> str:
    lines = ["## Presets", "", "What `algorithm` stands for: the fields of `algo` in which a preset differs from the"]
    lines += ["defaults above. Where they come from: [algorithms.md](algorithms.md).", ""]
    lines += ["| `algorithm` | `algo` |", "|---|---|"]
    for name, fields in PRESETS.items():
        lines.append(f"| `{name}` | {', '.join(f'`{k}={_plain(v)}`' for k, v in fields.items()) or 'the defaults'} |")
    return "\n".join(lines)


def _placements() -> str:
    lines = [
        "## Placements",
        "",
        "Names that [`plan.placement`](#plan.placement) takes besides components joined by `+`:",
    ]
    lines += ["", "| name | candidates |", "|---|---|"]
    values = {name: value.replace("|", "\\|") for name, value in PLACEMENTS.items()}
    return "\n".join([*lines, *(f"| `{name}` | `{value}` |" for name, value in values.items())])


def _plain(value: Any) -> str:
    return value if isinstance(value, str) and value else json.dumps(value, ensure_ascii=False)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
