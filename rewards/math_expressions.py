"""A small reader and evaluator of school algebra in LaTeX or plain text.

It does a known amount of work on any text of bounded length: nothing is simplified or solved, and numbers that would
grow out of hand are refused. Rational arithmetic is exact; everything else has 30 digits.
"""

from __future__ import annotations

import math
import re
import zlib
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import sympy
from mpmath.ctx_mp import MPContext

Tree = tuple[Any, ...]
"""`("number", Fraction)`, `("name", str)`, or an operation and its operands."""
Value = Any
"""`Fraction` where arithmetic stayed rational, else a number of `_mp`."""

_mp = MPContext()
_mp.dps = 30
MAX_BITS = 14_000
"""Longest number that is computed, and largest binary exponent: Python refuses to print longer ones."""
MAX_DEPTH = 25
MAX_TERMS = 200
"""Of an expression that is expanded."""
POINTS = 3
"""How many places symbolic expressions are compared at."""

_TOKEN = re.compile(r"\s*(\d+(?:\.\d+)?|\.\d+|\\text\{[^{}]*\}|\\[a-zA-Z]+|\\[{}|]|\S)")
_NUMBER = re.compile(r"\d|\.\d")
_GREEK = re.compile(
    "(?:var)?(?:alpha|beta|gamma|delta|epsilon|zeta|eta|theta|iota|kappa|lambda|mu|nu|xi|rho|sigma|tau|upsilon|phi|chi"
    "|psi|omega|Gamma|Delta|Theta|Lambda|Xi|Sigma|Phi|Psi|Omega)|ell|hbar"
)
_DECORATION = re.compile("overline|bar|vec|hat|widehat|tilde|over(?:left)?rightarrow|mathbf|angle|triangle")
_FUNCTIONS = {  # LaTeX: (mpmath, sympy)
    **{f: (f, f) for f in ("sin", "cos", "tan", "cot", "sec", "csc", "sinh", "cosh", "tanh", "coth", "exp")},
    **{f"arc{f}": (f"a{f}", f"a{f}") for f in ("sin", "cos", "tan", "cot", "sec", "csc")},
    "ln": ("log", "log"),
    "log": ("log", "log"),
    "lg": ("log", "log"),
}
_FENCES = {"(": ")", "[": "]", "{": "}", "\\{": "\\}", "|": "|", "\\lvert": "\\rvert", "\\lfloor": "\\rfloor"}
_FENCES["\\lceil"] = "\\rceil"
_FENCED = {"|": "abs", "\\lvert": "abs", "\\lfloor": "floor", "\\lceil": "ceil"}


class Unread(ValueError):
    """The text is no expression of those read here."""


class TooCostly(Unread):
    """It is, and its value is not worth having."""


def parse(text: str) -> Tree:
    """The tree of an expression. Raises `Unread`."""
    parser = _Parser(_TOKEN.findall(text))
    tree = parser.sum()
    if parser.next is not None:
        raise Unread(text)
    return tree


def names(tree: Tree) -> frozenset[str]:
    """Variables of an expression; `e` and `i` are numbers."""
    if tree[0] == "name":
        return frozenset({tree[1]})
    return frozenset().union(*(names(part) for part in tree[1:] if isinstance(part, tuple)))


def evaluate(tree: Tree, point: int = 0) -> Value:
    """Its value with the variables at one of `POINTS` fixed places. Raises `Unread`."""
    try:
        return _evaluate(tree, point)
    except (ZeroDivisionError, ValueError, OverflowError, TypeError) as error:
        raise error if isinstance(error, Unread) else Unread(str(error)) from error


def values(tree: Tree) -> tuple[Value | None, ...]:
    """At each of the places; `None` where it has none there. Raises `Unread` if it has none anywhere."""
    found = []
    for point in range(POINTS):
        try:
            found.append(_inexact(evaluate(tree, point)))
        except TooCostly:
            raise
        except Unread:
            found.append(None)
    if found.count(None) == POINTS:
        raise Unread("no value")
    return tuple(found)


def constant(real: Fraction, imaginary: Fraction) -> Value:
    """A number as `values` gives them."""
    return _mp.mpc(_inexact(real), _inexact(imaginary)) if imaginary else _inexact(real)


