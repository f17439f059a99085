"""A small reader of school algebra in LaTeX or plain text, which evaluates what it reads.

It does a known amount of work on any text of bounded length: nothing is simplified or solved, and numbers that would
grow out of hand are refused. Rational arithmetic is exact; everything else has 30 digits.
"""

from __future__ import annotations

import math
import operator
import re
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

from mpmath.ctx_mp import MPContext

Value = Any
"""`Fraction` where arithmetic stayed rational, else a number of `_mp`."""

_mp = MPContext()
_mp.dps = 30
MAX_BITS = 14_000
"""Longest number that is computed, and largest binary exponent: Python refuses to print longer ones."""
MAX_DEPTH = 25
EXACT = Fraction(1, 10**18)
"""Largest relative error of a number computed to 30 digits."""
POINTS = 3
"""How many places symbolic expressions are compared at."""

_TOKEN = re.compile(
    r"\s*(\d*\.\d*\\(?:overline|bar|dot)\s*\{?\d+\}?|(?:1|\d*\.\d+)[eE][-+]?\d{1,3}(?!\w)"
    r"|\d+[eE](?:[-+]\d)?\d{1,3}(?!\w)|\d*\.\d+|\d+|\\text\{[^{}]*\}|\\[a-zA-Z]+|\\[{}|]|\S)"
)  # `1e-3` is a number, `2e-1` has Euler's
_NUMBER = re.compile(r"\.?\d")
_PROPER = re.compile(r"\\frac \{ (\d+) \} \{ (\d+) \}|(\d+) / (\d+)")
_GREEK = re.compile(
    r"\\(?:(?:var)?(?:alpha|beta|gamma|delta|epsilon|zeta|eta|theta|iota|kappa|lambda|mu|nu|xi|rho|sigma|tau|upsilon|phi"
    "|chi|psi|omega)|Gamma|Delta|Theta|Lambda|Xi|Sigma|Phi|Psi|Omega|ell|hbar)"
)
_DECORATION = re.compile(r"\\(?:overline|bar|vec|hat|widehat|tilde|over(?:left)?rightarrow|angle|triangle)")
_FUNCTIONS = {  # LaTeX: mpmath
    **{f: f for f in ("sin", "cos", "tan", "cot", "sec", "csc", "sinh", "cosh", "tanh", "coth", "exp", "ln")},
    **{f"arc{f}": f"a{f}" for f in ("sin", "cos", "tan", "cot", "sec", "csc")},
    "log": "ln",
    "lg": "ln",
}
_FENCES = {"(": ")", "[": "]", "{": "}", "\\{": "\\}", "|": "|", "\\lfloor": "\\rfloor", "\\lceil": "\\rceil"}
_ROUNDING: dict[str, Callable[[Value], Any]] = {"\\lfloor": _mp.floor, "\\lceil": _mp.ceil}
_ARITHMETIC = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv}


class Unread(Exception):
    """The text is no expression of those read here, or its value is not worth having."""


@dataclass(frozen=True)
class Symbolic:
    """An expression by its values."""

    names: frozenset[str]
    """Variables; `e` and `i` are numbers."""
    values: tuple[Value | None, ...]
    """At `POINTS` places; `None` where it has none there."""
    decimal: bool = field(compare=False)
    """A decimal point was read."""

    def __str__(self) -> str:
        places = ", ".join("?" if value is None else digits(value, 10) for value in self.values)
        return f"expression in {', '.join(sorted(self.names))}: {places}"


def evaluate(text: str) -> Symbolic:
    """The values of an expression: over the real numbers, if it has any there. Raises `Unread` if it has none."""
    tokens = _TOKEN.findall(text)
    decimal = any("." in token and "\\" not in token for token in tokens)
    for real in (True, False):
        readers = [_Reader(tokens, point, real) for point in range(POINTS)]
        values = [reader.value() for reader in readers]
        if any(value is not None for value in values):
            return Symbolic(frozenset().union(*(reader.names for reader in readers)), tuple(values), decimal)
    raise Unread(text)


def apart(a: Value, b: Value) -> Value:
    return abs(_inexact(a) - _inexact(b))


def near(a: Value, b: Value, relative: Fraction | None = None) -> bool:
    """By default, whether two fractions, or numbers that were computed to 30 digits, are the same."""
    if isinstance(a, Fraction) and isinstance(b, Fraction):
        return abs(a - b) <= max(abs(a), abs(b)) * (relative or 0)
    a, b = _inexact(a), _inexact(b)
    return abs(a - b) <= max(abs(a), abs(b)) * _inexact(relative or EXACT)


def simple(value: Value) -> Value:
    """The fraction of a small denominator that a number is within rounding of, else the number."""
    if isinstance(value, Fraction):
        return value
    value = _mp.chop(value, _mp.mpf(10) ** -28)
    if not _mp.isfinite(value):
        raise Unread("infinite")
    if isinstance(value, _mp.mpc):
        return value
    rounded = Fraction(str(_mp.nstr(value, 30))).limit_denominator(1000)
    return rounded if near(rounded, value) else value


