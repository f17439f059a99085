"""What a plugin is given of the completions of one prompt: in a run as in a trial, and no more than it takes."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

_LISTED = {"completion": "completions", "prompt": "prompts"}


def wants_chat(plugin: str, chat: bool) -> bool:
    """Whether it gets chat messages for texts: with `data.chat`, and TRL's own, which read nothing else."""
    return chat or plugin.startswith("trl.")


def given(
    columns: Sequence[Mapping[str, Any]],
    prompts: Sequence[str] | None,
    completions: Sequence[str],
    finish_reasons: Sequence[str],
    completion_ids: Sequence[Sequence[int]] | None,
    *,
    chat: bool,
) -> dict[str, list[Any]]:
    """Lists of a value a completion, by the names that plugins know them by; what is `None` is left out.

    With `chat`, completions and prompts are chat messages; a row's column `prompt` is what the user said there.
    """
    names = dict.fromkeys(name for row in columns for name in row if name != "prompt")
    made: dict[str, list[Any]] = {name: [row.get(name) for row in columns] for name in names}
    made["completions"] = [_message("assistant", text) if chat else text for text in completions]
    made["finish_reason"] = list(finish_reasons)
    if prompts is not None:
        pairs = zip(columns, prompts, strict=True)
        made["prompts"] = [_message("user", row.get("prompt", text)) if chat else text for row, text in pairs]
    if completion_ids is not None:
        made["completion_ids"] = [list(ids) for ids in completion_ids]
    return made


def taken(group: Mapping[str, Sequence[Any]], takes: Collection[str] | None) -> dict[str, Sequence[Any]]:
    """What of a group a plugin with these parameters can be given, and the completions, which are counted."""
    if takes is None:
        return dict(group)
    names = {"completions", *(_LISTED.get(name, name) for name in takes)}
    return {name: values for name, values in group.items() if name in names}


def _message(role: str, content: Any) -> list[dict[str, Any]]:
    return [{"role": role, "content": content}]
