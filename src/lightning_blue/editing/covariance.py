"""Second moments of keys over ordinary text: collected in one pass, kept in a file that knows them.

K0 K0^T of Eq. 4 is estimated as the mean of k k^T over tokens. Ten tokens for each key dimension
are enough ("Efficient Knowledge Editing via Minimal Precomputation"); the paper's 100,000 documents
remain a setting. Documents follow each other in the rows without padding and without a border but
what the tokenizer itself puts before a text (BOS), as in the model's own training: a token sees the
end of the document before its own. Products are formed and summed in float64: rounded to float32,
directions that ordinary text uses a millionth as much as others would be noise.
"""

from __future__ import annotations

import hashlib
import json
import logging
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from blue_callbacks.precision import in_float64
from blue_callbacks.ranges import COUNT, Range, check_ranges
from lightning_blue.data.corpus import (
    AUTO,
    corpus_fingerprint,
    corpus_texts,
    fitting_corpus,
    is_local,
    require_named,
)
from lightning_blue.editing.brought import MARK, BroughtStatistics
from lightning_blue.editing.convergence import UpdateChange
from lightning_blue.editing.covariance_file import (
    COMPUTE_AGAIN,
    Collected,
    CovarianceFile,
    mirrored,
)
from lightning_blue.editing.fingerprints import (
    marks_documents,
    model_fingerprint,
    tokenizer_fingerprint,
)
from lightning_blue.language_model.architectures import weight_view
from lightning_blue.language_model.batching import context_length, inference
from lightning_blue.language_model.states import is_finite, read_states
from lightning_blue.language_model.tokens import encode_prompts
from lightning_blue.language_model.vocabulary import check_vocabulary
from lightning_blue.support.errors import InputError
from lightning_blue.support.hub import missing_path
from lightning_blue.support.leftovers import sweep
from lightning_blue.support.processes import progress_bar
from lightning_blue.support.space import check_writable, require_space, size
from lightning_blue.support.storage import unless_full

log = logging.getLogger(__name__)

MAX_TOKENS_PER_DIM = 1_000_000  # more than any corpus holds
_BLOCKS = 4  # of columns, in which the upper triangle of a product is formed
_PROBE_SEQUENCES = 2
_PROBE_KEYS = 128
_BRING_BACK = (
    "bring the file back from a copy, or leave --model.covariance.path out to have it computed"
)


@dataclass(frozen=True)
class CovarianceSource:
    """Where covariances come from.

    Args:
        corpus: a text file, the name of a dataset on the hub with a column ``text`` (its
            configuration follows a colon), or a text of the package: ``plain_english``,
            ``almanac``. ``auto``: the almanac's for the model in the package, else plain English.
        split: split of a hub dataset.
        tokens_per_dim: tokens collected for each key dimension.
        max_length: tokens in a sequence, capped by the model's context.
        batch_tokens: tokens in a forward pass.
        cache: folder of the cached files; None keeps nothing.
        path: one given file instead of the cache; refused if it was made from anything else.
        trust: whether ``path`` is taken as it is, from wherever it comes: safetensors with
            ``layerN`` or the ``.npz`` of ROME and MEMIT, see `lightning_blue.editing.brought`.
        report_change: whether to keep with the file, and to log, by what fraction the update on
            keys of the text that follows still moves each time that the tokens double.
    """

    corpus: str = AUTO
    split: str = "train"
    tokens_per_dim: float = 10.0
    max_length: int = 512
    batch_tokens: int = 8192
    cache: str | None = "stats"
    path: str | None = None
    trust: bool = False
    report_change: bool = True

    def __post_init__(self) -> None:
        check_ranges(
            "model.covariance",
            vars(self),
            tokens_per_dim=Range(0, MAX_TOKENS_PER_DIM, above=True),
            max_length=COUNT,
            batch_tokens=COUNT,
        )
        require_named("model.covariance.corpus", self.corpus)
        if self.trust and not self.path:
            raise InputError(
                "no statistics are given that could be trusted",
                where="model.covariance.trust",
                hint="say where they are: --model.covariance.path FILE",
            )

    def fitting(self, tokenizer: PreTrainedTokenizerBase) -> CovarianceSource:
        """Return it with the text that ``auto`` stands for with a model of this tokenizer."""
        return replace(self, corpus=fitting_corpus(self.corpus, tokenizer))