def scaled(value: Value, factor: Fraction) -> Value:
    return value * factor if isinstance(value, Fraction) else value * _inexact(factor)


def digits(value: Value, count: int = 20) -> str:
    """The same for numbers that are the same, so far as so many digits tell."""
    return str(value) if isinstance(value, Fraction) else str(_mp.nstr(value, count))


class _Reader:
    """Recursive descent. Multiplication may be implied; `a/bc` is `(a/b)c`."""

    def __init__(self, tokens: list[str], point: int, real: bool) -> None:
        self.tokens, self.point, self.real = tokens, point, real
        self.at, self.depth = 0, 0
        self.closers: list[str] = []
        self.names: set[str] = set()

    def value(self) -> Value | None:
        """Of the whole text; `None` where it has none at this place. Raises `Unread`."""
        try:
            value = self.sum()
        except (ArithmeticError, ValueError, TypeError):
            return None
        if self.next is not None:
            raise Unread(self.next)
        return value

    def done(self, value: Value) -> Value:
        """The value of an operation, if it is one to go on with."""
        if isinstance(value, Fraction):
            if max(value.numerator.bit_length(), value.denominator.bit_length()) > MAX_BITS:
                raise Unread("too long")
        elif self.real and isinstance(value, _mp.mpc):
            raise ArithmeticError("not real")
        elif value and _mp.mag(value) > MAX_BITS:
            raise Unread("too large")
        return value

    def both(self, sign: str, a: Value, b: Value) -> Value:
        if not (isinstance(a, Fraction) and isinstance(b, Fraction)):
            a, b = _inexact(a), _inexact(b)
        return self.done(_ARITHMETIC[sign](a, b))

    @property
    def next(self) -> str | None:
        return self.tokens[self.at] if self.at < len(self.tokens) else None

    def take(self, wanted: str | None = None) -> str:
        token = self.next
        if token is None or (wanted is not None and token != wanted):
            raise Unread(f"{wanted} expected, not {token}")
        self.at += 1
        return token

    def sum(self) -> Value:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise Unread("nested too deeply")
        value = self.product()
        while self.next in ("+", "-"):
            value = self.both(self.take(), value, self.product())
        self.depth -= 1
        return value

    def product(self) -> Value:
        value = self.signed()
        while True:
            if self.next in ("*", "/"):
                value = self.both(self.take(), value, self.signed())
            elif self.starts_factor():
                value = self.both("*", value, self.power())
            else:
                return value

    def signed(self) -> Value:
        return self.sign() * self.power()

    def sign(self) -> int:
        sign = 1
        while self.next in ("+", "-"):
            sign = -sign if self.take() == "-" else sign
        return sign

    def starts_factor(self) -> bool:
        token = self.next
        if token is None or _NUMBER.match(token):
            return False  # two numbers side by side mean nothing
        if token in _FENCES:
            return not (token == "|" and self.closers and self.closers[-1] == "|")
        return token not in _FENCES.values() and (token[-1].isalpha() or token[-1] in "√}")

    def power(self) -> Value:
        value = self.postfix(self.primary())
        while self.next == "^":
            self.take()
            value = self.postfix(self.done(_power(value, self.script())))
        return value

    def postfix(self, value: Value) -> Value:
        while self.next in ("!", "°", "%"):
            mark = self.take()
            factor = Fraction(1, 100) if mark == "%" else _mp.pi / 180
            value = self.done(_factorial(value)) if mark == "!" else self.both("*", value, factor)
        return value

    def script(self) -> Value:
        """An exponent or subscript: in braces or brackets, or one number or name, with its sign."""
        sign = self.sign()
        if (self.next or "").isdecimal():
            return sign * Fraction(self.take())  # `\log_2\frac{1}{8}` has no mixed number
        return sign * self.primary()

    def fenced(self, opener: str) -> Value:
        self.closers.append(_FENCES[opener])
        value = self.sum()
        self.take(self.closers.pop())
        if opener in _ROUNDING:
            return Fraction(int(_ROUNDING[opener](_inexact(value))))
        return abs(value) if opener == "|" else value

    def primary(self) -> Value:
        token = self.take()
        if _NUMBER.match(token):
            return self.mixed(token) if token.isdecimal() else _fraction(token)
        if token in _FENCES:
            return self.fenced(token)
        if token == "\\frac":
            return self.both("/", self.primary(), self.primary())
        if token == "\\binom":
            return self.done(_binomial(self.primary(), self.primary()))
        if token in ("\\sqrt", "√"):
            degree = self.fenced(self.take()) if self.next == "[" else Fraction(2)
            return self.done(_root(self.primary(), degree))
        if token in ("\\pi", "π"):
            return +_mp.pi
        if token[1:] in _FUNCTIONS:
            return self.function(token[1:])
        return self.name(token)

    def mixed(self, whole: str) -> Fraction:
        """`2\\frac{1}{2}` and `2 1/2` are two and a half."""
        proper = _PROPER.match(" ".join(self.tokens[self.at : self.at + 7]))
        if proper is None:
            return Fraction(whole)
        self.at += len(proper[0].split())
        return int(whole) + Fraction(int(proper[1] or proper[3]), int(proper[2] or proper[4]))

    def function(self, name: str) -> Value:
        base = Fraction(10) if name in ("log", "lg") else None
        exponent = None
        while self.next in ("^", "_"):
            if self.take() == "^":
                exponent = self.script()
            else:
                base = self.script()
        if exponent == -1:
            name, exponent = f"arc{name}", None
            if name not in _FUNCTIONS:
                raise Unread(name)
        value = self.done(getattr(_mp, _FUNCTIONS[name])(_inexact(_small(self.argument()))))
        if base is not None:
            value = self.done(value / _mp.ln(_inexact(base)))
        return value if exponent is None else self.done(_power(value, exponent))

    def argument(self) -> Value:
        """Of a function: what is in brackets, else the product up to the next sign or function."""
        if self.next in ("(", "{", "["):
            return self.primary()
        value = self.signed()
        while self.starts_factor() and (self.next or "")[1:] not in _FUNCTIONS and self.next not in ("(", "[", "|"):
            value = self.both("*", value, self.power())
        return value

    def name(self, token: str) -> Value:
        name = token.removeprefix("\\text{").rstrip("} ").lstrip()
        if _DECORATION.fullmatch(token):
            name += f"({self.raw()})"
        elif not name or not (name != token or token.isalpha() or _GREEK.fullmatch(token)):
            raise Unread(token)
        while self.next in ("_", "'"):
            name += self.take()
            name += self.raw() if name[-1] == "_" else ""
        if name == "e":
            return +_mp.e
        if name == "i":
            return self.done(_mp.mpc(0, 1))
        self.names.add(name)
        place = _place(name, self.point)
        if self.next == "(" and name[0] in "fghFGHP":  # a function that nobody defined: any will do
            return self.done(_mp.sin(place * _inexact(_small(self.primary())) + 1))
        return place

    def raw(self) -> str:
        """The text of a subscript, or of what a decoration stands over."""
        token = self.take()
        if token != "{":
            return token
        end = self.tokens.index("}", self.at)
        text, self.at = "".join(self.tokens[self.at : end]), end + 1
        return text


