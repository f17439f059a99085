"""How much of a completion is in the wanted language."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any

from rewards.common import text_of

_NO_LANGUAGE = re.compile(
    r"```.*?(?:```|\Z)|`[^`\n]*`"  # code
    # LaTeX; a formula ends before another begins, or many unclosed ones would take quadratic time
    r"|\$\$.*?\$\$|\$[^$\n]*\$|\\\[(?:(?!\\[\[\]]).)*\\\]|\\\((?:(?!\\[()]).)*\\\)|\\[a-zA-Z]+(?:\{[^{}]*\})*"
    r"|https?://\S+|</?\w+>",
    re.DOTALL,
)
_SENTENCE = re.compile(r"[^.!?。！？\n]+[.!?。！？\n]*")
_WORD = re.compile(r"[^\W\d_]+")
_KANA = {"HIRAGANA": "CJK", "KATAKANA": "CJK"}  # with Han in one sentence of Japanese
_LETTERS = 30
"""Sentences are joined until they have so many letters: on shorter ones the classifier is often wrong."""


class Consistency:
    """The share of letters that are in `language` (DeepSeek-R1's language consistency, arXiv 2501.12948, section 2.3.2,
    there of words). Code, LaTeX, tags, addresses, numbers and single letters are left out; `None` (not applicable)
    where fewer than `min_letters` remain.

    A text is parted by script, as in "so the 答案 is", then into runs of sentences, each of which is wholly in the
    language that py3langid finds likeliest, deterministically. On short texts of one script it is often wrong: name in
    `among` the languages that are likely, or raise `min_letters`.
    """

    def __init__(self, language: str = "en", *, among: Sequence[str] | None = None, min_letters: int = 20) -> None:
        """`language`, `among`: ISO 639-1 codes."""
        self._language, self._among, self._min_letters = language, among, min_letters
        self._identifier: Any = None

    def setup(self) -> None:
        """Load the model: 0.7 s and 110 MB. Raises `ValueError` for a language that it does not know."""
        from py3langid.langid import MODEL_FILE, LanguageIdentifier

        self._identifier = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
        wanted = {self._language, *(self._among or ())}
        if unknown := wanted - set(self._identifier.labels):
            raise ValueError(f"rewards.language:Consistency: {sorted(unknown)} unknown; {self._identifier.labels}")
        if self._among is not None:
            self._identifier.set_languages(wanted)

    def __call__(self, completion: Any, **columns: Any) -> float | None:
        total = wanted = 0
        for part, letters in _parts(_NO_LANGUAGE.sub("\n", text_of(completion))):
            total += letters
            if self._identifier.classify(part)[0] == self._language:
                wanted += letters
        return wanted / total if total >= max(self._min_letters, 1) else None


def _parts(text: str) -> Iterator[tuple[str, int]]:
    """Runs of sentences of one script, and the number of their letters. What is left at the end of a script joins the
    run before it."""
    runs: dict[str, list[tuple[str, int]]] = {}
    for sentence in _SENTENCE.findall(text):
        words: dict[str, list[str]] = {}
        for word in _WORD.findall(sentence):
            for script, piece in _by_script(word):
                # x, n and α are symbols; one sign of Chinese is a word.
                if len(piece) > 1 or script in ("CJK", "HANGUL"):
                    words.setdefault(script, []).append(piece)
        for script, pieces in words.items():
            done = runs.setdefault(script, [("", 0)])
            if done[-1][1] >= _LETTERS:
                done.append(("", 0))
            joined = " ".join(pieces)
            done[-1] = (f"{done[-1][0]} {joined}".strip(), done[-1][1] + sum(map(len, pieces)))
    for done in runs.values():
        if len(done) > 1 and done[-1][1] < _LETTERS:
            (last, letters), (before, more) = done.pop(), done.pop()
            done.append((f"{before} {last}", letters + more))
        yield from done


def _by_script(word: str) -> Iterator[tuple[str, str]]:
    begin = 0
    for i in range(1, len(word) + 1):
        if i == len(word) or _script(word[i]) != _script(word[begin]):
            yield _script(word[begin]), word[begin:i]
            begin = i


@lru_cache(maxsize=65536)
def _script(letter: str) -> str:
    """The first word of the letter's Unicode name: LATIN, CJK, CYRILLIC."""
    name = unicodedata.name(letter, "UNKNOWN").split()[0]
    return _KANA.get(name, name)
