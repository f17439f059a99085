"""Reading mathematical answers.

An answer is read into a number (with its unit), a symbolic expression, a group (set, tuple, interval, union, matrix), a
relation (`x = 5`), or, if all that fails, a text. Units: `rewards.math_units`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import lru_cache
from itertools import pairwise

from rewards.math_expressions import Symbolic, Unread, Value, apart, digits, evaluate, near, scaled, simple
from rewards.math_units import Dimensions, Unit, read_unit, unit_text

MAX_ANSWER = 500
"""Characters of a longest answer that is read as mathematics; longer ones are compared as text."""


@dataclass(frozen=True)
class Number:
    value: Value
    decimal: bool = False
    """Written with a decimal point, so perhaps rounded."""
    percent: bool = False
    unit: Dimensions = ()
    factor: Fraction = Fraction(1)
    """To the unit's base units."""

    def __str__(self) -> str:
        text = digits(simple(scaled(self.value, self.factor)))
        return text + "%" * self.percent + (f" {unit_text(self.unit)}" if self.unit else "")


@dataclass(frozen=True)
class Group:
    fences: str
    """`{}` a set, `∪` a union, `∖` a difference, `≈` forms of one answer, `[[]]` a matrix of rows `[ ]`, `::` a
    ratio, else the brackets of a tuple or an interval."""
    items: tuple[Answer, ...]

    @property
    def ordered(self) -> bool:
        return self.fences not in ("{}", "∪", "≈")

    def __str__(self) -> str:
        items = [str(item) for item in self.items]
        items = items if self.ordered else sorted(set(items))
        if len(self.fences) == 1:
            return f" {self.fences} ".join(items)
        return self.fences[0] + ", ".join(items) + self.fences[-1]


@dataclass(frozen=True)
class Relation:
    sign: str
    """`=`, `≠`, `>` or `≥`, of `difference` to 0; `am` or `pm` of a time."""
    difference: Symbolic | None
    name: str = ""
    value: Answer | None = None
    """Of `name`, if it is one that is said to equal something."""

    def __str__(self) -> str:
        if self.value is None:
            return f"{self.difference} {self.sign} 0"
        return str(self.value) if self.sign == "=" else f"{self.value} {self.sign}"


@dataclass(frozen=True)
class Text:
    text: str

    def __str__(self) -> str:
        return self.text

    @property
    def letters(self) -> str:
        """What is compared: words without their case."""
        letters = re.sub(r"\\text|[\s{}]", "", self.text).strip("().")
        return letters.casefold() if len(letters) > 1 else letters

    @property
    def prose(self) -> bool:
        return bool(re.fullmatch(r"(?=.*[^\W\d_]{2})[\w\s'.,:;?&/()-]+", self.text))


Answer = Number | Symbolic | Group | Relation | Text

