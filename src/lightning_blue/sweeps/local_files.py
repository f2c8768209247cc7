"""The content of the local files that a run's configuration names, as hashes.

What a run reads of them is part of what it is. Texts and records are hashed whole, since one record
that was corrected counts; the files of models and covariances, which may have gigabytes, by their
size and 64 blocks. What is on the hub is known by its name alone.
"""

from __future__ import annotations

import glob
import hashlib
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from blue_callbacks.plans import layer_updates
from lightning_blue.data.corpus import PACKAGED
from lightning_blue.data.hub import ALMANAC

MODEL = "model/name_or_path"
TEXTS: Mapping[str, Collection[str]] = {  # key -> names that stand for files in the package
    "data/path": (ALMANAC,),
    "data/controls": (ALMANAC,),
    "measure/text": PACKAGED,
    "measure/ability/data": (),
    "model/covariance/corpus": PACKAGED,
}
COVARIANCE = "model/covariance/path"
LAYER = "{}"  # stands for a layer's number in the names of files of covariances
TASKS = "measure/ability/tasks"
_NAMED = ("include", "dataset_path", "data_files", "data_dir")  # keys of a task's file
_SAMPLES, _SAMPLE = 64, 65536  # blocks of a large file that are read, and their bytes


class LocalFiles:
    """Hashes of the files of configurations, each read once."""

    def __init__(self) -> None:
        self._known: dict[tuple[Path, bool], str | None] = {}

    def of(self, config: Mapping[str, Any]) -> dict[str, str | None]:
        """Return a hash for each key that may name files; None where it names none that are here.

        Args:
            config: a resolved configuration under flat keys.
        """
        hashes = {key: self._text(config.get(key), names) for key, names in TEXTS.items()}
        model = config.get(MODEL)
        hashes[MODEL] = self._hash(_package(ALMANAC) if model == ALMANAC else model)
        hashes[COVARIANCE] = self._covariances(config)
        tasks = [Path(name).expanduser() for name in config.get(TASKS) or []]
        tasks = [path for path in tasks if path.is_file()]
        if tasks:  # else they are names that the harness knows
            hashes[TASKS] = _hash_of(_files_of_tasks(tasks), whole=True)
        return hashes

    def _text(self, source: Any, names: Collection[str]) -> str | None:
        if source in names:
            return self._hash(_package(source))
        return self._hash(source if isinstance(source, str) else None, whole=True)

    def _covariances(self, config: Mapping[str, Any]) -> str | None:
        source = config.get(COVARIANCE) or ""
        if LAYER not in source:
            return self._hash(source)
        files = _files_of_layers(source, _written(config))
        return _hash_of(files, whole=False) if files else None

    def _hash(self, source: str | Path | None, whole: bool = False) -> str | None:
        if not source:
            return None
        key = Path(source).expanduser(), whole
        if key not in self._known:
            files = _files(key[0])
            self._known[key] = _hash_of(files, whole) if files else None
        return self._known[key]


def _package(name: str) -> Path:
    """Return the folder of what the package has under a name."""
    return Path(str(PACKAGED[name])).parent


def _files(place: Path) -> list[Path]:
    """Return a file, or the files in a folder; none where nothing is there.

    Hidden ones are left out: notes of who downloaded a folder, which no run reads.
    """
    if not place.is_dir():
        return [place] if place.exists() else []
    inside = (path for path in sorted(place.rglob("*")) if path.is_file())
    return [path for path in inside if not _is_hidden(path.relative_to(place))]


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _written(config: Mapping[str, Any]) -> list[int] | None:
    """Return the layers whose covariances a run reads; None where the model proposes them."""
    layers = config.get("update/layers")
    if not layers:
        return None
    return sorted({update.layer for update in layer_updates(config["update/plan"], layers)})


def _files_of_layers(pattern: str, layers: Iterable[int] | None) -> list[Path]:
    """Return the files of covariances of layers; without layers, those of all that there are."""
    if layers is not None:
        named = [Path(pattern.replace(LAYER, str(layer))) for layer in layers]
        return [path for path in named if path.is_file()]
    parts = str(Path(pattern)).split(LAYER)
    number = re.compile(r"\d+".join(map(re.escape, parts)))
    found = _matches("*".join(map(glob.escape, parts)))
    return [path for path in found if number.fullmatch(str(path))]


def _matches(pattern: str) -> list[Path]:
    """Return what there is that a pattern of the shell names, in order."""
    anchor = Path(pattern).anchor
    return sorted(Path(anchor).glob(pattern.removeprefix(anchor)))


def _files_of_tasks(tasks: Iterable[Path]) -> list[Path]:
    """Return tasks' YAML files, and the files, modules and data that these name, in turn."""
    found: list[Path] = []
    waiting = [*tasks]
    while waiting:
        path = waiting.pop(0).resolve()
        if path in found:
            continue
        found.append(path)
        if path.suffix in (".yaml", ".yml"):
            for place in _places_named(path):
                waiting += _files(place)
    return found


def _places_named(task: Path) -> Iterator[Path]:
    """Yield where the files may be that a task's YAML file names: beside it, or from here."""
    try:
        document = yaml.load(task.read_text(encoding="utf-8"), _TaskLoader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return  # the run will say so
    for name in filter(None, _names(document)):
        for place in (task.parent / name, Path(name).expanduser()):
            yield from [place] if place.exists() else _matches(str(place))


def _names(value: Any, named: bool = False) -> Iterator[str]:
    """Yield the strings under keys that may name files, and the modules of functions."""
    if isinstance(value, _Function):
        yield value.module
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _names(inner, named or key in _NAMED)
    elif isinstance(value, list):
        for inner in value:
            yield from _names(inner, named)
    elif named and isinstance(value, str):
        yield value


class _Function:
    """What ``!function utils.clean`` stands for: a function of a module beside the file."""

    def __init__(self, name: str) -> None:
        self.module = name.rpartition(".")[0].replace(".", "/") + ".py"


class _TaskLoader(yaml.SafeLoader):
    """Reads a task of lm-evaluation-harness without importing anything."""


_TaskLoader.add_constructor("!function", lambda _, node: _Function(str(node.value)))


def _hash_of(files: Iterable[Path], whole: bool) -> str:
    """Hash the names, sizes and content of files, of large ones samples where not all is read."""
    digest = hashlib.sha256()
    for path in files:
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode())
        with path.open("rb") as file:
            if not whole and size > _SAMPLES * _SAMPLE:
                for sample in range(_SAMPLES):
                    file.seek((size - _SAMPLE) * sample // (_SAMPLES - 1))
                    digest.update(file.read(_SAMPLE))
            else:
                while block := file.read(1 << 20):
                    digest.update(block)
    return digest.hexdigest()