def exact_parts(value: Value) -> tuple[Fraction, Fraction, bool]:
    """Real part, imaginary part, and whether they are exact: a value within rounding of a simple fraction is one."""
    if isinstance(value, Fraction):
        return value, Fraction(0), True
    value = _mp.mpc(value)
    parts, exact = [], True
    scale = abs(value)
    if not _mp.isfinite(scale):
        raise Unread("infinite")
    for part in (value.real, value.imag):
        if abs(part) <= scale * _mp.mpf(10) ** -24:
            parts.append(Fraction(0))
            continue
        mantissa, exponent = part.man_exp
        if abs(exponent) > MAX_BITS:
            raise TooCostly("magnitude")
        number = Fraction(mantissa) * Fraction(2) ** exponent * (1 if part > 0 else -1)
        simple = number.limit_denominator(1000)
        if abs(number - simple) <= abs(number) * Fraction(1, 10**24):
            number = simple
        else:
            exact = False
        parts.append(number)
    return parts[0], parts[1], exact


def spelled(tree: Tree) -> str | None:
    """One text for expressions that expand to the same; `None` where that could take long."""
    try:
        if _terms(tree) > MAX_TERMS:
            return None
        found = _to_sympy(tree)
        return str(sympy.cancel(found) if _quotient(tree) else sympy.expand(found))
    except (Unread, ValueError, TypeError, ZeroDivisionError, NotImplementedError, sympy.PolynomialError):
        return None


class _Parser:
    """Recursive descent. Multiplication may be implied; `a/bc` is `(a/b)c`."""

    def __init__(self, tokens: list[str]) -> None:
        self.tokens, self.at, self.depth = tokens, 0, 0
        self.closers: list[str] = []

    @property
    def next(self) -> str | None:
        return self.tokens[self.at] if self.at < len(self.tokens) else None

    def take(self, wanted: str | None = None) -> str:
        token = self.next
        if token is None or (wanted is not None and token != wanted):
            raise Unread(f"{wanted} expected, not {token}")
        self.at += 1
        return token

    def sum(self) -> Tree:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise Unread("nested too deeply")
        tree = self.product()
        while self.next in ("+", "-"):
            operator = self.take()
            right = self.product()
            tree = ("+", tree, right if operator == "+" else ("*", _number(-1), right))
        self.depth -= 1
        return tree

    def product(self) -> Tree:
        tree = self.signed()
        while True:
            if self.next in ("*", "/", "\\cdot", "\\times", "\\div"):
                operator = "/" if self.take() in ("/", "\\div") else "*"
                tree = (operator, tree, self.signed())
            elif self.starts_factor():
                tree = ("*", tree, self.power())
            else:
                return tree

    def signed(self) -> Tree:
        sign = 1
        while self.next in ("+", "-"):
            sign = -sign if self.take() == "-" else sign
        return self.power() if sign == 1 else ("*", _number(-1), self.power())

    def starts_factor(self) -> bool:
        token = self.next
        if token is None or _NUMBER.match(token):
            return False  # two numbers side by side mean nothing
        if token in _FENCES:
            return not (token == "|" and self.closers and self.closers[-1] == "|")
        return (
            token[0].isalpha()
            or token == "√"
            or (token[0] == "\\" and token.lstrip("\\")[:1].isalpha() and token not in _CLOSERS)
        )

    def power(self) -> Tree:
        tree = self.postfix(self.primary())
        while self.next == "^":
            self.take()
            tree = self.postfix(("^", tree, self.script()))
        return tree

    def postfix(self, tree: Tree) -> Tree:
        while self.next in ("!", "°", "%"):
            mark = self.take()
            if mark == "!":
                tree = ("factorial", tree)
            else:
                tree = ("*", tree, ("/", ("pi",), _number(180)) if mark == "°" else _number(Fraction(1, 100)))
        return tree

    def script(self) -> Tree:
        """An exponent: in braces or brackets, or one number or name, with its sign."""
        sign = -1 if self.next == "-" else 1
        if sign == -1:
            self.take()
        tree = self.primary()
        return tree if sign == 1 else ("*", _number(-1), tree)

    def fenced(self, opener: str) -> Tree:
        self.closers.append(_FENCES[opener])
        tree = self.sum()
        self.take(self.closers.pop())
        return (_FENCED[opener], tree) if opener in _FENCED else tree

    def braced(self) -> Tree:
        return self.fenced(self.take("{")) if self.next == "{" else self.primary()

    def primary(self) -> Tree:
        token = self.take()
        if _NUMBER.match(token):
            return self.mixed(_number(token))
        if token in _FENCES:
            return self.fenced(token)
        if token == "\\frac":
            return ("/", self.braced(), self.braced())
        if token == "\\binom":
            return ("binomial", self.braced(), self.braced())
        if token in ("\\sqrt", "√"):
            degree = self.fenced(self.take()) if self.next == "[" else _number(2)
            return ("root", self.braced(), degree)
        if token in ("\\pi", "π"):
            return ("pi",)
        if token[1:] in _FUNCTIONS:
            return self.function(token[1:])
        return self.name(token)

    def mixed(self, whole: Tree) -> Tree:
        """`2\\frac{1}{2}` is two and a half."""
        tokens = self.tokens[self.at : self.at + 7]
        if tokens[:2] == ["\\frac", "{"] and tokens[3:5] == ["}", "{"] and tokens[6:] == ["}"]:
            up, down = tokens[2], tokens[5]
            if up.isdecimal() and down.isdecimal() and int(down) and whole[1].denominator == 1:
                self.at += 7
                return _number(whole[1] + Fraction(int(up), int(down)))
        return whole

    def function(self, name: str) -> Tree:
        base = _number(10) if name in ("log", "lg") else None
        exponent = None
        while self.next in ("^", "_"):
            if self.take() == "^":
                exponent = self.script()
            elif name == "log":
                base = self.script()
            else:
                raise Unread(name)
        if exponent == ("*", _number(-1), _number(1)) or exponent == _number(-1):
            name, exponent = f"arc{name}", None
            if name not in _FUNCTIONS:
                raise Unread(name)
        tree: Tree = ("call", name, self.argument())
        if base is not None:
            tree = ("/", tree, ("call", "ln", base))
        return tree if exponent is None else ("^", tree, exponent)

    def argument(self) -> Tree:
        """Of a function: what is in brackets, else the product up to the next sign or function."""
        if self.next in ("(", "{", "["):
            return self.primary()
        tree = self.signed()
        while self.starts_factor() and (self.next or "")[1:] not in _FUNCTIONS and self.next not in ("(", "[", "|"):
            tree = ("*", tree, self.power())
        return tree

    def name(self, token: str) -> Tree:
        if token.startswith("\\text{"):
            name = token[6:-1].strip()
        elif token[0] == "\\":
            name = token[1:]
            if _DECORATION.fullmatch(name):
                name += f"({self.raw()})"
            elif not _GREEK.fullmatch(name):
                raise Unread(token)
        elif len(token) == 1 and token.isalpha():
            name = token
        else:
            raise Unread(token)
        if not name:
            raise Unread(token)
        while self.next in ("_", "'"):
            name += self.take()
            name += self.raw() if name[-1] == "_" else ""
        if name in ("e", "i"):
            return (name,)
        if self.next == "(" and name[0] in "fghFGHP":
            raise Unread("a function that nobody defined")
        return ("name", name)

    def raw(self) -> str:
        """The text of a subscript, or of what a decoration stands over."""
        token = self.take()
        if token != "{":
            return token
        text = ""
        while self.next != "}":
            text += self.take()
        self.take()
        return text


