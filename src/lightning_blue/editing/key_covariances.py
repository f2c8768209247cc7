"""The covariances that a run holds, by layer: given in memory, read from a file, or collected."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from blue_callbacks import WeightId
from lightning_blue.editing.covariance import CovarianceSource, load_or_collect
from lightning_blue.editing.layers import EditableLayers
from lightning_blue.support.errors import InputError


class KeyCovariances:
    """Covariances of the keys of one model's layers.

    Args:
        layers: of the model, unedited.

    Attributes:
        by_layer: layer -> ``(d_in, d_in)``, float64 where they were not given otherwise.
        about: what they are from, as a report shows it.
    """

    def __init__(self, layers: EditableLayers) -> None:
        self.layers = layers
        self.by_layer: dict[int, Tensor] = {}
        self.about: dict[str, Any] = {}

    def give(self, covariances: Mapping[int, Tensor]) -> None:
        """Take covariances as they are.

        Args:
            covariances: layer -> ``(d_in, d_in)``, of keys of this model, unedited.

        Raises:
            InputError: for a layer that the model does not have, or a matrix of another size.
        """
        for layer, covariance in covariances.items():
            size = self.layers.weight(WeightId(layer)).shape[1]
            if covariance.shape != (size, size):
                raise InputError(
                    f"a covariance of layer {layer} is ({size}, {size}), not "
                    f"{tuple(covariance.shape)}: one row and column for each key dimension",
                    where="covariances",
                    hint="give the second moment of the inputs of the layer's down projection",
                )
        self.by_layer |= covariances
        given = ", ".join(map(str, sorted(covariances)))
        self.about["covariance_trusted"] = (
            f"given in memory for layers {given}; what model and text they are of was not checked"
        )

    def complete(
        self,
        tokenizer: PreTrainedTokenizerBase,
        layers: Sequence[int],
        source: CovarianceSource,
        weight: float | None = None,
    ) -> None:
        """Read or collect the covariances of those layers that have none yet.

        Args:
            tokenizer: of the model.
            layers: that are wanted.
            source: the text, and the file.
            weight: as in :func:`load_or_collect`.

        Raises:
            InputError: as :func:`load_or_collect` does, or if the text is another model's.
        """
        missing = sorted(set(layers) - set(self.by_layer))
        if missing:
            source.require_own_text(tokenizer)
            projections = {layer: self.layers.projection(WeightId(layer)) for layer in missing}
            found = load_or_collect(self.layers.model, tokenizer, projections, source, weight)
            self.by_layer |= found.covariances
            self.about |= found.about

    def go_on_from(self, earlier: KeyCovariances) -> None:
        """Take over what another one of the same model holds."""
        self.by_layer, self.about = {**earlier.by_layer}, {**earlier.about}
