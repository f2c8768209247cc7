"""Every message of `InputError` in the source, read from the code that raises it.

Values that are known when the message is written only stand as ``‹name›``, or ``…`` where they have
no name. Nothing is imported.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import NamedTuple

UNKNOWN = "…"
MOST = 24  # texts of one expression
Function = ast.FunctionDef | ast.ClassDef


class Message(NamedTuple):
    """What a user may read, and what to do.

    Attributes:
        package: the folder of the code that raises it, ``data`` for instance.
        texts: the message; several where the code chooses one.
        where: what it says of the place; empty if nothing.
        hints: what to do; empty where the message says no more.
    """

    package: str
    texts: list[str]
    where: list[str]
    hints: list[str]


def messages(sources: Path) -> Iterator[Message]:
    """Yield each message that the modules of a folder raise, by file and line."""
    for file in sorted(sources.rglob("*.py")):
        module = Module(ast.parse(file.read_text(encoding="utf-8")))
        package = file.relative_to(sources).parts[0].removesuffix(".py")
        for call in module.calls:
            if call.args and module.raises(call):
                given = {keyword.arg: keyword.value for keyword in call.keywords}
                texts, where, hints = (
                    module.texts(value, call) if value is not None else []
                    for value in (call.args[0], given.get("where"), given.get("hint"))
                )
                yield Message(package, texts, where, [hint for hint in hints if hint])


class Module:
    """A module's syntax, and what strings its expressions may be.

    Args:
        tree: of the module.
    """

    def __init__(self, tree: ast.Module) -> None:
        self.tree = tree
        nodes = list(ast.walk(tree))
        self.above = {child: node for node in nodes for child in ast.iter_child_nodes(node)}
        self.calls = [node for node in nodes if isinstance(node, ast.Call)]
        self.functions = {n.name: n for n in nodes if isinstance(n, ast.FunctionDef)}

    def raises(self, call: ast.Call) -> bool:
        """Tell whether a call makes an `InputError`, or is the constructor of a kind of it."""
        if ast.unparse(call.func) != "super().__init__":
            return _called(call) == "InputError"
        above: ast.AST | None = call
        while above is not None and not isinstance(above, ast.ClassDef):
            above = self.above.get(above)
        return above is not None and "InputError" in map(ast.unparse, above.bases)

    def texts(self, node: ast.expr, at: ast.AST, depth: int = 0) -> list[str]:
        """Return the strings that an expression may be at a place of the code."""
        found: list[str] = [UNKNOWN]
        if depth > 6:
            return found
        if isinstance(node, ast.Constant):
            found = [node.value if isinstance(node.value, str) else ""]
        elif isinstance(node, ast.JoinedStr):
            found = self._joined(node, at, depth)
        elif isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
            sides = (self.texts(side, at, depth + 1) for side in (node.left, node.right))
            found = ["".join(pair) for pair in product(*sides)]
        elif isinstance(node, ast.IfExp | ast.BoolOp):
            branches = [node.body, node.orelse] if isinstance(node, ast.IfExp) else node.values
            found = [text for branch in branches for text in self.texts(branch, at, depth + 1)]
        elif isinstance(node, ast.Name):
            found = self._named(node.id, at, depth) or [f"‹{node.id.strip('_').replace('_', ' ')}›"]
        elif isinstance(node, ast.Attribute):
            found = [f"‹{node.attr.strip('_').replace('_', ' ')}›"]
        elif isinstance(node, ast.Call):
            returned = self._returned(node)
            found = [text for each in returned for text in self.texts(each, each, depth + 1)]
            found = found or [UNKNOWN]
        return list(dict.fromkeys(found))[:MOST]

    def _joined(self, node: ast.JoinedStr, at: ast.AST, depth: int) -> list[str]:
        parts = []
        for value in node.values:
            inner = value.value if isinstance(value, ast.FormattedValue) else value
            simple = isinstance(inner, ast.Constant | ast.IfExp | ast.JoinedStr)
            names = isinstance(inner, ast.Name | ast.Attribute)
            parts.append(
                self.texts(inner, at, depth + 1)
                if simple
                else [f"‹{ast.unparse(inner).rpartition('.')[2].strip('_').replace('_', ' ')}›"]
                if names
                else [UNKNOWN]
            )
        return ["".join(each) for each in product(*parts)]

    def _named(self, name: str, at: ast.AST, depth: int) -> list[str]:
        """Return what a name was given: in its function, by its callers, or in the module."""
        function = self._function(at)
        scopes = [each for each in (function, self.tree) if each is not None]
        for scope in scopes:
            given = _assigned(scope, name)
            values = [each for value, place in given for each in self._part(value, place)]
            texts = [text for each in values for text in self.texts(each, each, depth + 1)]
            if texts:
                return texts
            if isinstance(scope, ast.FunctionDef) and scope is function:
                by_callers = self._given(scope, name, depth)
                if by_callers:
                    return by_callers
        return []

    def _given(self, function: ast.FunctionDef, name: str, depth: int) -> list[str]:
        """Return what the module's own calls give a function for one of its parameters."""
        parameters = [each.arg for each in (*function.args.args, *function.args.kwonlyargs)]
        if name not in parameters:
            return []
        place = parameters.index(name) - (parameters[0] in ("self", "cls"))
        texts = []
        for call in self.calls:
            if _called(call) == function.name:
                by_name = [each.value for each in call.keywords if each.arg == name]
                for value in by_name or call.args[place : place + 1]:
                    texts += self.texts(value, call, depth + 1)
        return texts

    def _part(self, value: ast.expr | None, place: int | None) -> list[ast.expr]:
        """Return a value, or what stands at one place of the tuple that a function returns."""
        if value is None or place is None:
            return [] if value is None else [value]
        tuples = self._returned(value) if isinstance(value, ast.Call) else [value]
        return [each.elts[place] for each in tuples if isinstance(each, ast.Tuple)]

    def _returned(self, call: ast.Call) -> list[ast.expr]:
        """Return the expressions that a function of the module may return."""
        function = self.functions.get(_called(call))
        nodes = [] if function is None else ast.walk(function)
        return [n.value for n in nodes if isinstance(n, ast.Return) and n.value is not None]

    def _function(self, node: ast.AST) -> ast.FunctionDef | None:
        above: ast.AST | None = node
        while above is not None and not isinstance(above, ast.FunctionDef):
            above = self.above.get(above)
        return above


def _called(call: ast.Call) -> str:
    return ast.unparse(call.func).rpartition(".")[2]


def _assigned(scope: ast.AST, name: str) -> Iterator[tuple[ast.expr | None, int | None]]:
    """Yield what a name is set to in a function or at the top of a module, and its place there."""
    nodes = ast.walk(scope) if isinstance(scope, ast.FunctionDef) else ast.iter_child_nodes(scope)
    for node in nodes:
        if not isinstance(node, ast.Assign | ast.AnnAssign | ast.NamedExpr):
            continue
        for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
            elements = target.elts if isinstance(target, ast.Tuple) else [target]
            for place, each in enumerate(elements):
                if isinstance(each, ast.Name) and each.id == name:
                    yield node.value, place if isinstance(target, ast.Tuple) else None
