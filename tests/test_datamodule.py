"""The data module: order, batches, counts, control facts, policy, and the trainer's view of it."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from conftest import LanguageModel
from helpers import write_jsonl
from lightning_blue.data import EditDataModule, read_requests
from lightning_blue.data.requests import EditRequest, Probe
from lightning_blue.support.errors import InputError


def fact(number: int, **fields: Any) -> dict[str, Any]:
    """One of many facts that do not touch each other."""
    own = {"subject": f"Town{number}", "prompt": "The mayor of {} is", "target_new": f"Ann{number}"}
    return own | {"target_true": f"Bob{number}"} | fields


def write(tmp_path: Path, facts: list[dict[str, Any]]) -> str:
    return write_jsonl(tmp_path / "facts.jsonl", facts)


def prepared(path: str, **arguments: Any) -> EditDataModule:
    data = EditDataModule(path, **arguments)
    data.prepare()
    return data


def test_batches_hold_the_requests_in_order(tmp_path: Path) -> None:
    data = prepared(write(tmp_path, [fact(i) for i in range(7)]), batch_size=3)
    for _ in range(2):  # a second epoch is the same
        batches = list(data.train_dataloader())
        assert [[r.subject for r in batch] for batch in batches] == [
            ["Town0", "Town1", "Town2"],
            ["Town3", "Town4", "Town5"],
            ["Town6"],
        ]
        assert all(isinstance(r, EditRequest) for batch in batches for r in batch)
    assert [r for batch in batches for r in batch] == data.requests


def test_edits_and_offset_choose_usable_requests(tmp_path: Path) -> None:
    facts = [fact(0), fact(1, target_new=""), fact(2), fact(3), fact(3), fact(4), fact(5)]
    data = prepared(write(tmp_path, facts), edits=3, offset=1, on_unusable="skip")
    assert [r.subject for r in data.requests] == ["Town2", "Town3", "Town4"]
    assert [(r.source, r.kind) for r in data.rejected] == [
        ("facts.jsonl:2", "empty target"),
        ("facts.jsonl:5", "duplicate"),
    ]


def test_shuffle_moves_the_edits_and_leaves_the_last_word_on_a_text_where_it_is(
    tmp_path: Path,
) -> None:
    facts = [fact(i) for i in range(8)]
    facts[2], facts[6] = fact(9, target_new="Old"), fact(9, target_new="New")
    path = write(tmp_path, [*facts, fact(10)])
    plain = prepared(path, batch_size=4, edits=8, controls=5)
    orders = [prepared(path, batch_size=4, edits=8, shuffle=seed) for seed in (0, 1, 1)]
    subjects = [[r.subject for r in data.requests] for data in (plain, *orders)]
    assert len({*map(tuple, subjects)}) == 3
    assert subjects[2] == subjects[3]
    for data, order in zip(orders, subjects[1:], strict=True):
        assert sorted(order) == sorted(subjects[0])  # the same edits
        assert [data.requests[place].target_new for place in (2, 6)] == ["Old", "New"]
    shuffled = prepared(path, batch_size=4, edits=8, controls=5, shuffle=1)
    assert shuffled.controls == plain.controls


def test_control_facts_come_after_the_edits_on_other_subjects(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    facts = [fact(0), fact(1), fact(0, prompt="{} lies in"), fact(2, target_true=None), fact(3)]
    path = write(tmp_path, [*facts, fact(4)])
    expected = [Probe(f"The mayor of Town{i} is", f"Bob{i}") for i in (3, 4)]
    with caplog.at_level(logging.INFO):
        assert prepared(path, edits=2, controls=1).controls == expected[:1]
        assert prepared(path, edits=2, controls=2).controls == expected
        assert prepared(path, edits=2, controls=9).controls == expected
    assert [(r.levelname, r.getMessage()) for r in caplog.records] == [
        ("INFO", "2 requests, 1 control fact"),
        ("INFO", "2 requests, 2 control facts"),
        ("INFO", "2 requests, 2 control facts (data.controls: at most 9)"),
    ]


def test_stop_is_the_default_and_names_what_is_wrong(tmp_path: Path) -> None:
    path = write(tmp_path, [fact(0), fact(1, target_new=""), fact(2, target_new="Bob2")])
    with pytest.raises(InputError) as caught:
        prepared(path)
    for part in ("2 of 3 requests", "facts.jsonl:2", "facts.jsonl:3", "on_unusable=skip"):
        assert part in str(caught.value)
    assert len(prepared(path, on_unusable="skip").requests) == 1


def test_fewer_requests_than_allowed_are_no_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write(tmp_path, [fact(i) for i in range(4)])
    with caplog.at_level(logging.INFO):
        assert len(prepared(path, edits=9, offset=1, controls=5).requests) == 3
    (record,) = caplog.records
    assert record.levelname == "INFO"
    assert record.getMessage() == (
        "3 requests (data.edits: at most 9), 0 control facts (data.controls: at most 5)"
    )


def test_no_requests(tmp_path: Path) -> None:
    path = write(tmp_path, [fact(i) for i in range(4)])
    with pytest.raises(InputError, match=r"(?s)no usable.*4 read, 0 unusable, offset 4.*lower"):
        prepared(path, offset=4)
    path = write(tmp_path, [fact(0, target_new="")])
    with pytest.raises(InputError, match=r"(?s)no usable requests.*1 read, 1 unusable"):
        prepared(path, on_unusable="skip")


def test_contradictions_in_a_batch_stop_the_run_or_keep_the_later(tmp_path: Path) -> None:
    path = write(tmp_path, [fact(0), fact(1), fact(0, target_new="Eve")])
    with pytest.raises(
        InputError, match=r"(?s)facts.jsonl:1.*contradicted by .*facts.jsonl:3.*Eve"
    ):
        prepared(path)
    data = prepared(path, on_unusable="skip")
    assert [r.target_new for r in data.requests] == ["Eve", fact(1)["target_new"]]
    assert [r.kind for r in data.rejected] == ["contradiction"]
    apart = prepared(path, batch_size=2)  # a later batch replaces an earlier edit
    assert [r.target_new for r in apart.requests] == [
        fact(0)["target_new"],
        fact(1)["target_new"],
        "Eve",
    ]
    assert len(prepared(path, edits=2).requests) == 2


@pytest.mark.parametrize(
    "arguments",
    [
        {"batch_size": 0},
        {"edits": 0},
        {"offset": -1},
        {"controls": -1},
        {"on_unusable": "drop"},
        {"protocol": "rome"},
    ],
)
def test_arguments_that_make_no_sense(arguments: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=rf"data\.{next(iter(arguments))}"):
        EditDataModule("x.json", **arguments)


def test_protocol_is_that_of_at_least_half_of_the_requests(tmp_path: Path) -> None:
    def protocol(known: int, unknown: int, **arguments: Any) -> str:
        facts = [fact(i, target_true=None) for i in range(unknown)]
        facts += [fact(unknown + i) for i in range(known)]
        return prepared(write(tmp_path, facts), **arguments).protocol

    assert protocol(2, 0) == "counterfact"
    assert protocol(2, 1) == "counterfact"  # one odd record changes nothing
    assert protocol(1, 1) == "counterfact"
    assert protocol(1, 2) == "zsre"
    assert protocol(0, 2) == "zsre"
    assert protocol(2, 0, protocol="zsre") == "zsre"
    assert protocol(0, 2, protocol="counterfact") == "counterfact"


def test_a_prefix_of_the_run_is_for_requests_without_one(tmp_path: Path) -> None:
    near = {"neighborhood_prompts": ["Oslo is led by"]}
    facts = [fact(0, **near), fact(1, target_prefix="", **near), fact(2)]
    data = prepared(write(tmp_path, facts), target_prefix="\n", edits=2, controls=1)
    assert [request.target_prefix for request in data.requests] == ["\n", ""]
    assert [request.neighborhood[0].target_prefix for request in data.requests] == ["\n", ""]
    assert data.controls == [Probe("The mayor of Town2 is", "Bob2", "\n")]


def test_blanks_at_the_end_of_prompts_are_kept_and_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    facts = [fact(0), fact(1, prompt="The mayor of {} is ")]
    with caplog.at_level(logging.WARNING):
        data = prepared(write(tmp_path, facts))
    assert data.requests[1].prompt == "The mayor of {} is "
    assert "1 of 2 prompts end with a blank, which is kept" in caplog.text
    assert "facts.jsonl:2" in caplog.text


def test_tokens_are_checked_when_there_is_a_tokenizer(tmp_path: Path, gpt2: LanguageModel) -> None:
    data = EditDataModule(write(tmp_path, [fact(0), fact(1, subject="long " * 80)]))
    with pytest.raises(InputError, match=r"(?s)1 too long.*facts.jsonl:2.*the model reads 64"):
        data.prepare(gpt2.tokenizer, max_length=64)
    data = EditDataModule(write(tmp_path, [fact(0)]))
    with pytest.raises(InputError, match="1 too long"):
        data.prepare(gpt2.tokenizer, max_length=64, contexts_length=60)


def test_setup_takes_the_modules_tokenizer_once(tmp_path: Path, gpt2: LanguageModel) -> None:
    path = write(tmp_path, [fact(0), fact(1, subject="long " * 80)])
    data = EditDataModule(path, on_unusable="skip")
    module = SimpleNamespace(tokenizer=gpt2.tokenizer, max_length=64)
    data.trainer = SimpleNamespace(lightning_module=module)  # type: ignore[assignment]
    data.setup("fit")
    assert [x.kind for x in data.rejected] == ["too long"]
    Path(path).unlink()
    data.setup("test")  # does not read again
    assert len(data.requests) == 1


def test_requests_before_preparation() -> None:
    with pytest.raises(RuntimeError, match="prepare"):
        _ = EditDataModule("x.json").requests


def test_dataset_reads_back_as_the_same_requests(tmp_path: Path) -> None:
    extra = {"paraphrases": ["{} is led by"], "neighborhood_prompts": ["Oslo is led by"]}
    facts = [fact(0, **extra), fact(1, target_true=None, case_id="x")]
    data = prepared(write(tmp_path, [*facts, fact(2, target_prefix=" ", **extra)]))
    data.dataset.save_to_disk(tmp_path / "saved")
    data.dataset.to_parquet(tmp_path / "saved.parquet")
    for copy in ("saved", "saved.parquet"):
        requests, rejected = read_requests(tmp_path / copy)
        assert rejected == []
        assert [r.source for r in requests] == [f"{copy} record {i}" for i in (1, 2, 3)]
        assert [without_source(r) for r in requests] == [without_source(r) for r in data.requests]


def without_source(request: EditRequest) -> tuple[Any, ...]:
    return tuple(value for name, value in vars(request).items() if name != "source")


class Recorder(pl.LightningModule):
    """Remembers the batches that the trainer hands it."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.seen: list[list[str]] = []

    def training_step(self, batch: list[EditRequest], batch_index: int) -> None:
        self.seen.append([request.subject for request in batch])

    def transfer_batch_to_device(self, batch, device, dataloader_idx):
        return batch  # requests are text; Lightning refuses to copy frozen dataclasses

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)


