"""The journal of a run: what it holds, that it is whole or not there, and what it refuses."""

from __future__ import annotations

import json
import shutil
from dataclasses import fields

import pytest
import torch
from lightning import Callback
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from blue_callbacks import EditRejected, WeightChange, WeightId
from helpers import fit
from lightning_blue.language_model.architectures import down_projection
from lightning_blue.runs.journal import EditJournal, Journal, record_name
from lightning_blue.support.errors import InputError
from runs_made import BATCHES, WEIGHTS, made, make, small_module, small_update  # noqa: F401


@pytest.fixture
def copied(made, tmp_path):  # noqa: F811
    """A run that may be spoiled."""
    return shutil.copytree(made("gpt2", "memit").folder, tmp_path / "run")


@pytest.mark.parametrize("kind", ["memit", "rect", "half"])
@pytest.mark.parametrize("model", ["gpt2", "llama"])
def test_records_come_back_as_they_were(made, model, kind):  # noqa: F811
    run = made(model, kind)
    journal = Journal(run.folder)
    assert journal.request_ids == [record.request_ids for record in run.watch.records]
    for file, record in zip(journal.files, run.watch.records, strict=True):
        for found, change in zip(file.changes(), record.changes, strict=True):
            for field in fields(WeightChange):
                one, other = getattr(found, field.name), getattr(change, field.name)
                if isinstance(other, torch.Tensor):
                    assert one.dtype == other.dtype
                    assert torch.equal(one, other), field.name
                else:
                    assert one == other, field.name
    past_keys = [change.past_keys for record in run.watch.records for change in record.changes]
    assert all((past is not None) == (kind == "rect") for past in past_keys)


@pytest.mark.parametrize("model", ["gpt2", "llama"])
def test_the_header_says_what_was_edited(made, model):  # noqa: F811
    run = made(model, "memit")
    header = Journal(run.folder).header
    assert header.model.name_or_path == str(run.base)
    assert (header.model.type, header.model.dtype) == (model, "float32")
    assert header.update == small_update("memit").state_dict()["settings"]
    assert list(header.weights) == WEIGHTS
    for weight, written in header.weights.items():
        module = run.module.model.get_submodule(written.module)
        assert module is down_projection(run.module.blocks[weight.layer], run.module.architecture)
        assert written.shape == (32, 96)
        assert written.transposed == (model == "gpt2")
    assert header.covariance["identity"]["model"] == header.model.fingerprint


def test_a_batch_costs_what_is_documented(made):  # noqa: F811
    """n * 2 * (d_out + d_in) * 4 bytes a weight; RECT: n * d_in * 4 + d_out * d_in / 8 more."""
    n, d_out, d_in = 2, 32, 96
    for kind, more in (("memit", 0), ("rect", n * d_in * 4 + d_out * d_in // 8)):
        path = made("llama", kind).folder / "records" / record_name(0)
        expected = len(WEIGHTS) * (n * 2 * (d_out + d_in) * 4 + more)
        assert sum(t.numel() * t.itemsize for t in load_file(path).values()) == expected
        assert path.stat().st_size < expected + 4096


def flip(path):
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


def rewrite(**changes):
    def spoil(path):
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
        save_file(load_file(path), path, metadata={**metadata, **changes})

    return spoil


def without_metadata(path):
    save_file(load_file(path), path)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (flip, "damaged"),
        (lambda path: path.write_bytes(path.read_bytes()[:-100]), "damaged"),
        (lambda path: path.write_bytes(b""), "damaged"),
        (without_metadata, "no lightning-blue edit record"),
        (rewrite(version="7"), "version 7"),
        (rewrite(run="other"), "another run"),
        (rewrite(model="other"), "another run"),
        (rewrite(batch="2"), "record of batch 2"),
        (rewrite(request_ids='["only one"]'), "damaged"),
        (lambda path: path.unlink(), "batch 1 is missing"),
    ],
)
def test_spoiled_records_are_refused(copied, spoil, said):
    spoil(copied / "records" / record_name(1))
    with pytest.raises(InputError, match=said):
        list(Journal(copied).changes(WeightId(2)))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"version": 2}, "version 2"),
        ({"format": "else"}, "'else'"),
        ({"model": {}}, "damaged"),
        ({"weights": {"layer0": 3}}, "damaged"),
    ],
)
def test_spoiled_headers_are_refused(copied, changes, said):
    path = copied / "records" / "journal.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(InputError, match=said):
        Journal(copied)
    path.write_text("{")
    with pytest.raises(InputError, match="cannot be read"):
        Journal(copied)