_CLOSERS = frozenset(_FENCES.values())


def _number(value: Any) -> Tree:
    return ("number", Fraction(value))


def _place(name: str, point: int) -> Value:
    """Where a variable is put: between -3 and 3, the same in every process, and of no special value."""
    return _mp.mpf(zlib.crc32(f"{point} {name}".encode()) + 0.5) * 6 / 2**32 - 3


def _evaluate(tree: Tree, point: int) -> Value:
    head, *rest = tree
    if head == "number":
        return rest[0]
    if head == "name":
        return _place(rest[0], point)
    if head in ("pi", "e", "i"):
        return {"pi": +_mp.pi, "e": +_mp.e, "i": _mp.mpc(0, 1)}[head]
    if head == "call":
        return _checked(getattr(_mp, _FUNCTIONS[rest[0]][0])(_inexact(_small(_evaluate(rest[1], point)))))
    return _checked(_OPERATIONS[head](*(_evaluate(part, point) for part in rest)))


def _inexact(value: Value) -> Value:
    return _mp.convert(value)


def _both(operation: Callable[[Any, Any], Value]) -> Callable[[Value, Value], Value]:
    def apply(a: Value, b: Value) -> Value:
        if isinstance(a, Fraction) and isinstance(b, Fraction):
            return operation(a, b)
        return operation(_inexact(a), _inexact(b))

    return apply


def _checked(value: Value) -> Value:
    if isinstance(value, Fraction):
        if max(value.numerator.bit_length(), value.denominator.bit_length()) > MAX_BITS:
            raise TooCostly("too long")
    elif value and _mp.mag(value) > MAX_BITS:
        raise TooCostly("too large")
    return value


