"""The layers of a model: which of them can be edited, and the weights that edits write in them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from torch import Tensor, nn
from transformers import PreTrainedModel

from blue_callbacks import WeightId
from lightning_blue.editing.depth import proposed_layers, trained_layer
from lightning_blue.language_model.architectures import (
    Architecture,
    blocks,
    check_layers,
    down_projection,
    hidden_size,
    projection_fault,
    weight_view,
)


class EditableLayers:
    """The blocks of a model, and in each the down projection that edits write.

    Args:
        model: a causal language model.
        architecture: names of its modules.
    """

    def __init__(self, model: PreTrainedModel, architecture: Architecture) -> None:
        self.model, self.architecture = model, architecture
        self.blocks = blocks(model, architecture)

    def check(self, layers: Sequence[int]) -> None:
        """Refuse layers that cannot be edited.

        Raises:
            InputError: naming them, and those that can be.
        """
        check_layers(layers, self.blocks, self.architecture, hidden_size(self.model))

    @property
    def editable(self) -> list[int]:
        """Layers with a down projection that can be written, ascending."""
        d_model = hidden_size(self.model)
        faults = [projection_fault(block, self.architecture, d_model) for block in self.blocks]
        return [layer for layer, fault in enumerate(faults) if fault is None]

    def proposed(self) -> list[int]:
        """Return critical layers by depth.

        Raises:
            InputError: if none of them can be edited.
        """
        return proposed_layers(len(self.blocks), self.editable)

    def proposed_for_training(self) -> list[int]:
        """Return the one layer that fine-tuning trains where none is given.

        Raises:
            InputError: if no layer can be edited.
        """
        return [trained_layer(len(self.blocks), self.editable or self.proposed())]

    def projection(self, weight: WeightId) -> nn.Module:
        """Return the module that holds a weight.

        Raises:
            InputError: if its layer cannot be edited.
        """
        self.check([weight.layer])
        return down_projection(self.blocks[weight.layer], self.architecture)

    def weight(self, weight: WeightId) -> Tensor:
        """Return a view of a weight, ``(d_out, d_in)``; writing into it writes the model."""
        return weight_view(self.projection(weight))

    def stored(self, weights: Sequence[WeightId]) -> dict[str, Tensor]:
        """Return the weights that the model computes with, as it stores them."""
        return {
            str(weight): cast(Tensor, self.projection(weight).weight).detach() for weight in weights
        }

    def names(self, weights: Sequence[WeightId]) -> list[str]:
        """Return the full names of weights, as ``model.named_parameters()`` has them."""
        names = {id(weight): name for name, weight in self.model.named_parameters()}
        return [names[id(self.projection(weight).weight)] for weight in weights]
