"""Run part of a model: up to a module, or from a block's output onward."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel


class _Reached(Exception):
    """Everything that was asked for has been computed; the rest of the forward pass is waste."""


def hidden_of(output: Any) -> Tensor:
    """Return the hidden states of a block's output, which is a tensor or a tuple."""
    return output[0] if isinstance(output, tuple) else output


def read_states(
    model: PreTrainedModel,
    input_ids: Tensor,
    *,
    inputs_of: Mapping[str, nn.Module] | None = None,
    outputs_of: Mapping[str, nn.Module] | None = None,
) -> dict[str, Tensor]:
    """Read inputs and outputs of modules in one forward pass, stopped after the last of them.

    Args:
        model: a causal language model in eval mode.
        input_ids: right-padded token ids, ``(n_rows, n_tokens)``. No mask is needed: with causal
            attention nothing that is read depends on the padding after it.
        inputs_of: name -> module whose first input is wanted.
        outputs_of: name -> module whose output (hidden states) is wanted.

    Returns:
        name -> ``(n_rows, n_tokens, d)``.
    """
    wanted = len(inputs_of or {}) + len(outputs_of or {})
    states: dict[str, Tensor] = {}

    def keep(name: str, value: Tensor) -> None:
        states[name] = value.reshape(*input_ids.shape, -1)
        if len(states) == wanted:
            raise _Reached

    with ExitStack() as stack:
        for name, module in (inputs_of or {}).items():
            hook = module.register_forward_hook(
                lambda _m, args, _out, name=name: keep(name, args[0])
            )
            stack.callback(hook.remove)
        for name, module in (outputs_of or {}).items():
            hook = module.register_forward_hook(
                lambda _m, _args, out, name=name: keep(name, hidden_of(out))
            )
            stack.callback(hook.remove)
        with torch.no_grad(), suppress(_Reached):
            model(input_ids=input_ids, use_cache=False)
    return states


class AlignedRows(NamedTuple):
    """Token rows aligned at one column; what is before it never changes.

    Attributes:
        input_ids: ``(n_rows, n_tokens)``, padded on both sides.
        starts: columns of padding on the left, ``(n_rows,)``.
        column: where the rows are aligned.
    """

    input_ids: Tensor
    starts: Tensor
    column: int

    def arguments(self, first: int) -> dict[str, Tensor]:
        """Return the model's arguments for the columns from ``first`` on."""
        columns = torch.arange(self.input_ids.shape[1], device=self.input_ids.device)
        shifted = columns - self.starts[:, None]
        return {
            "input_ids": self.input_ids[:, first:],
            "attention_mask": (shifted >= 0).long(),
            "position_ids": shifted.clamp(min=0)[:, first:],
        }


KeyValues = list[tuple[Tensor, Tensor]]  # by layer: attention's keys and values


def read_from_column(
    model: PreTrainedModel, block: nn.Module, rows: AlignedRows
) -> tuple[Tensor, KeyValues]:
    """Run the rows once; keep what later passes from the aligned column on can start from.

    Returns:
        The block's output from the column on, ``(n_rows, n_tokens - column, d_model)``, and the
        attention's keys and values of every layer before it.
    """
    outputs: list[Tensor] = []
    hook = block.register_forward_hook(lambda _m, _args, out: outputs.append(hidden_of(out)))
    try:
        with torch.no_grad():
            run = model.base_model(**rows.arguments(0), use_cache=True)
    finally:
        hook.remove()
    before = slice(0, rows.column)
    kept = [
        (layer.keys[:, :, before].clone(), layer.values[:, :, before].clone())
        for layer in run.past_key_values.layers
    ]
    return outputs[0][:, rows.column :].clone(), kept


def logits_from_block(
    model: PreTrainedModel,
    blocks: Sequence[nn.Module],
    layer: int,
    rows: AlignedRows,
    before: KeyValues,
    hidden: Tensor,
    positions: Tensor,
    *,
    returns_tuple: bool = False,
) -> Tensor:
    """Run the model from a block's output onward and read logits at few positions.

    The model's own code runs, masks, rotary embeddings, final norm and head included. The blocks
    up to ``layer`` are skipped, columns before the alignment are taken from ``before``, and the
    head sees only the positions that are read.

    Args:
        model: a causal language model in eval mode.
        blocks: its decoder blocks.
        layer: the block whose output is given.
        rows: the tokens.
        before: from :func:`read_from_column`.
        hidden: output of block ``layer`` from the aligned column on, ``(n_rows, n_tokens -
            column, d_model)``.
        positions: columns to read, at or after the aligned one, ``(n_rows, n_positions)``.
        returns_tuple: whether this architecture's blocks return a tuple.

    Returns:
        Logits in float32, ``(n_rows, n_positions, vocabulary)``.
    """
    index = torch.arange(hidden.shape[0], device=hidden.device)[:, None]

    def gather(_module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (args[0][index, positions - rows.column], *args[1:])

    head = model.get_output_embeddings()
    with ExitStack() as stack:
        stack.callback(head.register_forward_pre_hook(gather).remove)
        for block in blocks[:layer]:
            stack.enter_context(_replaced(block, None, returns_tuple))
        stack.enter_context(_replaced(blocks[layer], hidden, returns_tuple))
        arguments = rows.arguments(rows.column)
        logits: Tensor = model(**arguments, past_key_values=_cache(before, layer)).logits
    return logits.float()


def _cache(before: KeyValues, layer: int) -> DynamicCache:
    """Rebuild a cache, which a forward pass changes; the first layer's tells the length."""
    cache = DynamicCache()
    for index, (keys, values) in enumerate(before):
        if index == 0 or index > layer:
            cache.update(keys, values, index)
    return cache


@contextmanager
def _replaced(block: nn.Module, output: Tensor | None, as_tuple: bool) -> Iterator[None]:
    """Let a block return ``output``, or its own input, instead of computing."""

    def stand_in(hidden_states: Tensor, *_args: Any, **_kwargs: Any) -> Any:
        result = hidden_states if output is None else output
        return (result,) if as_tuple else result

    block.forward = stand_in
    try:
        yield
    finally:
        del block.forward
