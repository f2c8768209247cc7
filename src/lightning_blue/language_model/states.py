"""Read what modules take in and give out, in a forward pass that stops when all is read."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack, suppress
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
