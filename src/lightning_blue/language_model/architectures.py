"""Architectures as rows of data: where a model keeps its blocks and projections."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lightning_blue.language_model import experts
from lightning_blue.support.errors import InputError


@dataclass(frozen=True)
class Architecture:
    """Names of the modules that editing reads and writes.

    Args:
        block: a decoder block, with ``{}`` for its index, e.g. ``model.layers.{}``.
        down_projection: the FFN's last linear map, inside the block, e.g. ``mlp.down_proj``.
        attention_output: the attention's last linear map, inside the block, e.g.
            ``self_attn.o_proj``; only PMET needs it.
    """

    block: str
    down_projection: str
    attention_output: str | None = None

    def __post_init__(self) -> None:
        if self.block.count("{") != 1 or not self.block.endswith(".{}"):
            raise InputError(
                f"block is {self.block!r}; it must end with one '.{{}}', the index of a block",
                where="model.architecture.block",
                hint="name the list of blocks in the model, with .{} behind: model.layers.{}",
            )


_LLAMA = Architecture("model.layers.{}", "mlp.down_proj", "self_attn.o_proj")
_BLOOM = Architecture("transformer.h.{}", "mlp.dense_4h_to_h", "self_attention.dense")

ARCHITECTURES: dict[str, Architecture] = {
    "gpt2": Architecture("transformer.h.{}", "mlp.c_proj", "attn.c_proj"),
    "gptj": Architecture("transformer.h.{}", "mlp.fc_out", "attn.out_proj"),
    "gpt_neox": Architecture("gpt_neox.layers.{}", "mlp.dense_4h_to_h", "attention.dense"),
    "opt": Architecture("model.decoder.layers.{}", "fc2", "self_attn.out_proj"),
    "bloom": _BLOOM,
    "falcon": _BLOOM,
    "mpt": Architecture("transformer.blocks.{}", "ffn.down_proj", "attn.out_proj"),
    "llama": _LLAMA,  # Llama 2 and 3, Vicuna, Yi, SmolLM 1 and 2
    "mistral": _LLAMA,
    "qwen2": _LLAMA,  # Qwen 1.5 to 2.5
    "qwen3": _LLAMA,
    "phi": Architecture("model.layers.{}", "mlp.fc2", "self_attn.dense"),
    "phi3": _LLAMA,  # Phi-3 and Phi-4
    "gemma": _LLAMA,
    "gemma2": _LLAMA,
    "gemma3_text": _LLAMA,
    "cohere": _LLAMA,
    "exaone4": _LLAMA,
    "glm4": _LLAMA,
    "granite": _LLAMA,
    "olmo2": _LLAMA,
    "smollm3": _LLAMA,
    "starcoder2": Architecture("model.layers.{}", "mlp.c_proj", "self_attn.o_proj"),
    "qwen2_5_vl_text": _LLAMA,
    # mixtures of experts that have layers with a single FFN
    "qwen2_moe": _LLAMA,
    "qwen3_moe": _LLAMA,
    "deepseek_v2": _LLAMA,
    "deepseek_v3": _LLAMA,
}


def find_architecture(model: PreTrainedModel, named: Architecture | None = None) -> Architecture:
    """Return the row for a model, or the one the user named.

    A multimodal model has the row of its text part, with the names that the modules have in it.

    Raises:
        InputError: if the model type has no row, or no block has the named modules.
    """
    row = named or _row_of(model)
    if row is None:
        raise _unknown(model)
    layers = blocks(model, row)
    faults = [projection_fault(block, row, hidden_size(model)) for block in layers]
    if all(fault is not None for fault in faults):
        raise _unusable(model, row, layers, str(faults[0]))
    attention = row.attention_output
    if attention is not None and all(_submodule(block, attention) is None for block in layers):
        raise InputError(
            f"{model.config.model_type} has no module {row.block.format(0)}.{attention!s}",
            where="model.architecture.attention_output",
            hint="print the model and name the attention's output projection",
        )
    return row


def _row_of(model: PreTrainedModel) -> Architecture | None:
    config = model.config
    text = config.get_text_config()
    row = ARCHITECTURES.get(config.model_type) or ARCHITECTURES.get(text.model_type)
    if row is None or text is config:
        return row
    decoder = next(name for name, part in model.named_modules() if part is model.get_decoder())
    return replace(row, block=f"{decoder}.{row.block.partition('.')[2]}")


def hidden_size(model: PreTrainedModel) -> int:
    """Return d_model, the width of the residual stream."""
    return int(model.config.get_text_config().hidden_size)


def n_layers(model: PreTrainedModel) -> int:
    """Return how many decoder blocks the config counts; of a multimodal model those for text."""
    return int(model.config.get_text_config().num_hidden_layers)


def projection_fault(block: nn.Module, architecture: Architecture, d_model: int) -> str | None:
    """Say why a block's down projection is none that can be written; None where it is one."""
    name = architecture.down_projection
    module = _submodule(block, name)
    if module is None:
        return f"it has no module {name!r}"
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or weight.ndim != 2:
        return f"{name!r} is of type {type(module).__name__}, which is no linear map with a weight"
    d_out = weight_view(module).shape[0]
    if d_out != d_model:
        return f"{name!r} gives out {d_out} numbers, and the hidden states have {d_model}"
    return None


