"""Where targets are found: the block's output, or the FFN's where the block's does not follow."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch import nn
from transformers import PreTrainedModel

from lightning_blue.editing.additivity import Reach, measure_reach
from lightning_blue.support.errors import InputError
from lightning_blue.support.processes import distribute

log = logging.getLogger(__name__)

PROMPTS = 4  # of a run, that are looked at

Reaches = Mapping[int, Mapping[str, Reach] | None]  # by layer; None: nothing could be said


class Site(NamedTuple):
    """Where targets are found, and what a unit of a weight's output is there.

    Attributes:
        name: ``block``, ``ffn`` or ``attention_and_ffn``.
        multiples: by layer, what the residual has to be divided by.
    """

    name: str
    multiples: dict[int, float]


class TargetSite:
    """The target site of a run, measured on the unedited model before anything is optimised.

    Args:
        asked: ``auto``, ``block``, ``ffn`` or ``attention_and_ffn``.

    Attributes:
        name: what targets are the output of; until it is measured, ``block`` stands for ``auto``.
        multiples: by layer, what its residuals are divided by; empty until it is measured.
        note: what a reader should know of it.
        reaches: what was measured, by layer.
    """

    def __init__(self, asked: str) -> None:
        self.asked = asked
        self.name = "block" if asked == "auto" else asked
        self.multiples: dict[int, float] = {}
        self.note: str | None = None
        self.reaches: dict[int, Mapping[str, Reach] | None] = {}

    def measure(
        self,
        model: PreTrainedModel,
        places: Mapping[int, tuple[nn.Module, nn.Module]],
        prompts: Sequence[Sequence[int]],
    ) -> None:
        """Measure what a change of the layers' weights does; processes divide the layers.

        Args:
            model: a causal language model in eval mode, unedited.
            places: by layer, its block and its down projection; those that are known are left out.
            prompts: token ids of the run's prompts, each up to its lookup.

        Raises:
            InputError: if the closed form cannot be right for it, with the measured share.
        """
        new = sorted(set(places) - set(self.multiples))

        def work(layers: Sequence[int]) -> list[dict[str, Reach] | None]:
            return [measure_reach(model, prompts, *places[layer], layer) for layer in layers]

        reaches = dict(zip(new, distribute(new, work), strict=True))
        self.reaches |= reaches
        site = choose_site(self.name if self.multiples else self.asked, reaches)
        self.name = site.name
        self.multiples |= site.multiples
        if self.note is None:
            self.note = describe(site, reaches)
            if self.note is not None:
                log.info("%s", self.note)

    def state_dict(self) -> dict[str, Any]:
        """Return what was measured, as plain values."""
        return {"name": self.name, "multiples": self.multiples, "note": self.note}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what was measured before a run was stopped, if the same is asked for."""
        if self.asked in ("auto", state["name"]):
            self.name, self.multiples, self.note = state["name"], state["multiples"], state["note"]


def choose_site(asked: str, reaches: Reaches) -> Site:
    """Choose the site at which the closed form delivers its targets.

    Args:
        asked: ``auto`` takes the block's output, or where that does not follow the weight, the
            projection's own.
        reaches: from :func:`measure_reach`, by layer; None takes a layer to be plain.

    Raises:
        InputError: with the measured share, where the projection's output does not follow its
            weight, or the block's does not and was asked for.
    """
    measured = {layer: reach for layer, reach in reaches.items() if reach is not None}
    for layer, reach in measured.items():
        _require_own_output(layer, reach)
    ones = dict.fromkeys(reaches, 1.0)
    if asked not in ("auto", "block"):
        return Site(asked, ones)
    bent = [layer for layer, reach in measured.items() if not reach["block"].fixed]
    if not bent:
        return Site("block", ones | {n: reach["block"].multiple for n, reach in measured.items()})
    if asked == "block":
        raise InputError(
            _why_not_the_block(bent[0], measured[bent[0]]["block"]),
            where="model.target.site = block",
            hint="take the down projection's own output: --model.target.site=ffn",
        )
    return Site("ffn", ones)


def describe(site: Site, reaches: Reaches) -> str | None:
    """Say what a reader should know of the site that was chosen; None where all is plain."""
    if site.name == "block":
        multiples = sorted({f"{value:.4g}" for value in site.multiples.values() if value != 1})
        if not multiples:
            return None
        return (
            "what a weight writes arrives at its block's output multiplied by "
            f"{', '.join(multiples)}: residuals are divided by it"
        )
    if site.name == "ffn":
        for layer, reach in reaches.items():
            if reach is not None and not reach["block"].fixed:
                why = _why_not_the_block(layer, reach["block"])
                return f"{why}: targets are the down projection's own output"
    return None


def _why_not_the_block(layer: int, reach: Reach) -> str:
    return (
        f"layer {layer}: the block's output does not follow the weight by a fixed factor, as "
        f"behind a norm or a gate (off by {reach.missed:.0%} of a known change)"
    )


def _require_own_output(layer: int, reach: Mapping[str, Reach]) -> None:
    """Refuse a weight that does not write what its module gives out, or that the block ignores."""
    own, block = reach["ffn"], reach["block"]
    writes = own.fixed and own.multiple == 1
    if writes and not (block.fixed and block.multiple == 0):
        return
    name, missed = ("block", block.missed) if writes else ("projection", own.missed)
    raise InputError(
        f"a change of the down projection's weight in layer {layer} does not arrive at the "
        f"{name}'s output as it should: it is off by {missed:.0%} of the change",
        where="model.architecture.down_projection",
        hint="name the linear map whose output the block adds to its hidden states; quantised "
        "weights and those that layers share cannot be edited",
    )
