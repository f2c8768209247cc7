"""Second moments of keys over ordinary text: collected in one pass, kept in a file that knows them.

K0 K0^T of Eq. 4 is estimated as the mean of k k^T over tokens. Ten tokens for each key dimension
are enough ("Efficient Knowledge Editing via Minimal Precomputation"); the paper's 100,000 documents
remain a setting. Texts follow each other in the rows without padding and without a border, as in
the model's own training: a token sees the end of the text before its own.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice, pairwise
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from blue_callbacks.precision import float64_device
from lightning_blue.data.corpus import corpus_fingerprint, corpus_texts
from lightning_blue.editing.convergence import Change, UpdateChange
from lightning_blue.language_model.architectures import n_layers, weight_view
from lightning_blue.language_model.batching import context_length, inference
from lightning_blue.language_model.states import is_finite, read_states
from lightning_blue.language_model.tokens import encode_prompts
from lightning_blue.language_model.vocabulary import check_vocabulary
from lightning_blue.support.errors import InputError
from lightning_blue.support.leftovers import sweep
from lightning_blue.support.processes import progress_bar
from lightning_blue.support.space import check_writable, require_space, size
from lightning_blue.support.storage import unless_full, whole_file, writing

log = logging.getLogger(__name__)

_SAMPLED_VALUES = 4096  # of each weight, for the fingerprint of a model
_BLOCKS = 4  # of columns, in which the upper triangle of a product is formed
_PROBE_SEQUENCES = 2
_PROBE_KEYS = 128
_CHANGE = "layer{}.change"  # in a file's metadata


@dataclass(frozen=True)
class CovarianceSource:
    """Where covariances come from.

    Args:
        corpus: ``almanac``, a text file, or the name of a dataset on the hub with a column
            ``text``; a hub dataset's configuration follows a colon.
        split: split of a hub dataset.
        tokens_per_dim: tokens collected for each key dimension.
        max_length: tokens in a sequence, capped by the model's context.
        batch_tokens: tokens in a forward pass.
        cache: folder of the cached files.
        path: one given file instead of the cache; refused if it was made from anything else.
        report_change: whether to keep with the file, and to log, by what fraction the update on
            keys of the text that follows still moves each time that the tokens double.
    """

    corpus: str = "almanac"
    split: str = "train"
    tokens_per_dim: float = 10.0
    max_length: int = 512
    batch_tokens: int = 8192
    cache: str = "stats"
    path: str | None = None
    report_change: bool = True


def collect_covariance(
    model: PreTrainedModel,
    projections: Mapping[int, nn.Module],
    sequences: Iterable[Sequence[int]],
    n_tokens: int,
    batch_tokens: int = 8192,
    on_doubling: Callable[[int, Mapping[int, Tensor]], None] | None = None,
) -> tuple[dict[int, Tensor], int]:
    """Average k k^T over the tokens of packed sequences, for all layers in one pass.

    Products are formed in float32 and summed in float64; the forward pass stops after the last
    layer that is wanted.

    Args:
        model: a causal language model.
        projections: layer -> the down projection whose input is the key.
        sequences: token ids, all of one length but the last.
        n_tokens: how many tokens to use.
        batch_tokens: tokens in a forward pass.
        on_doubling: called with the tokens so far and the covariances from them, where a pass ends
            nearest to a quarter and a half of the tokens, and after all of them.

    Returns:
        layer -> ``(d_in, d_in)`` float32, and the number of tokens used.
    """
    sums: dict[int, Tensor] = {}
    seen, milestones = 0, [n_tokens / 4, n_tokens / 2] if on_doubling else []
    with (
        inference(model),
        progress_bar(n_tokens, "covariance", unit="token") as bar,
    ):
        for batch in _batches(sequences, n_tokens, batch_tokens):
            keys = read_keys(model, projections, batch)
            count = sum(map(len, batch))
            for layer in projections:
                _add_product(sums, layer, keys.pop(layer))
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


def _add_product(sums: dict[int, Tensor], layer: int, keys: Tensor) -> None:
    """Add K^T K of keys (n_tokens, d_in); it is symmetric, so that its upper triangle is enough."""
    d_in = keys.shape[1]
    where = float64_device(keys.device)
    if layer not in sums:
        sums[layer] = torch.zeros(d_in, d_in, dtype=torch.float64, device=where)
    total = sums[layer]
    edges = [d_in * block // _BLOCKS for block in range(_BLOCKS + 1)]
    with torch.autocast(keys.device.type, enabled=False):
        for first, last in pairwise(edges):
            total[first:last, first:] += (keys[:, first:last].T @ keys[:, first:]).to(where)


def _means(sums: Mapping[int, Tensor], seen: int) -> dict[int, Tensor]:
    """Divide, and mirror the upper triangles; layer -> ``(d_in, d_in)`` float32."""
    upper = {layer: (total / seen).float() for layer, total in sums.items()}
    return {layer: mean.triu() + mean.triu(1).T for layer, mean in upper.items()}


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
    tokenizer: PreTrainedTokenizerBase, texts: Iterable[str], length: int
) -> Iterator[list[int]]:
    """Join the token ids of texts and cut them into sequences of ``length``, the last shorter."""
    joined: list[int] = []
    texts = iter(texts)
    while chunk := list(islice(texts, 64)):
        for ids in encode_prompts(tokenizer, chunk):
            joined += ids
        while len(joined) >= length:
            yield joined[:length]
            joined = joined[length:]
    if joined:
        yield joined


class CovarianceFile:
    """A safetensors file of covariances that names what they were computed from.

    Args:
        path: the file.
        identity: what the covariances depend on; a file with another identity is refused.
    """

    def __init__(self, path: Path, identity: Mapping[str, object]) -> None:
        self.path = path
        self.identity = {key: str(value) for key, value in identity.items()}

    def read(self, layers: Sequence[int]) -> dict[int, Tensor]:
        """Return those of the layers that the file holds; nothing if there is no file.

        Raises:
            InputError: if the file was computed from something else, is no such file, or holds NaN
                or infinity.
        """
        with self._opened() as file:
            names = set(file.keys()) if file else set()
            kept = {n: file.get_tensor(f"layer{n}") for n in layers if f"layer{n}" in names}
            _require_finite(kept, str(self.path), "delete the file; it will be computed again")
            return kept

    def holds(self, layers: Sequence[int]) -> bool:
        """Return whether the file is there and holds all of the layers.

        Raises:
            InputError: as `read` does.
        """
        with self._opened() as file:
            return file is not None and {f"layer{n}" for n in layers} <= set(file.keys())

    def changes(self, layers: Sequence[int]) -> dict[int, list[Change]]:
        """Return how far the update still moved, for those of the layers of which it is known.

        Raises:
            InputError: as `read` does.
        """
        with self._opened() as file:
            notes = (file.metadata() or {}) if file else {}
        stored = {layer: json.loads(notes.get(_CHANGE.format(layer), "[]")) for layer in layers}
        known = {layer: changes for layer, changes in stored.items() if changes}
        return {layer: [Change(*each) for each in changes] for layer, changes in known.items()}

    @contextmanager
    def _opened(self) -> Iterator[Any]:
        """Open and verify the file; None if there is none."""
        if not self.path.exists():
            yield None
            return
        try:
            with safe_open(self.path, framework="pt") as file:
                self._verify(file.metadata() or {})
                yield file
        except InputError:
            raise
        except Exception as error:
            raise InputError(
                f"the covariance file cannot be read: {error}",
                where=str(self.path),
                hint="delete it; it will be computed again",
            ) from error

    def _verify(self, metadata: Mapping[str, str]) -> None:
        for key, value in self.identity.items():
            if metadata.get(key) != value:
                raise InputError(
                    f"this covariance file was computed from another {key}: "
                    f"{metadata.get(key, 'unknown')}, now {value}",
                    where=str(self.path),
                    hint="give the file that belongs to this model and corpus, or leave "
                    "covariance.path empty to have it computed",
                )

    def write(
        self,
        covariances: Mapping[int, Tensor],
        changes: Mapping[int, Sequence[Change]] = MappingProxyType({}),
    ) -> None:
        """Write the file atomically.

        Args:
            covariances: layer -> ``(d_in, d_in)``.
            changes: layer -> how far the update moved as the tokens doubled.

        Raises:
            InputError: if the disk is full or the folder cannot be written.
        """
        tensors = {f"layer{layer}": c.cpu().contiguous() for layer, c in covariances.items()}
        notes = {_CHANGE.format(layer): json.dumps(change) for layer, change in changes.items()}
        with writing(self.path), whole_file(self.path) as partial:
            save_file(tensors, partial, metadata={**self.identity, **notes})


def covariance_file(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, source: CovarianceSource
) -> CovarianceFile:
    """Return the file in which the covariances of a model belong, existing or not."""
    identity = {
        "model": model_fingerprint(model),
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "corpus": corpus_fingerprint(source.corpus, source.split),
        "tokens_per_dim": f"{source.tokens_per_dim:g}",
        "max_length": _sequence_length(model, source),
    }
    return CovarianceFile(_path_of(source, model, identity), identity)


def load_or_collect(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    projections: Mapping[int, nn.Module],
    source: CovarianceSource,
    weight: float = 15_000,
) -> dict[int, Tensor]:
    """Return layer -> covariance ``(d_in, d_in)``, computing what no file holds.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer.
        projections: layer -> the down projection whose input is the key.
        source: the text, and the file.
        weight: lambda of Eq. 5, for the reported change of the update; the paper's by default.

    Raises:
        InputError: if a given file belongs to something else, the corpus is too short, or what is
            missing would not fit into the cache. Where it cannot be written once it is collected,
            that is a warning.
    """
    file = covariance_file(model, tokenizer, source)
    covariances = file.read(list(projections))
    missing = {layer: module for layer, module in projections.items() if layer not in covariances}
    if missing and source.path:
        raise InputError(
            f"the covariance file has no layer {', '.join(map(str, missing))}",
            where=source.path,
            hint="leave covariance.path empty to have them computed",
        )
    if missing:
        _check_room(file.path, missing)
        new, change = _collect(model, tokenizer, missing, source, weight)
        covariances |= new
        every = range(n_layers(model))
        with unless_full("it will be collected again by the next run"):
            file.write({**file.read(every), **new}, {**file.changes(every), **change})
            log.info("covariance of layers %s: %s", list(new), file.path)
    return {layer: covariances[layer] for layer in projections}


def _check_room(path: Path, missing: Mapping[int, nn.Module]) -> None:
    """Refuse to collect what cannot be kept, and clear away what was left by others that died."""
    folder = path.parent
    d_in = weight_view(next(iter(missing.values()))).shape[1]
    needed = 4 * d_in**2 * len(missing)
    check_writable(folder)
    sweep(folder)
    hint = "make room there, or choose another --model.covariance.cache"
    require_space(folder, needed, "covariances of the keys", hint)
    log.info("about %s of covariances will be written to %s", size(needed), folder)


def _collect(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    projections: Mapping[int, nn.Module],
    source: CovarianceSource,
    weight: float,
) -> tuple[dict[int, Tensor], dict[int, list[Change]]]:
    """Collect covariances, and how far the update still moved as the tokens doubled."""
    d_in = weight_view(next(iter(projections.values()))).shape[1]
    wanted = round(source.tokens_per_dim * d_in)
    length = _sequence_length(model, source)
    needed = -(-wanted // length)
    packed = pack(tokenizer, corpus_texts(source.corpus, source.split), length)
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
            hint="give a longer text, or lower --covariance.tokens_per_dim",
        )
    _require_finite(new, source.corpus, "the keys overflow: try --model.dtype=bfloat16 or float32")
    if change is None:
        return new, {}
    known = {layer: changes for layer, changes in change.changes.items() if changes}
    for layer, changes in known.items():
        moved = ", ".join(f"{fraction:.1%} up to {tokens:,}" for tokens, fraction in changes)
        log.info("layer %d: as the tokens doubled, the update moved by %s", layer, moved)
    return new, known


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


def model_fingerprint(model: PreTrainedModel) -> str:
    """Hash the names, shapes and an even sample of the values of all weights."""
    digest = hashlib.sha256()
    for name, weight in model.state_dict().items():
        digest.update(f"{name}{tuple(weight.shape)}".encode())
        stride = max(1, weight.numel() // _SAMPLED_VALUES)
        sample = weight.detach().flatten()[::stride].float().cpu()
        digest.update(sample.contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash a tokenizer's vocabulary and special tokens."""
    described = json.dumps([sorted(tokenizer.get_vocab().items()), tokenizer("a b")["input_ids"]])
    return hashlib.sha256(described.encode()).hexdigest()[:16]


def _path_of(
    source: CovarianceSource, model: PreTrainedModel, identity: Mapping[str, object]
) -> Path:
    if source.path:
        return Path(source.path)
    key = hashlib.sha256(json.dumps(identity, default=str).encode()).hexdigest()[:12]
    name = Path(str(model.config.name_or_path)).name or model.config.model_type
    return Path(source.cache) / f"{name}-{key}.safetensors"


def _sequence_length(model: PreTrainedModel, source: CovarianceSource) -> int:
    return min(source.max_length, context_length(model) or source.max_length)