class Statistics(NamedTuple):
    """Covariances, and what they are from.

    Attributes:
        covariances: layer -> ``(d_in, d_in)``, float64.
        about: text, tokens, documents and file, as far as they are known, as a report shows them.
        collected: layer -> how its covariance was collected.
    """

    covariances: dict[int, Tensor]
    about: dict[str, Any]
    collected: dict[int, Collected]


def collect_covariance(
    model: PreTrainedModel,
    projections: Mapping[int, nn.Module],
    sequences: Iterable[Sequence[int]],
    n_tokens: int,
    batch_tokens: int = 8192,
    on_doubling: Callable[[int, Mapping[int, Tensor]], None] | None = None,
) -> tuple[dict[int, Tensor], int]:
    """Average k k^T over the tokens of packed sequences, for all layers in one pass.

    Products are formed and summed in float64; the forward pass stops after the last layer that is
    wanted.

    Args:
        model: a causal language model.
        projections: layer -> the down projection whose input is the key.
        sequences: token ids, all of one length but the last.
        n_tokens: how many tokens to use.
        batch_tokens: tokens in a forward pass.
        on_doubling: called with the tokens so far and the covariances from them, where a pass ends
            nearest to a quarter and a half of the tokens, and after all of them. Where one pass
            holds all tokens, it is taken in two halves.

    Returns:
        layer -> ``(d_in, d_in)`` float64, and the number of tokens used.
    """
    sums: dict[int, Tensor] = {}
    seen, milestones = 0, [n_tokens / 4, n_tokens / 2] if on_doubling else []
    with (
        inference(model),
        progress_bar(n_tokens, "covariance", unit="token") as bar,
    ):
        for batch in _batches(sequences, n_tokens, batch_tokens):
            keys = read_keys(model, projections, batch)
            for piece in _pieces(sum(map(len, batch)), n_tokens):
                for layer, rows in keys.items():
                    _add_product(sums, layer, rows[piece])
                count = piece.stop - piece.start
                seen += count
                bar.update(count)
                reached = seen + count / 2
                if on_doubling and milestones and milestones[0] < reached and seen < n_tokens:
                    milestones = [each for each in milestones if each > reached]
                    on_doubling(seen, _means(sums, seen))
    means = _means(sums, seen)
    if on_doubling:
        on_doubling(seen, means)
    return means, seen


def read_keys(
    model: PreTrainedModel, projections: Mapping[int, nn.Module], batch: Sequence[Sequence[int]]
) -> dict[int, Tensor]:
    """Return layer -> keys of all tokens of equally long sequences, ``(n_tokens, d_in)``."""
    modules = {str(layer): module for layer, module in projections.items()}
    ids = torch.tensor(batch, device=model.device)
    states = read_states(model, {"input_ids": ids}, inputs_of=modules)
    return {layer: states[str(layer)].flatten(0, 1).float() for layer in projections}


def _pieces(count: int, n_tokens: int) -> list[slice]:
    """Divide the tokens of a pass: in two where it holds all, so that half of them can be seen."""
    middle = count // 2 if count >= n_tokens > 1 else 0
    return [slice(0, middle), slice(middle, count)] if middle else [slice(0, count)]


