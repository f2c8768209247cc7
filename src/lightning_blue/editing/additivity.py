"""Whether a change of a weight arrives at the target site as it is: measured, not assumed.

The closed form solves for a weight whose output at a key moves by the residual. That reaches the
target where the site's output moves by the same, or by a fixed multiple of it. A norm or a gate
between the two changes direction or size with the token, and no closed form in the weight is right.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lightning_blue.language_model.architectures import weight_view
from lightning_blue.language_model.states import Reached, hidden_of, is_finite, precise
from lightning_blue.support.errors import InputError

STRENGTH = 4.0  # of the change, in norms of the site's output: far above its rounding
INFORMATIVE = 1 / 8  # a token whose rounding is more than this part of its change tells nothing


class Reach(NamedTuple):
    """How changes of a projection's output arrived at a site, over tokens and two changes.

    Attributes:
        multiple: of the change, by least squares; exactly 1.0 where rounding explains the rest.
        missed: the largest part of a change by which what arrived differed from it.
        fixed: whether rounding explains the difference from the multiple at every token.
    """

    multiple: float
    missed: float
    fixed: bool


class Observed(NamedTuple):
    """What a pass over the prompts showed of one layer, without padding.

    Attributes:
        keys: inputs of the projection, ``(n_tokens, d_in)``.
        written: its outputs, ``(n_tokens, d_model)``.
        states: outputs of the block, ``(n_tokens, d_model)``.
    """

    keys: Tensor
    written: Tensor
    states: Tensor


def measure_reach(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    block: nn.Module,
    projection: nn.Module,
    layer: int,
) -> dict[str, Reach] | None:
    """Change a projection's weight twice, look at what arrives behind it and behind its block.

    The changes are of rank one, in random directions, and STRENGTH times as long as the block's
    output at the prompts' last tokens; the weight is put back bit by bit. Three passes.

    Args:
        model: a causal language model in eval mode.
        prompts: token ids, each up to its lookup.
        block: a decoder block.
        projection: the FFN's down projection in it.
        layer: the block's index, for messages and the directions.

    Returns:
        ``ffn`` and ``block``; None where keys or outputs are not finite, or no key differs from
        zero, so that nothing can be said.

    Raises:
        InputError: if the projection does not see each token once.
    """
    with torch.no_grad(), torch.autocast(model.device.type, enabled=False):
        ids, real, last = _padded(model, prompts)
        before = _observe(model, block, projection, ids, real, layer)
        if not all(map(is_finite, before)):
            return None
        generator = torch.Generator().manual_seed(layer)
        size = STRENGTH * float(before.states[last].norm(dim=1).max())
        along = _along(before.keys[last])
        own, behind = [], []
        for strength in (size, -size / 2):
            direction = torch.randn(before.written.shape[1], generator=generator)
            change = strength * direction / direction.norm()
            with _changed(projection, change, along) as delta:
                after = _observe(model, block, projection, ids, real, layer)
                rounding = _rounding(model.dtype, before, after, projection, delta)
            sent = before.keys @ delta.T
            own.append(_Tokens(after.written - before.written, sent, rounding))
            behind.append(_Tokens(after.states - before.states, sent, rounding))
    ffn, states = _reach(own), _reach(behind)
    return None if ffn is None or states is None else {"ffn": ffn, "block": states}


class _Tokens(NamedTuple):
    """What arrived of a change, what was sent, ``(n, d)``, and the rounding's norm, ``(n,)``."""

    arrived: Tensor
    sent: Tensor
    rounding: Tensor


def _reach(tokens: Sequence[_Tokens]) -> Reach | None:
    """Compare what arrived with what was sent, at tokens whose rounding is small beside it."""
    arrived, sent, rounding = (torch.cat(parts) for parts in zip(*tokens, strict=True))
    length = sent.norm(dim=1)
    kept = rounding < INFORMATIVE * length
    if not bool(kept.any()) or not is_finite(arrived[kept]):
        return None
    arrived, sent = arrived[kept] / length[kept, None], sent[kept] / length[kept, None]
    tolerance = rounding[kept] / length[kept]
    multiple = float((arrived * sent).sum(1).mean())
    stray = (arrived - multiple * sent).norm(dim=1)
    missed = float((arrived - sent).norm(dim=1).max())
    fixed = bool((stray <= 2 * tolerance).all())  # the mean is off by as much as a token may be
    for plain in (0.0, 1.0):
        if fixed and abs(multiple - plain) <= float(tolerance.max()):
            multiple = plain
    return Reach(multiple, missed, fixed)


