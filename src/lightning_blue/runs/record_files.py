"""One edit batch as a safetensors file, written whole and read with suspicion.

Tensors are named ``INDEX.PART``: the change's place in the batch, and a tensor of
:class:`blue_callbacks.WeightChange`. The metadata holds the rest as JSON, and for each change a
digest of its tensors, because safetensors does not notice a flipped bit.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from blue_callbacks import EditRecord, WeightChange, WeightId
from lightning_blue.support.digests import digest
from lightning_blue.support.errors import InputError
from lightning_blue.support.storage import whole_file, writing

FORMAT, VERSION = "lightning-blue edit record", "1"
_TENSORS = ("left", "right", "keys", "residual", "past_keys", "kept", "whole")
_PLAIN = ("target_layer", "share", "change_norm", "residual_norm")


def write_record(path: Path, record: EditRecord, run: str, fingerprint: str) -> None:
    """Write a batch's record, whole or not at all.

    Args:
        path: the file.
        record: of the batch.
        run: the run's id.
        fingerprint: of the unedited model.

    Raises:
        InputError: if the disk is full or may not be written.
    """
    tensors: dict[str, Tensor] = {}
    notes = []
    for index, change in enumerate(record.changes):
        mine = _tensors_of(change)
        tensors |= {f"{index}.{name}": tensor for name, tensor in mine.items()}
        plain = {name: getattr(change, name) for name in _PLAIN}
        notes.append({"weight": str(change.weight), **plain, "sha256": digest(mine)})
    metadata = {
        "format": FORMAT,
        "version": VERSION,
        "run": run,
        "model": fingerprint,
        "batch": str(record.batch),
        "request_ids": json.dumps(record.request_ids),
        "changes": json.dumps(notes),
    }
    write_tensors(path, tensors, metadata)


class RecordFile:
    """The file of one batch; opening it reads the metadata only.

    Args:
        path: the file.

    Attributes:
        batch: its number, from 0.
        request_ids: of its n edits.
        run: id of the run that wrote it.
        model: fingerprint of the unedited model.

    Raises:
        InputError: if it is no such file, or of another version, or damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with opened(path, FORMAT, VERSION) as (_, metadata):
            self.run, self.model = metadata["run"], metadata["model"]
            self.batch = int(metadata["batch"])
            self.request_ids = tuple(json.loads(metadata["request_ids"]))
            self._changes: list[dict[str, Any]] = json.loads(metadata["changes"])
            self._ids = [WeightId.parse(change["weight"]) for change in self._changes]

    @property
    def norms(self) -> dict[WeightId, float]:
        """Frobenius norm of what the batch added to each weight."""
        norms = (change["change_norm"] for change in self._changes)
        return dict(zip(self._ids, norms, strict=True))

    def changes(self, weight: WeightId | None = None) -> tuple[WeightChange, ...]:
        """Read what the batch changed, of one weight or of all, in the order of writing.

        Raises:
            InputError: if the file is damaged.
        """
        with opened(self.path, FORMAT, VERSION) as (file, _):
            wanted = [i for i, each in enumerate(self._ids) if weight in (None, each)]
            return tuple(self._change(file, index) for index in wanted)

    def _change(self, file: Any, index: int) -> WeightChange:
        """Read one change; anything that does not fit is an error that `opened` explains."""
        names = {name: f"{index}.{name}" for name in _TENSORS}
        there = set(file.keys())
        found = {name: file.get_tensor(key) for name, key in names.items() if key in there}
        plain = self._changes[index]
        if digest(found) != plain["sha256"]:
            raise ValueError("its numbers are not those that were written")
        n = 0 if "whole" in found else len(self.request_ids)  # what is whole has no columns
        d_out, d_in = found["left"].shape[0], found["right"].shape[1]
        wanted = {"left": (d_out, n), "right": (n, d_in), "keys": (d_in, n), "residual": (d_out, n)}
        for name, shape in wanted.items():
            if tuple(found[name].shape) != shape:
                raise ValueError(f"{name} of {n} edits has the shape {tuple(found[name].shape)}")
        if "whole" in found and tuple(found["whole"].shape) != (d_out, d_in):
            raise ValueError(f"the whole change has the shape {tuple(found['whole'].shape)}")
        return WeightChange(
            weight=self._ids[index],
            target_layer=plain["target_layer"],
            share=plain["share"],
            left=found["left"],
            right=found["right"],
            keys=found["keys"],
            residual=found["residual"],
            past_keys=found.get("past_keys"),
            kept=found.get("kept"),
            change_norm=plain["change_norm"],
            residual_norm=plain["residual_norm"],
            whole=found.get("whole"),
        )


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file, whole or not at all; its folder is created.

    Raises:
        InputError: if the disk is full or may not be written.
    """
    own = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    with writing(path), whole_file(path) as partial:
        save_file(own, partial, metadata=dict(metadata))


@contextmanager
def opened(path: Path, kind: str, version: str) -> Iterator[tuple[Any, dict[str, str]]]:
    """Open a safetensors file of a format; yield it and its metadata.

    Raises:
        InputError: if it is missing, of another kind or version, or if the block stumbles over
            what it finds inside.
    """
    if not path.is_file():
        raise InputError(f"there is no such {kind}", where=str(path), hint="check the path")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            _check_kind(metadata, path, kind, version)
            yield file, metadata
    except InputError:
        raise
    except Exception as error:
        raise InputError(
            f"this {kind} is damaged: {error!s}",
            where=str(path),
            hint="bring the file back from a copy",
        ) from error


def _check_kind(metadata: Mapping[str, str], path: Path, kind: str, version: str) -> None:
    if metadata.get("format") != kind:
        raise InputError(
            f"this file is no {kind}", where=str(path), hint="check the path; another file is there"
        )
    if metadata.get("version") != version:
        raise InputError(
            f"this {kind} has version {metadata.get('version')}; version {version} can be read",
            where=str(path),
            hint="use the release of lightning-blue that wrote it",
        )


def _tensors_of(change: WeightChange) -> dict[str, Tensor]:
    """Return those tensors of a change that there are, by name, on the CPU."""
    parts = {name: getattr(change, name) for name in _TENSORS}
    return {name: tensor.cpu() for name, tensor in parts.items() if tensor is not None}
