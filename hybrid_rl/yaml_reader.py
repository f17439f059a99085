"""YAML as settings are written in it: what JSON can say, of bounded size, and no secrets. Imports nothing heavy."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import yaml

from hybrid_rl.settings import ConfigError

MOST_NODES, DEEPEST = 20_000, 32
"""Values in a file, those behind an alias counted wherever it stands; and how far they may be nested."""


class NotSettings(ValueError):
    """The text is no YAML, or says what settings cannot be."""


class _Loader(yaml.SafeLoader):
    """Knows null, truth values, numbers, text, lists and mappings: no dates, sets or bytes, and no Python objects."""

    yaml_constructors = {  # noqa: RUF012 (pyyaml's own)
        tag: function
        for tag, function in yaml.SafeLoader.yaml_constructors.items()
        if tag is None or tag.rpartition(":")[2] in ("null", "bool", "int", "float", "str", "seq", "map")
    }
    yaml_implicit_resolvers = {  # noqa: RUF012
        first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith(":timestamp")]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        """Refuses a key that is there twice, of which YAML would take the last, and keys that are no plain values."""
        own = [key for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
        seen: dict[Any, Any] = {}
        for key in own:
            value = self.construct_object(key, deep=True)
            if isinstance(value, list | dict):
                raise yaml.constructor.ConstructorError(
                    None, None, "a list or mapping cannot be a name", key.start_mark
                )
            if value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{short(value)} is given twice", key.start_mark)
            seen[value] = key
        return super().construct_mapping(node, deep=deep)


def read_yaml(text: str) -> Any:
    """What a YAML text says. Raises `NotSettings` where it is none, or says what settings cannot be."""
    loader = None
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _measure(node)
        value = loader.construct_document(node)
        _check_numbers(value)
        return value
    except RecursionError:
        raise NotSettings(f"it is nested more than {DEEPEST} levels deep") from None
    except yaml.YAMLError as error:
        raise NotSettings(_without_text(error)) from None
    except (ValueError, KeyError, AttributeError, TypeError, OverflowError) as error:
        # pyyaml's own, where a value is not of the kind that its tag says.
        if isinstance(error, NotSettings):
            raise
        raise NotSettings(f"a value cannot be read ({type(error).__name__})") from None
    finally:
        if loader is not None:
            loader.dispose()


def _without_text(error: yaml.YAMLError) -> str:
    """What is wrong and where. pyyaml would also show the text there, which may hold a secret."""
    if not isinstance(error, yaml.MarkedYAMLError):
        return " ".join(str(error).split())
    marks = [mark for mark in (error.problem_mark, error.context_mark) if mark is not None]
    where = f"line {marks[0].line + 1}, column {marks[0].column + 1}: " if marks else ""
    return where + ", ".join(part for part in (error.problem, error.context) if part)


def _measure(root: yaml.Node) -> None:
    """Count what comes of a document before it is made: a few aliases of aliases are a billion values."""
    waiting, count = [(root, 1)], 0
    while waiting:
        node, depth = waiting.pop()
        count += 1
        if depth > DEEPEST:
            raise NotSettings(f"it is nested more than {DEEPEST} levels deep, or within itself")
        if count > MOST_NODES:
            raise NotSettings(f"it comes to more than {MOST_NODES:,} values")
        if isinstance(node, yaml.SequenceNode):
            waiting += [(item, depth + 1) for item in node.value]
        elif isinstance(node, yaml.MappingNode):
            waiting += [(item, depth + 1) for pair in node.value for item in pair]


def _check_numbers(value: Any) -> None:
    for _, leaf in _leaves(value, ()):
        if isinstance(leaf, int) and abs(leaf) >= 2**63:
            raise NotSettings("it holds a whole number of more than 64 bits")


def _leaves(value: Any, path: tuple[Any, ...]) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Every value that is no list or mapping, and every name, with where it is."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield (*path, name), name
            yield from _leaves(inner, (*path, name))
    elif isinstance(value, list):
        for i, inner in enumerate(value):
            yield from _leaves(inner, (*path, i))
    else:
        yield path, value


def short(value: Any) -> str:
    """A value as errors show it, on one line."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # a whole number of thousands of digits
        text = f"<{type(value).__name__}>"
    text = text if text.isprintable() else ascii(value)
    return text if len(text) <= 120 else f"{text[:100]}... ({len(text)} characters)"


