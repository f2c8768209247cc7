"""Check everything that a run needs, in the order in which it would fail."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from blue_callbacks import ClosedFormUpdate, EditGuard
from lightning_blue.data.corpus import require_own_text
from lightning_blue.data.datamodule import EditDataModule
from lightning_blue.data.requests import EditRequest
from lightning_blue.editing.covariance import covariance_file, file_size
from lightning_blue.editing.module import EditModule
from lightning_blue.editing.prompts import edit_prompts
from lightning_blue.editing.targets import MAX_TOKENS
from lightning_blue.language_model.architectures import down_projection, weight_view
from lightning_blue.metrics.callback import MeasureEdits
from lightning_blue.preflight.estimate import (
    MEMORY_RANGE,
    RANGE,
    editing_memory,
    parts,
    workload,
)
from lightning_blue.preflight.facts import Requests, see, sort_requests
from lightning_blue.preflight.model import look_at, measure_additivity
from lightning_blue.preflight.report import Cost, Report, Settings
from lightning_blue.preflight.timing import Shared, measure_rates, spread
from lightning_blue.reporting.disk_space import size_of_run
from lightning_blue.reporting.record import RunRecord
from lightning_blue.support.errors import InputError
from lightning_blue.support.memory import available_memory
from lightning_blue.support.space import free_space, size
from lightning_blue.support.text import counted

SAMPLE = 32  # requests whose length stands for all


@dataclass
class Plans:
    """What a run would be made of.

    Attributes:
        module: the model, on the run's device.
        data: the facts.
        update, measure, guard, run: the callbacks.
        layers_proposed: whether the critical layers are, and were not given.
    """

    module: EditModule
    data: EditDataModule
    update: ClosedFormUpdate
    measure: MeasureEdits
    guard: EditGuard
    run: RunRecord
    layers_proposed: bool = False

    @property
    def written(self) -> list[int]:
        """Layers that the plan writes, ascending."""
        return sorted(set(self.update.written_layers))


def examine(plans: Plans, *, facts: int, tokens: int, given: bool) -> Report:
    """Check a model and facts; nothing is written to either.

    Args:
        plans: of the run.
        facts: that the model is asked about, at most.
        tokens: that it says of each.
        given: whether the facts are a user's, and not the package's in the place of any.

    Raises:
        InputError: for what cannot be checked: layers that the model has not, data that cannot be
            read.
        NonFiniteError: if a target's loss is not finite.
    """
    module, data, update = plans.module, plans.data, plans.update
    module.check_layers(update.layers)
    found = data.sort_out(
        module.tokenizer, module.max_length, module.contexts_length, module.embeddings
    )
    requests = sort_requests(found, data.batch_size) if given else None
    problems, notes = _problems(plans, requests)
    additivity, fault = (
        measure_additivity(module, plans.written, found.chosen) if found.chosen else ([], None)
    )
    problems += [] if fault is None else [fault]
    cost = None
    if found.chosen and fault is None:
        cost = estimate_cost(plans, found.chosen, stand_ins=not given)
        problems += _too_much(cost)
    seen = see(module, found.chosen[:facts], tokens) if given else []
    known = sum(fact.known_already for fact in seen)
    notes += [f"{known} of the {len(seen)} facts shown are said already"] if known else []
    return Report(
        model=look_at(module, plans.written[0]),
        settings=_settings(plans, measured=bool(additivity) and fault is None),
        additivity=additivity,
        requests=requests,
        facts=seen,
        cost=cost,
        problems=problems,
        notes=notes,
    )


def estimate_cost(plans: Plans, requests: Sequence[EditRequest], *, stand_ins: bool) -> Cost:
    """Estimate time, memory and disk of a run.

    Args:
        plans: of the run; the target site is measured.
        requests: that will be edited.
        stand_ins: whether they are facts of the package.
    """
    module, update, source = plans.module, plans.update, plans.module.covariance
    resident, available = _resident(module), available_memory(module.device)
    file = covariance_file(module.model, module.tokenizer, source, plans.written)
    missing = [layer for layer in plans.written if not file.holds([layer])]
    d_in = max(_shape(module, layer)[1] for layer in plans.written)
    work = workload(
        requests,
        plans.data.batch_size,
        update,
        plans.measure,
        plans.guard,
        missing_layers=len(missing),
        tokens=round(source.tokens_per_dim * d_in),
        compared=source.report_change,
        controls=plans.data.controls_at_most,
    )
    with Shared(module.device) as timing:
        rates = measure_rates(module, update, requests, plans.measure.tokens_per_batch)
    timed = parts(work, rates)
    seconds = sum(part.seconds for part in timed)
    memory = resident + _memory(plans, requests)
    return Cost(
        edits=len(requests),
        parts=timed,
        seconds=(RANGE[0] * seconds / timing.slowed, RANGE[1] * seconds),
        slowed=timing.slowed,
        memory=(MEMORY_RANGE[0] * memory, MEMORY_RANGE[1] * memory),
        memory_available=available + resident,
        disk=_disk(plans, len(requests)),
        disk_free=free_space(Path(plans.run.root)),
        folder=plans.run.root,
        covariance_file=str(file.path),
        covariance_bytes=file_size(d_in, len(missing)),
        stand_ins=stand_ins,
    )


def _memory(plans: Plans, requests: Sequence[EditRequest]) -> int:
    """Return the bytes that editing takes beside the model."""
    module, update = plans.module, plans.update
    return editing_memory(
        [_shape(module, layer) for layer in plans.written],
        edits=len(requests),
        batch_tokens=_tokens_at_once(plans, requests),
        token_bytes=module.target_finder.token_bytes(update.layer_updates[0].target_layer),
        half_precision=module.model.dtype.itemsize < 4,
        transformed=update.post_edit_transform is not None,
    )


def _disk(plans: Plans, edits: int) -> int:
    """Return the bytes that a run writes into its folder."""
    return size_of_run(
        [plans.update],
        plans.module,
        edits,
        plans.data.batch_size,
        export=plans.run.export,
        checkpoint_every=plans.run.checkpoint_every,
    ).total


def _problems(plans: Plans, requests: Requests | None) -> tuple[list[str], list[str]]:
    """Say what `fit` would refuse of the text and the facts, and what it would warn of."""
    module = plans.module
    problems: list[str] = []
    notes: list[str] = []
    if not module.covariance.trust:
        try:
            require_own_text(module.covariance.corpus, module.tokenizer)
        except InputError as error:
            problems.append(str(error))
    if requests is None:
        return problems, notes
    if not requests.usable:
        problems.append("no fact can be edited")
    if requests.unusable:
        total = counted(requests.total, "fact")
        count = f"{len(requests.unusable):,} of {total} cannot be used (above)"
        if plans.data.on_unusable == "skip":
            notes.append(f"{count}: they are left out (data.on_unusable=skip)")
        else:
            problems.append(
                f"{count}: correct them, or go on without them: --data.on_unusable=skip"
            )
    return problems, notes


def _too_much(cost: Cost) -> list[str]:
    """Say what the run cannot have on this machine."""
    problems = []
    if cost.memory[0] > cost.memory_available:
        problems.append(
            f"at least {size(cost.memory[0])} of memory are needed, and "
            f"{size(cost.memory_available)} can be had: --model.dtype=bfloat16 halves the model, "
            "fewer layers take fewer covariances"
        )
    needed = cost.disk + cost.covariance_bytes
    if cost.disk_free is not None and needed > cost.disk_free:
        problems.append(
            f"{size(needed)} are needed on the disk, and {size(cost.disk_free)} are free: make "
            "room there, choose another --run.root, or write less (--run.export=false)"
        )
    return problems


def _settings(plans: Plans, measured: bool) -> Settings:
    module, update = plans.module, plans.update
    return Settings(
        layers=list(update.layers),
        proposed=plans.layers_proposed,
        plan=update.plan,
        written=plans.written,
        site=module.site.name if measured else None,
        site_note=module.site.note,
        device=str(module.device),
        batch_size=plans.data.batch_size,
    )


def _shape(module: EditModule, layer: int) -> tuple[int, int]:
    d_out, d_in = weight_view(down_projection(module.blocks[layer], module.architecture)).shape
    return d_out, d_in


def _tokens_at_once(plans: Plans, requests: Sequence[EditRequest]) -> int:
    """Return how many tokens of targets are optimised together."""
    sample = spread(requests, SAMPLE)
    prompts = edit_prompts(plans.module.tokenizer, sample, plans.module.templates)
    each = sum(prompt.length * len(prompt.rewriting) for prompt in prompts) / len(prompts)
    most = plans.module.target.tokens_per_batch or MAX_TOKENS
    return min(most, round(each * min(len(requests), plans.data.batch_size)))


def _resident(module: EditModule) -> int:
    """Return the bytes that the process has on the model's device, the model among them."""
    if module.device.type == "cuda":
        return int(torch.cuda.memory_allocated(module.device))
    return int(psutil.Process().memory_info().rss)