def test_a_trainer_gets_the_batches_in_order(tmp_path: Path) -> None:
    module = Recorder()
    trainer = pl.Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    path = write(tmp_path, [fact(i) for i in range(5)])
    trainer.fit(module, datamodule=EditDataModule(path, batch_size=2))
    assert module.seen == [["Town0", "Town1"], ["Town2", "Town3"], ["Town4"]]


# facts in memory

FACT_ROWS = [fact(0, paraphrases=["{} is led by"]), fact(1, target_true=None)]


class Frame:
    """Stands for a pandas DataFrame: going through it gives the names of its columns."""

    columns = ("subject", "prompt", "target_new", "target_true", "paraphrases")

    def __iter__(self):
        return iter(self.columns)

    def to_dict(self, orient: str) -> list[dict[str, Any]]:
        assert orient == "records"
        return [{name: row.get(name, float("nan")) for name in self.columns} for row in FACT_ROWS]


def as_dataset() -> Any:
    import datasets

    return datasets.Dataset.from_list(FACT_ROWS)


@pytest.mark.parametrize(
    "facts",
    [
        lambda _: [dict(row) for row in FACT_ROWS],
        lambda _: (dict(row) for row in FACT_ROWS),
        lambda requests: requests,
        lambda _: Frame(),
        lambda _: as_dataset(),
    ],
    ids=["dictionaries", "generator", "requests", "frame", "dataset"],
)
def test_facts_in_memory_are_read_like_a_file(tmp_path: Path, facts: Any) -> None:
    expected = prepared(write(tmp_path, FACT_ROWS)).requests
    data = prepared(facts(expected))
    assert [without_source(r) for r in data.requests] == [without_source(r) for r in expected]
    assert [r.source for r in data.requests] == [f"facts in memory, record {i}" for i in (1, 2)]
    assert data.rejected == []


