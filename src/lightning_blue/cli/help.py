"""The help of a command that is configured by a run file, read from the source without running it.

``--help`` gives every key of the command's own sections a line, ``--help.SECTION`` says all about
one section, Lightning's ``trainer`` included. Importing what is described would take seconds.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from textwrap import shorten, wrap

from lightning_blue.cli.signatures import Key, keys_of, literal, spelled

WIDTH = 98  # characters of a line
KEY_WIDTH = 36
TRAINER = "trainer"

_EDITING = {
    "data": ["lightning_blue.data.datamodule.EditDataModule"],
    "model": ["lightning_blue.editing.module.edit_module", "lightning_blue.editing.EditModule"],
    "update": ["blue_callbacks.update.ClosedFormUpdate"],
    "measure": ["lightning_blue.metrics.callback.MeasureEdits"],
    "guard": ["blue_callbacks.guard.EditGuard"],
    "run": ["lightning_blue.reporting.record.RunRecord"],
}
_PRETRAINING = {
    "data": ["lightning_blue.pretrain.data.FactCorpusModule"],
    "model": ["lightning_blue.pretrain.module.PretrainModule"],
}
_STUDY = {"study": ["lightning_blue.studies.bench.StudySettings"]}
_LIGHTNING = {TRAINER: ["lightning.pytorch.trainer.trainer.Trainer"]}
COMMANDS = {
    "fit": "Edit facts in sequential batches, measure what changed, and report on it.",
    "evaluate": "Measure a model, edited or not, without editing it.",
    "stats": "Collect the covariance of keys that fit needs (fit does it by itself).",
    "pretrain": "Train a small language model that knows given facts.",
    "analyze": "Make a study of the paper on a run file's model and data: analyze STUDY, or all.",
}
_REST = (
    Key("config", "a run file, over which flags and later run files win"),
    Key("ckpt_path", "go on with a run that was stopped: a checkpoint, or last for its newest"),
    Key("for_model", "the model that a run file's settings were chosen on; others are refused"),
    Key("seed_everything", "decides everything that is random", "0"),
    Key("print_config", "print the whole configuration as a run file, and do nothing"),
)


def program(command: str) -> str:
    """Return how the running program is called, with a command."""
    module = Path(sys.argv[0]).parts[-2:] == ("lightning_blue", "__main__.py")
    return f"{'python -m lightning_blue' if module else 'lightning-blue'} {command}"


def asked_for(args: Sequence[str]) -> str | None:
    """Return the section that help is asked for; empty for the short help, None for none."""
    for arg in args:
        if arg in ("-h", "--help"):
            return ""
        if arg.startswith("--help."):
            return arg.removeprefix("--help.")
    return None


def write_help(command: str, section: str) -> int:
    """Write the short help of a command, or all about one of its sections.

    Returns:
        The exit code: 0, or 2 where there is no such section.
    """
    sections = sections_of(command)
    if section and section not in sections:
        hint = f"choose one of: {', '.join(sections)}"
        sys.stderr.write(f"error: there is no section {section!r}\n  hint:  {hint}\n")
        return 2
    lines = _long(section, _section(command, section)) if section else _short(command)
    sys.stdout.write("".join(f"{line}\n" for line in lines))
    return 0


def sections_of(command: str) -> dict[str, list[str]]:
    """Return what each section configures, by its dotted path; Lightning's section comes last."""
    if command == "pretrain":
        return _PRETRAINING | _LIGHTNING
    return (_STUDY if command == "analyze" else {}) | _EDITING | _LIGHTNING


def first_sentences(command: str) -> dict[str, str]:
    """Return what is said first of each key, by its dotted name."""
    keys = {
        f"{section}.{key.name}": key
        for section in sections_of(command)
        for key in _section(command, section)
    } | {key.name: key for key in _REST}
    return {name: _first_sentence(key.doc) for name, key in keys.items()}


def _section(command: str, section: str) -> list[Key]:
    """Return the keys of a section, in the order of the signatures."""
    sources = sections_of(command)[section]
    keys = {key.name: key for source in sources for key in keys_of(source)}
    keys = {name: key for name, key in keys.items() if name not in _NOT_SET}
    if section == TRAINER and command != "pretrain":
        chosen = literal("lightning_blue.cli.parser.TRAINER_DEFAULTS")
        keys |= {k: keys[k]._replace(default=spelled(v)) for k, v in chosen.items()}
    return list(keys.values())


_NOT_SET = ("model", "tokenizer")  # of EditModule: edit_module loads them


def _short(command: str) -> Iterator[str]:
    yield f"usage: {program(command)} [--config FILE] [--SECTION.KEY=VALUE ...]"
    yield from ("", COMMANDS[command])
    sections = sections_of(command)
    for section in sections:
        keys = _section(command, section)
        if section == TRAINER:
            yield from (
                "",
                f"trainer: {len(keys)} flags of Lightning's Trainer, see --help.trainer",
            )
        else:
            yield from ("", f"{section}:", *(_line(key, f"--{section}.") for key in keys))
    unused = {"pretrain": ("ckpt_path", "for_model"), "fit": ()}.get(command, ("ckpt_path",))
    rest = [key for key in _REST if key.name not in unused]
    yield from ("", "beside the sections:", *(_line(key, "--") for key in rest))
    yield from ("", f"All about a section: --help.SECTION, of {', '.join(sections)}.")
    yield "In a run file, section: {key: value}. [In brackets: what holds unless it is given.]"


def _line(key: Key, start: str) -> str:
    """Say what a key is: as much of the first sentence as fits, and the default."""
    name = f"  {start}{key.name} ".ljust(KEY_WIDTH)
    room = WIDTH - len(name) - len(_default(key)) - 1
    said = shorten(_first_sentence(key.doc), room, placeholder="…")
    return f"{name}{said} {_default(key)}".rstrip()


def _long(section: str, keys: Sequence[Key]) -> Iterator[str]:
    yield f"{section}:"
    for key in keys:
        yield from ("", f"  --{section}.{key.name} {_default(key)}".rstrip())
        for text in key.doc.split("\n\n"):
            yield from wrap(_plain(text), WIDTH, initial_indent=" " * 6, subsequent_indent=" " * 6)


def _default(key: Key) -> str:
    if key.default is None:
        return "(required)" if key.required else ""
    return f"[{shorten(key.default, 24, placeholder='…')}]"


def _first_sentence(text: str) -> str:
    flat = _plain(text)
    ends = [i for i in range(len(flat) - 2) if flat[i] == ";" or _ends(flat, i)]
    return flat[: ends[0]] if ends else flat.rstrip(".")


def _ends(text: str, place: int) -> bool:
    """Say whether a full stop ends a sentence, and not an abbreviation."""
    return text[place : place + 2] == ". " and text[place + 2].isupper()


def _plain(text: str) -> str:
    """Return text on one line, without the marks of code and of references."""
    return " ".join(_REFERENCE.sub(r"\1", text).replace("``", "").split())


_REFERENCE = re.compile(r":\w+:`~?([^`]+)`")