def _add_product(sums: dict[int, Tensor], layer: int, keys: Tensor) -> None:
    """Add K^T K of keys (n_tokens, d_in); it is symmetric, so that its upper triangle is enough."""
    d_in = keys.shape[1]
    keys = in_float64(keys)
    total = sums.setdefault(layer, keys.new_zeros(d_in, d_in))
    edges = [d_in * block // _BLOCKS for block in range(_BLOCKS + 1)]
    with torch.autocast(keys.device.type, enabled=False):
        for first, last in pairwise(edges):
            total[first:last, first:] += keys[:, first:last].T @ keys[:, first:]


def _means(sums: Mapping[int, Tensor], seen: int) -> dict[int, Tensor]:
    """Divide, and mirror the upper triangles; layer -> ``(d_in, d_in)``."""
    return {layer: mirrored(total / seen) for layer, total in sums.items()}


def _batches(
    sequences: Iterable[Sequence[int]], n_tokens: int, batch_tokens: int
) -> Iterator[list[Sequence[int]]]:
    """Group sequences of equal length into forward passes until there are enough tokens."""
    batch: list[Sequence[int]] = []
    taken = 0
    for whole in sequences:
        sequence = whole[: n_tokens - taken]
        if batch and (
            len(sequence) != len(batch[0]) or (len(batch) + 1) * len(sequence) > batch_tokens
        ):
            yield batch
            batch = []
        batch.append(sequence)
        taken += len(sequence)
        if taken >= n_tokens:
            break
    if batch:
        yield batch


def pack(
    tokenizer: PreTrainedTokenizerBase,
    documents: Iterable[str],
    length: int,
    starts: list[int] | None = None,
) -> Iterator[list[int]]:
    """Join the token ids of documents and cut them into sequences of ``length``, the last shorter.

    Args:
        tokenizer: a document is tokenised by itself, with what the tokenizer puts before a text.
        documents: see :func:`lightning_blue.data.corpus.corpus_texts`.
        length: tokens in a sequence.
        starts: takes up at which token each document begins that was read so far.
    """
    joined: list[int] = []
    read, documents = 0, iter(documents)
    while chunk := list(islice(documents, 64)):
        for ids in encode_prompts(tokenizer, chunk):
            if starts is not None:
                starts.append(read)
            joined += ids
            read += len(ids)
        for first in range(0, len(joined) - length + 1, length):
            yield joined[first : first + length]
        joined = joined[len(joined) // length * length :]
    if joined:
        yield joined


def covariance_file(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    source: CovarianceSource,
    layers: Sequence[int] = (),
) -> CovarianceFile:
    """Return the file in which the covariances of a model belong, existing or not.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer.
        source: the text, and the file.
        layers: those that are wanted, where statistics from elsewhere may be in a file for each.

    Raises:
        InputError: if a local text or statistics from elsewhere are missing.
    """
    if source.path and source.trust:
        return BroughtStatistics(source.path, layers)
    source = source.fitting(tokenizer)
    identity = {
        "model": model_fingerprint(model),
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "corpus": corpus_fingerprint(source.corpus, source.split),
        "tokens_per_dim": f"{source.tokens_per_dim:g}",
        "max_length": sequence_length(model, source),
    }
    if is_local(source.corpus) and marks_documents(tokenizer):
        identity["documents"] = "end at blank lines"  # and not at each line, as they once did
    hint = _BRING_BACK if source.path else COMPUTE_AGAIN
    return CovarianceFile(_path_of(source, model, identity), identity, hint)


def load_or_collect(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    projections: Mapping[int, nn.Module],
    source: CovarianceSource,
    weight: float | None = None,
) -> Statistics:
    """Return the covariances of layers, computing what no file holds.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer.
        projections: layer -> the down projection whose input is the key.
        source: the text, and the file.
        weight: lambda of Eq. 5, for the reported change of the update; None: one for each key
            dimension.

    Raises:
        InputError: if a given file belongs to something else, the corpus is too short, or what is
            missing would not fit into the cache. Where it cannot be written once it is collected,
            that is a warning.
    """
    if source.path and not source.trust and not Path(source.path).is_file():
        raise missing_path(source.path, where=f"model.covariance.path = {source.path}")
    source = source.fitting(tokenizer)
    if source.cache is None and not source.path:
        new, how = _collect(model, tokenizer, projections, source, weight)
        return Statistics(new, _about(None, source, how), how)
    file = covariance_file(model, tokenizer, source, list(projections))
    covariances = file.read({n: weight_view(p).shape[1] for n, p in projections.items()})
    collected = file.collected(list(projections))
    missing = {layer: module for layer, module in projections.items() if layer not in covariances}
    if missing and source.path:
        raise InputError(
            f"the covariance file has no layer {', '.join(map(str, missing))}",
            where=source.path,
            hint="leave covariance.path empty to have them computed",
        )
    if missing:
        _check_room(file.path, missing)
        new, how = _collect(model, tokenizer, missing, source, weight)
        covariances, collected = covariances | new, collected | how
        with unless_full("it will be collected again by the next run"):
            file.add(new, how)
            log.info("covariance of layers %s: %s", list(new), file.path)
    covariances = {layer: covariances[layer] for layer in projections}
    return Statistics(covariances, _about(file, source, collected), collected)


def _about(
    file: CovarianceFile | None, source: CovarianceSource, collected: Mapping[int, Collected]
) -> dict[str, Any]:
    """Say what covariances are from; what an older file does not say is left out."""
    if isinstance(file, BroughtStatistics):
        said = "brought from elsewhere; what model and text they are of was not checked"
        return {
            "covariance_file": str(file.path),
            "covariance_trusted": said,
            "covariance_sha256": file.identity[MARK],
        }
    layers = list(collected.values())
    counts = {
        "covariance_tokens": max((each.tokens or 0 for each in layers), default=0),
        "covariance_documents": max((each.documents or 0 for each in layers), default=0),
    }
    known = {name: count for name, count in counts.items() if count}
    kept = {} if file is None else {"covariance_file": str(file.path)}
    return {"covariance_text": source.corpus, **known, **kept}


def _check_room(path: Path, missing: Mapping[int, nn.Module]) -> None:
    """Refuse to collect what cannot be kept, and clear away what was left by others that died."""
    folder = path.parent
    d_in = weight_view(next(iter(missing.values()))).shape[1]
    needed = file_size(d_in, len(missing))
    check_writable(folder)
    sweep(folder)
    hint = "make room there, or choose another --model.covariance.cache"
    require_space(folder, needed, "covariances of the keys", hint)
    log.info("about %s of covariances will be written to %s", size(needed), folder)


def file_size(d_in: int, layers: int) -> int:
    """Return the bytes of a file of covariances: an upper triangle in float64 for each layer."""
    return 8 * d_in * (d_in + 1) // 2 * layers


def _collect(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    projections: Mapping[int, nn.Module],
    source: CovarianceSource,
    weight: float | None,
) -> tuple[dict[int, Tensor], dict[int, Collected]]:
    """Collect covariances, and say from what, and how far the update moved as tokens doubled."""
    d_in = weight_view(next(iter(projections.values()))).shape[1]
    wanted = round(source.tokens_per_dim * d_in)
    length = sequence_length(model, source)
    needed = -(-wanted // length)
    starts: list[int] = []
    packed = pack(tokenizer, corpus_texts(source.corpus, source.split), length, starts)
    sequences = list(islice(packed, needed + _PROBE_SEQUENCES))
    check_vocabulary(model, tokenizer, [source.corpus] * len(sequences), sequences)
    sequences, after = sequences[:needed], sequences[needed:]
    change = None
    if source.report_change and after:
        change = UpdateChange(_probe_keys(model, projections, after), weight)
    new, seen = collect_covariance(
        model, projections, sequences, wanted, source.batch_tokens, change
    )
    if seen < wanted:
        raise InputError(
            f"only {seen:,} of {wanted:,} tokens available in the corpus "
            f"({source.tokens_per_dim:g} for each of {d_in:,} key dimensions)",
            where=source.corpus,
            hint="give a longer text (--model.covariance.corpus), or lower "
            f"--model.covariance.tokens_per_dim to {seen / d_in:.2g}, at the price of accuracy",
        )
    _require_finite(new, source.corpus, "the keys overflow: try --model.dtype=bfloat16 or float32")
    changes = {} if change is None else change.changes
    for layer, each in changes.items():
        moved = ", ".join(f"{fraction:.1%} up to {tokens:,}" for tokens, fraction in each)
        log.info("layer %d: as the tokens doubled, the update moved by %s", layer, moved)
    documents = bisect_left(starts, seen)
    return new, {n: Collected(seen, documents, tuple(changes.get(n, ()))) for n in new}


def _require_finite(covariances: Mapping[int, Tensor], where: str, hint: str) -> None:
    bad = [str(layer) for layer, covariance in covariances.items() if not is_finite(covariance)]
    if bad:
        what = f"NaN or infinity in the covariance of layer {', '.join(bad)}"
        raise InputError(what, where=where, hint=hint)


def _probe_keys(
    model: PreTrainedModel, projections: Mapping[int, nn.Module], probe: Sequence[Sequence[int]]
) -> dict[int, Tensor]:
    """Return keys of evenly spaced tokens of the held-out text, ``(d_in, n)``."""
    whole = [sequence for sequence in probe if len(sequence) == len(probe[0])]
    with inference(model):
        keys = read_keys(model, projections, whole)
    return {layer: rows[:: max(1, len(rows) // _PROBE_KEYS)].T for layer, rows in keys.items()}


def _path_of(
    source: CovarianceSource, model: PreTrainedModel, identity: Mapping[str, object]
) -> Path:
    if source.path:
        return Path(source.path)
    key = hashlib.sha256(json.dumps(identity, default=str).encode()).hexdigest()[:12]
    name = Path(str(model.config.name_or_path)).name or model.config.model_type
    return Path(source.cache or "") / f"{name}-{key}.safetensors"


def sequence_length(model: PreTrainedModel, source: CovarianceSource) -> int:
    """Return how many tokens of text the model reads at once for its covariance."""
    return min(source.max_length, context_length(model) or source.max_length)
