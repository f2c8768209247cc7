"""Run part of a model: up to a module, or only what a change at one column can reach."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin

from lightning_blue.prefix_tree import row_width, share_prefixes


class _Reached(Exception):
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
            model(**arguments, use_cache=False)
    return states


class AlignedRows(NamedTuple):
    """Token rows aligned at one column; what is before it never changes.

    Attributes:
        input_ids: ``(n_rows, n_tokens)``, padded on both sides.
        starts: the column of each row's first token, ``(n_rows,)``.
        ends: the column after each row's last token, ``(n_rows,)``.
        column: where the rows are aligned.
    """

    input_ids: Tensor
    starts: Tensor
    ends: Tensor
    column: int

    def sequences(self) -> list[list[int]]:
        """Return the rows without padding."""
        bounds = zip(self.input_ids.tolist(), self.starts.tolist(), self.ends.tolist(), strict=True)
        return [ids[start:end] for ids, start, end in bounds]

    def arguments(self, first: int) -> dict[str, Tensor]:
        """Return the model's arguments for the columns from ``first`` on."""
        columns = torch.arange(self.input_ids.shape[1], device=self.input_ids.device)
        shifted = columns - self.starts[:, None]
        return {
            "input_ids": self.input_ids[:, first:],
            "attention_mask": (shifted >= 0).long(),
            "position_ids": shifted.clamp(min=0)[:, first:],
        }


@dataclass(frozen=True)
class Savings:
    """What repeated passes leave out; the numbers are the same without any of it.

    Args:
        skip_blocks: start from the stored output of the last block that never changes.
        reuse_prefix: compute no column before the aligned one; its keys and values are stored.
        share_prefixes: compute what rows begin with in common once, for what is stored.
        read_few: run the head, and the FFN of the last block, only at positions that are read.
    """

    skip_blocks: bool = True
    reuse_prefix: bool = True
    share_prefixes: bool = True
    read_few: bool = True


PLAIN = Savings(skip_blocks=False, reuse_prefix=False, share_prefixes=False, read_few=False)


@dataclass(frozen=True)
class Frozen:
    """Rows, and all that passes over them have in common.

    Attributes:
        rows: the tokens.
        first: the first column that a pass computes.
        start: the last block that a pass skips; -1 where it skips none.
        hidden: that block's output from the first column on, ``(n_rows, n_columns, d_model)``.
        before: by layer, the attention's keys and values of the columns before the first.
        outputs: of the watched modules at the aligned column, each ``(n_rows, d)``.
        returns_tuple: whether this architecture's blocks return a tuple.
    """

    rows: AlignedRows
    first: int
    start: int
    hidden: Tensor | None
    before: list[tuple[Tensor, ...]]
    outputs: list[Tensor]
    returns_tuple: bool

    def select(self, index: Tensor) -> Frozen:
        """Keep some of the rows."""
        ids, starts, ends, column = self.rows
        return replace(
            self,
            rows=AlignedRows(ids[index], starts[index], ends[index], column),
            hidden=None if self.hidden is None else self.hidden[index],
            before=[(keys[index], values[index]) for keys, values in self.before],
            outputs=[output[index] for output in self.outputs],
        )


def freeze(
    model: PreTrainedModel,
    blocks: Sequence[nn.Module],
    start: int,
    rows: AlignedRows,
    watched: Sequence[nn.Module] = (),
    savings: Savings = Savings(),
) -> Frozen:
    """Run the rows once; keep what later passes can start from.

    Args:
        model: a causal language model in eval mode.
        blocks: its decoder blocks.
        start: the last block whose output never changes; -1 if there is none.
        rows: the tokens.
        watched: modules whose outputs at the aligned column are wanted.
        savings: what later passes shall leave out.
    """
    first = rows.column if savings.reuse_prefix else 0
    start = start if savings.skip_blocks else -1
    sequences = rows.sequences()
    width = row_width(model, max(map(len, sequences))) if savings.share_prefixes else 0
    shared = share_prefixes(model, sequences, width)
    nodes = _by_column(shared.nodes, rows)
    outputs: dict[int, Tensor] = {}
    tuples: list[bool] = []

    def keep(index: int, output: Any) -> None:
        hidden = hidden_of(output).detach()
        outputs[index] = hidden.reshape(-1, hidden.shape[-1])

    modules = [*watched, *([blocks[start]] if start >= 0 else [])]
    with ExitStack() as stack:
        hook = blocks[0].register_forward_hook(
            lambda _m, _a, out: tuples.append(isinstance(out, tuple))
        )
        stack.callback(hook.remove)
        for index, module in enumerate(modules):
            hook = module.register_forward_hook(lambda _m, _a, out, i=index: keep(i, out))
            stack.callback(hook.remove)
        with torch.no_grad():
            cache = DynamicCache() if first else None
            model.base_model(**shared.arguments, past_key_values=cache, use_cache=bool(first))
    kept = [
        tuple(_pick(t, nodes[:, :first]) for t in (cast(Tensor, c.keys), cast(Tensor, c.values)))
        for c in cast("list[CacheLayerMixin]", cache.layers if cache is not None else [])
    ]
    hidden = outputs[len(watched)][nodes[:, first:]] if start >= 0 else None
    watched_now = [precise(outputs[i][nodes[:, rows.column]]) for i in range(len(watched))]
    return Frozen(rows, first, start, hidden, kept, watched_now, tuples[0])


