"""Reading mathematical answers.

An answer is read into a number (exact, with its unit), a symbolic expression, a group (set, tuple, interval, union,
matrix), a named value (`x = 5`), a relation, words, or, if all that fails, raw LaTeX. Units: `rewards.math_units`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from decimal import Context, Decimal
from fractions import Fraction
from functools import lru_cache
from typing import Any

from rewards.math_expressions import (
    TooCostly,
    Tree,
    Unread,
    evaluate,
    exact_parts,
    names,
    parse,
    spelled,
    values,
)
from rewards.math_units import Dimensions, read_unit, unit_text

MAX_ANSWER = 500
"""Characters of a longest answer that is read as mathematics; longer ones are compared as text."""


@dataclass(frozen=True)
class Number:
    real: Fraction
    imaginary: Fraction = Fraction(0)
    exact: bool = True
    decimal: bool = False
    """Written with a decimal point, so perhaps rounded."""
    percent: bool = False
    unit: Dimensions = ()
    factor: Fraction = Fraction(1)

    def __str__(self) -> str:
        parts = [_digits(part * self.factor) for part in (self.real, self.imaginary)]
        text = parts[0] if not self.imaginary else f"{parts[0]} + {parts[1]}i"
        return text + "%" * self.percent + (f" {unit_text(self.unit)}" if self.unit else "")


@dataclass(frozen=True)
class Symbolic:
    tree: Tree
    text: str
    values: tuple[Any, ...] = field(compare=False)
    """At the places where expressions are compared; `None` where it has none."""

    def __str__(self) -> str:
        return spelled(self.tree) or self.text


@dataclass(frozen=True)
class Group:
    fences: str
    """`{}` a set, `∪` a union, `[[]]` a matrix of rows `[ ]`, else the brackets of a tuple or an interval."""
    items: tuple[Any, ...]

    @property
    def ordered(self) -> bool:
        return self.fences not in ("{}", "∪")

    def __str__(self) -> str:
        items = [str(item) for item in self.items]
        if self.fences == "∪":
            return " ∪ ".join(sorted(set(items)))
        return self.fences[0] + ", ".join(items if self.ordered else sorted(set(items))) + self.fences[-1]


@dataclass(frozen=True)
class Relation:
    sign: str
    """`=`, `≠`, `>` or `≥`, of `difference` to 0."""
    difference: Symbolic

    def __str__(self) -> str:
        return f"{self.difference} {self.sign} 0"


@dataclass(frozen=True)
class Named:
    name: str
    value: Any
    relation: Relation | None

    def __str__(self) -> str:
        return f"{self.name} = {self.value}"


@dataclass(frozen=True)
class Words:
    text: str

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True)
class Raw:
    text: str
    verbatim: bool = False
    """Not to be handed to math-verify: it could take long, or is known to state nothing."""

    def __str__(self) -> str:
        return self.text


Answer = Number | Symbolic | Group | Relation | Named | Words | Raw

_UNICODE = str.maketrans(
    {"−": "-", "–": "-", "×": "*", "·": "*", "⋅": "*", "÷": "/", "∕": "/", "⩽": "≤", "⩾": "≥", "％": "%",
     "\u00a0": " ", "\u202f": " ", "\u2009": " ", "’": "'", "′": "'", "，": ", ", "（": "(", "）": ")", "`": " ",
     '"': " ", "\n": " ", "\t": " ", "º": "°", "½": "\\frac{1}{2}",
     "¼": "\\frac{1}{4}", "¾": "\\frac{3}{4}", "∅": "\\emptyset"}
)  # fmt: skip
_ATOM = r"(\{[^{}]*\}|\\(?:pi|[a-z]+)(?![a-zA-Z{])|[0-9a-zA-Z])"
_REWRITES = [
    (re.compile(pattern), replacement)
    for pattern, replacement in [
        (r"(?<=\d)(?:\\[,!:;]|\{,\}|,\\!|\\ )+\s*(?=\d{3}(?!\d))", ""),  # thin spaces and `{,}` between thousands
        (r"\\(?:left|right|[bB]igg?[lr]?|displaystyle|textstyle|limits|middle|!)(?![a-zA-Z])\s*\.?", ""),
        (r"(?<!\\)\\[,;:> ]|\\q?quad(?![a-zA-Z])|~|\\&", " "),
        (r"(?<!\\)\\[()\[\]]|\*\*", ""),  # delimiters of mathematics, and bold
        (r"\\[dtc]frac(?![a-zA-Z])", r"\\frac"),
        (r"\\(?:math(?:rm|bf|it|sf|tt)|text(?:rm|bf|it|normal|sf|tt)|mbox|hbox|operatorname|boldsymbol|bm)(?![a-zA-Z])\s*\{",
         r"\\text{"),
        (r"\\(?:boxed|fbox|bf|rm|it)(?![a-zA-Z])", ""),
        (r"\\mathbb\s*\{?R\}?", "(-∞,∞)"),
        (r"\^?\s*\{?\s*\\(?:circ|degree)(?![a-zA-Z])\s*\}?", "°"),
        (r"\^\s*\{?\s*°\s*\}?", "°"),
        (r"°\s*\\text\{\s*([CF])\s*\}", r"°\1"),
        (r"\\text\{\s*(?:%|\\%|percent)\s*\}|\\%|\s*\b[Pp]er ?cent(?:age)?\b", "%"),
        (r"\\(?:infty|inf)(?![a-zA-Z])|\b[Ii]nfinity\b|\boo\b", "∞"),
        (r"\+\s*∞", "∞"),
        (r"\\leq?(?:slant|q)?(?![a-zA-Z])|<=", "≤"),
        (r"\\geq?(?:slant|q)?(?![a-zA-Z])|>=", "≥"),
        (r"\\lt(?![a-zA-Z])", "<"),
        (r"\\gt(?![a-zA-Z])", ">"),
        (r"\\neq?(?![a-zA-Z])|!=", "≠"),
        (r"\\(?:approx|equiv|simeq)(?![a-zA-Z])|≈|≡|:=|==", "="),
        (r"\\in(?![a-zA-Z])", "∈"),
        (r"\\(?:cup|bigcup)(?![a-zA-Z])|\bU\b(?=\s*[\[(])", "∪"),
        (r"\\pm(?![a-zA-Z])|\+/-", "±"),
        (r"\\mp(?![a-zA-Z])", "∓"),
        (r"\\(?:cdot|times|ast)(?![a-zA-Z])", "*"),
        (r"\\div(?![a-zA-Z])", "/"),
        (r"\\(?:emptyset|varnothing)(?![a-zA-Z])", r"\\{\\}"),
        (r"\\(?:lbrace|{)", r"\\{"),
        (r"\\(?:rbrace|})", r"\\}"),
        (r"\\langle(?![a-zA-Z])", "("),
        (r"\\rangle(?![a-zA-Z])", ")"),
        (r"\\(?:lvert|rvert|vert|mid)(?![a-zA-Z])", "|"),
        (r"(?<![\\a-zA-Z])(sqrt|sin|cos|tan|cot|sec|csc|arcsin|arccos|arctan|ln|log|exp|pi)(?![a-zA-Z])", r"\\\1"),
        (r"\\a(sin|cos|tan)(?![a-zA-Z])", r"\\arc\1"),
        (r"\\frac\s*" + _ATOM + r"\s*" + _ATOM,
         lambda m: "\\frac" + "".join(a if a[0] == "{" else f"{{{a}}}" for a in m.groups())),
        (r"\\sqrt\s*([0-9a-zA-Z])", r"\\sqrt{\1}"),
        (r"\\frac\{\s*\\text\{([^{}]*)\}\s*\}\{\s*\\text\{([^{}]*)\}\s*\}", r"\\text{\1/\2}"),
        (r",?\s*\\text\{\s*,?\s*(?:and|or)\s*\}\s*|,?\s+(?:and|or)\s+", ", "),
        (r"(?<=\d)(?:\^?\{?\\text\{\s*(?:st|nd|rd|th)\s*\}\}?|(?:st|nd|rd|th)\b)", ""),
        (r"\^\{\s*(\d)\s*\}", r"^\1"),
        (r"\s+", " "),
    ]
]  # fmt: skip
_DECIMAL = r"(?:\d+(?:\.\d*)?|\.\d+)"
_PLAIN = re.compile(
    rf"(?P<sign>[+-]?)\s*(?:(?P<number>{_DECIMAL})"
    r"(?:\s*\*\s*10\s*\^\s*\{?(?P<ten>[+-]?\d{1,4})\}?|[eE](?P<e>[+-]?\d{1,4}))?"
    r"|(?P<repeat>\d*\.\d*)\\overline\{?(?P<period>\d+)\}?"
    rf"|(?:(?P<whole>\d+) ?)?(?:\\frac\{{\s*(?P<up>-?{_DECIMAL})\s*\}}\{{\s*(?P<down>-?{_DECIMAL})\s*\}}"
    rf"|(?<!\d)(?P<above>{_DECIMAL}) ?/ ?(?P<below>{_DECIMAL})))",
    re.ASCII,
)
_THOUSANDS = re.compile(r"(?<![\d.])(?<!\d,)\d{1,3}(?:,\d{3})+(?!\d|,\d)")
_CURRENCY = re.compile(
    r"(?P<sign>[+-]?)\s*(?:US ?)?(?P<mark>\\?\$|€|£|¥|₹|\\text\{\s*[$€£]\s*\})\s*(?P<rest>[-+]?[\d.\\(].*)"
)
_UNIT = re.compile(
    r"(?P<value>.*[\d)}\]!%πa-z])\s*(?P<unit>(?:(?:\\text\{[^{}]*\}|\\?[$€£¢]|° ?[CF]?)(?:\^\{?-?\d\}?|[²³])?[ */·]*)+)"
)
_WORDY_UNIT = re.compile(
    r"(?P<value>.*[\d)}\]])(?P<space> ?)(?P<unit>[^\W\d_][^\W\d_./ ]*(?:[²³]|\^\d)?(?:[ /.][^\\{}=<>]*)?)"
)
_PREFIX = re.compile(
    r"\s*(?:(?:so|thus|hence|therefore),? )?(?:the )?(?:final )?(?:answer|result)(?: is)?\s*[:=]?\s+"
    r"|\s*(?:=|approximately|about)\s*",
    re.IGNORECASE,
)
_WORDS = re.compile(r"(?=.*[^\W\d_]{2})[\w\s'.,:;?&/()-]+")
_WORD = re.compile(r"[^\W\d_]{3,}|no", re.IGNORECASE)
_PROSE = re.compile(r"(?<![\\a-zA-Z{])[a-zA-Z]{4,}")
"""A product of so many variables is a word."""
_NAME = re.compile(
    r"(?:m ?)?\\(?:angle|triangle|overline) ?\{?[A-Z]+\}?"
    r"|(?:\\?[A-Za-z]+|\\text\{[^{}]*\})'*(?:_\{?\w+\}?)?(?:\([A-Za-z](?:, ?[A-Za-z])*\))?|\([A-Za-z](?:, ?[A-Za-z])+\)"
)
_MATRIX = re.compile(r"\\begin\{([pbBvV]?matrix|array)\}(?:\{[clr|]*\})?(.*)\\end\{\1\}")
_CLOCK = re.compile(r"\d{1,2}:\d{2}")
_RATIO = re.compile(r"(\d+) ?: ?(\d+)")
_BASE = re.compile(r"(\w+)_\{?(\d+)\}?", re.ASCII)
_OPENERS, _CLOSERS = "([{", ")]}"


@lru_cache(maxsize=8192)
def read(text: str) -> Answer:
    """The answer that a text states, whatever it is: what cannot be understood is `Words` or `Raw`."""
    if len(text) > MAX_ANSWER:
        return Raw(" ".join(text.split()), verbatim=True)
    written = normalise(text)
    try:
        return _read(written)
    except RecursionError:
        return Raw(written, verbatim=True)


def normalise(text: str) -> str:
    """One spelling for what LaTeX and plain text spell in many ways; nothing is evaluated."""
    text = text.strip().translate(_UNICODE)
    if text.count("$") - text.count("\\$") > 1:
        text = re.sub(r"(?<!\\)\$", "", text)
    for pattern, replacement in _REWRITES:
        text = pattern.sub(replacement, text)
    return text.strip(" .,;:") if not text.startswith(".") else text.strip(" ,;:")


def _read(s: str) -> Answer:
    s = _peeled(s)
    if plain := _plain(s):
        return plain
    if wrapped := re.fullmatch(r"\\text\{([^{}]*)\}", s):
        inner = wrapped[1].strip()
        return _words(inner) if _WORDS.fullmatch(inner) and not re.match(r"[-\d(]|.*,", inner) else _read(inner)
    if matrix := _MATRIX.fullmatch(s):
        rows = re.split(r"\\\\", matrix[2].strip().removesuffix("\\\\"))
        if matrix[1] not in ("vmatrix", "Vmatrix"):
            return Group("[[]]", tuple(Group("[ ]", tuple(_read(cell) for cell in row.split("&"))) for row in rows))
    if len(pieces := _split(s, "∪")) > 1:
        return Group("∪", tuple(_read(piece) for piece in pieces))
    if fences := _fenced(s):
        return _group(*fences)
    s = _THOUSANDS.sub(lambda m: m[0].replace(",", ""), s)
    if len(items := _split(s, ",;")) > 1:
        return Group("{}", tuple(_read(item) for item in items if item.strip()))
    if "±" in s or "∓" in s:
        signs = ("+-", "-+")
        both = [s.replace("±", a).replace("∓", b) for a, b in signs]
        return Group("{}", tuple(_read(one.removeprefix("+")) for one in both))
    if relation := _relation(s):
        return relation
    if prefix := _PREFIX.match(s):
        return _read(s[prefix.end() :])
    if s in ("∞", "-∞"):
        return Words(s)
    return _quantity(s)


def _quantity(s: str) -> Answer:
    """A number or expression, with its unit or per cent sign."""
    if plain := _plain(s):
        return plain
    if money := _CURRENCY.fullmatch(s):
        value, unit = _read(money["sign"] + money["rest"]), read_unit(re.sub(r"\\text|[\\{}\s]", "", money["mark"]))
        return _with_unit(value, unit, known=True) if isinstance(value, Number) else value
    if s.endswith("%"):
        value = _quantity(s[:-1].strip())
        return _replaced(value, percent=True) if isinstance(value, Number) else value
    if unit := _unit(s):
        return unit
    if _CLOCK.fullmatch(s):
        return Words(s)
    if (ratio := _RATIO.fullmatch(s)) and int(ratio[2]):
        return Number(Fraction(int(ratio[1]), int(ratio[2])))
    if (based := _BASE.fullmatch(s)) and based[1][0].isdigit():
        return Number(Fraction(int(based[1])), unit=((f"base {int(based[2])}", 1),)) if based[1].isdigit() else Words(s)
    if _WORD.fullmatch(s):
        return _words(s)
    return _expression(s)


def _expression(s: str) -> Answer:
    try:
        if _PROSE.search(s):
            raise Unread(s)
        tree = parse(s)
        if not names(tree):
            real, imaginary, exact = exact_parts(evaluate(tree))
            return Number(real, imaginary, exact)
        return _symbolic(tree, s)
    except TooCostly:
        return Raw(s, verbatim=True)
    except Unread:
        return _words(s) if _WORDS.fullmatch(s) else Raw(s)


def _symbolic(tree: Tree, text: str) -> Symbolic:
    return Symbolic(tree, text.replace(" ", ""), values(tree))


def _words(s: str) -> Answer:
    s = " ".join(s.replace("\\text", "").split())
    return Words(s.casefold() if len(s) > 1 else s)


def _plain(s: str) -> Number | None:
    """Integers, decimals, fractions, mixed numbers, repeating decimals and scientific notation, all exact."""
    match = _PLAIN.fullmatch(s)
    if match is None:
        return None
    sign = -1 if match["sign"] == "-" else 1
    whole = Fraction(match["whole"] or 0)
    if match["number"]:
        exponent = int(match["ten"] or match["e"] or 0)
        if abs(exponent) > 1000:
            return None
        value, decimal = Fraction(match["number"].rstrip(".")) * Fraction(10) ** exponent, "." in match["number"]
        return Number(sign * value, decimal=decimal)
    if match["period"]:
        start, period = match["repeat"].partition(".")[2], match["period"]
        shifted = Fraction(int(period), 10 ** len(period) - 1) / 10 ** len(start)
        return Number(sign * (Fraction("0" + match["repeat"].rstrip(".")) + shifted))
    up, down = Fraction(match["up"] or match["above"]), Fraction(match["down"] or match["below"])
    return Number(sign * (whole + up / down)) if down else None


def _unit(s: str) -> Answer | None:
    if (match := _UNIT.fullmatch(s)) and not ("°" in match["unit"] and "\\" in match["value"]):  # `\sin 30°`
        unit = read_unit(
            re.sub(r"\\text\{([^{}]*)\}", lambda m: " " + m[1].strip(), match["unit"])
            .replace("\\", "")
            .replace("*", " ")
        )
        known = True  # marked as text, so no variable
    elif match := _WORDY_UNIT.fullmatch(s):
        unit = read_unit(match["unit"])
        words = match["unit"].split()
        known = unit is not None and unit[2]
        if not match["space"]:
            known = known and len(match["unit"]) > 1
        elif all(len(word) > 1 or word in ("a", "s") for word in words):
            known = True  # nouns: `42 apples`
    else:
        return None
    if unit is None or not known:
        return None
    value = _quantity(match["value"].strip())
    if isinstance(value, Number):
        return _with_unit(value, unit, known)
    return value if isinstance(value, Symbolic) else None


def _with_unit(value: Number, unit: tuple[Dimensions, Fraction, bool] | None, known: bool) -> Number:
    dimensions, factor, _ = unit or ((), Fraction(1), known)
    if not dimensions:
        return _replaced(value, real=value.real * factor, imaginary=value.imaginary * factor)
    if value.unit == dimensions:  # `\$5 dollars`
        return value
    return _replaced(value, unit=dimensions, factor=factor * value.factor)


def _replaced(number: Number, **changes: Any) -> Number:
    return Number(**{**number.__dict__, **changes})


def _relation(s: str) -> Answer | None:
    parts = _split(s, "=<>≤≥≠∈")
    if len(parts) == 1:
        return None
    signs = [c for c in _top_level(s) if c in "=<>≤≥≠∈"]
    parts = [part.strip() for part in parts]
    if signs == ["∈"] or (set(signs) == {"="} and not parts[0]):
        return _read(parts[-1]) if parts[-1] else None
    if not all(parts):
        return None
    if set(signs) == {"="}:
        return _equation(parts)
    return _inequality(parts, signs)


def _equation(parts: list[str]) -> Answer | None:
    first, last = parts[0], parts[-1]
    if not _NAME.fullmatch(first) and _NAME.fullmatch(last) and len(parts) == 2:
        first, last = last, first
    difference = _difference(first, last)
    if _NAME.fullmatch(first):
        value = _read(last)
        if not isinstance(value, Raw):
            return Named(first.replace("\\text", "").strip("\\{}"), value, difference and Relation("=", difference))
    if difference is None:
        left, right = _read(first), _read(last)
        if isinstance(left, Number) and isinstance(right, Number):
            return right if str(left) == str(right) else Raw("=".join(parts), verbatim=True)
        return None
    if all(value is not None and abs(value) < 1e-18 for value in difference.values):
        return _read(last)  # an identity: `(x+1)^2 = x^2+2x+1`
    return Relation("=", difference) if len(parts) == 2 else None


def _inequality(parts: list[str], signs: list[str]) -> Answer | None:
    """An interval where a variable is bounded by numbers, else the relation itself."""
    if all(sign in ">≥" for sign in signs):
        parts, signs = parts[::-1], ["<" if sign == ">" else "≤" for sign in signs[::-1]]
    if not all(sign in "<≤" for sign in signs):
        difference = _difference(parts[0], parts[-1])
        return Relation("≠", difference) if signs == ["≠"] and difference else None
    variable = [i for i, part in enumerate(parts) if _NAME.fullmatch(part) and not part.startswith("\\pi")]
    ends = {i: _read(part) for i, part in enumerate(parts) if i not in variable}
    bounded = len(variable) == 1 and all(isinstance(end, Number) or str(end) in ("∞", "-∞") for end in ends.values())
    if bounded and len(parts) == 3 and variable == [1]:
        return Group(("[" if signs[0] == "≤" else "(") + ("]" if signs[1] == "≤" else ")"), (ends[0], ends[2]))
    if len(parts) != 2:
        return None
    if bounded and variable == [0]:
        return Group("(" + ("]" if signs[0] == "≤" else ")"), (Words("-∞"), ends[1]))
    if bounded:
        return Group(("[" if signs[0] == "≤" else "(") + ")", (ends[0], Words("∞")))
    difference = _difference(parts[1], parts[0])
    return Relation(">" if signs[0] == "<" else "≥", difference) if difference else None


def _difference(left: str, right: str) -> Symbolic | None:
    try:
        tree = ("+", parse(left), ("*", ("number", Fraction(-1)), parse(right)))
        return _symbolic(tree, f"{left}-({right})") if names(tree) else None
    except Unread:
        return None


def _group(opener: str, inner: str, closer: str) -> Answer:
    items = _split(inner, ",;")
    if opener == "{":
        return Group("{}", tuple(_read(item) for item in items if item.strip()))
    if len(items) == 1:
        return _read(inner)
    mixed = (opener, closer) not in (("(", ")"), ("[", "]"))
    if len(items) != 2 and not mixed:
        opener, closer = "(", ")"
    return Group(opener + closer, tuple(_read(item) for item in items))


def _peeled(s: str) -> str:
    """Without spaces and braces around all of it."""
    s = s.strip()
    while s.startswith("{") and (fences := _fenced(s, "{")):
        s = fences[1].strip()
    return s


def _fenced(s: str, only: str = "") -> tuple[str, str, str] | None:
    """Opener, inside and closer of a text that is one bracket; an escaped brace is `{`."""
    if s.startswith("\\{") and s.endswith("\\}") and not only:
        inner, fences = s[2:-2], ("{", "}")
    elif s and s[0] in (only or "([") and s[-1] in (")]" if not only else "}"):
        inner, fences = s[1:-1], (s[0], s[-1])
    else:
        return None
    depth = 0
    for character in inner:
        depth += (character in _OPENERS) - (character in _CLOSERS)
        if depth < 0:
            return None
    return (fences[0], inner, fences[1]) if depth == 0 else None


def _top_level(s: str) -> str:
    """The text with everything in brackets blanked, of the same length."""
    depth, found = 0, []
    for character in s:
        depth -= character in _CLOSERS
        found.append(character if depth <= 0 and character not in _OPENERS + _CLOSERS else "\0")
        depth += character in _OPENERS
    return "".join(found)


def _split(s: str, separators: str) -> list[str]:
    parts, start = [], 0
    for i, character in enumerate(_top_level(s)):
        if character in separators and character != "\0":
            parts.append(s[start:i])
            start = i + 1
    return [*parts, s[start:]]


def _digits(number: Fraction) -> str:
    """Exactly if that is short, else to 20 digits."""
    if max(number.numerator.bit_length(), number.denominator.bit_length()) <= 64 or number.denominator == 1:
        return str(number)
    context = Context(prec=20)
    return str(context.divide(Decimal(number.numerator), Decimal(number.denominator)))
