"""The `hybrid-rl` command. Exit status: 0 done, 1 the run failed, 2 the input or the environment is wrong."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from hybrid_rl.arguments import add_command, amount, count
from hybrid_rl.reward_commands import add_reward_commands

if TYPE_CHECKING:
    from hybrid_rl.config import Config


def read_command_line(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """What is asked for. Ends the process with status 2 if that cannot be read."""
    parser = argparse.ArgumentParser(
        prog="hybrid-rl", description="Reinforcement learning with verifiable rewards under an adaptation plan."
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    train = _command(commands, "train", "train a policy", _train)
    train.add_argument("--resume", action="store_true", help="continue the run in run.dir from its last checkpoint")
    train.add_argument(
        "--auto-resume", action="store_true", help="the same if there is a checkpoint, else begin: for schedulers"
    )
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
    estimate = _command(commands, "estimate", "say what a run takes, from the model's shape alone", _estimate)
    estimate.add_argument("--gpus", type=count, metavar="N", help="on so many GPUs; those that are here by default")
    estimate.add_argument("--gpu-memory", type=amount, metavar="GIB", help="of each GPU; of those here by default")
    estimate.add_argument(
        "--gpu", metavar="NAME", help="which GPU: H100, H200, B200, A100, L40S; by default the one here"
    )
    estimate.add_argument(
        "--mean-length", type=count, metavar="TOKENS", help="of a completion; half the limit by default"
    )
    estimate.add_argument("--json", action="store_true", help="print the sizes as one object, on the last line")
    doctor = add_command(commands, "doctor", "check this machine, or a part of a run on its own", _doctor)
    doctor.add_argument("--json", action="store_true", help="print the findings as one object, on the last line")
    checks = doctor.add_subparsers(title="parts of a run", dest="check", metavar="[CHECK]")
    _command(checks, "sync", "send weights to engines and compare what these compute with the learner", _doctor_sync)
    evaluation = _command(commands, "eval", "evaluate a policy on the held-out problems", _eval)
    policy = evaluation.add_mutually_exclusive_group()
    policy.add_argument("--checkpoint", metavar="DIR", help="a checkpoint, or a run for its last; else the base model")
    policy.add_argument("--export", metavar="DIR", help="an exported policy")
    evaluation.add_argument("--ranks", metavar="1,2,4", help="also at these ranks of its Matryoshka layers")
    evaluation.add_argument("--out", metavar="DIR", help="where results go; of ranks, beside the policy by default")
    evaluation.add_argument("--json", action="store_true", help="print the results as one object, on the last line")
    export = _command(commands, "export", "write a run's policy for others to load", _export, "RUN")
    export.add_argument("--to", required=True, metavar="FORMAT", help="peft, merged or delta")
    export.add_argument("--out", required=True, metavar="DIR", help="where it goes; a directory that is not there yet")
    export.add_argument("--rank", type=int, metavar="K", help="its Matryoshka adapters' first K ranks alone")
    export.add_argument("--checkpoint", metavar="STEPDIR", help="which checkpoint; the last by default")
    continued = _command(commands, "import", "train on from an export or a PEFT adapter", _import, "DIR")
    continued.add_argument("--config", required=True, metavar="CONFIG", help="YAML file of settings")
    report = add_command(commands, "report", "make one HTML file of a run, done or not", _report)
    report.add_argument("directory", metavar="RUN", help="directory of a run")
    report.add_argument("--out", metavar="FILE", help="where it goes; RUN/report.html by default")
    study = add_command(commands, "study", "compare methods over learning rates, seeds and tasks", _study)
    study.add_argument("study", metavar="STUDY", help="YAML file of the study")
    study.add_argument("settings", nargs="*", metavar="key=value", help="settings that replace the file's")
    how = study.add_mutually_exclusive_group()
    how.add_argument("--resume", action="store_true", help="go on with the study in its dir")
    how.add_argument("--dry-run", action="store_true", help="check it and say how many runs there are; start nothing")
    how.add_argument("--report", action="store_true", help="write the tables and report of what is done; run nothing")
    summary = "make a dashboard of the metrics: in wandb, or as Grafana's JSON"
    dashboard = add_command(commands, "dashboard", summary, _dashboard)
    where = dashboard.add_mutually_exclusive_group(required=True)
    where.add_argument("--wandb", metavar="ENTITY/PROJECT", help="save it as a workspace there; needs wandb-workspaces")
    where.add_argument("--grafana", metavar="FILE", help="write JSON to import, for the metrics of tracking.prometheus")
    _command(commands, "warm-start", "make the small base policy that the configuration describes", _warm_start)
    add_reward_commands(commands)
    options, rest = parser.parse_known_args(arguments)
    # argparse takes positional arguments only in one run; settings may also follow an option.
    if rest and ("overrides" not in options or any(word.startswith("-") for word in rest)):
        unknown = [word for word in rest if "overrides" not in options or word.startswith("-") or "=" not in word]
        options.parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    if rest:
        options.overrides += rest
    return options


class _Version(argparse.Action):
    """Looks the version up only when it is asked for: reading metadata takes as long as all of the help."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from importlib.metadata import version

        print(f"hybrid-rl {version('hybrid-rl')}")
        parser.exit()