def _rounding(
    dtype: torch.dtype, before: Observed, after: Observed, projection: nn.Module, delta: Tensor
) -> Tensor:
    """Bound the rounding in a difference of two outputs, by token, ``(n_tokens,)``.

    Each output is rounded at most four times on its way (product, factor, two sums), by half an
    eps of what it then is. A product's own sum over d_in terms is formed in float32 or better and
    is off by sqrt(d_in) eps of the norms of its factors (Higham & Mary, 2019).
    """
    ends = sum(part.norm(dim=1) for seen in (before, after) for part in (seen.written, seen.states))
    weight = precise(weight_view(projection))
    norms = 2 * weight.norm() + delta.norm()
    sums = weight.shape[1] ** 0.5 * torch.finfo(weight.dtype).eps * norms * before.keys.norm(dim=1)
    return 2 * torch.finfo(dtype).eps * ends + sums


@contextmanager
def _changed(projection: nn.Module, change: Tensor, along: Tensor) -> Iterator[Tensor]:
    """Add ``change along^T`` to a weight for a while; yield what was added after rounding."""
    weight = weight_view(projection)
    kept = weight.clone()
    try:
        weight += torch.outer(change.to(along), along).to(weight.dtype)
        yield precise(weight) - precise(kept)
    finally:
        weight.copy_(kept)


def _along(keys: Tensor) -> Tensor:
    """Return the direction in which each of n keys, ``(n, d_in)``, has about the product 1."""
    squares = keys.square().sum(1, keepdim=True)
    return torch.where(squares > 0, keys / squares, torch.zeros_like(keys)).sum(0)


def _padded(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]]
) -> tuple[Tensor, Tensor, Tensor]:
    """Pad prompts on the right; return ids, the mask of real tokens, and the last ones among them.

    With causal attention nothing that is read depends on the padding after it.
    """
    lengths = torch.tensor([len(ids) for ids in prompts])
    width = int(lengths.max())
    ids = torch.tensor([[*row, *[0] * (width - len(row))] for row in prompts])
    real = torch.arange(width) < lengths[:, None]
    return ids.to(model.device), real.to(model.device), (lengths.cumsum(0) - 1).to(model.device)


def _observe(
    model: PreTrainedModel,
    block: nn.Module,
    projection: nn.Module,
    ids: Tensor,
    real: Tensor,
    layer: int,
) -> Observed:
    """Run the prompts up to the end of a block.

    Raises:
        InputError: if the projection does not see each token once.
    """
    calls: list[tuple[Tensor, Tensor]] = []
    states: list[Tensor] = []

    def end(_module: nn.Module, _args: Any, output: Any) -> None:
        states.append(hidden_of(output))
        raise Reached

    with ExitStack() as stack:
        stack.callback(
            projection.register_forward_hook(
                lambda _m, args, out: calls.append((args[0], hidden_of(out)))
            ).remove
        )
        stack.callback(block.register_forward_hook(end).remove)
        stack.enter_context(suppress(Reached))
        model(input_ids=ids, use_cache=False)
    seen = sum(given.shape[:-1].numel() for given, _ in calls)
    if len(calls) != 1 or seen != ids.numel():
        raise InputError(
            f"the down projection of layer {layer} ran {len(calls)} times on {seen} of "
            f"{ids.numel()} tokens: it does not see each token once, as an expert does that only "
            "some of them are sent to",
            where="model.architecture.down_projection",
            hint="name a linear map that every token passes once",
        )
    parts = (*calls[0], states[0])
    flat = (precise(part.reshape(ids.numel(), -1))[real.flatten()] for part in parts)
    return Observed(*flat)
