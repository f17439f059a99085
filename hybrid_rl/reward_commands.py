"""`hybrid-rl reward`: commands that have no configuration."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hybrid_rl.arguments import add_command, count, seconds


def add_reward_commands(commands: argparse._SubParsersAction) -> None:
    """Those that have no configuration: a plugin is tried without a run, or on what a run left."""
    summary = "write a reward, try it, score a run's completions again"
    reward = commands.add_parser("reward", help=summary, description=f"{summary.capitalize()} (docs/rewards.md).")
    tools = reward.add_subparsers(dest="tool", required=True, metavar="TOOL")

    new = add_command(tools, "new", "write NAME.py and test_NAME.py, a reward to start from", _reward_new)
    new.add_argument("name", metavar="NAME", help="of the function and its file")
    new.add_argument("--dir", default=".", metavar="DIR", help="where they go; here by default")

    test = add_command(tools, "test", "score completions from a file and show what comes of it", _reward_test)
    test.add_argument(
        "plugin", metavar="PLUGIN", help="file.py:function, module:function, or the name of an installed one"
    )
    test.add_argument("--data", required=True, metavar="FILE", help="JSONL: prompt, completion, columns; or rollouts")
    test.add_argument("--against", metavar="PLUGIN", help="show where this other plugin scores otherwise")
    test.add_argument("--against-arguments", metavar="JSON", help="arguments of that one")
    test.add_argument("--limit", type=count, metavar="N", help="the first N completions alone")
    test.add_argument("--chat", action="store_true", help="hand over chat messages, as with data.chat")

    replay = add_command(tools, "replay", "score the rollouts of a run again and compare", _reward_replay)
    replay.add_argument("directory", metavar="RUN", help="directory of a run")
    replay.add_argument("--reward", required=True, metavar="PLUGIN", help="what to score them with")
    replay.add_argument("--steps", metavar="A-B", help="these steps alone")
    replay.add_argument("--instead-of", metavar="NAME", help="which of the run's rewards it replaces")
    replay.add_argument("--out", metavar="FILE", help="JSONL of every completion's saved and new score")

    for tool in (test, replay):
        tool.add_argument("--arguments", metavar="JSON", help="arguments of the plugin, an object")
        tool.add_argument(
            "--column", nargs="+", action="extend", default=[], metavar="ours=theirs", help="a column by its other name"
        )
        tool.add_argument("--timeout", type=seconds, metavar="S", help="seconds of a call, as reward.timeout")
        tool.add_argument("--workers", type=count, metavar="N", help="processes, as reward.workers")
        tool.add_argument("--json", action="store_true", help="print the results as one object, on the last line")


def _reward_new(options: argparse.Namespace) -> int:
    from rich.console import Console

    from trainers.templates import new_reward

    new_reward(options.name, Path(options.dir), Console(soft_wrap=True))
    return 0


def _reward_test(options: argparse.Namespace) -> int:
    from rich.console import Console

    from hybrid_rl.config import RewardConfig
    from hybrid_rl.settings import ConfigError
    from trainers.authoring import Asked, try_reward

    limits = RewardConfig(**_limits(options))
    asked, against = Asked.of(options.plugin, options.arguments, limits), None
    if options.against is not None:
        against = Asked.of(options.against, options.against_arguments, limits, "--against-arguments")
    elif options.against_arguments is not None:
        raise ConfigError("--against-arguments are of --against, which is not given")
    try_reward(
        asked,
        Console(soft_wrap=True),
        data=Path(options.data),
        columns=_columns(options.column),
        against=against,
        limit=options.limit,
        chat=options.chat,
        as_json=options.json,
    )
    return 0


def _reward_replay(options: argparse.Namespace) -> int:
    from rich.console import Console

    from hybrid_rl.config_file import load_config
    from hybrid_rl.run_directory import RunDirectory
    from trainers.authoring import Asked
    from trainers.replay import replay_reward

    run = RunDirectory(Path(options.directory))
    config = load_config(run.config)
    asked = Asked.of(options.reward, options.arguments, config.reward.model_copy(update=_limits(options)))
    replay_reward(
        asked,
        config,
        run,
        Console(soft_wrap=True),
        steps=options.steps,
        instead_of=options.instead_of,
        columns=_columns(options.column),
        out=Path(options.out) if options.out else None,
        as_json=options.json,
    )
    return 0


def _limits(options: argparse.Namespace) -> dict[str, Any]:
    """Settings of `reward.*` that the command line gives."""
    given = {"timeout": options.timeout, "workers": options.workers}
    return {name: value for name, value in given.items() if value is not None}


def _columns(words: Sequence[str]) -> dict[str, str]:
    """Our name -> theirs. Raises `ConfigError` for what is no pair."""
    from hybrid_rl.settings import ConfigError

    for word in words:
        if not all(part.strip() for part in word.partition("=")):
            raise ConfigError(f"--column {word!r} is not of the form ours=theirs")
    return {ours.strip(): theirs.strip() for ours, _, theirs in (word.partition("=") for word in words)}
