"""Targets that runs have in common: optimised once, kept in files that know what they are of.

A target is a function of what the model computes with (all weights, the written ones as they are
now), of the tokens of a batch's prompts, of the settings, and of the place: other kernels, threads
and processes round otherwise. All of it is in a file's identity, so that what is read is what would
have been computed. What free memory decides, how many edits are optimised at once
(``tokens_per_batch: null``), is not: two runs may differ by it in the last bits with or without
these files.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path

import torch
import transformers
from lightning.pytorch.strategies import Strategy
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from lightning_blue import __version__
from lightning_blue.editing.optimization import Targets
from lightning_blue.editing.prompts import EditPrompts
from lightning_blue.editing.targets import TargetFinder
from lightning_blue.support.digests import digest
from lightning_blue.support.errors import InputError
from lightning_blue.support.locks import locked
from lightning_blue.support.processes import n_processes
from lightning_blue.support.storage import unless_full, whole_file, writing

Identity = Mapping[str, str]
DIGEST = "sha256"  # in the metadata: of the tensors
_ORIGIN = ("_name_or_path", "transformers_version", "architectures")


class TargetFile:
    """A safetensors file of one layer's targets that names what they depend on.

    Args:
        folder: of all such files.
        identity: what the targets depend on; the file's name is made of it.
    """

    def __init__(self, folder: Path, identity: Identity) -> None:
        self.identity = dict(identity)
        hashed = hashlib.sha256(json.dumps(self.identity, sort_keys=True).encode()).hexdigest()
        name = f"targets-layer{self.identity['layer']}-{hashed[:16]}"
        self.path = folder / f"{name}.safetensors"
        self.lock = folder / ".locks" / f"{name}.lock"

    def read(self) -> Targets | None:
        """Return the targets, on the CPU; None if there is no file.

        Raises:
            InputError: if the file is damaged, or holds the targets of something else.
        """
        if not self.path.exists():
            return None
        try:
            with safe_open(self.path, framework="pt") as file:
                tensors = {name: file.get_tensor(name) for name in ("values", "losses")}
                said = dict(file.metadata() or {})
            written = said.pop(DIGEST, None)
            if said != self.identity:
                raise ValueError("it belongs to something else")
            if written != digest(tensors):
                raise ValueError("its numbers are not those that were written")
        except Exception as error:
            raise InputError(
                f"the file of targets cannot be used: {error}",
                where=str(self.path),
                hint="delete it; the targets will be optimised again",
            ) from error
        return Targets(**tensors)

    def write(self, targets: Targets) -> None:
        """Write the file, whole or not at all.

        Raises:
            NotWritten: if the disk is full or may not be written.
        """
        tensors = {name: value.contiguous() for name, value in targets._asdict().items()}
        metadata = {**self.identity, DIGEST: digest(tensors)}
        with writing(self.path), whole_file(self.path) as partial:
            save_file(tensors, partial, metadata=metadata)


class TargetStore:
    """A folder of targets that runs on one model share.

    Of several runs that want the same at a time, the first optimises, and the others wait for it.

    Args:
        folder: of the files; created where it does not exist.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._unedited: dict[str, str] = {}  # digests of the weights that a run writes

    @property
    def ready(self) -> bool:
        """Whether it is known what the unedited weights were."""
        return bool(self._unedited)

    def note_unedited(self, weights: Mapping[str, Tensor]) -> None:
        """Take note of weights as they are before they are edited; of each once."""
        new = {name: weight for name, weight in weights.items() if name not in self._unedited}
        self._unedited |= _digests(new)

    def edited(self, weights: Mapping[str, Tensor]) -> dict[str, str]:
        """Return the digests of those weights that are not the unedited ones."""
        now = _digests(weights)
        return {name: found for name, found in now.items() if found != self._unedited.get(name)}

    def shared(
        self, identity: Identity, strategy: Strategy | None, optimise: Callable[[], Targets]
    ) -> tuple[Targets, Path | None]:
        """Return the targets of an identity, read or else optimised and kept.

        All processes of a run must call it: the first reads and writes, all optimise together.

        Args:
            identity: all that they depend on.
            strategy: of the run's Trainer; None: of one process.
            optimise: finds them where no file holds them.

        Returns:
            The targets, on the CPU, and the file that they were read from; None: they were not.

        Raises:
            InputError: if the file is damaged.
        """
        file = TargetFile(self.folder, identity)
        first = strategy is None or strategy.is_global_zero
        with ExitStack() as held:
            if first:
                with unless_full("other runs may optimise the same targets at the same time"):
                    held.enter_context(locked(file.lock, f"targets of layer {identity['layer']}"))
            known = file.read() if first else None
            known = known if strategy is None else strategy.broadcast(known)
            if known is not None:
                return known, file.path
            found = optimise()
            if first:
                with unless_full("other runs will optimise them again"):
                    file.write(found)
        return found, None


def target_identity(
    finder: TargetFinder,
    prompts: Sequence[EditPrompts],
    groups: Sequence[Sequence[int]],
    layer: int,
) -> dict[str, str]:
    """Return what the targets of a batch depend on beside the weights, the site and the place.

    Prompts are told by their tokens, so that contexts, chat template, and what stands between
    prompt and object are in them; nothing else about the optimisation is random.

    Args:
        finder: of the model.
        prompts: of the n edits.
        groups: indices of edits that have one target, by target.
        layer: target layer.
    """
    return {
        "dtype": str(finder.model.dtype),
        "config": _hashed(_described(finder.model)),
        "architecture": json.dumps(asdict(finder.architecture)),
        "prompts": _hashed(prompts),
        "groups": _hashed(groups),
        "target": json.dumps(asdict(finder.settings)),
        "layer": str(layer),
    }


def place(device: torch.device, precision: str) -> dict[str, str]:
    """Return what decides how numbers are rounded.

    Args:
        device: of the model.
        precision: of the Trainer.
    """
    cuda = device.type == "cuda"
    name = torch.cuda.get_device_name(device) if cuda else torch.backends.cpu.get_cpu_capability()
    return {
        "device": f"{device.type} {name}",
        "threads": str(torch.get_num_threads()),
        "processes": str(n_processes()),
        "precision": precision,
        "matmul": torch.get_float32_matmul_precision(),
        "lightning-blue": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def _digests(weights: Mapping[str, Tensor]) -> dict[str, str]:
    return {name: digest({name: weight.detach().cpu()}) for name, weight in weights.items()}


def _described(model: PreTrainedModel) -> list[object]:
    """Return what a model computes with beside its weights, without where it is from."""
    config = model.config.to_dict()
    kept = {key: config[key] for key in sorted(config) if key not in _ORIGIN}
    return [kept, getattr(model.config, "_attn_implementation", None)]


def _hashed(value: object) -> str:
    return hashlib.sha256(json.dumps(value, default=str).encode()).hexdigest()[:16]