_COMMAND = re.compile(r"\\\\|\\([a-zA-Z]+) ?|([<>!:=]=|\+/-|≡)")
_COMMANDS = {
    command: spelling
    for spelling, commands in {
        "": "left right middle big Big bigg Bigg bigl bigr Bigl Bigr biggl biggr Biggl Biggr limits displaystyle "
        "textstyle boxed fbox underline bf rm it large Large huge",
        " ": "quad qquad",
        "\\text": "mathrm mathbf mathit mathsf mathtt textrm textbf textit textnormal textsf texttt mbox hbox "
        "operatorname boldsymbol bm",
        "\\frac": "dfrac tfrac cfrac",
        "\\binom": "dbinom tbinom",
        "\\{\\}": "emptyset varnothing",
        "\\{": "lbrace",
        "\\}": "rbrace",
        "(": "langle",
        ")": "rangle",
        "|": "lvert rvert vert mid",
        "°": "circ degree",
        "∞": "infty inf",
        "≤": "le leq leqslant leqq <=",
        "≥": "ge geq geqslant geqq >=",
        "<": "lt",
        ">": "gt",
        "≠": "ne neq !=",
        "=": "equiv simeq ≡ := ==",
        "≈": "approx",
        "∈": "in",
        "∪": "cup bigcup",
        "∖": "setminus backslash",
        "±": "pm +/-",
        "∓": "mp",
        "*": "cdot times ast",
        "/": "div",
    }.items()
    for command in commands.split()
}
_CHARACTERS = str.maketrans("−–×·⋅÷∕⩽⩾％’′（）：。º`~\"", "--***//≤≥%''():.°   ") | str.maketrans(
    {"\u202f": "\\,", "\u2009": "\\,", "，": ", ", "²": "^2", "³": "^3", "½": "\\frac{1}{2}", "¼": "\\frac{1}{4}",
     "¾": "\\frac{3}{4}", "∅": "\\{\\}", "ℝ": "(-∞,∞)", "θ": "\\theta ", "α": "\\alpha ", "β": "\\beta "}
)  # fmt: skip
_REWRITES = [
    (re.compile(pattern), replacement)
    for pattern, replacement in [
        (r"(?<=\d)(?:\\[,!:; ]|\{,\}|,\\!)+ ?(?=\d{3}(?!\d))", ""),  # thin spaces and `{,}` between thousands
        (r"\\!|(?<!\\)\\[()\[\]]|\\(?:text)?color ?\{\w+\}", ""),
        (r"(?<![\w)}])\*\*([^*]*)\*\*(?!\w)", r"\1"),  # bold
        (r"^\*\*|\*\*$", ""),
        (r"\*\*", "^"),
        (r"(?<!\\)\\[,;:> ]|\\&", " "),
        (r"\\mathbb ?\{?R\}?", "(-∞,∞)"),
        (r"(?<![\\a-zA-Z])(sqrt|(?:a|arc)?(?:sin|cos|tan)|cot|sec|csc|ln|log|exp|pi)(?![a-zA-Z])", r"\\\1"),
        (r"\\text ?\{([^a-zA-Z{}]*)\}", r" \1 "),
        (r"\^? ?\{? ?° ?\}?", "°"),
        (r"° ?\\text ?\{ ?([CF]) ?\}", r"°\1"),
        (r"\\%|\\text ?\{ ?percent ?\}| ?\b[Pp]er ?cent(?:age)?\b", "%"),
        (r"\b[Ii]nfinity\b|\boo\b", "∞"),
        (r"\+ ?∞", "∞"),
        (r"\bU\b(?= ?[\[(])", "∪"),
        (r"\{([^{}\\]*)\\choose ?([^{}\\]*)\}", r"\\binom{\1}{\2}"),
        (r"\\(frac|binom|sqrt) ?(\d)", r"\\\1{\2}"),
        (r"\\(frac|binom) ?(\{[^{}]*\}) ?(\d)", r"\\\1\2{\3}"),
        (r"\\frac ?\{ ?\\text ?\{([^{}]*)\} ?\} ?\{ ?\\text ?\{([^{}]*)\} ?\}", r"\\text{\1/\2}"),
        (r",? ?\\text ?\{ ?,? ?(?:and|or) ?\} ?|,? (?:and|or) ", ", "),
        (r"(?<=\d)(?:\^?\{?\\text ?\{ ?(?:st|nd|rd|th) ?\}\}?|(?:st|nd|rd|th)\b)", ""),
        (r" +", " "),
    ]
]  # fmt: skip
_THOUSANDS = re.compile(r"(?<![\d.])(?<!\d,)\d{1,3}(?:,\d{3})+(?!\d|,\d)")
_CURRENCY = re.compile(r"(?P<sign>[+-]?) ?(?:US ?)?\\?(?P<mark>[$€£¥₹]) ?(?P<rest>[-+]?[\d.\\(].*)")
_UNIT = re.compile(
    r"(?P<value>.*[\d)}\]!%πa-z]) ?(?P<unit>(?:(?:\\text ?\{[^{}]*\}|\\?[$€£¢]|°(?: ?[CF])?)(?:\^\{?-?\d\}?)?[ */]*)+)"
)
_WORDY_UNIT = re.compile(
    r"(?P<value>.*[\d)}\]])(?P<space> ?)(?P<unit>[^\W\d_][^\W\d_./ ]*(?:\^\{?\d\}?)?(?:[ /.][^\\{}=<>]*)?)"
)
_PREFIX = re.compile(
    r"(?:\\text ?\{ ?)?(?:(?:so|thus|hence|therefore),? )?(?:the )?(?:final )?(?:answer|result)(?: is)? ?[:=]? ?[} ]"
    r"|(?:approximately|about|option|choice) ",
    re.IGNORECASE,
)
_WORD = re.compile(r"(?<![\\a-zA-Z{])[a-zA-Z]{4,}|^[^\W\d_]{3,}$|^no$", re.IGNORECASE)
"""A product of so many variables is a word."""
_NAME = re.compile(
    r"(?:m ?)?\\(?:angle|triangle|overline) ?\{?[A-Z]+\}?|\([A-Za-z](?:, ?[A-Za-z])+\)"
    r"|(?!\\pi)(?:\\?[A-Za-z]+|\\text ?\{[^{}]*\})'*(?:_\{?\w+\}?)?(?:\([A-Za-z](?:, ?[A-Za-z])*\))?"
)
_SUM = re.compile(r"[a-zA-Z](?: ?[+*] ?[a-zA-Z])+|\|[A-Z]\||[a-zA-Z]\(\w+\)")
"""What has no name of its own, but whose value is asked for: `m + n = 42`."""
_MATRIX = re.compile(r"\\begin\{([pbBvV]?matrix|array)\}(?:\{[clr|]*\})?(.*)\\end\{\1\}")
_CHOICE = re.compile(r"(?:\\text ?\{ ?)?\(?([A-J])[).:](?: ?\} ?| )((?!.*\b[A-J](?:[).:}]|$)).+)")
_CLOCK = re.compile(r"(\d{1,2}:\d\d)(?: ?(?:\\text ?\{)? ?([ap])\.? ?m\.?(?: ?\})?)?", re.IGNORECASE)
_RATIO = re.compile(r"\d+(?: ?: ?\d+)+")
_BASE = re.compile(r"(\d+)_\{?(\d+)\}?")
_SIGNS = "=≈<>≤≥≠∈"
_INFINITIES = (Text("∞"), Text("-∞"))
_PHRASES: dict[str, Answer] = {
    **dict.fromkeys(("no solution", "no solutions", "no real solutions"), Group("{}", ())),
    "all real numbers": Group("()", _INFINITIES[::-1]),
}


