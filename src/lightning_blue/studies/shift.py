"""How far editing moves hidden states of factual prompts (Fig. 7, 9, 10 of the paper)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from matplotlib.figure import Figure
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from blue_callbacks.plans import PLANS
from lightning_blue.editing.lookups import states_at_lookups
from lightning_blue.language_model.architectures import Architecture, blocks
from lightning_blue.language_model.loading import load_language_model
from lightning_blue.language_model.tokens import Encoded
from lightning_blue.reporting.files import read_edits
from lightning_blue.reporting.plots import BELOW, BLUE, GREY, VERMILLION
from lightning_blue.runs.base import UneditedModel
from lightning_blue.runs.journal import HEADER, RECORDS, Journal
from lightning_blue.runs.undo import write_without
from lightning_blue.studies.bench import Bench
from lightning_blue.studies.distances import frechet_distance, linear_cka, relative_shift
from lightning_blue.studies.pictures import new_figure
from lightning_blue.studies.results import Result, Row, estimate
from lightning_blue.support.errors import InputError
from lightning_blue.support.seeds import run_seed

FEWEST = 4  # prompts; with fewer, no distribution can be compared


class Edit(NamedTuple):
    """What a run was asked to edit."""

    prompt: str
    subject: str


def shift(bench: Bench) -> Result:
    """Compare hidden states behind the last block, at the last token of factual prompts.

    Of the models of given runs, or of the records edited in batches of the run file's size with the
    plans ``even`` and ``boundary``.

    Raises:
        InputError: if there are too few prompts, or a run's model cannot be read or is another.
    """
    module, prompts = bench.module, factual_prompts(bench)

    def states() -> Tensor:
        return last_states(module.model, module.tokenizer, module.architecture, prompts)

    before = states()
    after: dict[str, Tensor] = {}
    if bench.settings.runs:
        folders = [Path(run) for run in bench.settings.runs]
        names = [folder.name for folder in folders]
        if len(set(names)) < len(names):
            names = [str(folder) for folder in folders]
        for name, folder in zip(names, folders, strict=True):
            after[name] = _of_run(bench, folder, prompts)
    else:
        for plan in ("even", "boundary"):
            with bench.edited(PLANS[plan](bench.layers), bench.batch_size):
                after[plan] = states()
    rows = [_row(name, before, moved) for name, moved in after.items()]
    figure = _figure(before, after, run_seed(bench.seed))
    return Result(rows, _finding(rows), figure)


def factual_prompts(bench: Bench) -> list[str]:
    """Return distinct prompts about facts that are not edited: control facts, then neighbours.

    Neither by a request, nor, with another prompt about its subject, by a run that is compared.
    """
    neighbours = [probe for request in bench.requests for probe in request.neighborhood]
    by_runs = [edit for run in bench.settings.runs for edit in edits_of(Path(run))]
    edited = {request.text for request in bench.requests} | {edit.prompt for edit in by_runs}
    subjects = {edit.subject for edit in by_runs}
    texts = [probe.prompt for probe in (*bench.controls, *neighbours)]
    found = [
        text
        for text in dict.fromkeys(texts)
        if text not in edited and not any(subject in text for subject in subjects)
    ]
    if len(found) < FEWEST:
        raise InputError(
            f"only {len(found)} factual prompts available, and {FEWEST} are the least",
            where="the data",
            hint="give requests with neighborhood_prompts, or more requests than are edited",
        )
    return found[: bench.settings.prompts]


def edits_of(run: Path) -> list[Edit]:
    """Return what a run was asked to edit.

    Raises:
        InputError: if its folder does not tell.
    """
    _require_run(run)
    return [Edit(str(row["prompt"]), str(row["subject"])) for row in read_edits(run)]


def last_states(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    architecture: Architecture,
    prompts: Sequence[str],
) -> Tensor:
    """Return the last block's output at the last token of each prompt, ``(n, d)``, on the CPU."""
    rows = [Encoded(ids, len(ids) - 1) for ids in tokenizer(list(prompts))["input_ids"]]
    last = blocks(model, architecture)[-1]
    with torch.no_grad():
        return states_at_lookups(model, rows, output_of=last).double().cpu()


