"""Run part of a model: up to a module, or from a block's output onward."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


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


def logits_from_block(
    model: PreTrainedModel,
    blocks: Sequence[nn.Module],
    layer: int,
    input_ids: Tensor,
    hidden: Tensor,
    positions: Tensor,
    *,
    returns_tuple: bool = False,
) -> Tensor:
    """Run the model from a block's output onward and read logits at few positions.

    The model's own code runs, masks, rotary embeddings, final norm and head included; the blocks
    up to ``layer`` are skipped and the head sees only the positions that are read.

    Args:
        model: a causal language model in eval mode.
        blocks: its decoder blocks.
        layer: the block whose output is given.
        input_ids: right-padded token ids, ``(n_rows, n_tokens)``.
        hidden: output of block ``layer``, ``(n_rows, n_tokens, d_model)``.
        positions: token positions to read, ``(n_rows, n_positions)``.
        returns_tuple: whether this architecture's blocks return a tuple.

    Returns:
        Logits in float32, ``(n_rows, n_positions, vocabulary)``.
    """
    rows = torch.arange(input_ids.shape[0], device=input_ids.device)[:, None]

    def gather(_module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (args[0][rows, positions], *args[1:])

    head = model.get_output_embeddings()
    with ExitStack() as stack:
        stack.callback(head.register_forward_pre_hook(gather).remove)
        for block in blocks[:layer]:
            stack.enter_context(_replaced(block, None, returns_tuple))
        stack.enter_context(_replaced(blocks[layer], hidden, returns_tuple))
        logits: Tensor = model(input_ids=input_ids, use_cache=False).logits
    return logits.float()


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
