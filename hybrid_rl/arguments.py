"""Kinds of values on the command line."""

from __future__ import annotations

import argparse
import math


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