def test_no_run_and_no_records(tmp_path):
    with pytest.raises(InputError, match="no such run"):
        Journal(tmp_path / "nowhere")
    with pytest.raises(InputError, match="no records"):
        Journal(tmp_path)


def test_a_full_disk_leaves_no_half_record(gpt2, tmp_path, monkeypatch):
    def full(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("lightning_blue.runs.record_files.save_file", full)
    with pytest.raises(InputError, match="No space left on device"):
        make(tmp_path, gpt2, "memit", BATCHES[:1])
    assert [path.name for path in (tmp_path / "run" / "records").iterdir()] == ["journal.json"]


def test_truncate_forgets_later_batches_only(copied):
    journal = EditJournal(copied)
    journal.truncate(2)
    assert len(Journal(copied).files) == 2
    with pytest.raises(InputError, match="batch 2 is missing"):
        journal.truncate(3)


class SaveAfterTwo(Callback):
    """Save a checkpoint when two batches are committed."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if batch_idx == 1:
            path = trainer.default_root_dir + "/two.ckpt"
            trainer.save_checkpoint(path)
            saved = torch.load(path, weights_only=True)
            torch.save({**saved, "state_dict": {}}, path)  # the update has what was edited


def test_a_resumed_run_goes_on_with_its_journal(gpt2, tmp_path):
    """It crashed after batch 2 was committed, and goes on from the checkpoint before it."""
    run = make(tmp_path, gpt2, "memit", BATCHES[:1])  # for its base and statistics
    folder = tmp_path / "resumed"
    module, saving = small_module(run.base), {"default_root_dir": str(tmp_path)}
    callbacks = [EditJournal(folder), SaveAfterTwo()]
    fit(module, small_update("memit"), BATCHES, callbacks=callbacks, **saving)
    whole = [load_file(file.path) for file in Journal(folder).files]
    before = Journal(folder).header
    again, checkpoint = small_module(run.base), tmp_path / "two.ckpt"
    fit(
        again, small_update("memit"), BATCHES, callbacks=[EditJournal(folder)], ckpt_path=checkpoint
    )
    assert Journal(folder).header == before
    found = [load_file(file.path) for file in Journal(folder).files]
    assert len(found) == 3
    for one, other in zip(whole, found, strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_another_run_is_not_written_over(made, copied):  # noqa: F811
    module = small_module(made("gpt2", "memit").base)
    with pytest.raises(InputError, match="records of another run"):
        fit(module, small_update("memit"), BATCHES, callbacks=[EditJournal(copied)])
    assert len(Journal(copied).files) == 3


class RejectSecond(Callback):
    """Refuse what the second batch has written."""

    def __init__(self) -> None:
        self.seen = 0

    def on_edit_written(self, trainer, module, record):
        self.seen += 1
        if self.seen == 2:
            raise EditRejected("too far", stop=False)


def test_rejected_batches_have_no_record(made, tmp_path):  # noqa: F811
    module = small_module(made("gpt2", "memit").base)
    callbacks = [RejectSecond(), EditJournal(tmp_path)]
    fit(module, small_update("memit"), BATCHES, callbacks=callbacks)
    assert Journal(tmp_path).request_ids == [("r0", "r1"), ("r4", "r5")]
