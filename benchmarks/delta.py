"""Parts ``delta`` and ``profile``: the optimisation of targets."""

from __future__ import annotations

from argparse import Namespace
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks import textbook
from benchmarks.floor import EditRows, costs_of, search_operations, useful_tokens
from benchmarks.results import Row
from benchmarks.timing import Clock, now
from benchmarks.workload import CONTEXTS, Workload
from blue_callbacks import WeightId
from lightning_blue.data.requests import EditRequest
from lightning_blue.editing import EditModule
from lightning_blue.editing.optimization import TargetOptimization

Ask = Callable[[Sequence[EditRequest], Any], Tensor]


def edit_module(workload: Workload, args: Namespace, **switches: Any) -> TimedModule:
    """Wrap the model for the package, with the settings that the textbook side has too.

    Args:
        workload: model and tokenizer.
        args: steps and learning rate.
        **switches: further settings of the target search, to switch shortcuts off.
    """
    module = TimedModule(
        workload.model,
        workload.tokenizer,
        target=TargetOptimization(steps=args.steps, learning_rate=args.learning_rate, **switches),
        contexts=list(CONTEXTS),
    )
    module.seconds = defaultdict(float)
    return module.to(workload.model.device)


class TimedModule(EditModule):
    """The package's module, which also notes how long each kind of question took."""

    seconds: dict[str, float]

    def edit_targets(self, batch: Sequence[EditRequest], layer: int) -> Tensor:
        """Optimise targets, on the clock."""
        return self._timed("targets", super().edit_targets, batch, layer)

    def edit_keys(self, batch: Sequence[EditRequest], weight: WeightId) -> Tensor:
        """Read keys, on the clock."""
        return self._timed("keys", super().edit_keys, batch, weight)

    def edit_outputs(self, batch: Sequence[EditRequest], layer: int) -> Tensor:
        """Read outputs, on the clock."""
        return self._timed("outputs", super().edit_outputs, batch, layer)

    def _timed(self, what: str, ask: Ask, batch: Sequence[EditRequest], where: Any) -> Tensor:
        began = now()
        answer = ask(batch, where)
        self.seconds[what] += now() - began
        return answer


def settings(args: Namespace) -> textbook.Settings:
    """Return the textbook's settings."""
    return textbook.Settings(args.steps, args.learning_rate, contexts=CONTEXTS)


def run_delta(workload: Workload, args: Namespace, clock: Clock) -> list[Row]:
    """Optimise the targets of a batch at each boundary layer, both ways in turn."""
    module, batch = edit_module(workload, args), workload.requests[: args.edits]
    rows = [_measure(workload, module, batch, layer, args, clock) for layer in args.layers]
    both = Row(
        "delta",
        f"layers {', '.join(map(str, args.layers))} together",
        "edit",
        ours=sum(row.ours for row in rows),
        textbook=sum(row.textbook or 0 for row in rows),
        floor=sum(row.floor or 0 for row in rows),
    )
    return [*rows, both]


def _measure(
    workload: Workload,
    module: EditModule,
    batch: Sequence[EditRequest],
    layer: int,
    args: Namespace,
    clock: Clock,
) -> Row:
    model, tokenizer = workload.model, workload.tokenizer
    few = batch[: args.textbook_edits]

    def one_at_a_time() -> list[tuple[Tensor, list[float]]]:
        return [textbook.optimise_target(model, tokenizer, r, layer, settings(args)) for r in few]

    rivals = {"ours": lambda: module.edit_targets(batch, layer), "textbook": one_at_a_time}
    # Whoever goes first in every round also warms up the caches; the first round is not counted.
    samples = clock.race(rivals, args.repeats)
    losses = module.target_losses[layer][..., 0]
    forwards = (~losses.isnan()).sum(1).tolist()
    edits = edit_rows(workload, batch)
    operations = search_operations(costs_of(model), edits, layer, forwards)
    tokens, n_rows = useful_tokens(edits)
    return Row(
        "delta",
        f"layer {layer}",
        "edit",
        ours=samples["ours"].median / len(batch),
        textbook=samples["textbook"].median / len(few),
        floor=operations / clock.rate / len(batch),
        ours_peak=samples["ours"].peak,
        textbook_peak=samples["textbook"].peak,
        details={
            "edits": len(batch),
            "textbook_edits": len(few),
            "seconds": {name: s.seconds for name, s in samples.items()},
            "matmul_gflops": clock.rate / 1e9,
            "useful_tokens_per_row": tokens / n_rows,
            "mean_forwards": sum(forwards) / len(forwards),
            **agreement(samples["ours"].result, losses, samples["textbook"].result),
        },
    )


def agreement(
    targets: Tensor, losses: Tensor, reference: Sequence[tuple[Tensor, list[float]]]
) -> dict[str, float]:
    """Compare targets (relative norm) and losses (absolute) with the textbook's."""
    worst_loss = worst_target = 0.0
    for column, (target, course) in enumerate(reference):
        ours = losses[column, : len(course)].double().cpu()
        worst_loss = max(worst_loss, float((ours - torch.tensor(course).double()).abs().max()))
        difference = (targets[:, column] - target).norm() / target.norm()
        worst_target = max(worst_target, float(difference))
    return {"worst_loss_difference": worst_loss, "worst_target_difference": worst_target}


def edit_rows(workload: Workload, batch: Sequence[EditRequest]) -> list[EditRows]:
    """Tokenise a batch as the floor counts it."""
    return [_rows_of(workload, request) for request in batch]


def _rows_of(workload: Workload, request: EditRequest) -> EditRows:
    target = textbook.target_tokens(workload.tokenizer, request.target_new)
    prompts = [
        textbook.tokenise(workload.tokenizer, request, context, target)
        for context in ("", *CONTEXTS)
    ]
    about = EditRequest("", "{} is a", request.subject, "")
    prompts.append(textbook.tokenise(workload.tokenizer, about, "", []))
    reads = [len(target)] * (len(prompts) - 1) + [1]
    return EditRows([p.ids for p in prompts], [p.lookup for p in prompts], reads)
