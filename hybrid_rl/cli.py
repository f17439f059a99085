"""The `hybrid-rl` command. Exit status: 0 done, 1 the run failed, 2 the input or the environment is wrong."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from hybrid_rl.config import Config, ConfigError
from hybrid_rl.config_file import load_config
from hybrid_rl.types import WorkerDied


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="hybrid-rl", description="Reinforcement learning with verifiable rewards under an adaptation plan."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    train = _command(commands, "train", "train a policy", _train)
    train.add_argument("--resume", action="store_true", help="continue the run in run.dir from its last checkpoint")
    train.add_argument(
        "--dry-run", action="store_true", help="check everything, print the resolved settings, start nothing"
    )
    rank = _command(commands, "rank", "rank the modules and write the adaptation plan", _rank)
    rank.add_argument("--out", metavar="PLAN.json", help="where to write the plan; needed unless --dry-run")
    rank.add_argument("--plot", metavar="PLAN.png", help="where to draw the heat map; beside the plan by default")
    rank.add_argument("--compare", metavar="OTHER.json", help="show what differs from this plan")
    rank.add_argument(
        "--dry-run", action="store_true", help="candidates, budget and memory from the model's shape; reads no weights"
    )
    doctor = commands.add_parser("doctor", help="check parts of a run on their own")
    checks = doctor.add_subparsers(dest="check", required=True, metavar="CHECK")
    _command(checks, "sync", "send weights to engines and compare what these compute with the learner", _doctor_sync)
    _command(commands, "warm-start", "make the small base policy that the configuration describes", _warm_start)
    options, rest = parser.parse_known_args(arguments)
    # argparse takes positional arguments only in one run; settings may also follow an option.
    options.overrides += [word for word in rest if "=" in word and not word.startswith("-")]
    unknown = [word for word in rest if word not in options.overrides]
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    try:
        return options.run(load_config(options.config, options.overrides), options)
    except ConfigError as error:
        print(f"hybrid-rl {options.command}: {error}", file=sys.stderr)
        return 2
    except WorkerDied as death:
        print(f"hybrid-rl {options.command}: {death}. `--resume` goes on from a checkpoint", file=sys.stderr)
        return 1


def _command(commands: argparse._SubParsersAction, name: str, summary: str, run: object) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=summary, description=summary.capitalize() + ".")
    parser.add_argument("config", metavar="CONFIG", help="YAML file of settings")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="settings that replace the file's; dots are nesting"
    )
    parser.set_defaults(run=run)
    return parser


def _train(config: Config, options: argparse.Namespace) -> int:
    if options.dry_run:
        from hybrid_rl.tracking import dump_config
        from trainers.setup import check_task

        task = check_task(config)
        print(dump_config(config), end="")
        if task.plan is not None:
            from rich.console import Console

            from hybrid_rl.report import plan_table

            Console(stderr=True, soft_wrap=True).print(plan_table(task.plan))
        return 0
    from trainers.grpo import train

    train(config, name=Path(options.config).stem, resume=options.resume)
    return 0


def _rank(config: Config, options: argparse.Namespace) -> int:
    from rich.console import Console

    from trainers.rank import rank_command, rank_dry_run

    console = Console(soft_wrap=True)
    if options.dry_run:
        rank_dry_run(config, console)
        return 0
    if options.out is None:
        raise ConfigError("--out PLAN.json is needed to say where the plan goes")
    plot, compare = (Path(path) if path else None for path in (options.plot, options.compare))
    rank_command(config, console, out=Path(options.out), plot=plot, compare=compare)
    return 0


def _doctor_sync(config: Config, options: argparse.Namespace) -> int:
    from rich.console import Console

    from trainers.doctor import doctor_sync

    return 0 if doctor_sync(config, Console(soft_wrap=True)) else 1


def _warm_start(config: Config, options: argparse.Namespace) -> int:
    from rich.console import Console

    from trainers.warm_start import warm_start

    warm_start(config, Console(soft_wrap=True))
    return 0


if __name__ == "__main__":
    sys.exit(main())