def main(arguments: Sequence[str] | None = None) -> int:
    options = read_command_line(arguments)
    # Imported here, as all else that takes its time: help is to come at once.
    from hybrid_rl.settings import ConfigError

    try:
        if "overrides" not in options:
            return options.run(options)
        return options.run(_settings(options), options)
    except ConfigError as error:
        tool = f" {options.tool}" if "tool" in options else ""
        print(f"hybrid-rl {options.command}{tool}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as interrupt:
        print(f"hybrid-rl {options.command}: interrupted {interrupt}".rstrip(), file=sys.stderr)
        return 130
    except Exception as error:  # whatever it was; the log has its traceback
        from hybrid_rl.failures import explain

        print(f"hybrid-rl {options.command}: {explain(error)}", file=sys.stderr)
        return 1


_SUBJECTS = {
    "CONFIG": ("config", "YAML file of settings"),
    "RUN": ("directory", "directory of a run"),
    "DIR": ("directory", "directory of an export, or of a PEFT adapter made elsewhere"),
}


def _command(
    commands: argparse._SubParsersAction, name: str, summary: str, run: Callable[..., int], subject: str = "CONFIG"
) -> argparse.ArgumentParser:
    parser = add_command(commands, name, summary, run)
    what, meaning = _SUBJECTS[subject]
    parser.add_argument(what, metavar=subject, help=meaning)
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="settings that replace the file's; dots are nesting"
    )
    return parser


_ELSEWHERE = ("model.path", "model.trust_remote_code")
"""Settings of a run that an export may change: its base model may be elsewhere now."""


def _settings(options: argparse.Namespace) -> Config:
    """What a command works with: of `export` the run's settings, of `import` those that continue the export."""
    from hybrid_rl.config_file import load_config, load_tree
    from hybrid_rl.settings import ConfigError

    if options.command == "export":
        other = [o for o in options.overrides if o.partition("=")[0].strip() not in _ELSEWHERE]
        if other:
            raise ConfigError(f"{other[0]} does nothing for an export, which takes only model.path; drop it")
        return load_config(Path(options.directory) / "config.yaml", options.overrides)
    continuing: list[str] = []
    if options.command == "import":
        from hybrid_rl.export import starting_from

        plan = load_tree(options.config).get("plan")
        components = plan.get("components") if isinstance(plan, dict) else None
        continuing = starting_from(Path(options.directory), components or {})
    return load_config(options.config, [*continuing, *options.overrides])


def _train(config: Config, options: argparse.Namespace) -> int:
    resume = options.resume or ("auto" if options.auto_resume else False)
    if options.dry_run:
        from rich.console import Console

        from hybrid_rl.run_directory import dump_config
        from hybrid_rl.tables import plan_table
        from trainers.grpo import check_run
        from trainers.preflight import dry_run
        from trainers.ranking import make_plan
        from trainers.setup import ranks

        task, _ = check_run(config, resume)
        print(dump_config(config), end="")
        console = Console(stderr=True, soft_wrap=True)
        if task.plan is not None or not ranks(config):
            console.print(plan_table(make_plan(config, task, None)))
        dry_run(config, task, console)
        return 0
    return _run(config, options, resume)


