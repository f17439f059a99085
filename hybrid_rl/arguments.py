"""Parts of the command line: how a command is added, and kinds of values."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable


def add_command(
    commands: argparse._SubParsersAction, name: str, summary: str, run: Callable[..., int]
) -> argparse.ArgumentParser:
    """A command whose help begins with `summary`. What it is given leads to `run`, and to its parser, so that whoever
    refuses something later can show this command's usage."""
    parser = commands.add_parser(name, help=summary, description=f"{summary[:1].upper()}{summary[1:]}.")
    parser.set_defaults(run=run, parser=parser)
    return parser


def count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number from 1 on")
    return int(text)


def amount(text: str, of: str = "") -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is no number{of} above 0")
    return number


def seconds(text: str) -> float:
    return amount(text, " of seconds")
