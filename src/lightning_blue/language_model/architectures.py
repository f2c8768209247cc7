"""Architectures as rows of data: where a model keeps its blocks and projections."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lightning_blue.support.errors import InputError


@dataclass(frozen=True)
class Architecture:
    """Names of the modules that editing reads and writes.

    Args:
        block: a decoder block, with ``{}`` for its index, e.g. ``model.layers.{}``.
        down_projection: the FFN's last linear map, inside the block, e.g. ``mlp.down_proj``.
        attention_output: the attention's last linear map, inside the block, e.g.
            ``self_attn.o_proj``; only PMET needs it.
        norm_after_ffn: whether a norm stands between the down projection and the residual stream,
            so that the block's output is not linear in the weight.
    """

    block: str
    down_projection: str
    attention_output: str | None = None
    norm_after_ffn: bool = False


_LLAMA = Architecture("model.layers.{}", "mlp.down_proj", "self_attn.o_proj")
_GEMMA = Architecture("model.layers.{}", "mlp.down_proj", "self_attn.o_proj", norm_after_ffn=True)

ARCHITECTURES: dict[str, Architecture] = {
    "gpt2": Architecture("transformer.h.{}", "mlp.c_proj", "attn.c_proj"),
    "gptj": Architecture("transformer.h.{}", "mlp.fc_out", "attn.out_proj"),
    "gpt_neox": Architecture("gpt_neox.layers.{}", "mlp.dense_4h_to_h", "attention.dense"),
    "opt": Architecture("model.decoder.layers.{}", "fc2", "self_attn.out_proj"),
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "phi": Architecture("model.layers.{}", "mlp.fc2", "self_attn.dense"),
    "phi3": _LLAMA,
    "gemma2": _GEMMA,
    "gemma3_text": _GEMMA,
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
            hint="name its modules, e.g. --model.architecture.block='model.layers.{}' "
            "--model.architecture.down_projection=mlp.down_proj",
        )
    first = row.block.format(0)
    inside = filter(None, (row.down_projection, row.attention_output))
    for name in (first, *(f"{first}.{part}" for part in inside)):
        try:
            model.get_submodule(name)
        except AttributeError:
            raise InputError(
                f"{model_type} has no module {name!r}",
                where="model.architecture",
                hint="print the model and name its first block and the FFN's down projection",
            ) from None
    return row


def check_site(site: str, architecture: Architecture) -> None:
    """Refuse a target site that this architecture cannot have.

    Raises:
        InputError: with the reason.
    """
    if site == "block" and architecture.norm_after_ffn:
        raise InputError(
            "a norm follows the FFN's down projection in this architecture, so that the block's "
            "output is not linear in its weight and no closed form reaches a target there",
            where="model.target.site",
            hint="take the down projection's own output: --model.target.site=ffn",
        )
    if site == "attention_and_ffn" and architecture.attention_output is None:
        raise InputError(
            "PMET's target site needs the name of the attention's output projection",
            where="model.architecture",
            hint="give it, e.g. --model.architecture.attention_output=self_attn.o_proj",
        )


def blocks(model: PreTrainedModel, architecture: Architecture) -> list[nn.Module]:
    """Return the decoder blocks in order."""
    container = model.get_submodule(architecture.block.rsplit(".{}", 1)[0])
    return list(container.children())


def down_projection(block: nn.Module, architecture: Architecture) -> nn.Module:
    """Return a block's FFN down projection."""
    return block.get_submodule(architecture.down_projection)


def feed_forward(block: nn.Module, architecture: Architecture) -> nn.Module | None:
    """Return the module of a block's whole FFN; None where its parts stand in the block itself."""
    name, _, _ = architecture.down_projection.rpartition(".")
    return block.get_submodule(name) if name else None


def site_modules(site: str, block: nn.Module, architecture: Architecture) -> list[nn.Module]:
    """Return the modules whose outputs a target is made of; what the weight writes is the last."""
    projection = down_projection(block, architecture)
    if site == "attention_and_ffn":
        return [block.get_submodule(architecture.attention_output or ""), projection]
    return [block if site == "block" else projection]


def weight_view(projection: nn.Module) -> Tensor:
    """Return a projection's weight as a ``(d_out, d_in)`` view (Conv1D stores it transposed)."""
    weight: Tensor = projection.weight.data  # type: ignore[assignment]
    return weight.T if isinstance(projection, Conv1D) else weight


def check_layers(layers: list[int], n_layers: int) -> None:
    """Refuse layers that the model does not have.

    Raises:
        InputError: naming the layers and those the model has.
    """
    missing = [layer for layer in layers if not 0 <= layer < n_layers]
    if missing:
        raise InputError(
            f"the model has no layer {', '.join(map(str, missing))}: "
            f"its {n_layers} layers are 0 to {n_layers - 1}",
            where="update.layers",
            hint="choose critical layers in that range",
        )