def edited_model(run: Path) -> PreTrainedModel:
    """Return the edited model of a run: as it was exported, or put together from its records.

    Raises:
        InputError: if there is neither.
    """
    _require_run(run)
    if (run / "model").is_dir():
        return load_language_model(str(run / "model"))[0]
    journal = Journal(run)
    journal.require_edits()
    base = UneditedModel(journal.header.model, journal.header.weights)
    write_without(journal, {}, base, None)
    return base.model


def _require_run(run: Path) -> None:
    if not (run / "model").is_dir() and not (run / RECORDS / HEADER).is_file():
        raise InputError(
            "the run has neither a model nor records of its batches",
            where=str(run),
            hint="give the folder of a finished run, e.g. runs/quickstart",
        )


def _of_run(bench: Bench, run: Path, prompts: Sequence[str]) -> Tensor:
    """Return the states of a run's model, which must be an edited one of the bench's model."""
    header = run / RECORDS / HEADER
    if header.is_file():
        found = Journal(run).header.model.fingerprint
        if found != bench.module.identity:
            raise InputError(
                f"the run edited another model: its fingerprint is {found}, and that of the run "
                f"file's model {bench.module.identity}",
                where=str(run),
                hint="give the run file, model and dtype that the run was made with",
            )
    module, model = bench.module, edited_model(run)
    model.to(bench.device)  # type: ignore[arg-type]
    states = last_states(model, module.tokenizer, module.architecture, prompts)
    if states.shape[1] != module.model.config.get_text_config().hidden_size:
        raise InputError(
            "the run's model has states of another size",
            where=str(run),
            hint="give a run that edited the model of the run file",
        )
    return states


def _row(name: str, before: Tensor, after: Tensor) -> Row:
    moved = estimate(relative_shift(before, after))
    spread = float(before.var(dim=0).sum())
    distance = frechet_distance(before, after)
    return {
        "run": name,
        "prompts": len(before),
        "relative_shift": moved.mean,
        "standard_error": moved.error,
        "linear_cka": linear_cka(before, after),
        "frechet_distance": distance,
        "frechet_over_variance": distance / spread,
    }


def _figure(before: Tensor, after: Mapping[str, Tensor], seed: int) -> Figure:
    """Draw one t-SNE of all states together, a panel for each run."""
    from sklearn.manifold import TSNE  # a second to import

    points = torch.cat([before, *after.values()]).float().numpy()
    perplexity = min(30.0, (len(points) - 1) / 3)
    projection = TSNE(perplexity=perplexity, init="pca", random_state=seed)
    parts = torch.from_numpy(projection.fit_transform(points)).split(len(before))
    figure = new_figure(4.6 * len(after), 4.8)
    axes = figure.subplots(1, len(after), squeeze=False, sharex=True, sharey=True).flat
    for axis, (name, part) in zip(axes, zip(after, parts[1:], strict=True), strict=True):
        moves = torch.stack((parts[0], part))  # (2, n, 2)
        axis.plot(*moves.permute(2, 0, 1), color=GREY, linewidth=0.3, alpha=0.4, zorder=1)
        for points_, colour, text in ((parts[0], BLUE, "unedited"), (part, VERMILLION, "edited")):
            axis.scatter(
                *points_.T, s=6, color=colour, alpha=0.5, label=text, linewidths=0, zorder=2
            )
        axis.set_title(name, fontsize=10)
        axis.set_xticks([])
        axis.set_yticks([])
        axis.set_xlabel("t-SNE, fitted to all runs together")
    legend = figure.legend(*figure.axes[0].get_legend_handles_labels(), **BELOW, ncols=2)
    for handle in legend.legend_handles:
        handle.set_sizes([30])  # type: ignore[union-attr]
    return figure


def _finding(rows: Sequence[Row]) -> str:
    parts = [
        f"{row['run']} moves them by {row['relative_shift']:.1%} ± {row['standard_error']:.1%} of "
        f"their norm (linear CKA {row['linear_cka']:.3f}, Frechet distance "
        f"{row['frechet_over_variance']:.3f} of the variance)"
        for row in rows
    ]
    return f"on {rows[0]['prompts']} factual prompts that were not edited, {'; '.join(parts)}."
