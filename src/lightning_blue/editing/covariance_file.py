"""A file of covariances: what they were computed from, and that they are what was written.

``layerN`` holds the upper triangle of layer N's covariance in float64, row after row,
``(d_in (d_in + 1) / 2,)``: as many bytes as the whole matrix has in float32 (0.82 GB for the 14,336
key dimensions of Llama-3-8B). safetensors does not notice a flipped bit, so that the metadata
holds a digest of each tensor, and one of itself. Older files, whole matrices in float32 without
digests, are read as well.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import isqrt
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from lightning_blue.editing.convergence import Change
from lightning_blue.language_model.states import is_finite
from lightning_blue.support.digests import digest
from lightning_blue.support.errors import InputError
from lightning_blue.support.storage import whole_file, writing

FORMAT, VERSION = "lightning-blue covariance", "2"
COMPUTE_AGAIN = "delete the file; it will be computed again"
_LAYER = re.compile(r"layer\d+")
_BLOCK = 1024  # rows that are mirrored at a time


@dataclass(frozen=True)
class Collected:
    """How a layer's covariance was collected.

    Attributes:
        tokens: that it is the mean over; None where an older file does not say.
        documents: that these are from: of a text file, or rows of a dataset.
        changes: how far the update still moved as the tokens doubled.
    """

    tokens: int | None = None
    documents: int | None = None
    changes: tuple[Change, ...] = ()


class CovarianceFile:
    """A safetensors file of covariances that names what they were computed from.

    Args:
        path: the file.
        identity: what the covariances depend on; a file with another identity is refused.
        hint: how to mend a file that is damaged.
    """

    def __init__(
        self, path: Path, identity: Mapping[str, object], hint: str = COMPUTE_AGAIN
    ) -> None:
        self.path = path
        self.identity = {key: str(value) for key, value in identity.items()}
        self.hint = hint

    def read(self, d_in: Mapping[int, int]) -> dict[int, Tensor]:
        """Return those of the layers that the file holds; nothing if there is no file.

        All of the file is checked, layers that are not asked for too.

        Args:
            d_in: layer -> key dimensions that its covariance must have.

        Returns:
            layer -> ``(d_in, d_in)``, float64.

        Raises:
            InputError: if the file was computed from something else, is no such file, is damaged,
                holds matrices of other sizes, NaN or infinity.
        """
        with self._opened() as file:
            whole = {n: unpacked(t) for n, t in self._tensors(file) if n in d_in} if file else {}
            for layer, matrix in whole.items():
                if len(matrix) != d_in[layer]:
                    raise ValueError(
                        f"layer {layer} has {len(matrix)} key dimensions, and {d_in[layer]} in "
                        "the model"
                    )
            bad = [str(layer) for layer, matrix in whole.items() if not is_finite(matrix)]
            if bad:
                raise ValueError(f"NaN or infinity in the covariance of layer {', '.join(bad)}")
        return whole

    def holds(self, layers: Sequence[int]) -> bool:
        """Return whether the file is there and holds all of the layers; reads its head alone.

        Raises:
            InputError: if the file was computed from something else, or is no such file.
        """
        with self._opened() as file:
            return file is not None and {f"layer{n}" for n in layers} <= set(file.keys())

    def collected(self, layers: Sequence[int]) -> dict[int, Collected]:
        """Return how the covariances of those of the layers that the file holds were collected.

        Raises:
            InputError: as `holds` does.
        """
        with self._opened() as file:
            there = set(file.keys()) if file else set()
            notes = _notes(file) if file else {}
        known = {layer: notes.get(layer, {}) for layer in layers if f"layer{layer}" in there}
        return {layer: _collected(note) for layer, note in known.items()}

    def add(self, covariances: Mapping[int, Tensor], collected: Mapping[int, Collected]) -> None:
        """Write the file atomically, with the layers that it holds already.

        Args:
            covariances: layer -> ``(d_in, d_in)``.
            collected: layer -> how that was done.

        Raises:
            InputError: if the disk is full or the folder cannot be written, or for a file that
                is there, as `read` does.
        """
        with self._opened() as file:
            tensors = {n: _packed(unpacked(t)) for n, t in self._tensors(file)} if file else {}
            known = {n: _collected(note) for n, note in _notes(file).items()} if file else {}
        tensors |= {layer: _packed(matrix.cpu().double()) for layer, matrix in covariances.items()}
        named = {f"layer{layer}": tensor for layer, tensor in tensors.items()}
        metadata = {**self.identity, "format": FORMAT, "version": VERSION}
        for layer, tensor in tensors.items():
            how = {**known, **collected}.get(layer, Collected())
            note = {"sha256": digest({f"layer{layer}": tensor}), **vars(how)}
            metadata[f"layer{layer}"] = json.dumps(note)
        with writing(self.path), whole_file(self.path) as partial:
            save_file(named, partial, metadata={**metadata, "sha256": _digest_of(metadata)})

    def _tensors(self, file: Any) -> Iterator[tuple[int, Tensor]]:
        """Yield each layer and its tensor as it is stored, once it is known to be undamaged."""
        notes = _notes(file)
        names = set(file.keys())
        strange = [name for name in names if not _LAYER.fullmatch(name)]
        if strange:
            raise ValueError(f"it holds {strange[0]!r}, which is no covariance of a layer")
        checked = "format" in (file.metadata() or {})
        if checked and names != {f"layer{layer}" for layer in notes}:
            raise ValueError("its layers are not those that were written")
        for name in sorted(names, key=lambda name: int(name.removeprefix("layer"))):
            layer, tensor = int(name.removeprefix("layer")), file.get_tensor(name)
            if checked and digest({name: tensor}) != notes[layer]["sha256"]:
                raise ValueError(f"the numbers of layer {layer} are not those that were written")
            if not checked and (tensor.dim() != 2 or tensor.shape[0] != tensor.shape[1]):
                raise ValueError(f"layer {layer} has the shape {tuple(tensor.shape)}")
            yield layer, tensor

    @contextmanager
    def _opened(self) -> Iterator[Any]:
        """Open and verify the file; None if there is none."""
        if not self.path.exists():
            yield None
            return
        try:
            with safe_open(self.path, framework="pt") as file:
                self._verify(file.metadata() or {})
                yield file
        except InputError:
            raise
        except Exception as error:
            raise InputError(
                f"the covariance file cannot be read: {error}",
                where=str(self.path),
                hint=self.hint,
            ) from error

    def _verify(self, metadata: Mapping[str, str]) -> None:
        if "format" in metadata:
            if metadata["format"] != FORMAT or metadata.get("version") != VERSION:
                kind = f"{metadata['format']!r} of version {metadata.get('version')}"
                raise ValueError(f"it is {kind}, not {FORMAT!r} of version {VERSION}")
            signed = {key: value for key, value in metadata.items() if key != "sha256"}
            if metadata.get("sha256") != _digest_of(signed):
                raise ValueError("its head is not what was written")
        for key, value in self.identity.items():
            if metadata.get(key) != value:
                raise InputError(
                    f"this covariance file was computed from another {key}: "
                    f"{metadata.get(key, 'unknown')}, now {value}",
                    where=str(self.path),
                    hint="give the file that belongs to this model and corpus, leave "
                    "--model.covariance.path out to have it computed, or, if you know that it "
                    "fits, say so: --model.covariance.trust=true",
                )


def mirrored(upper: Tensor) -> Tensor:
    """Copy the upper triangle of a square matrix into its lower one, in place; return it."""
    for first in range(0, len(upper), _BLOCK):
        block = slice(first, min(first + _BLOCK, len(upper)))
        upper[block, :first] = upper[:first, block].T
        corner = upper[block, block]
        corner.copy_(corner.triu() + corner.triu(1).T)
    return upper


def _packed(matrix: Tensor) -> Tensor:
    """Return the upper triangle of a symmetric matrix, row after row."""
    return torch.cat([row[place:] for place, row in enumerate(matrix)])


def unpacked(tensor: Tensor) -> Tensor:
    """Return the float64 matrix of a triangle; or of a whole matrix, which older files hold."""
    if tensor.dim() == 2:
        return tensor.double()
    size = (isqrt(8 * len(tensor) + 1) - 1) // 2
    matrix, start = tensor.new_zeros(size, size, dtype=torch.float64), 0
    for place in range(size):
        matrix[place, place:] = tensor[start : start + size - place]
        start += size - place
    return mirrored(matrix)


def _notes(file: Any) -> dict[int, dict[str, Any]]:
    """Return what the metadata says of each layer, in the new form or in the old one."""
    notes = {}
    for key, value in (file.metadata() or {}).items():
        name, _, old = key.partition(".")
        if _LAYER.fullmatch(name):
            found = json.loads(value)
            notes[int(name.removeprefix("layer"))] = {"changes": found} if old else found
    return notes


def _collected(note: Mapping[str, Any]) -> Collected:
    changes = tuple(Change(*each) for each in note.get("changes", ()))
    return Collected(note.get("tokens"), note.get("documents"), changes)


def _digest_of(metadata: Mapping[str, str]) -> str:
    return hashlib.sha256(json.dumps(dict(metadata), sort_keys=True).encode()).hexdigest()