def _by_column(nodes: Tensor, rows: AlignedRows) -> Tensor:
    """Shift each sequence's nodes to its row's columns, 0 in the padding before them."""
    columns = torch.arange(rows.input_ids.shape[1], device=nodes.device)
    shifted = columns - rows.starts[:, None]
    return nodes.gather(1, shifted.clamp(0, nodes.shape[1] - 1)).masked_fill(shifted < 0, 0)


def _pick(cached: Tensor, nodes: Tensor) -> Tensor:
    """Take ``(n_rows, n_heads, n_columns, d)`` from a cache of packed rows by flat index."""
    return cached.transpose(1, 2).flatten(0, 1)[nodes].transpose(1, 2).contiguous()


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
    savings: Savings = Savings(),
) -> tuple[Tensor, ...]:
    """Run rows with something added to modules' outputs; read logits at few positions.

    The model's own code runs, masks, rotary embeddings, final norm and head included.

    Args:
        model: a causal language model in eval mode.
        blocks: its decoder blocks.
        passes: what to run; the head runs once, in the last of them, for all that is read.
        savings: what to leave out.

    Returns:
        For each pass logits in float32 or better, ``(n_reads, vocabulary)``.
    """
    if not savings.read_few:
        return tuple(precise(_run(model, blocks, one)[one.where]) for one in passes)
    read: list[Tensor] = []
    for number, one in enumerate(passes, start=1):

        def take(_head: nn.Module, args: Any, one: Pass = one, number: int = number) -> Any:
            read.append(args[0][one.where])
            if number < len(passes):
                raise _Reached
            return (torch.cat(read),)

        with ExitStack() as stack:
            hook = model.get_output_embeddings().register_forward_pre_hook(take)
            stack.callback(hook.remove)
            if one.ffn is not None and not {m for m, _ in one.added} & set(one.ffn.modules()):
                stack.enter_context(_only_at(one.ffn, *one.where))
            stack.enter_context(suppress(_Reached))
            logits = _run(model, blocks, one)
    return precise(logits).split([len(states) for states in read])


def _run(model: PreTrainedModel, blocks: Sequence[nn.Module], one: Pass) -> Tensor:
    """Return the logits of a pass."""
    frozen = one.frozen
    skipped = [*blocks[: frozen.start + 1], *([] if one.last is None else blocks[one.last + 1 :])]
    with ExitStack() as stack:
        for block in skipped:
            given = frozen.hidden if block is blocks[frozen.start] and frozen.start >= 0 else None
            stack.enter_context(_replaced(block, given, frozen.returns_tuple))
        for module, delta in one.added:
            stack.enter_context(_added(module, delta, frozen.rows.column - frozen.first))
        arguments = frozen.rows.arguments(frozen.first)
        cache = _cache(frozen.before, frozen.start)
        logits: Tensor = model(**arguments, past_key_values=cache, use_cache=bool(cache)).logits
    return logits


def _cache(before: Sequence[tuple[Tensor, ...]], start: int) -> DynamicCache | None:
    """Rebuild a cache, which a forward pass changes; skipped layers only tell the length."""
    if not before:
        return None
    cache = DynamicCache()
    for index, (keys, values) in enumerate(before):
        some = slice(0, 1) if index <= start else slice(None)
        cache.update(keys[some], values[some], index)
    return cache


@contextmanager
def _replaced(block: nn.Module, output: Tensor | None, as_tuple: bool) -> Iterator[None]:
    """Let a block return ``output``, or its own input, instead of computing."""

    def stand_in(hidden_states: Tensor, *_args: Any, **_kwargs: Any) -> Any:
        result = hidden_states if output is None else output
        return (result,) if as_tuple else result

    own = vars(block).get("forward")  # accelerate puts one there
    block.forward = stand_in
    try:
        yield
    finally:
        del block.forward
        if own is not None:
            block.forward = own


@contextmanager
def _only_at(ffn: nn.Module, row: Tensor, column: Tensor) -> Iterator[None]:
    """Let a module that treats every position alike see few of them; the others get zeros."""
    shapes: list[torch.Size] = []

    def take(_module: nn.Module, args: Any) -> Any:
        shapes.append(args[0].shape)
        return (args[0][row, column], *args[1:])

    def put_back(_module: nn.Module, _args: Any, output: Tensor) -> Tensor:
        return output.new_zeros(shapes.pop()).index_put((row, column), output)

    hooks = [ffn.register_forward_pre_hook(take), ffn.register_forward_hook(put_back)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _added(module: nn.Module, delta: Tensor, column: int) -> Iterator[None]:
    """Add ``(n_rows, d)`` to a module's output at a column."""

    def add(_module: nn.Module, _args: Any, output: Any) -> Any:
        whole = hidden_of(output)
        rows = whole.reshape(len(delta), -1, whole.shape[-1])  # OPT's FFN works on flat tokens
        changed = (precise(rows[:, column]) + delta).to(whole.dtype)
        parts = (rows[:, :column], changed[:, None], rows[:, column + 1 :])
        result = torch.cat(parts, dim=1).reshape(whole.shape)
        return (result, *output[1:]) if isinstance(output, tuple) else result

    hook = module.register_forward_hook(add)
    try:
        yield
    finally:
        hook.remove()
