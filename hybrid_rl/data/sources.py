"""Rows from wherever they are: local files, hub data sets, or the built-in generator."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hybrid_rl.config import ConfigError
from hybrid_rl.data import arithmetic

_FORMATS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}
_HUB_NAME = re.compile(r"^(?P<name>[\w.-]+(?:/[\w.-]+)?)(?::(?P<config>[\w.-]+))?(?:@(?P<split>[\w.\[\]:%-]+))?$")


def load_rows(
    source: str, *, setting: str, columns: Mapping[str, str], answer_after: str | None = None, split: str = "train"
) -> list[dict[str, Any]]:
    """All rows of `source`, with `columns` (our name -> theirs) renamed.

    `split` is read from a hub data set that names none. `setting` is the configuration key, for messages. Raises
    `ConfigError` if the source does not exist, is empty, or lacks a column.
    """
    rows = _read(source, setting, split)
    if not rows:
        raise ConfigError(f"{setting}={source!r} has no rows")
    present = list(rows[0])
    wanted = {"prompt": "prompt", **columns}
    for ours, theirs in wanted.items():
        if theirs not in present:
            raise ConfigError(
                f"{setting}={source!r} has no column {theirs!r} (for {ours}); it has {present}. Set data.columns.{ours}"
            )
    if answer_after is not None and "answer" not in wanted and "answer" not in present:
        raise ConfigError(
            f"data.answer_after={answer_after!r} needs a column 'answer'; {setting}={source!r} has {present}"
        )
    renamed = [{**row, **{ours: row[theirs] for ours, theirs in wanted.items()}} for row in rows]
    if answer_after is not None:
        for i, row in enumerate(renamed):
            if answer_after not in str(row["answer"]):
                raise ConfigError(
                    f"{setting}={source!r}: the answer of row {i} has no data.answer_after={answer_after!r}"
                )
            row["answer"] = _after(str(row["answer"]), answer_after)
    return renamed


def _read(source: str, setting: str, split: str) -> list[dict[str, Any]]:
    path = Path(source)
    if path.suffix in _FORMATS:
        if not path.is_file():
            raise ConfigError(f"{setting}={source!r} does not exist")
        if not path.stat().st_size:
            return []  # the library fails on an empty file, each format in its own way
        return _from_datasets(source, setting, _FORMATS[path.suffix], data_files=str(path), split="train")
    match = _HUB_NAME.match(source)
    if match is None:
        raise ConfigError(f"{setting}={source!r} is neither a {', '.join(_FORMATS)} file nor name[:config][@split]")
    if match["name"] == "arithmetic":
        try:
            return list(arithmetic.problems(match["split"] or split, match["config"] or "addition"))
        except ValueError as error:
            raise ConfigError(f"{setting}={source!r}: {error}") from None
    return _from_datasets(source, setting, match["name"], name=match["config"], split=match["split"] or split)


def _from_datasets(source: str, setting: str, path: str, **options: Any) -> list[dict[str, Any]]:
    import datasets

    datasets.disable_progress_bars()
    try:
        return datasets.load_dataset(path, **options).to_list()  # type: ignore[union-attr]
    except Exception as error:  # the library raises many kinds: network, parsing, unknown names
        reason = (str(error.__cause__ or error).strip() or type(error).__name__).splitlines()[0]
        raise ConfigError(f"{setting}={source!r} cannot be loaded: {reason}") from None


def _after(text: str, mark: str) -> str:
    """What follows the last mark, without thousands separators around digits: GSM8K's `#### 1,234` -> `1234`."""
    return re.sub(r"(?<=\d),(?=\d{3})", "", text.rpartition(mark)[2]).strip()
