"""Settings of `edit` by the names of the configuration, read from the constructors that take them.

>>> sorted(places("learning_rate")), sorted(places("seed"))
(['model.target.learning_rate'], ['measure.seed', 'model.seed'])
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from functools import cache
from typing import Any, NamedTuple, get_args, get_type_hints

from blue_callbacks import ClosedFormUpdate, EditGuard
from lightning_blue.comparison.labels import method_rows
from lightning_blue.data import EditDataModule
from lightning_blue.editing import EditModule
from lightning_blue.metrics.callback import MeasureEdits
from lightning_blue.support.errors import InputError

SECTIONS: dict[str, type] = {
    "model": EditModule,
    "data": EditDataModule,
    "update": ClosedFormUpdate,
    "guard": EditGuard,
    "measure": MeasureEdits,
}
GIVEN = ("model.model", "model.tokenizer", "data.path")  # what `edit` is called with

Settings = dict[str, Any]  # by dotted name


class Parameter(NamedTuple):
    """A parameter of a section's constructor, or a field of a dataclass that is one.

    Attributes:
        default: that the constructor has; None where it has none.
        parent: the dataclass that it is a field of; None for a parameter.
    """

    default: Any
    parent: type | None = None


@cache
def parameters() -> Mapping[str, Parameter]:
    """Return every setting by its dotted name, ``model.target.steps`` for instance."""
    found = {name: each for section in SECTIONS for name, each in _of_section(section)}
    return {name: each for name, each in found.items() if name not in GIVEN}


def places(name: str) -> list[str]:
    """Return the dotted names that a name may stand for: its own, or those that end with it.

    A section's own setting goes before one of a group inside a section: ``batch_size`` is
    ``data.batch_size`` and not ``measure.ability.batch_size``.
    """
    known = parameters()
    if name in known:
        return [name]
    found = [key for key in known if key.endswith(f".{name}")]
    least = min((key.count(".") for key in found), default=0)
    return [key for key in found if key.count(".") == least]


def resolved(named: Mapping[str, Any], where: str = "edit()") -> Settings:
    """Return settings under their dotted names.

    Args:
        named: value by the last part of a name, or more of it.
        where: they were given, for messages.

    Raises:
        InputError: for a name that no setting has, or that several have.
    """
    settings: Settings = {}
    for name, value in named.items():
        found = places(name)
        if len(found) > 1:
            choice = f'settings={{"{found[0]}": {value!r}}}'
            raise InputError(
                f"several settings are called {name!r}: {', '.join(found)}",
                where=where,
                hint=f"say which of them: {choice}",
            )
        if not found:
            raise InputError(f"there is no setting {name!r}", where=where, hint=_near(name))
        settings[found[0]] = value
    return settings


def of_method(method: str) -> Settings:
    """Return what makes a method, a row of ``conf/methods``.

    Raises:
        InputError: if there is no such row.
    """
    rows = method_rows()
    if method not in rows:
        near = difflib.get_close_matches(method, rows, n=1)
        known = f"did you mean {near[0]!r}?" if near else f"choose one of {', '.join(rows)}"
        raise InputError(f"there is no method {method!r}", where="edit(method)", hint=known)
    return {name.replace("/", "."): value for name, value in rows[method].items()}


def complete(settings: Settings) -> Settings:
    """Return all settings, those that were not given with the defaults of their constructors."""
    defaults = {name: each.default for name, each in parameters().items()}
    return {**defaults, **settings}


def arguments(section: str, settings: Settings) -> dict[str, Any]:
    """Return what a section's constructor is called with.

    Args:
        section: of `SECTIONS`.
        settings: by dotted name, those of other sections among them.

    Raises:
        InputError: if a value cannot be one of its dataclass.
    """
    groups: dict[str, Settings] = {}
    plain: Settings = {}
    for name, value in settings.items():
        first, _, rest = name.partition(".")
        group, dot, inner = rest.partition(".")
        if first == section and dot:
            groups.setdefault(group, {})[inner] = value
        elif first == section:
            plain[rest] = value
    for group, values in groups.items():
        start = f"{section}.{group}."
        kind = next(each.parent for n, each in parameters().items() if n.startswith(start))
        assert kind is not None
        try:
            plain[group] = kind(**values)
        except TypeError as error:
            raise InputError(str(error), where=f"{section}.{group}") from error
    return plain


def _of_section(section: str) -> Iterator[tuple[str, Parameter]]:
    constructor = SECTIONS[section].__init__  # type: ignore[misc]
    kinds = get_type_hints(constructor)
    for name, parameter in inspect.signature(constructor).parameters.items():
        if name == "self":
            continue
        kind = _dataclass_of(kinds[name])
        if kind is None:
            yield f"{section}.{name}", Parameter(_default(parameter.default))
            continue
        for each in fields(kind):
            default = getattr(parameter.default, each.name, None)
            yield f"{section}.{name}.{each.name}", Parameter(default, kind)


def _default(default: Any) -> Any:
    return None if default is inspect.Parameter.empty else default


def _dataclass_of(kind: Any) -> type | None:
    """Return the dataclass that a parameter is, or may be."""
    choices = [kind, *get_args(kind)]
    return next((each for each in choices if isinstance(each, type) and is_dataclass(each)), None)


def _near(name: str) -> str:
    known = parameters()
    last = {key.rpartition(".")[2]: key for key in known}
    near = difflib.get_close_matches(name, [*known, *last], n=1)
    if not near:
        return (
            "`lightning-blue fit --help` lists all of them; those of run and trainer are not used"
        )
    return f"did you mean {near[0]!r}?"
