"""Signatures, defaults and docstrings, read from the source: nothing is imported."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from docstring_parser import DocstringStyle, parse


class Key(NamedTuple):
    """A key of a section.

    Attributes:
        name: below the section, ``target.steps`` for instance.
        doc: what it is.
        default: as a run file spells it; None for null.
        required: whether there is none.
    """

    name: str
    doc: str
    default: str | None = None
    required: bool = False


def keys_of(path: str) -> list[Key]:
    """Return the parameters of a class or function, those of dataclasses among them spread.

    Args:
        path: ``package.module.name``, or that by which a package offers it.

    >>> [key.default for key in keys_of("lightning_blue.data.EditDataModule") if key.name == "path"]
    ['almanac']
    """
    module, name = _definition(path)
    node = _body(module)[name]
    if isinstance(node, ast.ClassDef) and _is_dataclass(node):
        return list(_fields(module, node))
    return list(_parameters(module, node))


def literal(path: str) -> Any:
    """Return the value of a constant that is written as a literal."""
    module, name = _definition(path)
    node = _body(module)[name]
    assert isinstance(node, ast.Assign | ast.AnnAssign)
    assert node.value is not None
    return ast.literal_eval(node.value)


def spelled(value: object) -> str | None:
    """Return a value as a run file spells it; None for null."""
    return None if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _parameters(module: str, node: ast.stmt) -> Iterator[Key]:
    """Yield the parameters of a function, or of a class's ``__init__``."""
    docs = _docs(node)
    if isinstance(node, ast.ClassDef):
        node = next(each for each in node.body if getattr(each, "name", "") == "__init__")
        docs |= _docs(node)
    assert isinstance(node, ast.FunctionDef)
    named = node.args.args
    defaults: list[ast.expr | None] = [None] * (len(named) - len(node.args.defaults))
    pairs = [*zip(named, [*defaults, *node.args.defaults], strict=True)]
    pairs += zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True)
    for argument, default in pairs:
        if argument.arg != "self":
            yield from _keys(module, argument.arg, argument.annotation, default, docs)


def _fields(module: str, node: ast.ClassDef) -> Iterator[Key]:
    """Yield the fields of a dataclass."""
    for each in node.body:
        if isinstance(each, ast.AnnAssign) and isinstance(each.target, ast.Name):
            yield from _keys(module, each.target.id, each.annotation, each.value, _docs(node))


def _keys(
    module: str,
    name: str,
    annotation: ast.expr | None,
    default: ast.expr | None,
    docs: dict[str, str],
) -> Iterator[Key]:
    """Yield a parameter, or the fields of the dataclass that it is."""
    if isinstance(annotation, ast.Name):
        try:
            source, kind = _definition(f"{module}.{annotation.id}")
            node = _body(source)[kind]
        except KeyError:  # a type of Python's own, or of another package
            node = None
        if isinstance(node, ast.ClassDef) and _is_dataclass(node):
            yield from (key._replace(name=f"{name}.{key.name}") for key in _fields(source, node))
            return
    yield Key(name, docs.get(name, ""), _default(module, default), required=default is None)


def _default(module: str, default: ast.expr | None) -> str | None:
    """Return a default as a run file spells it."""
    if default is None:
        return None
    try:
        is_name = isinstance(default, ast.Name)
        value = literal(f"{module}.{default.id}") if is_name else ast.literal_eval(default)  # type: ignore[attr-defined]
    except (ValueError, KeyError):
        return ast.unparse(default)
    return spelled(value)


def _docs(node: ast.stmt) -> dict[str, str]:
    """Return what a docstring says of each parameter."""
    text = ast.get_docstring(node) if isinstance(node, ast.ClassDef | ast.FunctionDef) else None
    found = parse(text or "", DocstringStyle.GOOGLE).params
    return {each.arg_name.strip("`* "): each.description or "" for each in found}


def _is_dataclass(node: ast.ClassDef) -> bool:
    return any("dataclass" in ast.unparse(each) for each in node.decorator_list)


def _definition(path: str) -> tuple[str, str]:
    """Follow imports from a module to the one that defines a name.

    Raises:
        KeyError: if there is no such name, or it is defined in no file that can be read.
    """
    module, _, name = path.rpartition(".")
    node = _body(module)[name]
    if isinstance(node, ast.ImportFrom):
        if node.module is None or node.level:
            raise KeyError(path)
        original = next(each.name for each in node.names if (each.asname or each.name) == name)
        return _definition(f"{node.module}.{original}")
    return module, name


@cache
def _body(module: str) -> dict[str, ast.stmt]:
    """Return the statements of a module by the names that they define or import."""
    named: dict[str, ast.stmt] = {}
    for node in ast.parse(_file(module).read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            named[node.name] = node
        elif isinstance(node, ast.ImportFrom):
            named |= {each.asname or each.name: node for each in node.names}
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            named |= {each.id: node for each in targets if isinstance(each, ast.Name)}
    return named


def _file(module: str) -> Path:
    """Find a module's file below its top-level package, which is not imported either."""
    top, *rest = module.split(".")
    spec = find_spec(top)
    if spec is None or not spec.submodule_search_locations:
        raise KeyError(module)
    path = Path(next(iter(spec.submodule_search_locations))).joinpath(*rest)
    for file in (path.with_suffix(".py"), path / "__init__.py"):
        if file.is_file():
            return file
    raise KeyError(module)
