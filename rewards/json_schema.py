"""Valid JSON, against a schema."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any, NoReturn

from jsonschema.validators import validator_for
from referencing import Registry
from referencing.exceptions import Unresolvable

from rewards.common import independent, text_of

_FENCED = re.compile(r"^[ \t]*```[^\n`]*\n(.*?)^[ \t]*```", re.DOTALL | re.MULTILINE)
_OPENING = re.compile(r"[{\[]")
_NOTHING = object()


@independent
def valid(
    completions: list[Any],
    schema: Mapping[str, Any] | str | list[Any],
    *,
    parsed: float = 0.0,
    **columns: Any,
) -> list[float | None]:
    """1.0 where the completion's JSON is valid under `schema`, `parsed` where it is JSON but not valid, else 0.0.

    The JSON is the last fenced block; without one, the whole text; or else the last outermost object or array in it.
    NaN and Infinity are no JSON. `schema` is a column or one for all, as a mapping or JSON text, of the draft that its
    `$schema` names, 2020-12 by default. `format` is an annotation, not checked. `None` (not applicable) where a row has
    no schema.

    A `$ref` must lead to within the schema: nothing is ever fetched. Raises `ValueError` for one that does not, and
    `jsonschema.SchemaError` for a schema that is none.
    """
    schemas = schema if isinstance(schema, list) else [schema] * len(completions)
    return [_score(text_of(c), s, parsed) for c, s in zip(completions, schemas, strict=True)]


def _score(text: str, schema: Any, parsed: float) -> float | None:
    if schema is None:
        return None
    if isinstance(schema, str):
        schema = json.loads(schema)
    kind: Any = validator_for(schema)
    kind.check_schema(schema)
    document = _document(text)
    if document is _NOTHING:
        return 0.0
    try:
        # An empty registry: the default one fetches what it does not know.
        return 1.0 if kind(schema, registry=Registry()).is_valid(document) else parsed
    except RecursionError:  # a document too deep to judge by a recursive schema
        return parsed
    except Unresolvable as error:
        raise ValueError(f"rewards.json_schema:valid: the schema's $ref {error.ref!r} is not within it") from None


def _document(text: str) -> Any:
    fenced = _FENCED.findall(text)
    whole = _load(fenced[-1] if fenced else text)
    if whole is not _NOTHING or fenced:
        return whole
    decoder = json.JSONDecoder(parse_constant=_refuse)
    found, begin = _NOTHING, 0
    while opening := _OPENING.search(text, begin):
        begin = opening.start() + 1
        try:
            found, begin = decoder.raw_decode(text, opening.start())
        except ValueError:
            pass
        except RecursionError:  # thousands of brackets: each of them would be tried
            return _NOTHING
    return found


def _load(text: str) -> Any:
    try:
        return json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return _NOTHING


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no JSON")
