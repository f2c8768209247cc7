"""An EditModule that knows the targets of its unedited model and need not optimise them again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from blue_callbacks import WeightId
from lightning_blue.data.requests import EditRequest
from lightning_blue.editing.module import EditModule
from lightning_blue.editing.optimization import Targets
from lightning_blue.editing.target_store import TargetStore


class StudyModule(EditModule):
    """Edit as `EditModule` does, with targets that were optimised before.

    A known target is given out while the weights are unedited, when it is what the optimisation
    would find; on edited weights it is optimised anew.

    Args:
        **settings: of `EditModule`.

    Attributes:
        keep_known: give out known targets on edited weights too.
        outputs_seen: layer -> outputs of the newest batch just before the layer was written,
            ``(d_model, n)``; filled while ``watching``.
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.keep_known = self.watching = False
        self.outputs_seen: dict[int, Tensor] = {}
        self._originals: dict[WeightId, Tensor] = {}
        self._targets: Mapping[int, Targets] = {}
        self._places: dict[EditRequest, int] = {}

    @classmethod
    def of(cls, module: EditModule, **changes: Any) -> StudyModule:
        """Wrap the model of a module, with the module's settings; a study exports no model.

        Args:
            module: whose model and settings they are.
            **changes: settings that are to be others.
        """
        names = [
            n for n in list(signature(EditModule.__init__).parameters)[1:] if n != "export_dtype"
        ]
        return cls(**{**{name: getattr(module, name) for name in names}, **changes})

    def unedited_targets(
        self, requests: Sequence[EditRequest], layers: Sequence[int], folder: Path | None
    ) -> dict[int, Targets]:
        """Return layer -> targets of the requests, optimising what no file holds.

        Args:
            requests: n edits, optimised together; the weights are unedited.
            layers: target layers.
            folder: of the files; None keeps none. Where one cannot be written, that is a warning.

        Raises:
            InputError: if a file is damaged.
            NonFiniteError: as `edit_targets` does.
        """
        before, self.target_store = self.target_store, TargetStore(folder) if folder else None
        try:
            self.note_unedited(list(self._originals))
            for layer in layers:
                super().edit_targets(requests, layer)
        finally:
            self.target_store = before
        return {
            layer: Targets(self.target_values[layer].cpu(), self.target_losses[layer].cpu())
            for layer in layers
        }

    def know(self, requests: Sequence[EditRequest], targets: Mapping[int, Targets]) -> None:
        """Take over targets of the unedited model, by layer."""
        self._places = {request: place for place, request in enumerate(requests)}
        self._targets = targets

    def remember_weights(self, weights: Sequence[WeightId]) -> None:
        """Keep the weights as they are now: the unedited ones."""
        self._originals = {weight: self.editable_weights.read(weight).clone() for weight in weights}

    def restore(self) -> None:
        """Write the unedited weights back; no edit batch is held then."""
        for weight, value in self._originals.items():
            self.editable_weights.write(weight, value)
        self.edit_batches_held = 0

    @property
    def changes(self) -> dict[WeightId, Tensor]:
        """How far each weight is from the unedited one, ``(d_out, d_in)``."""
        return {
            weight: self.editable_weights.read(weight) - value
            for weight, value in self._originals.items()
        }

    def rescale(self, factor: float) -> None:
        """Make the whole update ``factor`` times as long."""
        for weight, change in self.changes.items():
            self.editable_weights.write(weight, self._originals[weight] + factor * change)

    def edit_targets(self, batch: Sequence[EditRequest], layer: int) -> Tensor:
        """Return known targets where they hold, ``(d_model, n)``; else optimise them."""
        known = self._targets.get(layer)
        here = known is not None and all(request in self._places for request in batch)
        if known is None or not here or not (self.keep_known or self._unedited()):
            return super().edit_targets(batch, layer)
        places = torch.tensor([self._places[request] for request in batch])
        self.target_losses[layer] = known.losses[places].to(self.device)
        self.target_values[layer] = known.values[:, places].to(self.device)
        return self.target_values[layer][-1].T

    def edit_keys(self, batch: Sequence[EditRequest], weight: WeightId) -> Tensor:
        """Return the keys, ``(d_in, n)``; they are asked for just before the layer is written."""
        if self.watching:
            self.outputs_seen[weight.layer] = self.edit_outputs(batch, weight.layer)
        return super().edit_keys(batch, weight)

    def _unedited(self) -> bool:
        read = self.editable_weights.read
        return all(torch.equal(read(weight), value) for weight, value in self._originals.items())
