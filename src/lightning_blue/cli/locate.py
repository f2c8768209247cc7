"""The command ``locate``: which layers a model recalls facts in, and where editing works."""

from __future__ import annotations

import copy
import logging
import math
import sys
import warnings
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

from scipy.stats import spearmanr

from blue_callbacks import ClosedFormUpdate
from blue_callbacks.plans import LayerUpdate
from lightning_blue.cli.found import located_folder
from lightning_blue.cli.parser import EditCLI
from lightning_blue.data.datamodule import EditDataModule
from lightning_blue.data.hub import ALMANAC
from lightning_blue.data.requests import EditRequest
from lightning_blue.editing.decisions import decisions
from lightning_blue.editing.module import EditModule
from lightning_blue.locating import FILE
from lightning_blue.locating.effects import Effects, around_the_peak, average
from lightning_blue.locating.facts import as_tokens, find_known
from lightning_blue.locating.probe import ProbeResult, candidates, probe_layers, probe_requests
from lightning_blue.locating.report import Located, as_text, write
from lightning_blue.locating.tracing import CausalTracer
from lightning_blue.support.errors import InputError
from lightning_blue.support.seeds import run_seed
from lightning_blue.support.space import check_writable
from lightning_blue.support.text import counted

log = logging.getLogger(__name__)


def locate(own: Namespace, for_fit: Sequence[str]) -> int:
    """Trace known facts, try edits in single layers, and write what came of it into a folder.

    Args:
        own: arguments of the command itself.
        for_fit: keys of `fit`.

    Raises:
        InputError: for what cannot be used; nothing is written then.
    """
    folder = Path(own.output) if own.output else located_folder(own.model, own.data or ALMANAC)
    _require_free(folder, own.force)
    check_writable(folder)
    named = {"model.name_or_path": own.model, "data.path": own.data}
    args = [f"--{key}={value}" for key, value in named.items() if value is not None]
    cli = EditCLI([*for_fit, *args], "locate")
    if cli.datamodule.path == ALMANAC and own.model != ALMANAC:
        raise InputError(
            "no facts are given that this model may know",
            where="--data",
            hint="give facts with what the model says now: --data=FILE",
        )
    (update,) = (c for c in cli.trainer.callbacks if isinstance(c, ClosedFormUpdate))  # type: ignore[attr-defined]
    module = cli.model.to(cli.trainer.strategy.root_device)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the summary says what is worth it
        located = examine(
            module, cli.datamodule, update, own, str(cli.config["trainer.accelerator"])
        )
    write(located, folder)
    sys.stdout.write(as_text(located, folder))
    return 0


def examine(
    module: EditModule,
    data: EditDataModule,
    update: ClosedFormUpdate,
    own: Namespace,
    accelerator: str,
) -> Located:
    """Find known facts, trace them, and probe layers; the model is left as it was.

    Args:
        module: the model, unedited, on its device.
        data: the facts.
        update: how the probe writes.
        own: arguments of the command: how many facts, samples, layers.
        accelerator: of the Trainer.

    Raises:
        InputError: if no fact is known, or the model's modules cannot be found.
    """
    seed = run_seed(module.seed)
    tracer = CausalTracer(module.model, module.architecture, samples=own.samples, seed=seed)
    requests, notes = _read(data, module)
    known = find_known(
        module.model, module.tokenizer, requests, max(own.facts, own.probe_facts), seed
    )
    traced = known.facts[: own.facts]
    tokens = as_tokens(module.tokenizer, traced)
    traces = tracer.trace(tokens)
    effects = average(tokens, traces)
    usable = usable_layers(module)
    tracing = around_the_peak(effects, usable)
    probe = None
    if own.probe_facts:
        edits = probe_requests(known.facts, requests, module, seed)[: own.probe_facts]
        if len(edits) > 1:
            chosen = candidates(usable, own.probe_layers, tracing.peak)
            probe = _probe(module, update, edits, chosen, usable, seed, accelerator)
        else:
            notes.append("no direct probe: fewer than 2 facts that could be edited and measured")
    assert tracer.noise is not None
    return Located(
        model=own.model,
        identity=module.identity,
        data=str(data.path),
        asked=known.asked,
        facts=traced,
        tokens=tokens,
        traces=traces,
        samples=own.samples,
        noise=tracer.noise,
        window=tracer.window,
        effects=effects,
        tracing=tracing,
        probe=probe,
        agreement=rank_correlation(effects, probe),
        by_depth=module.propose_layers(),
        notes=notes,
    )


def usable_layers(module: EditModule) -> list[int]:
    """Return the layers that can be edited, without the last: a block must read what is written."""
    return [layer for layer in module.editable_layers if layer < len(module.blocks) - 1]


def rank_correlation(effects: Effects, probe: ProbeResult | None) -> float:
    """Return how alike both curves rank the probe's layers, Spearman's; NaN where undefined."""
    if probe is None or len(probe.scores) < 3:
        return math.nan
    curve = effects.ffn_curve()
    pairs = [(curve[each.layer].mean, each.score.mean) for each in probe.scores]
    return float(spearmanr(*zip(*pairs, strict=True)).statistic)


def _probe(
    module: EditModule,
    update: ClosedFormUpdate,
    edits: Sequence[EditRequest],
    layers: Sequence[int],
    usable: Sequence[int],
    seed: int,
    accelerator: str,
) -> ProbeResult:
    written = copy.deepcopy(update)
    written.layers, written.proposed = list(layers), False
    written.layer_updates = [LayerUpdate(layer, layer, 1.0) for layer in layers]
    for sentence in decisions(module, written):
        log.info("decided for the probe: %s", sentence)
    return probe_layers(module, written, edits, layers, usable, seed=seed, accelerator=accelerator)


def _read(data: EditDataModule, module: EditModule) -> tuple[list[EditRequest], list[str]]:
    """Read the facts; return notes on those that cannot be used."""
    found = data.sort_out(
        module.tokenizer, module.max_length, module.contexts_length, module.embeddings
    )
    if not found.chosen:
        raise InputError(
            "no usable facts",
            where=f"--data: {found.total:,} read, {len(found.rejected):,} unusable",
            hint="`lightning-blue check MODEL --data FILE` says of each what is wrong with it",
        )
    notes = []
    if found.rejected:
        notes.append(
            f"{len(found.rejected):,} of {counted(found.total, 'fact')} are not used, the first: "
            f"{found.rejected[0]}"
        )
    return found.chosen, notes


def _require_free(folder: Path, force: bool) -> None:
    if (folder / FILE).exists() and not force:
        raise InputError(
            "there is what an earlier call found",
            where=f"--output {folder}",
            hint="give another folder with --output=FOLDER, or write over it with --force",
        )
