"""Units of measurement, so far as answers to school problems name them."""

from __future__ import annotations

import re
from fractions import Fraction
from typing import NamedTuple

Dimensions = tuple[tuple[str, int], ...]
"""Sorted pairs of a dimension and its power: `(("length", 1), ("time", -1))`."""


class Unit(NamedTuple):
    dimensions: Dimensions
    factor: Fraction
    """To the base units of its dimensions."""
    known: bool
    """Whether every word of it is. Words that measure nothing (`apples`) are left out."""


_TABLE = {
    "length": "m meter=1 mm millimeter=0.001 cm centimeter=0.01 dm=0.1 km kilometer=1000 in inch inche=0.0254 "
    "ft foot feet=0.3048 yd yard=0.9144 mi mile=1609.344",
    "mass": "g gram=1 mg milligram=0.001 kg kilogram kilo=1000 ton tonne=1000000 lb lbs pound=453.59237 "
    "oz ounce=28.349523125",
    "time": "s sec second=1 ms millisecond=0.001 min minute=60 h hr hour=3600 day=86400 week=604800",
    "calendar": "month=1 yr year=12",
    "volume": "l L liter=1 ml mL milliliter=0.001",
    "gallon": "gal gallon=1 quart=0.25 pint=0.125 cup=0.0625",
    "angle": "° deg degree=1",
    "radian": "rad radian=1",
    "celsius": "°C=1",
    "fahrenheit": "°F=1",
    "dollar": "$ usd USD dollar buck=1 ¢ cent=0.01",
    "euro": "€ EUR eur euro=1",
    "sterling": "£ GBP gbp=1",
    "yen": "¥ yen=1",
    "rupee": "₹ Rs rs rupee=1",
    "": "hundred=100 thousand=1000 million=1000000 billion=1000000000 trillion=1000000000000",
}
_UNITS = {
    name + plural: (dimension, Fraction(factor))
    for dimension, entries in _TABLE.items()
    for words, factor in re.findall(r"([^=]+)=([\d.]+) ?", entries)
    for name in words.split()
    for plural in ("", "s" * (len(name) > 2))
}
_BASE = {"length": "m", "mass": "g", "time": "s", "calendar": "months", "volume": "l", "angle": "°"}
_POWERS = {"square": 2, "sq": 2, "squared": 2, "cubic": 3, "cu": 3, "cubed": 3}
_WORD = re.compile(
    r"(?P<per>/|\bper\b)|(?P<word>° ?[CF]?\b|[$€£¥₹¢°]|[^\W\d_]+)\.?(?:(?:\s*\^)?\{?(?P<power>-?\d)\}?)?"
    r"|[\s*(),.-]|(?P<no>.)"
)


def read_unit(text: str) -> Unit | None:
    """`None` if it is no unit at all."""
    text = re.sub(r"\bk(m|p|mp)h\b", "km/h", text).replace("mph", "mi/h")
    text = re.sub(r"(?<=[a-z])tre(s?)\b", r"ter\1", text)
    powers: dict[str, int] = {}
    factor, known, sign, pending = Fraction(1), True, 1, 1
    for match in _WORD.finditer(text):
        word = match["word"]
        if match["no"]:
            return None
        if match["per"]:
            sign = -1
        elif word in ("squared", "cubed"):
            powers = {name: power * _POWERS[word] for name, power in powers.items()}
            factor = factor ** _POWERS[word]
        elif word and word.lower() in _POWERS:
            pending = _POWERS[word.lower()]
        elif word:
            word = word.replace(" ", "")
            found = _UNITS.get(word) or _UNITS.get(word.lower() if len(word) > 2 else "")
            known = known and found is not None
            if found:
                power = sign * pending * int(match["power"] or 1)
                powers[found[0]] = powers.get(found[0], 0) + power
                factor *= found[1] ** power
                pending = 1
    dimensions = sorted((name, power) for name, power in powers.items() if name and power)
    return Unit(tuple(dimensions), factor, known)


def unit_text(dimensions: Dimensions) -> str:
    return " ".join(_BASE.get(name, name) + (f"^{power}" if power != 1 else "") for name, power in dimensions)
