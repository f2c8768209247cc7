"""Run files: a file names what it builds on and says only what differs; typos get a suggestion."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml

from lightning_blue.support.errors import InputError, first_line
from lightning_blue.support.text import no_text, shown

PACKAGED = Path(__file__).parents[1] / "conf"  # of an installed wheel

_VALUES = {"--model": "--model.name_or_path", "--data": "--data.path"}  # what is meant by each
_UNKNOWN_KEYS = (
    re.compile(r"unrecognized arguments: -{0,2}(?P<key>[\w.]+)"),
    re.compile(r"Group '(?P<group>[\w.]+)' does not accept option '(?P<key>[\w.]+)'"),
    re.compile(r"(?:[Kk]ey|[Oo]ption) ['\"](?P<key>[\w.]+)['\"]"),
)


def with_bases(args: Sequence[str]) -> list[str]:
    """Put a ``--config`` for each file's bases before it, the farthest base first.

    ``base`` is a file, relative to the one that names it, or a list of them; later ones override
    earlier ones.

    Raises:
        InputError: for a file that is missing or is no YAML mapping, or bases that go in circles;
            for text that no file can hold.
    """
    require_text(list(args), "the command line")
    expanded: list[str] = []
    rest = iter(args)
    for arg in rest:
        if arg in ("--config", "-c"):
            arg = f"--config={next(rest, '')}"
        if arg.startswith("--config="):
            chain = _chain(located(Path(arg.removeprefix("--config="))), [])
            expanded += [f"--config={path}" for path in chain]
        else:
            expanded.append(arg)
    return [*expanded, "--base=null"]  # resolved here: what is printed stands on its own


def require_sections(args: Sequence[str]) -> None:
    """Refuse a model or facts where a section of a run file belongs: ``--data facts.jsonl``.

    Raises:
        InputError: naming the key that takes it.
    """
    for place, arg in enumerate(args):
        option, given, value = arg.partition("=")
        if option in _VALUES and not given:
            value = args[place + 1] if place + 1 < len(args) else ""
        if option in _VALUES and not value.endswith((".yaml", ".yml")) and "{" not in value:
            raise InputError(
                f"{option} is a whole section of the configuration, and {shown(value)} is no run "
                "file with one",
                where=f"{option} {shown(value)}",
                hint=f"give it as {_VALUES[option]}={value}",
            )


def located(path: Path) -> Path:
    """Return ``conf/...`` of the installed package where there is no such file here."""
    parts = path.parts
    if path.exists() or PACKAGED.name not in parts[:-1]:
        return path
    last = max(i for i, part in enumerate(parts[:-1]) if part == PACKAGED.name)
    packaged = PACKAGED.joinpath(*parts[last + 1 :])
    return packaged if packaged.exists() else path


def _chain(path: Path, above: list[Path]) -> list[Path]:
    """Return a file's bases, each with its own before it, and the file itself."""
    if path.resolve() in (other.resolve() for other in above):
        circle = " -> ".join(str(p) for p in [*above, path])
        raise InputError(
            f"run files name each other as base: {circle}",
            where=str(path),
            hint="leave out the base of one of them",
        )
    chain: list[Path] = []
    for base in _bases(path):
        chain += _chain(located(path.parent / base), [*above, path])
    return [*chain, path]


def _bases(path: Path) -> list[str]:
    """Return what a file names as its base or bases, the one that counts least first."""
    named = _read(path).get("base")
    bases = named if isinstance(named, list) else [named] if named is not None else []
    if not all(isinstance(base, str) for base in bases):
        raise InputError(
            f"base is {named!r}; it must be a run file or a list of run files",
            where=str(path),
            hint="write it as base: FILE, or base: [FILE, FILE]",
        )
    return bases


def _read(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        require_text(content, str(path))
    except InputError:
        raise
    except (FileNotFoundError, IsADirectoryError):
        there = sorted(p.name for p in path.parent.glob("*.yaml"))
        near = difflib.get_close_matches(path.name, there, n=1)
        hint = f"did you mean {path.parent / near[0]}?" if near else "check the path"
        raise InputError("there is no such run file", where=str(path), hint=hint) from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # of a date, a number, brackets
        raise InputError(
            f"the run file is not valid YAML: {' '.join(str(error).split())}",
            where=str(path),
            hint="correct it there; compare it with conf/quickstart.yaml",
        ) from None
    if not isinstance(content or {}, dict):
        raise InputError(
            f"the run file holds a {type(content).__name__}; it must hold keys and values",
            where=str(path),
            hint="write it as SECTION: {KEY: VALUE}, as in conf/quickstart.yaml",
        )
    return content or {}


def unresolved(error: Exception) -> InputError:
    """Say of a ``${...}`` that cannot be resolved which it is, and where it stands."""
    if isinstance(error, RecursionError):
        return InputError(
            "a value is nested too deeply, or refers to itself",
            where="the configuration",
            hint="look for a ${...} that names its own key, or one that leads back to it",
        )
    return InputError(
        f"a reference cannot be resolved: {first_line(error)}",
        where=getattr(error, "full_key", None) or "the configuration",
        hint="name a key that exists and has a value, in full: ${update.plan}",
    )


def require_text(values: Any, where: str) -> None:
    """Refuse text that no file can hold: bytes that are not UTF-8, and the NUL character.

    Args:
        values: of the configuration, nested.
        where: they stand.

    Raises:
        InputError: naming the first.
    """
    if isinstance(values, dict | list):
        for value in [*values, *values.values()] if isinstance(values, dict) else values:
            require_text(value, where)
    elif isinstance(values, str) and (flaw := no_text(values)):
        hint = "write it without that"
        raise InputError(f"{shown(values)} {flaw}", where=where, hint=hint)


def explain(message: str, keys: Iterable[str]) -> str:
    """Add to a message about a key that does not exist the nearest one."""
    found = next(filter(None, (pattern.search(message) for pattern in _UNKNOWN_KEYS)), None)
    if found is None:
        return message
    key = ".".join(part for part in (found.groupdict().get("group"), found["key"]) if part)
    known = list(keys)
    near = [] if key in known else difflib.get_close_matches(key, known, n=1)
    return f"{message}\n  hint:  did you mean {near[0]}?" if near else message
