"""The last step of a run whose model is saved in fewer digits than it was edited in."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from blue_callbacks import WeightId
from blue_callbacks.weights import WeightStore
from lightning_blue.language_model.saving import rounded, rounding_loss

MUCH = 0.1  # of an update, lost by rounding: worth a warning


class FinalRounding:
    """Rounds edited weights to what is saved of them, so that what is measured then is saved.

    Args:
        store: of the weights, float32 or better.
        dtype: in which the model is saved.

    Attributes:
        active: whether there is anything to do; set by who saves the model.
        losses: by weight, the part of the update that was lost, see `rounding_loss`.
    """

    def __init__(self, store: WeightStore, dtype: torch.dtype) -> None:
        self.store, self.dtype = store, dtype
        self.active = False
        self.losses: dict[str, float] = {}
        self._unedited: dict[WeightId, Tensor] = {}

    def keep(self, weights: Sequence[WeightId]) -> None:
        """Copy unedited weights to the CPU, in the saved dtype where that holds all of them."""
        for weight in set(weights) - set(self._unedited):
            original = self.store.read(weight)
            small = original.to(self.dtype)
            exact = torch.equal(small.to(original), original)
            self._unedited[weight] = (small if exact else original.clone()).cpu()

    def apply(self) -> None:
        """Round the weights that were kept, and warn where that takes much of the update."""
        if not self.active:
            return
        for weight, original in self._unedited.items():
            edited = self.store.read(weight)
            self.losses[str(weight)] = rounding_loss(original, edited, self.dtype)
            self.store.write(weight, rounded(edited, self.dtype))
        much = [f"{weight} {loss:.0%}" for weight, loss in self.losses.items() if loss > MUCH]
        if much:
            rank_zero_warn(
                f"rounding to {str(self.dtype).removeprefix('torch.')}, in which the model is "
                f"saved, loses much of the update: {', '.join(much)}; "
                "--model.export_dtype=float32 keeps it"
            )
