"""Numbers of the configuration: each has a range, and is held to it before anything is loaded."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator
from typing import Any, get_type_hints

import numpy as np
import pytest

from blue_callbacks import ClosedFormUpdate, EditGuard
from blue_callbacks.ranges import COUNT, FRACTION, POSITIVE, Range, check_ranges
from lightning_blue.ability import AbilitySettings
from lightning_blue.data import EditDataModule
from lightning_blue.editing import module
from lightning_blue.editing.covariance import CovarianceSource
from lightning_blue.editing.module import EditModule, edit_module
from lightning_blue.editing.optimization import TargetOptimization
from lightning_blue.metrics.retention import RetentionSettings
from lightning_blue.pretrain import FactCorpusModule, PretrainModule
from lightning_blue.reporting import MeasureEdits, RunRecord
from lightning_blue.support.errors import InputError
from lightning_blue.support.processes import EditStrategy


@pytest.mark.parametrize(
    ("allowed", "inside", "outside", "said"),
    [
        (COUNT, [1, 10**5000, np.int64(3)], [0, -1, 1.0, True, "1"], "a whole number from 1 up"),
        (
            POSITIVE,
            [1e-300, 1, np.float32(2)],
            [0.0, -0.0, 1e300, True],
            "a finite number above 0 and at most 1e+30",
        ),
        (FRACTION, [1, 0.5], [0, 1.0000001], "a finite number above 0 and at most 1"),
        (Range(2, 9000), [2, 9000.0], [1.9, 9001], "a finite number from 2 to 9,000"),
    ],
)
def test_ranges_by_hand(allowed, inside, outside, said):
    assert all(value in allowed for value in inside)
    assert not any(value in allowed for value in [*outside, math.nan, math.inf, -math.inf, None])
    assert str(allowed) == said


def test_the_message_names_key_value_and_range():
    with pytest.raises(InputError) as caught:
        check_ranges(
            "data", {"edits": None, "batch_size": 0, "path": 3}, edits=COUNT, batch_size=COUNT
        )
    assert str(caught.value) == (
        "batch_size is 0\n  where: data.batch_size\n  hint:  give a whole number from 1 up"
    )


# Everything that the command line builds, by its section, and what it cannot be built without.
DECLARED: list[tuple[str, Callable[..., Any], Callable[..., Any], dict[str, Any]]] = [
    ("model.target", TargetOptimization, TargetOptimization, {}),
    ("model.covariance", CovarianceSource, CovarianceSource, {}),
    ("model", EditModule.__init__, edit_module, {}),
    ("data", EditDataModule.__init__, EditDataModule, {}),
    ("update", ClosedFormUpdate.__init__, ClosedFormUpdate, {"layers": [0]}),
    ("guard", EditGuard.__init__, EditGuard, {}),
    ("measure", MeasureEdits.__init__, MeasureEdits, {}),
    ("measure.retention", RetentionSettings, RetentionSettings, {}),
    ("measure.ability", AbilitySettings, AbilitySettings, {}),
    ("run", RunRecord.__init__, RunRecord, {}),
    ("trainer.strategy", EditStrategy.__init__, EditStrategy, {}),
    ("model", PretrainModule.__init__, PretrainModule, {}),
    ("data", FactCorpusModule.__init__, FactCorpusModule, {}),
]


def numbers() -> Iterator[tuple[str, str, Callable[..., Any], dict[str, Any]]]:
    """Every argument that is declared as a number, or a number or None."""
    for section, declaring, build, needed in DECLARED:
        for name, kind in get_type_hints(
            declaring, globalns=vars(inspect.getmodule(declaring))
        ).items():
            if kind in (int, float, int | None, float | None):
                yield section, name, build, needed


@pytest.mark.parametrize(
    ("section", "name", "build", "needed"),
    [pytest.param(*row, id=f"{row[0]}.{row[1]}") for row in numbers()],
)
def test_every_number_has_a_range(section, name, build, needed, monkeypatch):
    monkeypatch.setattr(module, "load_language_model", None)  # nothing may be loaded before
    for value in (math.nan, math.inf, -math.inf, -1, -0.5, "3", True):
        with pytest.raises(
            InputError, match=f"^{name} is .*\n  where: {section}.{name}\n  hint:  give a"
        ):
            build(**needed, **{name: value})


def test_there_are_numbers_to_check():
    assert len(list(numbers())) > 40


@pytest.mark.parametrize(
    ("section", "build", "setting"),
    [
        ("model.target.steps", TargetOptimization, {"steps": 10**12}),
        ("model.covariance.tokens_per_dim", CovarianceSource, {"tokens_per_dim": 1e300}),
        ("model.target.learning_rate", TargetOptimization, {"learning_rate": 1e300}),
        ("model.context_tokens", edit_module, {"context_tokens": 10**12}),
        ("model.seed", edit_module, {"seed": 2**32}),
        ("measure.seed", MeasureEdits, {"seed": 2**32}),
    ],
)
def test_numbers_that_no_machine_could_work_off(section, build, setting):
    with pytest.raises(
        InputError, match=rf"where: {section}\n  hint:  give .*(at most|to) [\d,e+]+$"
    ):
        build(**setting)


def test_contexts_have_room_in_the_model(gpt2):
    with pytest.raises(InputError, match=r"(?s)context_tokens is 64.* from 1 to 63"):
        EditModule(*gpt2, context_tokens=64)
    assert EditModule(*gpt2, context_tokens=63).context_tokens == 63


@pytest.mark.parametrize(
    ("build", "setting", "said"),
    [
        (CovarianceSource, {"corpus": " "}, "no text is named"),
        (MeasureEdits, {"text": ""}, "no text is named"),
        (EditDataModule, {"path": ""}, "no data is named"),
        (EditDataModule, {"format": "hint"}, "choose one of: auto"),
        (PretrainModule, {"d_model": 12, "n_heads": 4}, "a multiple of 8"),
    ],
)
def test_other_settings_without_a_meaning(build, setting, said):
    with pytest.raises(InputError, match=said):
        build(**setting)
