"""Part ``covariance``: second moments of keys of several layers over ordinary text."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain

from torch import Tensor

from benchmarks import textbook
from benchmarks.floor import costs_of, covariance_operations
from benchmarks.results import Row
from benchmarks.timing import Clock
from benchmarks.workload import Workload, load_texts, shared_folder
from lightning_blue.editing.collecting import collect_covariance, pack

MAX_LENGTH = 512


def run_covariance(workload: Workload, args: Namespace, clock: Clock) -> list[Row]:
    """Collect the covariances of all critical layers over the same text, both ways in turn.

    Both read as many tokens. The textbook takes one text at a time and one full pass for each
    layer; a second row lets its passes stop after the layer, which published code does.
    """
    model, tokenizer = workload.model, workload.tokenizer
    layers, n_tokens = args.critical, args.tokens
    length = min(MAX_LENGTH, model.config.max_position_embeddings)
    texts = load_texts(shared_folder())
    modules = {layer: textbook.down_projection(model, layer) for layer in layers}
    packed = list(pack(tokenizer, texts, length))
    whole = list(text_sequences(tokenizer, texts, length, n_tokens))

    def ours(sequences: Iterable[Sequence[int]] = packed, n: int = n_tokens) -> dict[int, Tensor]:
        return collect_covariance(model, modules, sequences, n)[0]

    def plain(stop: bool = False) -> dict[int, Tensor]:
        return {
            layer: textbook.collect_covariance(model, layer, whole, stop=stop) for layer in layers
        }

    rivals: dict[str, Callable[[], dict[int, Tensor]]]
    rivals = {"ours": ours, "textbook": plain, "stopped": lambda: plain(stop=True)}
    samples = clock.race(rivals, args.repeats, warm_up=False)
    lengths = [length] * (n_tokens // length) + [n_tokens % length]
    read = sum(map(len, whole))
    floor = covariance_operations(costs_of(model), lengths, layers) / clock.rate
    found = ours(whole, read)
    differences = [
        float((found[layer] - moment).norm() / moment.norm())
        for layer, moment in samples["textbook"].result.items()
    ]
    common = {
        "unit": "1,000 tokens",
        "ours": samples["ours"].median / n_tokens * 1000,
        "floor": floor / n_tokens * 1000,
        "ours_peak": samples["ours"].peak,
    }
    details = {
        "tokens": n_tokens,
        "textbook_tokens": read,
        "mean_text_length": read / len(whole),
        "seconds": {name: s.seconds for name, s in samples.items()},
        "worst_relative_difference": max(differences),
    }
    name = f"{len(layers)} layers, {', '.join(map(str, layers))}"
    return [
        Row(
            "covariance",
            f"{name}; {case}",
            textbook=samples[rival].median / read * 1000,
            textbook_peak=samples[rival].peak,
            details=details,
            **common,
        )
        for rival, case in (("textbook", "full passes"), ("stopped", "passes that stop"))
    ]


def text_sequences(
    tokenizer: object, texts: Sequence[str], length: int, n_tokens: int
) -> Iterator[list[int]]:
    """Yield the token ids of one text after another, capped, until there are enough tokens."""
    taken = 0
    for ids in chain.from_iterable(
        tokenizer(texts[start : start + 64], verbose=False)["input_ids"]  # type: ignore[operator]
        for start in range(0, len(texts), 64)
    ):
        sequence = ids[: min(length, n_tokens - taken)]
        taken += len(sequence)
        if sequence:
            yield sequence
        if taken >= n_tokens:
            return