_PASSWORD_IN_URL = re.compile(
    r"://[^/\s@:]*:[^/\s@]+@|https?://(?=[a-z_]*\d)\w{20,}@"  # the latter a token for a name
    r"|[?&](?:[\w-]*(?:key|token|secret|signature)|password|sig)=",
    re.IGNORECASE,
)
_KNOWN_SECRET = re.compile(
    r"""(?<![A-Za-z0-9])(?:
        sk-(?:(?:proj|svcacct|admin|ant-[a-z]+\d\d|or-v1)-[\w-]{20,} | [A-Za-z0-9]{20,})  # OpenAI and others
        | hf_[A-Za-z0-9]{30,} | gh[oprsu]_[A-Za-z0-9]{36,} | github_pat_\w{22,} | glpat-[\w-]{20,}
        | xox[abeoprs]-[\w-]{20,} | (?:AKIA|ASIA)[A-Z0-9]{16}(?![A-Za-z0-9]) | AIza[\w-]{35}  # Slack, AWS, Google
        | [Bb]earer\ [\w.~+/=-]{20,} | eyJ[\w-]{10,200}\.eyJ  # JSON web tokens
        | -----BEGIN\ [A-Z ]*PRIVATE\ KEY )""",
    re.VERBOSE,
)
_SECRET = (
    r"(?:(?:api|access|secret|private|auth)[_-]?key"
    r"|(?:api|access|auth|bearer|refresh|hf|hub|huggingface|github|gitlab|slack|wandb|openai)[_-]token"
    r"|password|passwd|secret|credentials?)"
)
_SECRET_NAME = re.compile(rf"(?:^|[_-]){_SECRET}$", re.IGNORECASE)
_SECRET_OPTION = re.compile(rf"(?:^|\s)-{{1,2}}(?:[\w-]+[_-])?{_SECRET}[=\s](?!\$)\S", re.IGNORECASE)
_MAYBE_SECRET_NAME = re.compile(r"(?:^|[_-])(?:key|token)$", re.IGNORECASE)  # also of a dictionary, or of a text
_OPAQUE = re.compile(r"(?=.*\d)(?=.*[a-z])(?=.*[A-Z])[\w.+/=-]{20,}|[0-9a-f]{32,}")


def refuse_secrets(tree: Any) -> None:
    """Settings are written into a run's directory, its reports and trackers: raises `ConfigError` for a password in a
    URL, and for a key or token. Its value is not shown."""
    for path, leaf in _leaves(tree, ()):
        name = next((str(part)[:60] for part in reversed(path) if not isinstance(part, int)), "")
        if not isinstance(leaf, str) or not leaf:
            continue
        where = ".".join(str(part)[:60] for part in path)
        if _PASSWORD_IN_URL.search(leaf):
            raise ConfigError(
                f"{where} holds a password or key in its URL; settings are written into the run, so give it by "
                "environment variable and leave it out of the URL"
            )
        named = _SECRET_NAME.search(name) or (_MAYBE_SECRET_NAME.search(name) and _OPAQUE.fullmatch(leaf))
        told = _KNOWN_SECRET.search(leaf) or _SECRET_OPTION.search(leaf)
        if leaf is not path[-1] and (named or told):
            raise ConfigError(
                f"{where} holds a secret; settings are written into the run, so give it by environment variable: a "
                "reward reads os.environ, or takes the variable's name (rewards.judge: api_key_env)"
            )
