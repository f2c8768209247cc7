"""What the name of a model stands for: one in the package, a folder, a GGUF file, one on the hub.

What a folder is instead of a model (an adapter, a run, a file) is said before anything is loaded.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

from lightning_blue.support.errors import InputError
from lightning_blue.support.hub import looks_local, missing_path

PACKAGED = {"almanac": resources.files("lightning_blue") / "assets" / "almanac" / "model"}
GGUF = ".gguf"
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx")


class Source(NamedTuple):
    """Where a model is.

    Attributes:
        name: as the user gave it.
        path: of its folder, or its name on the hub.
        gguf_file: name of a GGUF file in there; None for a model folder.
        revision: branch, tag or commit on the hub.
    """

    name: str
    path: str
    gguf_file: str | None = None
    revision: str | None = None

    @property
    def folder(self) -> Path | None:
        """The folder; None on the hub."""
        return Path(self.path) if Path(self.path).is_dir() else None

    @property
    def where(self) -> str:
        """What a message names."""
        return f"model.name_or_path = {self.name}"

    @property
    def arguments(self) -> dict[str, Any]:
        """What every ``from_pretrained`` is given; remote code is never run."""
        gguf = {} if self.gguf_file is None else {"gguf_file": self.gguf_file}
        return {"revision": self.revision, "trust_remote_code": False, **gguf}

    def refused(self, what: str, hint: str | None = None) -> InputError:
        """Return the error for a model that cannot be used."""
        return InputError(what, where=self.where, hint=hint)


def find_source(name: str, revision: str | None = None) -> Source:
    """Say where a model is.

    Args:
        name: ``almanac``, a folder, a GGUF file (on the hub ``owner/name/file.gguf``), or a name on
            the hub.
        revision: branch, tag or commit on the hub.

    Raises:
        InputError: if it is a file or a folder that holds no model, or a path that does not exist.
    """
    packaged = PACKAGED.get(name)
    path = Path(str(packaged) if packaged is not None else name).expanduser()
    source = Source(name, str(path), None, revision)
    if path.is_file():
        if path.suffix.lower() == GGUF:
            return Source(name, str(path.parent), path.name, revision)
        raise source.refused("this is a file, and a model is a folder", _folder_hint(path))
    if path.is_dir():
        _require_model_folder(source, path)
        return source
    repository = repository_of(name)
    if repository != name:
        return Source(name, repository, name.removeprefix(f"{repository}/"), revision)
    if looks_local(name) or path.suffix.lower() in (GGUF, *WEIGHTS):
        raise missing_path(name, source.where)
    return Source(name, name, None, revision)


def repository_of(name: str) -> str:
    """Return the repository of a GGUF file on the hub; any other name as it is.

    >>> [repository_of(name) for name in ("owner/name/file.gguf", "owner/name", "/a/b.gguf")]
    ['owner/name', 'owner/name', '/a/b.gguf']
    """
    owner, _, file = name.rpartition("/")
    on_hub = file.lower().endswith(GGUF) and owner.count("/") == 1 and not looks_local(owner)
    return owner if on_hub else name


def config_of(folder: Path) -> Mapping[str, Any]:
    """Return what stands in a folder's ``config.json``; empty if it cannot be read."""
    return _json(folder / "config.json")


def adapter_refused(source: Source, base: str) -> InputError:
    """Return the error for a PEFT adapter, with the way to make a model of it."""
    return source.refused(
        f"this is a PEFT adapter for {base}, not a model",
        "merge it and give the merged folder: PeftModel.from_pretrained(AutoModelForCausalLM."
        f"from_pretrained({base!r}), {source.path!r}).merge_and_unload().save_pretrained(FOLDER), "
        "and save the tokenizer there",
    )


def _require_model_folder(source: Source, folder: Path) -> None:
    """Refuse a folder without ``config.json``, saying what it is instead."""
    if (folder / "adapter_config.json").is_file():
        adapter = _json(folder / "adapter_config.json")
        raise adapter_refused(source, str(adapter.get("base_model_name_or_path") or "BASE"))
    if (folder / "config.json").is_file():
        return
    inside = [
        *(folder / name for name in ("model", "hf", "merged")),
        *sorted(folder.glob("snapshots/*")),
        *sorted(folder.glob("checkpoint-*")),
    ]
    models = [path for path in inside if (path / "config.json").is_file()]
    files = sorted(path for path in folder.glob("*") if path.suffix.lower() == GGUF)
    if models:
        hint = f"the folder inside it is one: {models[-1]}"
    elif files:
        hint = f"give the GGUF file itself: {files[0]}"
    elif any(folder.glob("consolidated*")) or (folder / "params.json").is_file():
        hint = "these are weights in their maker's own format; take their Hugging Face version"
    elif any(folder.iterdir()):
        hint = "copy config.json there from where the weights come from, and the tokenizer's files"
    else:
        hint = "the folder is empty; download the model into it, or give its name on the hub"
    raise source.refused("the folder holds no config.json, so that it is no model", hint)


def _folder_hint(file: Path) -> str:
    if (file.parent / "config.json").is_file():
        return f"give the folder that it stands in: {file.parent}"
    if file.suffix.lower() in WEIGHTS:
        return (
            "weights alone are not enough: give a folder with config.json and the tokenizer's "
            "files beside them, or a GGUF file"
        )
    return "give a Hugging Face folder, a GGUF file, or a name on the hub"


def _json(path: Path) -> Mapping[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
