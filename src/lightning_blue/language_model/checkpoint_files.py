"""The files of a checkpoint: what they hold, read from their headers before weights are loaded."""

from __future__ import annotations

import json
import zipfile
from collections import Counter
from collections.abc import Iterable, Mapping
from math import prod
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open
from transformers.utils import (
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    WEIGHTS_INDEX_NAME,
    WEIGHTS_NAME,
)

from lightning_blue.support.errors import InputError, first_line

FLOATS = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}  # as safetensors names them; all others are packed or are no numbers of the model
_NAMES = {dtype: name for name, dtype in FLOATS.items()}
_DAMAGED = "download or save the file again; it was perhaps cut off on the way"


class StoredTensor(NamedTuple):
    """A tensor as its file describes it.

    Attributes:
        file: in which it is.
        dtype: as safetensors names it: ``F32``, ``BF16``, ``I8``, ``F8_E4M3`` and so on.
        shape: its shape.
    """

    file: Path
    dtype: str
    shape: tuple[int, ...]


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Read the headers of a model folder's weight files; name -> tensor.

    The files are those that transformers takes: safetensors before pickled, one before several.

    Raises:
        InputError: if there is none, or one is missing, damaged, empty or of another kind.
    """
    tensors: dict[str, StoredTensor] = {}
    for file in weight_files(folder):
        found = _safetensors(file) if file.suffix == ".safetensors" else _pickled(file)
        tensors |= found
    return tensors


def weight_files(folder: Path) -> list[Path]:
    """Return the files that hold a model folder's weights.

    Raises:
        InputError: if there is none, or the list of several is damaged or names a missing one.
    """
    for name in (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_NAME, WEIGHTS_INDEX_NAME):
        path = folder / name
        if path.is_file():
            return _listed(path) if path.suffix == ".json" else [path]
    there = ", ".join(sorted(path.name for path in folder.iterdir())[:8])
    raise InputError(
        f"the folder has no weights: neither {SAFE_WEIGHTS_NAME} nor {WEIGHTS_NAME} nor a list of "
        "several",
        where=str(folder),
        hint=f"download or save the model again; in the folder are {there}",
    )


def stored_dtype(tensors: Mapping[str, StoredTensor]) -> torch.dtype | None:
    """Return the dtype of most of the stored values; None if none is a plain float."""
    counts: Counter[torch.dtype] = Counter()
    for tensor in tensors.values():
        if tensor.dtype in FLOATS:
            counts[FLOATS[tensor.dtype]] += prod(tensor.shape)
    return counts.most_common(1)[0][0] if counts else None


def gguf_dtype(path: Path) -> torch.dtype:
    """Return the dtype of a GGUF file's values; float32 where they were unpacked from blocks.

    Norms stand in float32 beside weights in half precision, which then are the file's dtype.
    """
    from gguf import GGUFReader

    kinds = {tensor.tensor_type.name for tensor in GGUFReader(path).tensors}
    halves = [FLOATS[kind] for kind in ("BF16", "F16") if kind in kinds]
    return halves[0] if halves and kinds <= FLOATS.keys() else torch.float32


def _listed(index: Path) -> list[Path]:
    """Return the files that an index names."""
    try:
        names: Iterable[str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        files = [index.parent / name for name in sorted(set(names))]
    except Exception as error:
        raise InputError(
            f"the list of weight files cannot be read: {type(error).__name__}: {first_line(error)}",
            where=str(index),
            hint=_DAMAGED,
        ) from error
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise InputError(
            f"{len(missing)} of {len(files)} weight files are missing: {', '.join(missing[:3])}",
            where=str(index),
            hint="download the rest of the model into the folder",
        )
    return files


def _safetensors(file: Path) -> dict[str, StoredTensor]:
    try:
        with safe_open(file, framework="pt") as opened:
            slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
            return {
                name: StoredTensor(file, part.get_dtype(), tuple(part.get_shape()))
                for name, part in slices.items()
            }
    except Exception as error:
        raise _damaged(file, "no whole safetensors file", error) from error


def _pickled(file: Path) -> dict[str, StoredTensor]:
    """Read what a pickled file holds without its values; nothing in it is run."""
    try:
        content = torch.load(file, "meta", weights_only=True, mmap=zipfile.is_zipfile(file))
    except Exception as error:
        raise _damaged(file, "no file of weights that can be read safely", error) from error
    entries = content.items() if isinstance(content, Mapping) else ()
    tensors = {
        str(name): StoredTensor(file, _NAMES.get(value.dtype, str(value.dtype)), (*value.shape,))
        for name, value in entries
        if isinstance(value, torch.Tensor)
    }
    if not tensors:
        raise InputError("the file holds no weights by name", where=str(file), hint=_DAMAGED)
    return tensors


def _damaged(file: Path, what: str, error: Exception) -> InputError:
    reason, hint = f"{type(error).__name__}: {first_line(error)}", _DAMAGED
    if file.suffix != ".safetensors" and not isinstance(error, RuntimeError):
        # of many kinds; torch's own text advises to run whatever is inside
        reason = "it is damaged, or holds other objects than tensors, and these are never run"
        hint = "take the model's safetensors version, or save the weights as safetensors yourself"
    if file.stat().st_size == 0:
        reason, hint = "it is empty", _DAMAGED
    elif _begins_with(file, b"version https://git-lfs"):
        reason, hint = "it is a pointer of Git LFS", "fetch the file itself: git lfs pull"
    return InputError(f"this is {what}: {reason}", where=str(file), hint=hint)


def _begins_with(file: Path, start: bytes) -> bool:
    with file.open("rb") as opened:
        return opened.read(len(start)) == start
