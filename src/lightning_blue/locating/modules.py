"""The modules that causal tracing restores: blocks, FFN and attention outputs of every layer."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from lightning_blue.language_model.architectures import Architecture, projection_fault
from lightning_blue.support.errors import InputError

KINDS = ("hidden", "ffn", "attention")
LABELS = {"hidden": "hidden state", "ffn": "FFN output", "attention": "attention output"}


def traced_modules(
    blocks: Sequence[nn.Module], architecture: Architecture, d_model: int
) -> dict[str, list[nn.Module]]:
    """Return by kind the module of each layer whose output is restored.

    FFN and attention are restored at their last linear map: what stands behind it, a norm for
    instance, treats each token by itself, so that it is restored with it. Where an FFN has no such
    map (a mixture of experts), its whole output is.

    Raises:
        InputError: if a block's attention or FFN cannot be found.
    """
    if architecture.attention_output is None:
        raise InputError(
            "tracing needs the name of the attention's output projection",
            where="model.architecture",
            hint="give it, e.g. --model.architecture.attention_output=self_attn.o_proj",
        )
    attention = [
        _submodule(block, architecture.attention_output, layer, "attention_output")
        for layer, block in enumerate(blocks)
    ]
    ffn = []
    for layer, block in enumerate(blocks):
        name = architecture.down_projection
        if projection_fault(block, architecture, d_model) is not None:
            name = name.partition(".")[0]
        ffn.append(_submodule(block, name, layer, "down_projection"))
    return {"hidden": list(blocks), "ffn": ffn, "attention": attention}


def _submodule(block: nn.Module, name: str, layer: int, key: str) -> nn.Module:
    try:
        return block.get_submodule(name)
    except AttributeError:
        raise InputError(
            f"layer {layer} has no module {name!r}, and tracing compares all layers",
            where=f"model.architecture.{key}",
            hint="a model whose layers are of several kinds cannot be traced: choose layers by "
            "editing, with `lightning-blue analyze single-layer`",
        ) from None


def window_size(n_layers: int) -> int:
    """Return over how many layers FFN and attention outputs are restored together.

    Ten of GPT2-XL's 48 (Meng et al. 2022a), in proportion to the depth.

    >>> [window_size(n) for n in (48, 32, 30, 18, 12, 4)]
    [10, 7, 6, 4, 2, 1]
    """
    return max(1, round(n_layers * 10 / 48))


def window(layer: int, size: int, n_layers: int) -> range:
    """Return the layers that are restored together around a layer, as in ROME's code.

    >>> window(5, 4, 12), window(0, 4, 12), window(11, 4, 12), window(3, 1, 12)
    (range(3, 7), range(0, 2), range(9, 12), range(3, 4))
    """
    before, after = size // 2, -(-size // 2)
    return range(max(0, layer - before), min(n_layers, layer + after))
