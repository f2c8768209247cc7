"""Architectures as rows of data: where a model keeps its blocks and down projections."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lightning_blue.errors import InputError


@dataclass(frozen=True)
class Architecture:
    """Names of the modules that editing reads and writes.

    Args:
        block: a decoder block, with ``{}`` for its index, e.g. ``model.layers.{}``.
        down_projection: the FFN's last linear map, inside the block, e.g. ``mlp.down_proj``.
        returns_tuple: whether a block returns a tuple instead of a tensor.
    """

    block: str
    down_projection: str
    returns_tuple: bool = False


_LLAMA = Architecture("model.layers.{}", "mlp.down_proj")

ARCHITECTURES: dict[str, Architecture] = {
    "gpt2": Architecture("transformer.h.{}", "mlp.c_proj"),
    "gptj": Architecture("transformer.h.{}", "mlp.fc_out", returns_tuple=True),
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
}


def find_architecture(model: PreTrainedModel, named: Architecture | None = None) -> Architecture:
    """Return the row for a model, or the one the user named.

    Raises:
        InputError: if the model type has no row, or the named modules do not exist in the model.
    """
    model_type = model.config.model_type
    row = named or ARCHITECTURES.get(model_type)
    if row is None:
        raise InputError(
            f"architecture {model_type!r} is not known; known are {', '.join(ARCHITECTURES)}",
            where="model.name_or_path",
            mend="name its modules, e.g. --model.architecture.block='model.layers.{}' "
            "--model.architecture.down_projection=mlp.down_proj",
        )
    for name in (row.block.format(0), f"{row.block.format(0)}.{row.down_projection}"):
        try:
            model.get_submodule(name)
        except AttributeError:
            raise InputError(
                f"{model_type} has no module {name!r}",
                where="model.architecture",
                mend="print the model and name its first block and the FFN's down projection",
            ) from None
    return row


def blocks(model: PreTrainedModel, architecture: Architecture) -> list[nn.Module]:
    """Return the decoder blocks in order."""
    container = model.get_submodule(architecture.block.rsplit(".{}", 1)[0])
    return list(container.children())


def down_projection(block: nn.Module, architecture: Architecture) -> nn.Module:
    """Return a block's FFN down projection."""
    return block.get_submodule(architecture.down_projection)


def weight_view(projection: nn.Module) -> Tensor:
    """Return a projection's weight as a ``(d_out, d_in)`` view (Conv1D stores it transposed)."""
    weight: Tensor = projection.weight.data  # type: ignore[assignment]
    return weight.T if isinstance(projection, Conv1D) else weight


def check_layers(layers: list[int], n_layers: int) -> None:
    """Refuse layers that the model does not have.

    Raises:
        InputError: naming the layers and the range there is.
    """
    missing = [layer for layer in layers if not 0 <= layer < n_layers]
    if missing:
        raise InputError(
            f"the model has no layer {', '.join(map(str, missing))}: "
            f"its {n_layers} layers are 0 to {n_layers - 1}",
            where="update.layers",
            mend="choose critical layers in that range",
        )