def _unknown(model: PreTrainedModel) -> InputError:
    """Refuse a model without a row: a mixture of experts as such, others with how to name them."""
    model_type = model.config.model_type
    guess = _block_list(model)
    layers = [] if guess is None else list(model.get_submodule(guess).children())
    if any(map(experts.routed, layers)):
        return _mixture(model, layers)
    return InputError(
        f"architecture {model_type!r} is not known; known are {', '.join(ARCHITECTURES)}",
        where="model.name_or_path",
        hint=f"name its modules, e.g. --model.architecture.block='{guess or 'model.layers'}.{{}}' "
        "--model.architecture.down_projection=mlp.down_proj",
    )


def _unusable(
    model: PreTrainedModel, row: Architecture, layers: Sequence[nn.Module], fault: str
) -> InputError:
    """Refuse a model none of whose blocks has the projection."""
    there = _submodule(layers[0], row.down_projection) is not None
    if any(map(experts.routed, layers)):
        return _mixture(model, layers, fault if there else "")
    if not there:
        first = f"{row.block.format(0)}.{row.down_projection}"
        fault = f"{model.config.model_type} has no module {first!r}"
    return InputError(
        fault,
        where="model.architecture",
        hint="print the model and name its first block and the FFN's down projection",
    )


def _mixture(model: PreTrainedModel, layers: Sequence[nn.Module], fault: str = "") -> InputError:
    more = f" ({fault})" if fault else ""
    return InputError(
        f"{model.config.model_type} is a mixture of experts: {experts.WHY}{more}",
        where="model.architecture.down_projection",
        hint=experts.what_to_do(layers, hidden_size(model), []),
    )


def _block_list(model: PreTrainedModel) -> str | None:
    """Return the name of the list of decoder blocks: the first one that has their number."""
    inside = {id(part) for part in model.get_decoder().modules()}
    for name, part in model.named_modules():
        if isinstance(part, nn.ModuleList) and id(part) in inside and len(part) == n_layers(model):
            return name
    return None


def _submodule(block: nn.Module, name: str) -> nn.Module | None:
    try:
        return block.get_submodule(name)
    except AttributeError:
        return None


def check_site(site: str, architecture: Architecture) -> None:
    """Refuse a target site that this architecture cannot have.

    Raises:
        InputError: with the reason.
    """
    if site == "attention_and_ffn" and architecture.attention_output is None:
        raise InputError(
            "PMET's target site needs the name of the attention's output projection",
            where="model.architecture",
            hint="give it, e.g. --model.architecture.attention_output=self_attn.o_proj",
        )


def blocks(model: PreTrainedModel, architecture: Architecture) -> list[nn.Module]:
    """Return the decoder blocks in order.

    Raises:
        InputError: if the architecture's name of a block is none of a list in the model.
    """
    name, slot, rest = architecture.block.partition(".{}")
    container = _submodule(model, name)
    layers = [] if container is None or not slot or rest else list(container.children())
    if not layers:
        raise InputError(
            f"{model.config.model_type} has no module {architecture.block.replace('{}', '0')!r}",
            where=f"model.architecture.block = {architecture.block}",
            hint="print the model and name a block of its list of blocks, with {} for the index, "
            "e.g. 'model.layers.{}'",
        )
    return layers


def down_projection(block: nn.Module, architecture: Architecture) -> nn.Module:
    """Return a block's FFN down projection."""
    return block.get_submodule(architecture.down_projection)


def feed_forward(block: nn.Module, architecture: Architecture) -> nn.Module | None:
    """Return the module of a block's whole FFN; None where its parts stand in the block itself."""
    name, inside, _ = architecture.down_projection.partition(".")
    return block.get_submodule(name) if inside else None


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


def check_layers(
    layers: Sequence[int], blocks: Sequence[nn.Module], architecture: Architecture, d_model: int
) -> None:
    """Refuse layers that the model does not have, or that have no down projection to write.

    Args:
        layers: critical layers.
        blocks: the model's.
        architecture: the names in it.
        d_model: width of the residual stream.

    Raises:
        InputError: naming the layers and those that can be edited.
    """
    missing = [layer for layer in layers if not 0 <= layer < len(blocks)]
    if missing:
        raise InputError(
            f"the model has no layer {', '.join(map(str, missing))}: "
            f"its {len(blocks)} layers are 0 to {len(blocks) - 1}",
            where="update.layers",
            hint="choose critical layers in that range",
        )

    def fault(layer: int) -> str | None:
        return projection_fault(blocks[layer], architecture, d_model)

    bad = [layer for layer in layers if fault(layer) is not None]
    if bad:
        usable = [layer for layer in range(len(blocks)) if fault(layer) is None]
        why = experts.WHY if experts.routed(blocks[bad[0]]) else fault(bad[0])
        raise InputError(
            f"layer {', '.join(map(str, bad))} cannot be edited: {why}",
            where="update.layers",
            hint=experts.what_to_do(blocks, d_model, usable),
        )