@lru_cache(maxsize=8192)
def read(text: str) -> Answer:
    """The answer that a text states, whatever it is: what cannot be understood is `Text`."""
    if len(text) > MAX_ANSWER:
        return Text(" ".join(text.split()))
    written = normalise(text)
    try:
        return _read(written) if len(written) <= 2 * MAX_ANSWER else Text(written)
    except RecursionError:
        return Text(written)


def normalise(text: str) -> str:
    """One spelling for what LaTeX and plain text spell in many ways; nothing is evaluated."""
    text = " ".join(text.translate(_CHARACTERS).split())
    if text.count("$") - text.count("\\$") > 1:
        text = re.sub(r"(?<!\\)\$", "", text)
    text = _COMMAND.sub(lambda m: _COMMANDS.get(m[m.lastindex or 0], m[0]), text)
    for pattern, replacement in _REWRITES:
        text = pattern.sub(replacement, text)
    return text.strip(" ,;:").rstrip(" .,;:")


def _read(s: str) -> Answer:
    s = s.strip()
    while (fences := _fenced(s)) and fences[0] == "{":
        s = fences[1].strip()
    if wrapped := re.fullmatch(r"\\text ?\{([^{}]*)\}", s):
        return _read(wrapped[1])
    if choice := _CHOICE.fullmatch(s):
        return Group("≈", (_read(choice[1]), _read(choice[2])))
    if (matrix := _MATRIX.fullmatch(s)) and "v" not in matrix[1].lower():
        rows = [row for row in re.split(r"(?:\\\\)+", matrix[2]) if row.strip()]
        return Group("[[]]", tuple(Group("[ ]", tuple(_read(cell) for cell in row.split("&"))) for row in rows))
    for operator in "∪∖":
        if len(pieces := _split(s, operator)) > 1:
            return Group(operator, tuple(_read(piece) for piece in pieces))
    if fences:
        return _group(*fences)
    s = _THOUSANDS.sub(lambda m: m[0].replace(",", ""), s)
    if len(items := _split(s, ",;")) > 1:
        either = all(re.search("[<>≤≥]", item) for item in items)  # `x < 1 or x > 2`
        return Group("∪" if either else "{}", tuple(_read(item) for item in items if item.strip()))
    if "±" in s or "∓" in s:
        both = [s.replace("±", a).replace("∓", b) for a, b in ("+-", "-+")]
        return Group("{}", tuple(_read(one.removeprefix("+")) for one in both))
    if relation := _relation(s):
        return relation
    if prefix := _PREFIX.match(s):
        return _read(s[prefix.end() :])
    if s.replace(" ", "") in ("∞", "-∞"):
        return Text(s.replace(" ", ""))
    return _quantity(s)


