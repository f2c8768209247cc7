"""Whether a checkpoint and its configuration belong together: no weight made up, no layer dropped.

transformers makes up at random what a checkpoint lacks, and leaves out what its configuration has
no place for. Edits of such a model would be edits of noise.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn
from transformers import PreTrainedModel

from lightning_blue.language_model.sources import Source

_NUMBERED = re.compile(r"(?:(?P<list>.*?)\.)?(?P<index>\d+)\.")
NAMED = 3  # weights in a message


def require_complete(model: PreTrainedModel, found: Mapping[str, Any], source: Source) -> None:
    """Refuse a model that is not the one that its checkpoint holds.

    What the model's class declares as dispensable, and heads that are tied to the embedding, are
    not among the missing. What is left over outside the decoder's blocks (another task's head, for
    one) costs a warning.

    Args:
        model: as it was loaded.
        found: from ``from_pretrained`` with ``output_loading_info`` and
            ``ignore_mismatched_sizes``.
        source: where it was loaded from.

    Raises:
        InputError: naming weights of another size, weights that are missing, and weights of blocks
            that have no place in the model.
    """
    mismatched = sorted(found["mismatched_keys"])
    if mismatched:
        name, stored, wanted = mismatched[0]
        raise source.refused(
            f"{_weights(len(mismatched))} of another size than config.json says: {name} is "
            f"{tuple(stored)}, and should be {tuple(wanted)}",
            "take the config.json that belongs to the weights",
        )
    layers = model.config.get_text_config().num_hidden_layers
    belongs = f"config.json, which says num_hidden_layers = {layers}, must belong to the weights"
    missing = sorted(found["missing_keys"])
    if missing:
        raise source.refused(
            f"{_weights(len(missing))} not in the checkpoint, and would be made up at random: "
            f"{_listed(missing)}",
            f"download or save the model again; {belongs}",
        )
    left_over = sorted(found["unexpected_keys"])
    dropped = in_blocks(left_over, model.state_dict().keys())
    if dropped:
        raise source.refused(
            f"{_weights(len(dropped))} in the checkpoint for which the model has no place: "
            f"{_listed(dropped)}",
            belongs,
        )
    if left_over:
        rank_zero_warn(
            f"the model has no place for {len(left_over)} tensors of the checkpoint, which are "
            f"left out: {_listed(left_over)}"
        )


def in_blocks(names: Iterable[str], of_model: Collection[str]) -> list[str]:
    """Return the names that belong to a numbered list of modules which the model has too.

    >>> in_blocks(["h.4.mlp.weight", "score.weight", "tower.0.weight"], ["body.h.0.mlp.weight"])
    ['h.4.mlp.weight']
    """
    lists = {match["list"] or "" for match in map(_NUMBERED.match, of_model) if match}
    kept = []
    for name in names:
        match = _NUMBERED.match(name)
        if match and any(_same_list(match["list"] or "", known) for known in lists):
            kept.append(name)
    return kept


def _same_list(one: str, other: str) -> bool:
    """Say whether two names of lists are the same but for a prefix of the base model."""
    return f".{one}".endswith(f".{other}") or f".{other}".endswith(f".{one}")


def _weights(count: int) -> str:
    return "1 weight is" if count == 1 else f"{count} weights are"


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more
