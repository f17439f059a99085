"""What launch/submit.sh runs: `ray job submit` for training, by Ray's own client.

Ray's command quotes an entrypoint for Windows, so that settings with quotes or `$` in them would arrive as others; and
it has one exit status for all failures, where the run's own tells wrong input (2) from a failed run (1).
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import shlex
import sys
import time
from pathlib import Path

from hybrid_rl.config_file import load_config
from hybrid_rl.settings import ConfigError

_NOT_UPLOADED = (".git", ".venv", "models", "runs", "wandb", "__pycache__")
_PASSED_ON = ("TOKENIZERS_PARALLELISM", "VLLM_NO_USAGE_STATS", "RAY_USAGE_STATS_ENABLED")
"""Of launch/env.sh; what depends on the device, nodes of the cluster know better than this machine."""
_SECONDS_TO_SAVE = 120
_SECONDS_TO_START = 60


def main() -> int:
    options = _parse()
    try:
        environment = _environment(options.env)
        _check(options.working_dir, options.config, options.settings)
        client = _client(options.address)
        words = ["hybrid-rl", "train", options.config, *options.settings, "cluster.address=auto"]
        job = _submit(client, shlex.join(words), environment)
    except ConfigError as error:
        print(f"submit: {error}", file=sys.stderr)
        return 2
    at = f"--address {options.address}"
    print(
        f"submit: job {job}: {shlex.join(words)}\nsubmit: stop it, saving, by: ray job stop {at} {job}", file=sys.stderr
    )
    if options.no_wait:
        print(job)
        return 0
    try:
        asyncio.run(_follow(client, job))
    except KeyboardInterrupt:
        print(f"submit: the job goes on; follow it by: ray job logs {at} --follow {job}", file=sys.stderr)
        return 130
    return _status(client, job)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="launch/submit.sh",
        description="Train as a job of a Ray cluster, and follow its log. Exit status: the job's; 2 if it was refused.",
        epilog="Example: launch/submit.sh --address http://head:8265 -- configs/gsm8k.yaml run.dir=/shared/run",
    )
    parser.add_argument("--address", required=True, help="of the cluster's job server, as http://HOST:8265")
    parser.add_argument(
        "--working-dir", type=Path, default=Path(), metavar="DIR", help="uploaded, less models, runs and the like; here"
    )
    parser.add_argument("--no-wait", action="store_true", help="do not follow the log; print the job's id and return")
    parser.add_argument(
        "--env",
        action="append",
        default=[],
        metavar="NAME",
        help="pass this variable on, by name; Ray keeps its value in logs of the cluster",
    )
    parser.add_argument("config", metavar="CONFIG", help="YAML file of settings, in DIR or on all nodes")
    parser.add_argument(
        "settings", nargs="*", metavar="key=value", help="settings that replace the file's, --auto-resume"
    )
    return parser.parse_args()


def _environment(names: list[str]) -> dict[str, str]:
    missing = [name for name in names if name not in os.environ]
    if missing:
        raise ConfigError(f"--env {missing[0]}: it is not set here; it takes a name, not NAME=value")
    passed = {name: os.environ[name] for name in (*_PASSED_ON, *names) if name in os.environ}
    # What `ray job stop` waits for after SIGTERM, before it kills; by default 3 s, in which no run can save.
    return {"RAY_JOB_STOP_WAIT_TIME_S": str(_SECONDS_TO_SAVE), **passed}


def _check(directory: Path, config_file: str, words: list[str]) -> None:
    """Refuse here, before anything is uploaded, what would be refused or lost there."""
    try:
        os.chdir(directory)
    except OSError as error:
        raise ConfigError(f"--working-dir {directory} cannot be entered: {error.strerror}") from None
    settings = [word for word in words if word not in ("--resume", "--auto-resume")]
    config = load_config(config_file, settings)
    if config.cluster.address is not None:
        raise ConfigError("cluster.address is the cluster that --address names; leave it out")
    if config.run.dir is None or not Path(config.run.dir).is_absolute():
        raise ConfigError(
            f"run.dir={config.run.dir!r} would be in a copy of {directory} that Ray deletes; give a directory that all "
            "nodes share, from / on"
        )
    if not Path(config.model.path).is_absolute() and Path(config.model.path).exists():
        raise ConfigError(
            f"model.path={config.model.path!r} is here, which is not uploaded; give a directory of the nodes, from / on"
        )


def _client(address: str):
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    logging.getLogger("ray").setLevel(logging.ERROR)  # it names each file that is not uploaded
    try:
        return JobSubmissionClient(address)
    except AuthenticationError:
        raise ConfigError(
            f"--address {address} was shown {_token()} and refuses it; it must be the token of the head "
            "(docs/cluster.md)"
        ) from None
    except (ConnectionError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[-1]
        raise ConfigError(
            f"--address {address} is no job server ({reason}); start the head with `ray start --head "
            "--dashboard-host=ADDRESS`, or forward its port 8265"
        ) from None


def _token() -> str:
    """Which token Ray's client sends, never what it is; Ray looks for it in this order."""
    if os.environ.get("RAY_AUTH_MODE") != "token":
        return f"no token (RAY_AUTH_MODE={os.environ.get('RAY_AUTH_MODE', '')})"
    if os.environ.get("RAY_AUTH_TOKEN"):
        return "the token in RAY_AUTH_TOKEN"
    path, named = os.environ.get("RAY_AUTH_TOKEN_PATH"), " (RAY_AUTH_TOKEN_PATH)"
    if not path:
        path, named = "~/.ray/auth_token", ""
    return f"{'the' if Path(path).expanduser().is_file() else 'no'} token in {path}{named}"


def _submit(client, entrypoint: str, environment: dict[str, str]) -> str:
    runtime = {"working_dir": ".", "excludes": list(_NOT_UPLOADED), "env_vars": environment}
    until = time.monotonic() + _SECONDS_TO_START
    while True:
        try:
            return client.submit_job(entrypoint=entrypoint, runtime_env=runtime)
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[-1]
            if "No available agent" not in reason or time.monotonic() > until:  # a head that has just come up
                raise ConfigError(f"the job server takes no job: {reason}") from None
            time.sleep(1)


async def _follow(client, job: str) -> None:
    async for lines in client.tail_job_logs(job):
        print(lines, end="", flush=True)


def _status(client, job: str) -> int:
    info = client.get_job_info(job)
    print(f"submit: job {job}: {info.status}", file=sys.stderr)
    if info.driver_exit_code is not None:
        return info.driver_exit_code if info.driver_exit_code >= 0 else 128 - info.driver_exit_code
    if info.status == "SUCCEEDED":
        return 0
    print(f"submit: {info.message}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