def _quantity(s: str) -> Answer:
    """A number or expression, with its unit or per cent sign; a time, ratio or number in another base."""
    if money := _CURRENCY.fullmatch(s):
        value = _read(money["sign"] + money["rest"])
        return _with_unit(value, read_unit(money["mark"])) if isinstance(value, Number) else value
    if s.endswith("%"):
        value = _quantity(s[:-1].strip())
        return replace(value, percent=True) if isinstance(value, Number) else value
    if clock := _CLOCK.fullmatch(s):
        time = Text(clock[1])
        half = f"{clock[2]}m".lower()
        return Relation(half, None, half, time) if clock[2] else time
    if unit := _unit(s):
        return unit
    if _RATIO.fullmatch(s):
        first, *others = (Fraction(int(part)) for part in s.split(":"))
        if all(others):
            shares = tuple(Number(first / other) for other in others)
            return shares[0] if len(shares) == 1 else Group("::", shares)
    if based := _BASE.fullmatch(s):
        return Number(Fraction(int(based[1])), unit=((f"base {int(based[2])}", 1),))
    return _expression(s)


def _expression(s: str) -> Answer:
    try:
        if _WORD.search(s):
            raise Unread(s)
        found = evaluate(s)
        first, *others = found.values
        if first is not None and all(value is not None and near(first, value) for value in others):
            value = simple(first)  # a number, or what is one whatever its variables are
            return Number(value, decimal=found.decimal and isinstance(value, Fraction))
        return found
    except Unread:
        words = re.sub(r"^(?:an?|the) ", "", s.casefold())
        return _PHRASES.get(words, Text(words if Text(s).prose else s))


def _unit(s: str) -> Answer | None:
    if (match := _UNIT.fullmatch(s)) and not ("°" in match["unit"] and "\\" in match["value"]):  # `\sin 30°`
        unit = read_unit(re.sub(r"\\text ?|[\\{}]", " ", match["unit"]))
    elif match := _WORDY_UNIT.fullmatch(s):
        unit, words = read_unit(match["unit"]), match["unit"].split()
        noun = match["space"] and all(len(word) > 1 or word in ("a", "s") for word in words)  # `42 apples`
        if unit is None or not (noun or words[0] > "\u3000" or (unit.known and (match["space"] or len(words[0]) > 1))):
            return None
    else:
        return None
    value = _quantity(match["value"].strip())
    if isinstance(value, Number) and unit:
        return _with_unit(value, unit)
    return value if isinstance(value, Symbolic) else None


def _with_unit(number: Number, unit: Unit | None) -> Number:
    if unit is None:
        return number
    if not unit.dimensions:
        return replace(number, value=scaled(number.value, unit.factor))
    if number.unit == unit.dimensions:  # `\$5 dollars`
        return number
    return replace(number, unit=unit.dimensions, factor=unit.factor * number.factor)


def _relation(s: str) -> Answer | None:
    parts = [part.strip() for part in _split(s, _SIGNS)]
    signs = [c for c in _top_level(s) if c in _SIGNS]
    if not signs:
        return None
    if signs == ["∈"] or (set(signs) <= {"=", "≈"} and not parts[0]):
        return _read(parts[-1]) if parts[-1] else None
    if not all(parts):
        return None
    if signs[-1] == "≈" and len(signs) < 3:
        exact, _, rounded = s.rpartition("≈")
        forms = _read(exact), _read(rounded)
        if _rounded(*forms, rounded):
            return Group("≈", forms)
    return _equation(parts) if set(signs) <= {"=", "≈"} else _inequality(parts, signs)


