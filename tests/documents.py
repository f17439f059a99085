"""What the documentation holds, for its tests: blocks of commands, links, anchors, words in backticks."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from markdown_it import MarkdownIt
from markdown_it.token import Token

ROOT = Path(__file__).parent.parent
GUIDES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
"""Pages whose commands and settings are of this version."""
PAGES = [*GUIDES, ROOT / "CHANGELOG.md", ROOT / "benchmarks" / "RESULTS.md"]

_NOT_RUN = re.compile(r"<!-- not run: (.+?) -->")
_HEREDOC = re.compile(r"<<'?(\w+)'?")
_FILE_NAME = re.compile(r"# ([\w-]+\.(?:py|yaml))\n")


@dataclass(frozen=True)
class Block:
    """A fenced block."""

    page: Path
    line: int
    language: str
    text: str
    not_run: str | None
    """Why its commands cannot be run by a test: `<!-- not run: REASON -->` stands before it."""

    @property
    def file_name(self) -> str | None:
        """The file that a reader is to make of it: its first line is a comment with that name."""
        named = _FILE_NAME.match(self.text)
        return named[1] if named else None

    @property
    def where(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


@cache
def tokens(page: Path) -> list[Token]:
    return MarkdownIt("commonmark").enable("table").parse(page.read_text(encoding="utf-8"))


@cache
def blocks(page: Path) -> list[Block]:
    found, reason = [], None
    for token in tokens(page):
        if token.type == "html_block":
            said = _NOT_RUN.search(token.content)
            reason = said[1] if said else None
            continue
        if token.type == "fence":
            found.append(Block(page, (token.map or [0])[0] + 1, token.info.strip(), token.content, reason))
        reason = None
    return found


def shell_blocks(page: Path) -> list[Block]:
    return [block for block in blocks(page) if block.language == "bash"]


def commands(block: Block) -> Iterator[list[str]]:
    """Its simple commands, as words; redirections, and the bodies of here-documents, are left out."""
    pending, until = "", None
    for line in block.text.splitlines():
        if until is not None:
            until = None if line == until else until
            continue
        pending += line
        if pending.endswith("\\"):
            pending = pending[:-1]
            continue
        try:
            words = _words(pending)
        except ValueError:  # a quotation goes on in the next line
            pending += "\n"
            continue
        marked = _HEREDOC.search(pending)
        until = marked[1] if marked else None
        pending = ""
        yield from words


def _words(line: str) -> list[list[str]]:
    lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    found: list[list[str]] = [[]]
    redirected = False
    for word in lexer:
        if set(word) <= set("<>"):
            redirected = True
        elif set(word) <= set(";|&()"):
            found.append([])
        elif redirected:
            redirected = False
        else:
            found[-1].append(word)
    return [words for words in found if words]


def _inline(page: Path, kind: str) -> Iterator[Token]:
    for token in tokens(page):
        yield from (child for child in token.children or () if child.type == kind)


def code_spans(page: Path) -> list[str]:
    return [token.content for token in _inline(page, "code_inline")]


def links(page: Path) -> list[str]:
    hrefs = [str(token.attrs["href"]) for token in _inline(page, "link_open")]
    return hrefs + [str(token.attrs["src"]) for token in _inline(page, "image")]


@cache
def anchors(page: Path) -> set[str]:
    """What a link to the page may name: headings as GitHub names them, and explicit ids."""
    found = set(re.findall(r'<a id="([^"]+)">', page.read_text(encoding="utf-8")))
    inline = zip(tokens(page), tokens(page)[1:], strict=False)
    for heading in (text.content for opening, text in inline if opening.type == "heading_open"):
        slug = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        while slug in found:
            slug += "-1"
        found.add(slug)
    return found


def first_cells(page: Path) -> list[str]:
    """The first words in backticks of every row of the page's tables."""
    opens = [i for i, token in enumerate(tokens(page)) if token.type == "tr_open"]
    cells = [tokens(page)[i + 2].children or [] for i in opens]
    return [code[0] for cell in cells if (code := [t.content for t in cell if t.type == "code_inline"])]
