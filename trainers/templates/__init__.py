"""`hybrid-rl reward new`: the files beside this one, with a name of one's own in place of `my_reward`."""

from __future__ import annotations

import importlib.util
import keyword
from pathlib import Path

from rich.console import Console

from hybrid_rl.settings import ConfigError

_PLACEHOLDER = "my_reward"


def new_reward(name: str, directory: Path, console: Console) -> None:
    """Write `NAME.py` and `test_NAME.py`, and say what to run next. Raises `ConfigError` for a name that cannot be one,
    for files that are there already, and where none can be written."""
    if not name.isidentifier() or keyword.iskeyword(name):
        raise ConfigError(
            f"{name!r} cannot name a function of Python; use letters, digits and underscores, as in exact_sum"
        )
    if name.startswith("test_"):
        raise ConfigError(f"{name!r} would be taken for a test by pytest; choose a name without test_")
    if not directory.is_dir():
        raise ConfigError(f"--dir {directory} is no directory; make it")
    files = {directory / f"{prefix}{name}.py": f"{prefix}{_PLACEHOLDER}.py" for prefix in ("", "test_")}
    for path in files:
        if path.exists():
            raise ConfigError(f"{path} is there already; choose another name, or --dir")
    if _installed(name):
        raise ConfigError(f"{name!r} is an installed module, which {name}.py would hide; choose another name")
    for path, template in files.items():
        text = (Path(__file__).with_name(template)).read_text(encoding="utf-8")
        text = text.replace(_PLACEHOLDER, name).replace("MyReward", _class_name(name))
        try:
            path.write_text(text, encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"{path} cannot be written: {error.strerror}; choose another --dir") from None
    reward, test = files
    console.print(f"wrote {reward} and {test}; next:", markup=False, highlight=False)
    console.print(f"  pytest {test}", markup=False, highlight=False)
    console.print(
        f"  hybrid-rl reward test {reward}:{name} --data FILE.jsonl   # a line each: prompt, completion, answer",
        markup=False,
        highlight=False,
    )


def _installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ValueError:  # __main__
        return True


def _class_name(name: str) -> str:
    return "".join(part[:1].upper() + part[1:] for part in name.split("_")) or name