def _rounded(exact: Answer, rounded: Answer, text: str) -> bool:
    """Whether `exact ≈ rounded` is one answer and not two guesses."""
    if isinstance(exact, Relation) and exact.value:
        exact = exact.value
    if not isinstance(exact, Number) or not isinstance(rounded, Number):
        return False
    places = re.search(r"\.(\d*)", text)
    return apart(exact.value, rounded.value) < (10.0 ** -len(places[1]) if places else 0.51)


def _equation(parts: list[str]) -> Answer | None:
    first, last = parts[0], parts[-1]
    if len(parts) == 2 and _NAME.fullmatch(last) and not _NAME.fullmatch(first):
        first, last = last, first
    relation, right = _difference(first, "=", last) or Relation("=", None), _read(last)
    if _NAME.fullmatch(first) or _SUM.fullmatch(first):
        return replace(relation, name=re.sub(r"\\text|[\s\\{}]", "", first), value=right)
    left = _read(first)
    if isinstance(left, Number) and isinstance(right, Number):
        return right if str(left) == str(right) else Text("=".join(parts))
    if relation.difference is None:
        return None
    if all(value is not None and abs(value) < 1e-18 for value in relation.difference.values):
        return right  # an identity: `(x+1)^2 = x^2+2x+1`
    return relation if len(parts) == 2 else None


def _inequality(parts: list[str], signs: list[str]) -> Answer | None:
    """An interval where a variable is bounded by numbers, else the relation itself."""
    if signs == ["≠"]:
        return _difference(parts[0], "≠", parts[1])
    if all(sign in ">≥" for sign in signs):
        parts, signs = parts[::-1], ["<" if sign == ">" else "≤" for sign in signs[::-1]]
    if len(parts) > 3 or not all(sign in "<≤" for sign in signs):
        return None
    bounds, brackets = parts, signs
    if len(parts) == 2:  # from or to infinity
        below = _NAME.fullmatch(parts[0])
        bounds, brackets = (["-∞", *parts], ["<", *signs]) if below else ([*parts, "∞"], [*signs, "<"])
    ends = _read(bounds[0]), _read(bounds[2])
    if _NAME.fullmatch(bounds[1]) and all(isinstance(end, Number) or end in _INFINITIES for end in ends):
        return Group(("(" if brackets[0] == "<" else "[") + (")" if brackets[1] == "<" else "]"), ends)
    return _difference(parts[1], ">" if signs[0] == "<" else "≥", parts[0]) if len(parts) == 2 else None


def _difference(left: str, sign: str, right: str) -> Relation | None:
    try:
        found = evaluate(f"{left}-({right})")
    except Unread:
        return None
    return Relation(sign, found) if found.names else None


def _group(opener: str, inner: str, closer: str) -> Answer:
    items = _split(inner, ",;")
    if opener == "\\{":
        return Group("{}", tuple(_read(item) for item in items if item.strip()))
    if len(items) == 1:
        return _read(inner)
    interval = opener + closer in ("[)", "(]") or len(items) == 2
    return Group(opener + closer if interval else "()", tuple(_read(item) for item in items))


def _fenced(s: str) -> tuple[str, str, str] | None:
    """Opener, inside and closer of a text that is one bracket."""
    match = re.fullmatch(r"(\\?\{|[(\[])\0*([)\]}])", _top_level(s))
    if match is None or (match[1][-1] == "{") != (match[2] == "}"):
        return None
    width = len(match[1])
    return match[1], s[width:-width], match[2]


def _top_level(s: str) -> str:
    """The text with everything in brackets blanked, of the same length."""
    depth, found = 0, []
    for character in s:
        depth -= character in ")]}"
        found.append(character if depth <= 0 else "\0")
        depth += character in "([{"
    return "".join(found)


def _split(s: str, separators: str) -> list[str]:
    cuts = [i for i, character in enumerate(_top_level(s)) if character in separators]
    return [s[start + 1 : end] for start, end in pairwise([-1, *cuts, len(s)])]
