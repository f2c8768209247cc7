"""Passes over frozen rows that run only what a change at the lookup can reach."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from lightning_blue.editing.fast.frozen import ALL_SHORTCUTS, Frozen, Shortcuts
from lightning_blue.language_model.states import Reached, adding, precise


class Pass(NamedTuple):
    """One pass over frozen rows.

    Attributes:
        frozen: from :func:`freeze`.
        added: modules, and what is added to their outputs at the aligned column, ``(n_rows, d)``.
        rows: of the positions whose logits are wanted, ``(n_reads,)``.
        columns: of these positions, at or after the aligned one, ``(n_reads,)``.
        last: the block whose output goes to the final norm and head; None: the model's last.
        ffn: the FFN of that block; None: it runs at all positions.
    """

    frozen: Frozen
    added: Sequence[tuple[nn.Module, Tensor]]
    rows: Tensor
    columns: Tensor
    last: int | None = None
    ffn: nn.Module | None = None

    @property
    def where(self) -> tuple[Tensor, Tensor]:
        """Rows and columns among those that are computed."""
        return self.rows, self.columns - self.frozen.first


def logits_with(
    model: PreTrainedModel,
    blocks: Sequence[nn.Module],
    passes: Sequence[Pass],
    shortcuts: Shortcuts = ALL_SHORTCUTS,
) -> tuple[Tensor, ...]:
    """Run rows with something added to modules' outputs; read logits at few positions.

    The model's own code runs, masks, rotary embeddings, final norm and head included.

    Args:
        model: a causal language model in eval mode.
        blocks: its decoder blocks.
        passes: what to run; the head runs once, in the last of them, for all that is read.
        shortcuts: what to skip.

    Returns:
        For each pass logits in float32 or better, ``(n_reads, vocabulary)``.
    """
    if not shortcuts.read_few:
        return tuple(precise(_run(model, blocks, each)[each.where]) for each in passes)
    head_inputs: list[Tensor] = []
    for number, each in enumerate(passes, start=1):

        def take(_head: nn.Module, args: Any, each: Pass = each, number: int = number) -> Any:
            head_inputs.append(args[0][each.where])
            if number < len(passes):
                raise Reached
            return (torch.cat(head_inputs),)

        with ExitStack() as stack:
            hook = model.get_output_embeddings().register_forward_pre_hook(take)
            stack.callback(hook.remove)
            if each.ffn is not None and not {m for m, _ in each.added} & set(each.ffn.modules()):
                stack.enter_context(only_at(each.ffn, *each.where))
            stack.enter_context(suppress(Reached))
            logits = _run(model, blocks, each)
    return precise(logits).split([len(states) for states in head_inputs])


def _run(model: PreTrainedModel, blocks: Sequence[nn.Module], single: Pass) -> Tensor:
    """Return the logits of a pass."""
    frozen = single.frozen
    skipped = [
        *blocks[: frozen.start + 1],
        *([] if single.last is None else blocks[single.last + 1 :]),
    ]
    with ExitStack() as stack:
        for block in skipped:
            given = frozen.hidden if block is blocks[frozen.start] and frozen.start >= 0 else None
            stack.enter_context(_replaced(block, given, frozen.returns_tuple))
        for module, delta in single.added:
            stack.enter_context(adding(module, delta, frozen.rows.column - frozen.first))
        arguments = frozen.rows.arguments(frozen.first)
        cache = cache_before(frozen.before, frozen.start)
        logits: Tensor = model(**arguments, past_key_values=cache, use_cache=bool(cache)).logits
    return logits


def cache_before(before: Sequence[tuple[Tensor, ...]], start: int) -> DynamicCache | None:
    """Rebuild a cache, which a forward pass changes; skipped layers only tell the length."""
    if not before:
        return None
    cache = DynamicCache()
    for index, (keys, values) in enumerate(before):
        rows = slice(0, 1) if index <= start else slice(None)
        cache.update(keys[rows], values[rows], index)
    return cache


@contextmanager
def _replaced(block: nn.Module, output: Tensor | None, as_tuple: bool) -> Iterator[None]:
    """Let a block return ``output``, or its input, instead of computing."""

    def stand_in(hidden_states: Tensor, *_args: Any, **_kwargs: Any) -> Any:
        result = hidden_states if output is None else output
        return (result,) if as_tuple else result

    patched = vars(block).get("forward")  # accelerate puts one there
    block.forward = stand_in
    try:
        yield
    finally:
        del block.forward
        if patched is not None:
            block.forward = patched


@contextmanager
def only_at(ffn: nn.Module, row: Tensor, column: Tensor) -> Iterator[None]:
    """Let a module that treats every position alike see few of them; the others get zeros.

    All of its arguments that have a position each are cut: Bloom's FFN is given the residual too.
    """
    shapes: list[torch.Size] = []

    def few(part: Any, shape: torch.Size) -> Any:
        has_positions = isinstance(part, Tensor) and part.shape[:2] == shape[:2]
        return part[row, column][None] if has_positions else part

    def take(_module: nn.Module, args: Any) -> Any:
        shapes.append(args[0].shape)
        return tuple(few(part, args[0].shape) for part in args)

    def put_back(_module: nn.Module, _args: Any, output: Tensor) -> Tensor:
        return output.new_zeros(shapes.pop()).index_put((row, column), output[0])

    hooks = [ffn.register_forward_pre_hook(take), ffn.register_forward_hook(put_back)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
