"""Targets of the unedited model: optimised once for each layer, kept in files that know them."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file

from lightning_blue.data.requests import EditRequest
from lightning_blue.editing.covariance import tokenizer_fingerprint
from lightning_blue.editing.module import EditModule
from lightning_blue.editing.optimization import Targets
from lightning_blue.support.errors import InputError
from lightning_blue.support.seeds import run_seed
from lightning_blue.support.storage import unless_full, whole_file, writing

log = logging.getLogger(__name__)


class TargetFile:
    """A safetensors file of one layer's targets that names what they depend on.

    Args:
        folder: of all such files.
        identity: what the targets depend on; the file's name is made of it.
    """

    def __init__(self, folder: Path, identity: Mapping[str, str]) -> None:
        self.identity = dict(identity)
        digest = hashlib.sha256(json.dumps(self.identity, sort_keys=True).encode()).hexdigest()
        self.path = folder / f"targets-layer{self.identity['layer']}-{digest[:12]}.safetensors"

    def read(self) -> Targets | None:
        """Return the targets, on the CPU; None if there is no file.

        Raises:
            InputError: if the file is damaged, or holds the targets of something else.
        """
        if not self.path.exists():
            return None
        try:
            with safe_open(self.path, framework="pt") as file:
                if (file.metadata() or {}) != self.identity:
                    raise ValueError("it belongs to something else")
                return Targets(file.get_tensor("values"), file.get_tensor("losses"))
        except Exception as error:
            raise InputError(
                f"the file of targets cannot be used: {error}",
                where=str(self.path),
                hint="delete it; the targets will be optimised again",
            ) from error

    def write(self, targets: Targets) -> None:
        """Write the file, whole or not at all.

        Raises:
            NotWritten: if the disk is full or may not be written.
        """
        tensors = {"values": targets.values.contiguous(), "losses": targets.losses.contiguous()}
        with writing(self.path), whole_file(self.path) as partial:
            save_file(tensors, partial, metadata=self.identity)


def target_identity(
    module: EditModule, requests: Sequence[EditRequest], layer: int
) -> dict[str, str]:
    """Return all that the targets of a layer depend on; how many are optimised at once is not."""
    settings = {k: v for k, v in asdict(module.target).items() if k != "tokens_per_batch"}
    edits = [(r.case_id, r.prompt, r.subject, r.target_new) for r in requests]
    return {
        "model": module.identity,
        "dtype": str(module.model.dtype),
        "tokenizer": tokenizer_fingerprint(module.tokenizer),
        "architecture": json.dumps(asdict(module.architecture)),
        "requests": _digest(edits),
        "target": json.dumps(settings),
        "templates": _digest(module.templates),
        "seed": str(run_seed(module.seed)),
        "layer": str(layer),
    }


def load_or_optimise(
    module: EditModule, requests: Sequence[EditRequest], layers: Sequence[int], folder: Path
) -> dict[int, Targets]:
    """Return layer -> targets of the requests, optimising what no file holds.

    Args:
        module: whose weights are unedited.
        requests: n edits, optimised together.
        layers: target layers.
        folder: of the files. Where one cannot be written, that is a warning.

    Raises:
        InputError: if a file is damaged.
        NonFiniteError: as `EditModule.edit_targets` does.
    """
    found: dict[int, Targets] = {}
    for layer in layers:
        file = TargetFile(folder, target_identity(module, requests, layer))
        known = file.read()
        if known is None:
            module.edit_targets(requests, layer)
            known = Targets(module.target_values[layer].cpu(), module.target_losses[layer].cpu())
            with unless_full("they will be optimised again by the next study"):
                file.write(known)
                log.info("targets of layer %d: %s", layer, file.path)
        found[layer] = known
    return found


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]