def _small(value: Value, limit: int = 10_000) -> Value:
    if abs(value) > limit:
        raise TooCostly(f"above {limit}")
    return value


def _power(base: Value, exponent: Value) -> Value:
    _small(exponent)
    if isinstance(exponent, Fraction) and exponent.denominator == 1 and isinstance(base, Fraction):
        bits = max(base.numerator.bit_length(), base.denominator.bit_length())
        if bits * abs(exponent) > MAX_BITS:
            raise TooCostly("too long")
        return base ** int(exponent)
    if base == 0:
        return Fraction(0) if _mp.re(_inexact(exponent)) > 0 else Fraction(1) / 0
    if isinstance(exponent, Fraction) and exponent.denominator == 1:
        return _inexact(base) ** int(exponent)
    return _inexact(base) ** _inexact(exponent)


def _root(value: Value, degree: Value) -> Value:
    if degree == 0:
        raise Unread("root of degree 0")
    odd = isinstance(degree, Fraction) and degree.denominator == 1 and degree.numerator % 2
    if odd and _mp.im(_inexact(value)) == 0 and _mp.re(_inexact(value)) < 0:
        return -_power(-value, 1 / degree)  # the real root, as schools have it
    return _power(value, 1 / _inexact(degree) if not isinstance(degree, Fraction) else 1 / degree)


def _whole(value: Value, limit: int = 1000) -> int:
    if not isinstance(value, Fraction) or value.denominator != 1 or value < 0:
        raise Unread("not a natural number")
    return int(_small(value, limit))


_OPERATIONS: dict[str, Callable[..., Value]] = {
    "+": _both(lambda a, b: a + b),
    "*": _both(lambda a, b: a * b),
    "/": _both(lambda a, b: a / b),
    "^": _power,
    "root": _root,
    "abs": lambda a: abs(a),
    "floor": lambda a: (
        Fraction(int(_mp.floor(_inexact(a)))) if not isinstance(a, Fraction) else Fraction(math.floor(a))
    ),
    "ceil": lambda a: Fraction(int(_mp.ceil(_inexact(a)))) if not isinstance(a, Fraction) else Fraction(math.ceil(a)),
    "factorial": lambda n: Fraction(math.factorial(_whole(n))),
    "binomial": lambda n, k: Fraction(math.comb(_whole(n), _whole(k))),
}


def _terms(tree: Tree) -> int:
    """At most so many, when expanded."""
    parts = [_terms(part) for part in tree[1:] if isinstance(part, tuple)]
    if tree[0] == "+":
        return sum(parts)
    if tree[0] == "^" and tree[2][0] == "number":
        power = math.ceil(abs(tree[2][1]))
        return math.comb(power + parts[0] - 1, power) if power < MAX_TERMS else MAX_TERMS + 1
    return math.prod(parts)


def _quotient(tree: Tree) -> bool:
    """Whether it is one of polynomials, which has a normal form that takes more than to expand it."""
    heads, divided = {"number", "name", "+", "*", "/", "^"}, False
    pending = [tree]
    while pending:
        part = pending.pop()
        if part[0] not in heads or (part[0] == "^" and part[2][0] != "number"):
            return False
        divided |= part[0] == "/" and bool(names(part[2]))
        pending += [operand for operand in part[1:] if isinstance(operand, tuple)]
    return divided


def _to_sympy(tree: Tree) -> Any:
    head, *rest = tree
    if not names(tree) and head != "number":
        real, imaginary, exact = exact_parts(evaluate(tree))
        if exact:
            return sympy.Rational(real) + sympy.I * sympy.Rational(imaginary)
    if head == "number":
        return sympy.Rational(rest[0].numerator, rest[0].denominator)
    if head == "name":
        return sympy.Symbol(rest[0])
    if head in ("pi", "e", "i"):
        return {"pi": sympy.pi, "e": sympy.E, "i": sympy.I}[head]
    if head == "call":
        return getattr(sympy, _FUNCTIONS[rest[0]][1])(_to_sympy(rest[1]))
    parts = [_to_sympy(part) for part in rest]
    operations: dict[str, Callable[..., Any]] = {
        "+": lambda a, b: a + b,
        "*": lambda a, b: a * b,
        "/": lambda a, b: a / b,
        "^": lambda a, b: a**b,
        "root": lambda a, n: a ** (1 / n),
        "abs": sympy.Abs,
        "floor": sympy.floor,
        "ceil": sympy.ceiling,
    }
    if head not in operations:
        raise Unread(head)
    return operations[head](*parts)
