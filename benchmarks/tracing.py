"""Part ``tracing``: causal tracing against one restoration at a time."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.results import Row
from benchmarks.timing import Clock
from benchmarks.workload import Workload
from lightning_blue.language_model.architectures import find_architecture
from lightning_blue.locating.corrupted import noise_of
from lightning_blue.locating.facts import TracedFact, as_tokens
from lightning_blue.locating.modules import KINDS, window
from lightning_blue.locating.tracing import CausalTracer, Trace


class Place(NamedTuple):
    """One restoration: of which fact, which output, in which layer, at which token."""

    fact: int
    kind: int
    layer: int
    position: int


@torch.no_grad()
def restore_one(
    model: Any,
    fact: TracedFact,
    noise: Tensor,
    together: Sequence[nn.Module],
    position: int,
    **options: Any,
) -> Tensor:
    """Return the answer's probability in each noisy row, with outputs restored at one token.

    As ROME's ``trace_with_patch``: a pass of a clean row and the noisy ones, whole prompts through
    all layers; outputs of the clean row are copied into the others.

    Args:
        model: a causal language model.
        fact: to be traced.
        noise: ``(n_samples, n_subject_tokens, d_model)``.
        together: modules whose outputs are restored.
        position: of the token.
        **options: of the model's forward pass.
    """
    ids = torch.tensor([fact.ids] * (1 + len(noise)), device=model.device)

    def corrupt(_module: nn.Module, _args: Any, output: Tensor) -> Tensor:
        output[1:, fact.first : fact.last + 1] += noise.to(output)
        return output

    def restore(_module: nn.Module, _args: Any, output: Any) -> None:
        states = output[0] if isinstance(output, tuple) else output
        states[1:, position] = states[0, position]

    with ExitStack() as stack:
        hook = model.get_input_embeddings().register_forward_hook(corrupt)
        stack.callback(hook.remove)
        for module in together:
            stack.callback(module.register_forward_hook(restore).remove)
        logits = model(input_ids=ids, use_cache=False, **options).logits[1:, -1]
    return logits.float().softmax(-1)[:, fact.answer]


def run_tracing(workload: Workload, args: Namespace, clock: Clock) -> list[Row]:
    """Trace a few facts in full; time the textbook way on an even sample of their restorations."""
    model = workload.model
    facts = as_tokens(workload.tokenizer, workload.requests[: args.facts])
    tracer = CausalTracer(model, find_architecture(model), samples=args.samples)
    layers = len(tracer.blocks)
    places = [
        Place(number, kind, layer, position)
        for number, fact in enumerate(facts)
        for kind in range(len(KINDS))
        for layer in range(layers)
        for position in fact.positions
    ]
    sample = places[:: max(1, len(places) // args.textbook_restorations)]
    tracer.trace(facts[:1])  # warm up
    _one_at_a_time(tracer, facts, sample[:1])
    rivals: dict[str, Callable[[], Any]] = {
        "ours": partial(tracer.trace, facts),
        "as ROME's code": partial(_one_at_a_time, tracer, facts, sample),
        "head at the last token": partial(_one_at_a_time, tracer, facts, sample, logits_to_keep=1),
    }
    found = clock.race(rivals, args.repeats, warm_up=False)
    ours = found.pop("ours")
    return [
        Row(
            "tracing",
            f"{len(facts)} facts, {args.samples} samples of noise; textbook: {name}",
            "restoration",
            ours=ours.median / len(places),
            textbook=textbook.median / len(sample),
            ours_peak=ours.peak,
            textbook_peak=textbook.peak,
            details={
                "restorations": len(places),
                "textbook_restorations": len(sample),
                "worst_ratio_of_probabilities": _worst(ours.result, textbook.result, facts, sample),
            },
        )
        for name, textbook in found.items()
    ]


def _one_at_a_time(
    tracer: CausalTracer, facts: Sequence[TracedFact], sample: Sequence[Place], **options: Any
) -> list[float]:
    """Return the mean probability over samples of noise at each place."""
    model = tracer.model
    width = int(model.config.hidden_size)
    assert tracer.noise is not None
    found = []
    for place in sample:
        fact, kind = facts[place.fact], KINDS[place.kind]
        noise = tracer.noise * noise_of(fact, tracer.samples, tracer.seed, width)
        around = window(place.layer, tracer.window, len(tracer.blocks))
        layers = [place.layer] if kind == "hidden" else around
        together = [tracer.modules[kind][layer] for layer in layers]
        answers = restore_one(model, fact, noise, together, place.position, **options)
        found.append(float(answers.mean()))
    return found


def _worst(
    traces: Sequence[Trace],
    found: Sequence[float],
    facts: Sequence[TracedFact],
    sample: Sequence[Place],
) -> float:
    """Return the largest factor, less 1, by which ours and the textbook's probabilities differ."""
    return max(
        abs(
            float(
                traces[place.fact].restored[
                    place.kind, place.layer, place.position - facts[place.fact].first
                ]
            )
            / reference
            - 1
        )
        for place, reference in zip(sample, found, strict=True)
    )
