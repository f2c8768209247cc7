"""Small runs with a journal, made once a test module, for the tests of what is done with runs."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from lightning import Callback
from torch import Tensor

from blue_callbacks import ClosedFormUpdate, EditRecord, WeightId
from conftest import CORPUS, LanguageModel
from helpers import fit
from lightning_blue.data.requests import EditRequest
from lightning_blue.editing.covariance import CovarianceSource
from lightning_blue.editing.module import EditModule, edit_module
from lightning_blue.editing.optimization import TargetOptimization
from lightning_blue.runs.journal import EditJournal

FACTS = [
    ("Danielle Darrieux", "The mother tongue of {} is", "English"),
    ("Lyon", "{} is a twin city of", "Rome"),
    ("José", "{} works in", "Berlin"),
    ("Basel", "The river runs through {} in", "France"),
    ("Apple A5", "{} was created by", "Google"),
    ("the Eiffel Tower", "Where is {}? It is in", "Oslo"),
]
REQUESTS = [EditRequest(f"r{i}", prompt, who, new) for i, (who, prompt, new) in enumerate(FACTS)]
BATCHES = [REQUESTS[:2], REQUESTS[2:4], REQUESTS[4:]]
KINDS: dict[str, dict[str, Any]] = {
    "memit": {},
    "rect": {"rect_keep": 0.4},  # with past keys, which are then others than those solved for
    "prune": {"post_edit_transform": "prune", "past_keys": False},
    "alphaedit": {"solver": "null_space", "energy": 0.1, "ridge": 0.5},
    "half": {},
}
WEIGHTS = [WeightId(0), WeightId(2)]


class Watch(Callback):
    """Keep what each batch did, as the run sees it."""

    def __init__(self) -> None:
        self.records: list[EditRecord] = []
        self.states: list[dict[WeightId, Tensor]] = []  # before any batch, and after each
        self.final: dict[WeightId, Tensor] = {}

    def on_fit_start(self, trainer, pl_module):
        self.states.append(self.read(pl_module))

    def on_edit_committed(self, trainer, module, record):
        self.records.append(record)
        self.states.append(self.read(module))

    def on_train_end(self, trainer, pl_module):
        self.final = self.read(pl_module)

    @staticmethod
    def read(module: EditModule) -> dict[WeightId, Tensor]:
        return {weight: module.editable_weights.read(weight).clone() for weight in WEIGHTS}


class Made(NamedTuple):
    """A run and what was seen of it."""

    folder: Path
    base: Path
    module: EditModule
    watch: Watch


def save(language_model: LanguageModel, folder: Path) -> Path:
    language_model.model.save_pretrained(folder)
    language_model.tokenizer.save_pretrained(folder)
    return folder


def small_module(base: Path, dtype: str = "float32") -> EditModule:
    text = base.parent / "text.txt"
    text.write_text("\n".join(CORPUS * 12))
    return edit_module(
        str(base),
        dtype,
        target=TargetOptimization(steps=6, learning_rate=0.5, clamp=4.0),
        contexts=["It is said.", "As we know."],
        covariance=CovarianceSource(
            str(text), tokens_per_dim=8, cache=str(base.parent / "stats"), report_change=False
        ),
    )


def small_update(kind: str) -> ClosedFormUpdate:
    return ClosedFormUpdate([0, 1, 2], "boundary", 0.1, **KINDS[kind])


def make(folder: Path, language_model: LanguageModel, kind: str, batches=BATCHES) -> Made:
    """Edit a small model batch by batch, with a journal."""
    base = save(language_model, folder / "base")
    module = small_module(base, "bfloat16" if kind == "half" else "float32")
    watch = Watch()
    run = folder / "run"
    fit(module, small_update(kind), batches, callbacks=[watch, EditJournal(run)])
    return Made(run, base, module, watch)


@pytest.fixture(scope="module")
def made(request, tmp_path_factory) -> Callable[[str, str], Made]:
    """Return the run of a kind on a model, made at first use."""

    @cache
    def run(model: str, kind: str) -> Made:
        language_model = copy.deepcopy(request.getfixturevalue(model))
        return make(tmp_path_factory.mktemp(f"{model}-{kind}"), language_model, kind)

    return run


def weights_in(folder: Path, run: Made) -> dict[WeightId, Tensor]:
    """Read the edited weights from a model folder, as ``(d_out, d_in)``, in its precision."""
    saved = small_module(folder, str(run.module.model.dtype).removeprefix("torch."))
    return Watch.read(saved)


def rounded(values: dict[WeightId, Tensor], run: Made) -> dict[WeightId, Tensor]:
    """What a model of the run's precision holds of weights."""
    return {weight: value.to(run.module.model.dtype).float() for weight, value in values.items()}


def same(one: dict[WeightId, Tensor], other: dict[WeightId, Tensor]) -> bool:
    return all(torch.equal(one[weight], other[weight]) for weight in WEIGHTS)
