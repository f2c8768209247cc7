"""The parts of the site that are made from the code each time it is built."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable
from contextlib import redirect_stdout, suppress
from io import StringIO
from itertools import groupby
from operator import attrgetter
from pathlib import Path

from messages import Message, messages

from lightning_blue.__main__ import COMMANDS, USAGE, main
from lightning_blue.cli.help import sections_of
from lightning_blue.cli.signatures import literal
from lightning_blue.metrics.table import METRICS, PERCENT, MetricSpec

ROOT = Path(__file__).parents[2]
SOURCES = (ROOT / "src" / "lightning_blue", ROOT / "callbacks" / "blue_callbacks")
PACKAGES = {  # whose public names the reference shows, and what they are for
    "lightning_blue": "The package",
    "lightning_blue.data": "Data",
    "lightning_blue.editing": "Editing",
    "lightning_blue.metrics": "Metrics",
    "blue_callbacks": "Callbacks",
}
AREAS = {  # of messages, by the folder of the code that raises them; others by that folder's name
    "cli": "Command line and run files",
    "api": "Python API",
    "data": "Data",
    "language_model": "Model and tokenizer",
    "preflight": "Check",
    "locating": "Locate",
    "editing": "Layers, targets and statistics",
    "update": "The update, and going on with a run",
    "metrics": "What is measured",
    "reporting": "Outputs, and W&B",
    "runs": "Show, undo, export, apply",
    "studies": "Analyze",
    "sweeps": "Sweeps",
    "comparison": "Compare",
    "support": "Files, disks, the hub, several processes",
}
SETTINGS = ("fit", "analyze", "pretrain")  # commands that together have every section


def command_line() -> str:
    """Return the help of each command, then all about each section of a run file."""
    parts = [_block(USAGE.split("\n", 1)[1].strip())]
    for command in COMMANDS:
        parts += [f"## {command}", _block(_printed(command, "--help"))]
    parts.append("## Every key of a run file")
    for command in SETTINGS:
        for section in sections_of(command):
            title = f"{section} (pretrain)" if command == "pretrain" else section
            if command == "fit" or section not in sections_of("fit") or title != section:
                text = _printed(command, f"--help.{section}")
                parts += [f"### {title}", _folded("all keys", _block(text))]
    return "\n\n".join(parts)


def metrics() -> str:
    """Return a table of metrics and, beneath, how each is measured."""
    lines = ["| name | unit | better | needs |", "|---|---|---|---|"]
    for spec in METRICS:
        needs = ", ".join(spec.needs) or "nothing more"
        unit = "%" if spec.unit == PERCENT else spec.unit
        lines.append(f"| [`{spec.name}`](#{spec.name}) | {unit} | {spec.direction} | {needs} |")
    return "\n".join([*lines, "", *(_metric(spec) for spec in METRICS)])


def python() -> str:
    """Return directives that show every public name with its docstring."""
    parts = []
    for package, title in PACKAGES.items():
        names = [name for name in _public(package) if not name.startswith("__")]
        named = [f"::: {package}.{name}" for name in names]
        parts += [f"## {title}", f"`{package}`", *named] if named else []
    return "\n\n".join(parts)


def all_messages() -> str:
    """Return each message of `InputError` with what to do, by area."""
    found = [message for source in SOURCES for message in messages(source) if _says(message)]
    areas = {**dict.fromkeys(AREAS, ()), **_by_area(found)}
    parts = []
    for area, told in areas.items():
        title = AREAS.get(area, area.replace("_", " ").capitalize())
        parts += [f"## {title}", *map(_message, told)] if told else []
    return "\n\n".join(parts)


PARTS: dict[str, Callable[[], str]] = {
    "command line": command_line,
    "metrics": metrics,
    "python": python,
    "messages": all_messages,
}


def _public(package: str) -> list[str]:
    """Return the names that a package offers, in the order of its list."""
    with suppress(KeyError):
        return list(literal(f"{package}.__all__"))
    return []


def _printed(*args: str) -> str:
    """Return what a command prints."""
    os.environ["COLUMNS"] = "98"  # argparse asks for it
    printed = StringIO()
    with redirect_stdout(printed), suppress(SystemExit):
        main(args)
    return printed.getvalue().rstrip()


def _metric(spec: MetricSpec) -> str:
    lines = [f"## {spec.title} {{ #{spec.name} }}", ""]
    if callable(getattr(spec.measured, "get", None)):
        lines += [f"- {name}: {spec.measure(name).definition}." for name in spec.measured]
    else:
        lines.append(f"{_sentence(spec.measure('counterfact').definition)}")
    if spec.side_effect:
        lines += ["", "It shows what an edit did to the rest of the model."]
    return "\n".join([*lines, ""])


def _message(message: Message) -> str:
    told = "\n".join(_readable(message.texts))
    hints = _readable(message.hints)
    lines = [_block(told)]
    lines += [_literal(_sentence(hint)) for hint in hints[:1]]
    lines += [f"Or: {_literal(_sentence(hint))}" for hint in hints[1:]]
    return "\n\n".join(lines)


def _says(message: Message) -> bool:
    return bool(_readable(message.texts))


def _readable(texts: Iterable[str]) -> list[str]:
    """Leave out what another program says: it has no word of its own."""
    return [text for text in texts if re.search(r"[a-z]{2}", re.sub(r"‹.*?›", "", text))]


def _by_area(found: Iterable[Message]) -> dict[str, list[Message]]:
    known = sorted((m._replace(package=_area(m.package)) for m in found), key=attrgetter("package"))
    return {area: list(told) for area, told in groupby(known, attrgetter("package"))}


def _area(package: str) -> str:
    """The modules of the callbacks stand beside each other: they are one area."""
    callbacks = {file.stem for file in SOURCES[1].glob("*.py")}
    return "update" if package in callbacks else package


def _literal(text: str) -> str:
    """Return text whose signs Markdown leaves as they are."""
    parts = re.split(r"(``.*?``|`[^`]*`)", text)
    return "".join(
        part if index % 2 else re.sub(r"([\\*_{}\[\]<>#|$])", r"\\\1", part)
        for index, part in enumerate(parts)
    )


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:] + ("" if text.endswith(".") else ".")


def _block(text: str) -> str:
    return f"```text\n{text}\n```"


def _folded(title: str, text: str) -> str:
    indented = "\n".join(f"    {line}".rstrip() for line in text.splitlines())
    return f'??? note "{title}"\n\n{indented}'
