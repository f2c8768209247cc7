"""Read what modules take in and give out, and change what they give out, with hooks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


class Reached(Exception):
    """Everything that was asked for has been computed; the rest of the forward pass is waste."""


def hidden_of(output: Any) -> Tensor:
    """Return the hidden states of a block's output, which is a tensor or a tuple."""
    return output[0] if isinstance(output, tuple) else output


def precise(states: Tensor) -> Tensor:
    """Return states in float32, or in float64 if that is what they are."""
    return states.to(torch.promote_types(states.dtype, torch.float32))


def is_finite(values: Tensor) -> bool:
    """Say whether no value is NaN or infinite, in one pass and without a copy.

    >>> is_finite(torch.tensor([1.0, 2.0])), is_finite(torch.tensor([1.0, float("nan")]))
    (True, False)
    """
    if not values.is_floating_point() or values.numel() == 0:
        return True
    return all(bool(torch.isfinite(extreme)) for extreme in values.aminmax())


def read_states(
    model: PreTrainedModel,
    arguments: Mapping[str, Tensor],
    *,
    inputs_of: Mapping[str, nn.Module] | None = None,
    outputs_of: Mapping[str, nn.Module] | None = None,
) -> dict[str, Tensor]:
    """Read inputs and outputs of modules in one forward pass, stopped after the last of them.

    Args:
        model: a causal language model in eval mode.
        arguments: of its forward pass. Token ids ``input_ids``, ``(n_rows, n_tokens)``, that are
            padded on the right need no mask: with causal attention nothing that is read depends
            on the padding after it.
        inputs_of: name -> module whose first input is wanted.
        outputs_of: name -> module whose output (hidden states) is wanted.

    Returns:
        name -> ``(n_rows, n_tokens, d)``.
    """
    wanted = len(inputs_of or {}) + len(outputs_of or {})
    states: dict[str, Tensor] = {}

    def keep(name: str, value: Tensor) -> None:
        states[name] = value.reshape(*arguments["input_ids"].shape, -1)
        if len(states) == wanted:
            raise Reached

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
        with torch.no_grad(), suppress(Reached):
            model(**arguments, use_cache=False)
    return states


@contextmanager
def adding(module: nn.Module, delta: Tensor, column: int) -> Iterator[None]:
    """Add ``(n_rows, d)`` to a module's output at a column.

    The sum is formed in float32 or better, on the output's device.
    """

    def add(states: Tensor) -> Tensor:
        return (precise(states) + delta.to(states.device)).to(states.dtype)

    with _changing(module, len(delta), column, add):
        yield


@contextmanager
def replacing(module: nn.Module, values: Tensor, column: int) -> Iterator[None]:
    """Put ``(n_rows, d)`` in the place of a module's output at a column."""
    with _changing(module, len(values), column, lambda states: values.to(states)):
        yield


@contextmanager
def _changing(
    module: nn.Module, n_rows: int, column: int, change: Callable[[Tensor], Tensor]
) -> Iterator[None]:
    """Change a module's output at a column, ``(n_rows, d)``; the other columns stay."""

    def hook(_module: nn.Module, _args: Any, output: Any) -> Any:
        whole = hidden_of(output)
        rows = whole.reshape(n_rows, -1, whole.shape[-1])  # OPT's FFN works on flat tokens
        changed = change(rows[:, column])
        parts = (rows[:, :column], changed[:, None], rows[:, column + 1 :])
        result = torch.cat(parts, dim=1).reshape(whole.shape)
        return (result, *output[1:]) if isinstance(output, tuple) else result

    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def bypassed(blocks: Sequence[nn.Module]) -> Iterator[None]:
    """Let blocks give out the hidden states that they take in."""

    def pass_on(_module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    hooks = [block.register_forward_hook(pass_on, with_kwargs=True) for block in blocks]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