def _inexact(value: Value) -> Value:
    return _mp.convert(value)


def _place(name: str, point: int) -> Value:
    """Where a variable is put: the same in every process, and of no special value. All of them are positive at the
    first place, where roots and logarithms mostly are real, and negative at the second."""
    noise = zlib.crc32(f"{point} {name}".encode())
    negative = point == 1 or (point == 2 and noise % 2)
    return (-1 if negative else 1) * (_mp.mpf(noise + 0.5) * 3 / 2**32 + _mp.mpf("0.3"))


def _fraction(token: str) -> Fraction:
    """A decimal, in scientific notation or repeating."""
    if "\\" not in token:
        return Fraction(token)
    start, period = re.findall(r"\d*\.\d*|\d+", token)
    places = len(start.partition(".")[2])
    return Fraction(f"0{start}0") + Fraction(int(period), 10 ** len(period) - 1) / 10**places


def _small(value: Value, limit: int = 10_000) -> Value:
    if abs(value) > limit:
        raise Unread(f"above {limit}")
    return value


def _whole(value: Value) -> bool:
    return isinstance(value, Fraction) and value.denominator == 1 and value >= 0


def _power(base: Value, exponent: Value) -> Value:
    _small(exponent)
    power = int(exponent) if isinstance(exponent, Fraction) and exponent.denominator == 1 else _inexact(exponent)
    if isinstance(base, Fraction) and isinstance(power, int):
        if max(base.numerator.bit_length(), base.denominator.bit_length()) * abs(power) > MAX_BITS:
            raise Unread("too long")
        return base**power
    if base == 0:
        return Fraction(0) if _mp.re(power) > 0 else Fraction(1) / 0
    return _inexact(base) ** power


def _root(value: Value, degree: Value) -> Value:
    odd = isinstance(degree, Fraction) and degree.denominator == 1 and degree.numerator % 2
    if odd and not isinstance(value, _mp.mpc) and value < 0:
        return -_power(-value, 1 / degree)  # the real root, as schools have it
    return _power(value, 1 / degree)


def _factorial(n: Value) -> Value:
    return Fraction(math.factorial(int(_small(n, 1000)))) if _whole(n) else _mp.factorial(_inexact(_small(n)))


def _binomial(n: Value, k: Value) -> Value:
    if _whole(n) and _whole(k):
        return Fraction(math.comb(int(_small(n, 1000)), int(_small(k, 1000))))
    return _mp.binomial(_inexact(_small(n)), _inexact(_small(k)))
