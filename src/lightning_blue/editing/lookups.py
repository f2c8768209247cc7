"""Keys and outputs of edits: what goes into, and comes out of, a module at the subject's end."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lightning_blue.editing.prompts import EditPrompts
from lightning_blue.language_model.shared_prefixes import row_width, share_prefixes
from lightning_blue.language_model.states import precise, read_states
from lightning_blue.language_model.tokens import Encoded
from lightning_blue.support.processes import distribute

MAX_TOKENS = 8192  # of a pass; more at once is no faster


@torch.no_grad()
def keys_at_lookups(
    model: PreTrainedModel, projection: nn.Module, prompts: Sequence[EditPrompts]
) -> Tensor:
    """Return the key of each edit: the projection's input at the lookup, ``(d_in, n)``.

    Averaged inside each kind of context first, then over kinds: the bare prompt weighs one half,
    all prefixed ones together the other half. Processes that work together divide the prompts.

    Args:
        model: a causal language model in eval mode.
        projection: the FFN's down projection.
        prompts: of the n edits, all in the same contexts.
    """

    def compute(part: Sequence[EditPrompts]) -> list[Tensor]:
        rows = [row for prompt in part for row in prompt.rewriting]
        states = states_at_lookups(model, rows, input_of=projection)
        keys = states.view(len(part), -1, states.shape[1])  # (n, n_contexts, d_in)
        bare, prefixed = keys[:, 0], keys[:, 1:]
        mean = (bare + prefixed.mean(1)) / 2 if prefixed.shape[1] else bare
        return [key.clone() for key in mean.cpu()]

    return torch.stack(distribute(prompts, compute), dim=1).to(model.device)


@torch.no_grad()
def outputs_at_lookups(
    model: PreTrainedModel, site: nn.Module, prompts: Sequence[EditPrompts]
) -> Tensor:
    """Return the site's output at the lookup of each bare prompt, ``(d_model, n)``."""

    def compute(part: Sequence[EditPrompts]) -> list[Tensor]:
        rows = [prompt.rewriting[0] for prompt in part]
        return [output.clone() for output in states_at_lookups(model, rows, output_of=site).cpu()]

    return torch.stack(distribute(prompts, compute), dim=1).to(model.device)


def states_at_lookups(
    model: PreTrainedModel,
    rows: Sequence[Encoded],
    *,
    input_of: nn.Module | None = None,
    output_of: nn.Module | None = None,
) -> Tensor:
    """Read one module at each row's lookup, ``(n_rows, d)``, in float32 or better.

    Common beginnings of rows are computed once; tokens behind the lookup are left out, since with
    causal attention they change nothing at it.
    """
    wanted_inputs = {} if input_of is None else {"state": input_of}
    wanted_outputs = {} if output_of is None else {"state": output_of}
    sequences = [row.ids[: row.lookup + 1] for row in rows]
    longest = max(map(len, sequences))
    width, at_once = row_width(model, longest), max(1, MAX_TOKENS // longest)
    states = []
    for first in range(0, len(rows), at_once):
        part = sequences[first : first + at_once]
        shared = share_prefixes(model, part, width)
        captured = read_states(
            model, shared.arguments, inputs_of=wanted_inputs, outputs_of=wanted_outputs
        )["state"]
        last = torch.tensor([[len(ids) - 1] for ids in part], device=shared.nodes.device)
        nodes = shared.nodes.gather(1, last)[:, 0]
        states.append(captured.flatten(0, 1)[nodes.to(captured.device)])
    return precise(torch.cat(states))
