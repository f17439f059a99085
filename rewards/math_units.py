"""Units of measurement, so far as answers to school problems name them."""

from __future__ import annotations

import re
from fractions import Fraction

Dimensions = tuple[tuple[str, int], ...]
"""Sorted pairs of a dimension and its power: `(("length", 1), ("time", -1))`."""

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
_UNITS: dict[str, tuple[str, Fraction]] = {}
for _dimension, _entries in _TABLE.items():
    _names: list[str] = []
    for _entry in _entries.split():
        _name, _, _factor = _entry.partition("=")
        _names.append(_name)
        if _factor:
            _UNITS.update({name: (_dimension, Fraction(_factor)) for name in _names})
            _names = []
_COMPOSED = {"mph": "mi/h", "kmh": "km/h", "kmph": "km/h", "kph": "km/h"}
_BASE = {"length": "m", "mass": "g", "time": "s", "calendar": "months", "volume": "l", "angle": "°"}
_WORD = re.compile(
    r"(?P<per>/|\bper\b)|(?P<word>°\s*[CF]?\b|[$€£¥₹¢°]|[^\W\d_]+)\.?(?:\^?\{?(?P<power>-?\d)\}?)?|\S|(?<=\d)\s"
)
_POWERS = {"square": 2, "sq": 2, "squared": 2, "cubic": 3, "cu": 3, "cubed": 3}


def read_unit(text: str) -> tuple[Dimensions, Fraction, bool] | None:
    """Dimensions, the factor to their base units, and whether every word is known; `None` if this is no unit at all.

    Words that measure nothing (`apples`) are left out.
    """
    powers: dict[str, int] = {}
    factor, known, sign, pending = Fraction(1), True, 1, 1
    for match in _WORD.finditer(_spelled(text)):
        word = match["word"]
        if match["per"]:
            sign = -1
        elif word is None:
            if match[0].strip() not in ("", "*", "·", "-", "(", ")", ",", "."):
                return None
        elif word in ("squared", "cubed"):
            for name in powers:
                powers[name] *= _POWERS[word]
            factor = factor ** _POWERS[word]
        elif word.lower() in _POWERS:
            pending = _POWERS[word.lower()]
        else:
            entry = _lookup(word.replace(" ", ""))
            if entry is None:
                known = False
                continue
            power = sign * pending * int(match["power"] or 1)
            powers[entry[0]] = powers.get(entry[0], 0) + power
            factor *= entry[1] ** power
            pending = 1
    powers.pop("", None)
    return tuple(sorted((name, power) for name, power in powers.items() if power)), factor, known


def unit_text(dimensions: Dimensions) -> str:
    return " ".join(_BASE.get(name, name) + (f"^{power}" if power != 1 else "") for name, power in dimensions)


def _spelled(text: str) -> str:
    text = text.replace("etre", "eter").replace("litre", "liter")
    for word, composed in _COMPOSED.items():
        text = re.sub(rf"\b{word}\b", composed, text)
    return re.sub(r"\bkm/hr?\b", "km/h", text).replace("²", "^2").replace("³", "^3")


def _lookup(word: str) -> tuple[str, Fraction] | None:
    for name in (word, word.lower() if len(word) > 2 else word):
        for candidate in (name, name[:-1] if name.endswith("s") and len(name) > 3 else name):
            if candidate in _UNITS:
                return _UNITS[candidate]
    return None