def _run(config: Config, options: argparse.Namespace, resume: bool | Literal["auto"] = False) -> int:
    from trainers.grpo import train
    from trainers.stopping import Stopped

    try:
        train(config, name=Path(options.config).stem, resume=resume)
    except Stopped as stopped:
        print(f"hybrid-rl {options.command}: stopped by SIGTERM {stopped}", file=sys.stderr)
        return 128 + signal.SIGTERM
    return 0


def _rank(config: Config, options: argparse.Namespace) -> int:
    from rich.console import Console

    from hybrid_rl.settings import ConfigError
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


def _estimate(config: Config, options: argparse.Namespace) -> int:
    from rich.console import Console

    from trainers.estimation import estimate_command

    estimate_command(
        config,
        Console(),
        gpus=options.gpus,
        gpu_memory=options.gpu_memory,
        gpu_name=options.gpu,
        mean_length=options.mean_length,
        as_json=options.json,
    )
    return 0


def _doctor(options: argparse.Namespace) -> int:
    from rich.console import Console

    from trainers.health import doctor_command

    return 0 if doctor_command(Console(), as_json=options.json) else 2


def _doctor_sync(config: Config, options: argparse.Namespace) -> int:
    from rich.console import Console

    from trainers.doctor import doctor_sync

    return 0 if doctor_sync(config, Console(soft_wrap=True)) else 1


def _eval(config: Config, options: argparse.Namespace) -> int:
    from rich.console import Console

    from trainers.evaluation import eval_command

    checkpoint, export, out = (Path(d) if d else None for d in (options.checkpoint, options.export, options.out))
    eval_command(
        config,
        Console(soft_wrap=True),
        checkpoint=checkpoint,
        export=export,
        ranks=options.ranks,
        out=out,
        as_json=options.json,
    )
    return 0


def _export(config: Config, options: argparse.Namespace) -> int:
    from rich.console import Console

    from hybrid_rl.export import export_run
    from hybrid_rl.tables import rounding_table

    checkpoint = Path(options.checkpoint) if options.checkpoint else None
    run, out = Path(options.directory), Path(options.out)
    export = export_run(run, options.to, out, options.rank, checkpoint=checkpoint, config=config)
    manifest, console = export.manifest, Console(soft_wrap=True)
    rounding = manifest.get("rounding", {})
    if any(r["max_error"] for r in rounding.values()):
        console.print(rounding_table(rounding))
    if (probe := manifest.get("probe")) is not None:
        apart, size = probe["max_logit_difference"], probe["max_logit"]
        print(f"reloaded    its logits are at most {apart:.2g} from the policy's, of up to {size:.2g}")
    print(f"exported    {out}, {export.format}, step {manifest['step']}\nmodel card  {out / 'README.md'}")
    return 0


def _import(config: Config, options: argparse.Namespace) -> int:
    replaced = "model" if config.plan.start is None else "plan and values, in place of adaptation and plan.*"
    print(f"training goes on from {options.directory}: its {replaced}, with a new optimizer")
    return _run(config, options)


def _study(options: argparse.Namespace) -> int:
    from rich.console import Console

    from hybrid_rl.study.settings import load_study
    from trainers.stopping import Stopped
    from trainers.study import StudyFailed, study_command

    study = load_study(options.study, options.settings)
    console = Console(soft_wrap=True)
    try:
        study_command(study, console, resume=options.resume, dry_run=options.dry_run, report=options.report)
    except StudyFailed as failure:
        print(f"hybrid-rl study: {failure}", file=sys.stderr)
        return 1
    except Stopped:
        print(
            f"hybrid-rl study: stopped by SIGTERM; go on with hybrid-rl study {options.study} --resume", file=sys.stderr
        )
        return 128 + signal.SIGTERM
    return 0


def _report(options: argparse.Namespace) -> int:
    from hybrid_rl.report import write_report

    print(write_report(Path(options.directory), Path(options.out) if options.out else None))
    return 0


def _dashboard(options: argparse.Namespace) -> int:
    from hybrid_rl.tracking.dashboard import save_wandb_workspace, write_grafana

    print(save_wandb_workspace(options.wandb) if options.wandb else write_grafana(Path(options.grafana)))
    return 0


def _warm_start(config: Config, options: argparse.Namespace) -> int:
    from rich.console import Console

    from trainers.warm_start import warm_start

    warm_start(config, Console(soft_wrap=True))
    return 0


if __name__ == "__main__":
    sys.exit(main())
