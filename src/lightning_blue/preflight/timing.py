"""How long the parts of a run take on this machine, each timed on a little of its own work.

One item is done first, which warms up and says how many fit into a few seconds; those are timed.
Nothing is written to the model.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch

from blue_callbacks import ClosedFormUpdate, WeightId
from blue_callbacks.closed_form import least_squares
from blue_callbacks.precision import float64_device
from lightning_blue.data.requests import EditRequest
from lightning_blue.editing.collecting import collect_covariance
from lightning_blue.editing.covariance import sequence_length
from lightning_blue.editing.module import EditModule
from lightning_blue.language_model.architectures import down_projection, weight_view
from lightning_blue.language_model.generation import generate
from lightning_blue.language_model.scoring import Row, score_rows
from lightning_blue.language_model.tokens import encode_prompts
from lightning_blue.metrics.evaluation import evaluate

SECONDS = 4.0  # that the timed items of a part should take together, beside the first few
FEW, PATIENCE = 4, 10.0  # so many items at least, unless the first took longer than these seconds
GROWTH = 4  # times as many items as before, while there is time
MICRO_BATCH = 64  # items timed together at most
FACTORED = 1024  # key dimensions of the system that is factored; a factor's cost grows as a cube
STEPS = 13  # tokens that are written to find out what each behind the first one costs


class Shared:
    """How much a block of pure computation was slowed by other programs.

    Args:
        device: on which it computes. Of one that is no processor, nothing is known.

    Attributes:
        slowed: seconds that passed, over those that the processor worked; 1 where it is idle
            otherwise, or where several threads make that hard to say.
    """

    def __init__(self, device: torch.device) -> None:
        self.known = device.type == "cpu"
        self.slowed = 1.0

    def __enter__(self) -> Shared:
        """Read both clocks."""
        self._began = time.perf_counter(), time.process_time()
        return self

    def __exit__(self, *_: object) -> None:
        """Compare them."""
        passed, worked = time.perf_counter() - self._began[0], time.process_time() - self._began[1]
        if self.known and worked > 0:
            self.slowed = max(1.0, passed / worked)


class Rates(NamedTuple):
    """Seconds that one unit of each part of a run takes.

    Attributes:
        target: the targets of an edit, at all target layers of the plan.
        key: keys, outputs and solves of an edit, at all written layers.
        covariance_token: a token of ordinary text, through all written layers.
        factor: one factorisation of a covariance, of one layer.
        question: the probabilities of a request, its paraphrases and neighbours among them.
        text: the first token of a continuation or a generated text, with reading its prompt.
        written: each further token of it.
        scored_token: a token of text that is scored.
    """

    target: float
    key: float
    covariance_token: float
    factor: float
    question: float
    text: float
    written: float
    scored_token: float


def seconds_each(work: Callable[[int], None], most: int, device: torch.device) -> float:
    """Return the seconds that an item takes, together with others as far as there is time.

    The first is done alone, which warms up and says little. Then it is a few, and `GROWTH` times as
    many as before while these should fit into `SECONDS`: what takes longer by each item is told by
    the two times before, for many items together may take hardly longer than few. Where the first
    takes very long, it has to do.

    Args:
        work: does so many items.
        most: items that there are.
        device: on which the work is done.
    """

    def clock(count: int) -> float:
        started = time.perf_counter()
        work(count)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return max(time.perf_counter() - started, 1e-9)

    fewer, less = 1, clock(1)
    if less >= PATIENCE or most < 1:
        return less
    count = min(most, FEW)
    while True:
        took, more = clock(count), min(most, GROWTH * count)
        if more == count:
            return took / count
        slope = max(0.0, took - less) / (count - fewer)
        if took + slope * (more - count) > SECONDS:
            return took / count
        fewer, less, count = count, took, more


def measure_rates(
    module: EditModule,
    update: ClosedFormUpdate,
    requests: Sequence[EditRequest],
    tokens_per_batch: int = 4096,
    texts: bool = True,
) -> Rates:
    """Time a little of each part of a run.

    Args:
        module: the model, unedited, on the device of the run.
        update: the plan and the solver.
        requests: that will be edited, or others like them.
        tokens_per_batch: of the measurements.
        texts: whether the run writes and scores texts; their rates are 0 if not.
    """
    sample = spread(requests, MICRO_BATCH)
    rows = _text(module, sample)
    trial = _Trial(module, update, sample, rows, tokens_per_batch)

    def each(work: Callable[[int], None], items: Sequence[object]) -> float:
        return seconds_each(work, len(items), module.device)

    factor, solve = closed_form_seconds(update, module)
    first_token = each(trial.beginnings, sample) if texts else 0.0
    return Rates(
        target=each(trial.targets, sample),
        key=each(trial.keys, sample) + solve * len(update.layer_updates),
        covariance_token=each(trial.covariances, rows) / len(rows[0]),
        factor=factor,
        question=each(trial.questions, sample),
        text=first_token,
        written=max(0.0, each(trial.texts, sample) - first_token) / (STEPS - 1) if texts else 0.0,
        scored_token=each(trial.scores, rows) / len(rows[0]) if texts else 0.0,
    )


class _Trial(NamedTuple):
    """The parts of a run, each for the first so many items: requests, or rows of text."""

    module: EditModule
    update: ClosedFormUpdate
    sample: list[EditRequest]
    rows: list[list[int]]
    tokens_per_batch: int

    def targets(self, count: int) -> None:
        for layer in dict.fromkeys(part.target_layer for part in self.update.layer_updates):
            self.module.edit_targets(self.sample[:count], layer)

    def keys(self, count: int) -> None:
        for part in self.update.layer_updates:
            self.module.edit_keys(self.sample[:count], WeightId(part.layer))
            self.module.edit_outputs(self.sample[:count], part.target_layer)

    def covariances(self, count: int) -> None:
        blocks, row = self.module.blocks, self.module.architecture
        layers = sorted(set(self.update.written_layers))
        projections = {layer: down_projection(blocks[layer], row) for layer in layers}
        tokens = count * len(self.rows[0])
        collect_covariance(self.module.model, projections, self.rows[:count], tokens)

    def questions(self, count: int) -> None:
        evaluate(
            self.module.model,
            self.module.tokenizer,
            self.sample[:count],
            generate=False,
            continuation_tokens=0,
            tokens_per_batch=self.tokens_per_batch,
        )

    def beginnings(self, count: int) -> None:
        self._write(count, 1)

    def texts(self, count: int) -> None:
        self._write(count, STEPS)

    def _write(self, count: int, tokens: int) -> None:
        prompts = [request.text for request in self.sample[:count]]
        generate(self.module.model, self.module.tokenizer, prompts, max_new_tokens=tokens, top_k=1)

    def scores(self, count: int) -> None:
        rows = [Row(row, 1) for row in self.rows[:count]]
        score_rows(self.module.model, rows, self.tokens_per_batch)


def closed_form_seconds(update: ClosedFormUpdate, module: EditModule) -> tuple[float, float]:
    """Return the seconds of one factorisation, and of the solves for one edit, of one layer.

    Timed on a smaller system where keys are wide: a factorisation takes d_in^3 operations, a solve
    d_in^2.
    """
    block = module.blocks[update.written_layers[0]]
    d_in = weight_view(down_projection(block, module.architecture)).shape[1]
    size = min(d_in, FACTORED)
    generator = torch.Generator().manual_seed(0)
    ordinary = torch.randn(2 * size, size, generator=generator, dtype=torch.float64)
    keys = torch.randn(size, MICRO_BATCH, generator=generator, dtype=torch.float64)
    device = float64_device(module.device)
    covariance, keys = (ordinary.T @ ordinary / len(ordinary)).to(device), keys.to(device)
    whitening = least_squares(covariance, 1.0)

    def factor(_count: int) -> None:
        if update.solver.kind == "null_space":
            torch.linalg.eigh(covariance)
        else:
            least_squares(covariance, 1.0)

    def solve(_count: int) -> None:
        whitening.apply_transposed(whitening.apply(keys))

    wider = d_in / size
    factored, solved = (seconds_each(work, 1, device) for work in (factor, solve))
    return factored * wider**3, solved / MICRO_BATCH * wider**2


def spread(requests: Sequence[EditRequest], count: int) -> list[EditRequest]:
    """Take ``count`` requests, evenly from all of them."""
    step = max(1, len(requests) / count)
    return [requests[int(place * step)] for place in range(min(count, len(requests)))]


def _text(module: EditModule, requests: Iterable[EditRequest]) -> list[list[int]]:
    """Return rows of tokens as long as those that a covariance is collected from.

    What the tokens are does not matter for how long they take.
    """
    length = sequence_length(module.model, module.covariance)
    prompts = encode_prompts(module.tokenizer, [request.text for request in requests])
    ids = [token for prompt in prompts for token in prompt]
    repeated = ids * (length * MICRO_BATCH // len(ids) + 1)
    at_once = max(1, min(MICRO_BATCH, module.covariance.batch_tokens // length))
    return [repeated[place * length : (place + 1) * length] for place in range(at_once)]
