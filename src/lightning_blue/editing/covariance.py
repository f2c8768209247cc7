"""Where the covariances of keys come from: a file that knows what they are of, or else a text.

Ten tokens of ordinary text for each key dimension are enough ("Efficient Knowledge Editing via
Minimal Precomputation"); the paper's 100,000 documents remain a setting.
"""

from __future__ import annotations

import hashlib
import json
import logging
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from blue_callbacks.ranges import COUNT, Range, check_ranges
from lightning_blue.data.corpus import (
    AUTO,
    corpus_fingerprint,
    corpus_texts,
    fitting_corpus,
    is_local,
    require_named,
    require_own_text,
)
from lightning_blue.editing.brought import MARK, BroughtStatistics
from lightning_blue.editing.collecting import collect_covariance, pack, read_keys
from lightning_blue.editing.convergence import UpdateChange
from lightning_blue.editing.covariance_file import COMPUTE_AGAIN, Collected, CovarianceFile
from lightning_blue.editing.fingerprints import (
    marks_documents,
    model_fingerprint,
    tokenizer_fingerprint,
)
from lightning_blue.language_model.architectures import weight_view
from lightning_blue.language_model.batching import context_length, inference
from lightning_blue.language_model.states import is_finite
from lightning_blue.language_model.vocabulary import check_vocabulary
from lightning_blue.support.errors import InputError
from lightning_blue.support.hub import missing_path
from lightning_blue.support.leftovers import sweep
from lightning_blue.support.space import check_writable, require_space, size
from lightning_blue.support.storage import unless_full

log = logging.getLogger(__name__)

MAX_TOKENS_PER_DIM = 1_000_000  # more than any corpus holds
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

    def require_own_text(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Refuse a text of the package that is another model's, where a text is what counts.

        Raises:
            InputError: naming the text.
        """
        if not self.trust:
            require_own_text(self.corpus, tokenizer)


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