def test_tuples_are_facts() -> None:
    rows = [("Town0", "{} lies in", "Rome"), ("Town1", "{} lies in", "Oslo", "Bern")]
    first, second = prepared(rows).requests
    assert (first.subject, first.text, first.target_new, first.target_true) == (
        *("Town0", "Town0 lies in", "Rome", None),
    )
    assert second.target_true == "Bern"


def test_what_is_wrong_with_a_fact_in_memory_is_said_with_its_place() -> None:
    with pytest.raises(InputError, match="facts in memory, record 2: the target 'Ann1' equals"):
        prepared([fact(0), fact(1, target_true="Ann1")])
    with pytest.raises(InputError, match=r"(?s)record 2: the record is .* fields in braces"):
        prepared([fact(0), "Lyon is in Rome"])
    with pytest.raises(InputError, match=r"(?s)no records.*0 facts in memory"):
        prepared([])
    with pytest.raises(InputError, match=r"(?s)3 facts in memory: 3 read, 0 unusable, offset 3"):
        prepared([fact(i) for i in range(3)], offset=3)


@pytest.mark.parametrize(
    ("facts", "said"),
    [
        (fact(0), r"(?s)one dict with subject, prompt.*list.*choose one"),
        (None, "a NoneType holds no facts"),
        (3, "a int holds no facts"),
        (b"facts.json", "a bytes holds no facts"),
    ],
)
def test_what_holds_no_facts_is_refused_at_once(facts: Any, said: str) -> None:
    with pytest.raises(InputError, match=said):
        EditDataModule(facts)


def test_a_resumed_run_knows_facts_in_memory_again() -> None:
    before = prepared([fact(0), fact(1)]).state_dict()
    prepared([fact(0), fact(1)]).load_state_dict(before)
    with pytest.raises(InputError, match=r"(?s)other requests.*data.path = 2 facts in memory"):
        prepared([fact(0), fact(2)]).load_state_dict(before)
