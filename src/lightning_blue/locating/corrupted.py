"""Facts run once as they are and once for each sample of noise; all states are kept."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin

from lightning_blue.language_model.scoring import logits_at
from lightning_blue.language_model.states import hidden_of
from lightning_blue.locating.facts import TracedFact


@dataclass(frozen=True)
class States:
    """What was computed of facts; a fact has a clean row, and behind it one for each sample.

    Attributes:
        ids: ``(n_rows, n_tokens)``, padded on the right.
        embeddings: of the tokens, noise included, ``(n_rows, n_tokens, d_model)``.
        hidden: by layer, the block's output, ``(n_rows, n_tokens, d_model)``.
        clean: by kind and layer, outputs in the clean rows, ``(n_facts, n_tokens, d_model)``.
        cache: by layer, the attention's keys and values, each ``(n_rows, n_heads, n_tokens, d)``;
            empty where the model is not to be run in parts.
        log_probabilities: of the answers' first tokens, ``(n_facts, 1 + n_samples)``.
        returns_tuple: whether this architecture's blocks return a tuple.
    """

    ids: Tensor
    embeddings: Tensor
    hidden: list[Tensor]
    clean: dict[str, list[Tensor]]
    cache: list[tuple[Tensor, Tensor]]
    log_probabilities: Tensor
    returns_tuple: bool


def noise_of(fact: TracedFact, samples: int, seed: int, width: int) -> Tensor:
    """Return standard normal noise for the subject's tokens; it depends on fact and seed alone.

    Returns:
        ``(samples, n_subject_tokens, width)``, on the CPU.
    """
    key = zlib.crc32(repr((fact.ids, fact.first, fact.last)).encode())
    generator = torch.Generator().manual_seed(key + seed)
    return torch.randn(samples, fact.last + 1 - fact.first, width, generator=generator)


@torch.no_grad()
def embedding_spread(model: PreTrainedModel, facts: Sequence[TracedFact]) -> float:
    """Return the standard deviation of all numbers in the embeddings of the subjects' tokens."""
    ids = [token for fact in facts for token in fact.ids[fact.first : fact.last + 1]]
    embedded = model.get_input_embeddings()(torch.tensor([ids], device=model.device))
    return float(embedded.double().std())


@torch.no_grad()
def run_corrupted(
    model: PreTrainedModel,
    modules: Mapping[str, Sequence[nn.Module]],
    facts: Sequence[TracedFact],
    noise: Sequence[Tensor],
    *,
    cached: bool,
) -> States:
    """Run facts clean and corrupted.

    Args:
        model: a causal language model in eval mode.
        modules: by kind, the modules of each layer that can be restored; ``hidden`` are the blocks.
        facts: n of them.
        noise: that is added to the embeddings of each subject, ``(n_samples, n_tokens, d_model)``.
        cached: whether to keep the attention's keys and values.
    """
    samples = len(noise[0])
    each = 1 + samples
    n_tokens = max(len(fact.ids) for fact in facts)
    rows = [fact.ids + [0] * (n_tokens - len(fact.ids)) for fact in facts for _ in range(each)]
    ids = torch.tensor(rows, device=model.device)
    kept = _Kept(len(rows), each)

    def corrupt(_module: nn.Module, _args: Any, output: Tensor) -> Tensor:
        noisy = output.clone()
        for place, (fact, added) in enumerate(zip(facts, noise, strict=True)):
            where = slice(place * each + 1, (place + 1) * each), slice(fact.first, fact.last + 1)
            noisy[where] = (noisy[where].float() + added.to(noisy.device)).to(noisy.dtype)
        kept.embeddings = noisy
        return noisy

    with ExitStack() as stack:
        hook = model.get_input_embeddings().register_forward_hook(corrupt)
        stack.callback(hook.remove)
        for kind, places in modules.items():
            for layer, module in enumerate(places):
                stack.enter_context(kept.outputs_of(module, kind, layer))
        cache = DynamicCache() if cached else None
        arguments: dict[str, Any] = {"input_ids": ids, "past_key_values": cache}
        ends = torch.tensor([len(fact.ids) - 1 for fact in facts]).repeat_interleave(each)
        positions = (torch.arange(len(rows)) * n_tokens + ends).to(model.device)
        logits = logits_at(model, {**arguments, "use_cache": cached}, positions)
    answers = torch.tensor([fact.answer for fact in facts]).repeat_interleave(each)
    found = logits.log_softmax(-1).gather(1, answers.to(model.device)[:, None])
    layers = cast("list[CacheLayerMixin]", cache.layers if cache is not None else [])
    return States(
        ids,
        kept.embeddings,
        kept.all_rows,
        {kind: list(kept.clean_rows[kind].values()) for kind in modules},
        [(cast(Tensor, layer.keys), cast(Tensor, layer.values)) for layer in layers],
        found.view(len(facts), each),
        kept.returns_tuple,
    )


class _Kept:
    """Outputs of modules: of the blocks all rows, of all modules the clean ones."""

    def __init__(self, n_rows: int, each: int) -> None:
        self.n_rows, self.each = n_rows, each
        self.embeddings = torch.empty(0)
        self.all_rows: list[Tensor] = []
        self.clean_rows: dict[str, dict[int, Tensor]] = {}
        self.returns_tuple = False

    def outputs_of(self, module: nn.Module, kind: str, layer: int) -> Any:
        """Keep a module's output within a context."""

        def keep(_module: nn.Module, _args: Any, output: Any) -> None:
            states = hidden_of(output)
            states = states.reshape(self.n_rows, -1, states.shape[-1])  # OPT's FFN: flat tokens
            self.clean_rows.setdefault(kind, {})[layer] = states[:: self.each].clone()
            if kind == "hidden":
                self.all_rows.append(states)
                self.returns_tuple = isinstance(output, tuple)

        return _hooked(module, keep)


@contextmanager
def _hooked(module: nn.Module, hook: Callable[..., Any]) -> Any:
    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()
