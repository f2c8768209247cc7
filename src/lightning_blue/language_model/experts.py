"""Mixtures of experts: how their layers are told from others, and what can be edited in them."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

WHY = (
    "each token is sent to a few of many experts, so that no single weight writes what a layer adds"
)


def routed(block: nn.Module) -> bool:
    """Say whether a block sends its tokens to experts."""
    return any(name.rpartition(".")[2] == "experts" for name, _ in block.named_modules())


def shared_projections(block: nn.Module, d_model: int) -> list[str]:
    """Return names of linear maps to ``d_model`` numbers in the expert that every token takes."""
    return [
        name
        for name, part in block.named_modules()
        if "shared" in name and isinstance(part, nn.Linear) and part.out_features == d_model
    ]


def what_to_do(blocks: Sequence[nn.Module], d_model: int, usable: Sequence[int]) -> str:
    """Say what of a model with experts can be edited.

    Args:
        blocks: all of them.
        d_model: width of the residual stream.
        usable: layers whose down projection can be written.
    """
    ways = []
    if usable:
        ways.append(f"edit layers that have a single FFN: --update.layers=[{_listed(usable)}]")
    for block in blocks:
        names = shared_projections(block, d_model) if routed(block) else []
        if names:
            ways.append(
                "name the expert that every token takes: "
                f"--model.architecture.down_projection={names[-1]}"
            )
            break
    return ", or ".join(ways) or "choose a dense model: no layer of this one has a single FFN"


def _listed(layers: Sequence[int]) -> str:
    return ",".join(map(str, layers))
