"""Rewards tried before a run starts: can they be imported, and are they for the problems there are?"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hybrid_rl.config import Config, ConfigError
from hybrid_rl.reward import RewardHost
from hybrid_rl.types import Prompt


def check_rewards(config: Config, prompts: Sequence[Prompt], source: str) -> Mapping[str, Any]:
    """Import every reward's plugin here first: what is wrong with one, for problems of `source`, is said before any
    worker starts. Returns their arguments, defaults included."""
    columns = sorted(prompts[0].columns)
    for spec in config.rewards:
        unknown = sorted(set(spec.when) - set(columns))
        if unknown:
            raise ConfigError(
                f"rewards: when of {spec.name} names the column {unknown[0]!r}; {source} has {', '.join(columns)}"
            )
        if not any(spec.asks_about(prompt.columns) for prompt in prompts):
            name = min(spec.when)
            values = sorted({repr(prompt.columns[name]) for prompt in prompts})
            some = ", ".join([*values[:3], *["..."][: len(values) - 3]])
            raise ConfigError(
                f"rewards: {spec.name} is for no problem of {source}: its when is {spec.when}, and {name} is {some}"
            )
    seen = json.dumps([[s.name, s.plugin, s.arguments, _changed(s.plugin)] for s in config.rewards] + [columns])
    if seen in _checked:
        return _checked[seen]
    host = RewardHost(config.rewards, config.reward.model_copy(update={"workers": 1}))
    try:
        _checked[seen] = host.check(columns, ahead=False)
    except ConfigError as error:
        raise ConfigError(f"{error} ({source})") from None
    finally:
        host.close()
    return _checked[seen]


def _changed(plugin: str) -> float:
    """When a plugin's file was changed last."""
    path = Path(plugin.rpartition(":")[0])
    return path.stat().st_mtime if path.suffix == ".py" and path.is_file() else 0.0


_checked: dict[str, Mapping[str, Any]] = {}
"""Rewards that a run of this process has found to be in order, with their arguments."""
