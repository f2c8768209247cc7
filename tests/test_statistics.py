"""Files of covariances: exact, checked to the last byte, and brought from elsewhere."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoTokenizer

from blue_callbacks import WeightId
from lightning_blue.data.corpus import documents, require_own_text
from lightning_blue.editing.brought import BroughtStatistics
from lightning_blue.editing.collecting import pack
from lightning_blue.editing.convergence import Change
from lightning_blue.editing.covariance import CovarianceSource, load_or_collect
from lightning_blue.editing.covariance_file import Collected, CovarianceFile
from lightning_blue.editing.module import EditModule
from lightning_blue.language_model.loading import PACKAGED
from lightning_blue.support.errors import InputError
from test_covariance import TEXT, projections, source

IDENTITY = {"model": "m", "corpus": "c"}


def second_moment(size: int, seed: int = 0) -> torch.Tensor:
    keys = torch.randn(size, 4 * size, generator=torch.Generator().manual_seed(seed)).double()
    return (keys @ keys.T) / (4 * size)


@pytest.fixture
def file(tmp_path) -> CovarianceFile:
    """Two layers, with all that a file may hold."""
    made = CovarianceFile(tmp_path / "c.safetensors", IDENTITY)
    how = Collected(40, 3, (Change(40, 0.5),))
    made.add({1: second_moment(4), 12: second_moment(5, 1)}, {1: how})
    return made


def test_what_is_read_is_what_was_written(file):
    read = file.read({1: 4, 12: 5, 3: 7})
    assert set(read) == {1, 12}
    assert torch.equal(read[1], second_moment(4))
    assert torch.equal(read[12], second_moment(5, 1))
    assert file.collected([1, 2, 12]) == {
        1: Collected(40, 3, (Change(40, 0.5),)),
        12: Collected(),
    }


@pytest.mark.parametrize("size", [1, 2, 1024, 1025])
def test_a_file_is_as_large_as_the_matrix_in_float32(tmp_path, size):
    matrix = torch.arange(size, dtype=torch.float64)
    matrix = torch.outer(matrix, matrix) + math.pi
    file = CovarianceFile(tmp_path / "c.safetensors", IDENTITY)
    file.add({0: matrix}, {})
    assert torch.equal(file.read({0: size})[0], matrix)
    head = 1200
    assert file.path.stat().st_size <= 4 * size**2 + 4 * size + head


def test_a_layer_that_is_added_leaves_the_others(file):
    file.add({7: second_moment(6)}, {7: Collected(60)})
    assert torch.equal(file.read({12: 5})[12], second_moment(5, 1))
    assert file.collected([1, 7])[7] == Collected(60)
    assert file.collected([1, 7])[1].tokens == 40


def test_older_files_are_read(tmp_path):
    old = {"layer1": second_moment(4).float(), "layer12": second_moment(5, 1).float()}
    path = tmp_path / "old.safetensors"
    save_file(old, path, metadata={**IDENTITY, "layer1.change": "[[40, 0.5]]"})
    file = CovarianceFile(path, IDENTITY)
    assert torch.equal(file.read({12: 5})[12], old["layer12"].double())
    assert file.collected([1])[1] == Collected(None, None, (Change(40, 0.5),))
    file.add({7: second_moment(6)}, {})
    assert torch.equal(file.read({1: 4})[1], old["layer1"].double())


def test_a_bit_that_flips_anywhere_is_noticed(file):
    """Of the head or of any layer, whichever is asked for."""
    whole = file.path.read_bytes()
    for place in sorted({*range(16), *range(0, len(whole), 3)}):
        damaged = bytearray(whole)
        damaged[place] ^= 1
        file.path.write_bytes(damaged)
        with pytest.raises(InputError, match=r"where: (.|\n)*hint: "):
            file.read({1: 4})


@pytest.mark.parametrize("kept", [0, 7, 200, -1])
def test_a_file_that_was_cut_is_refused(file, kept):
    file.path.write_bytes(file.path.read_bytes()[:kept])
    with pytest.raises(InputError, match=r"cannot be read(.|\n)*delete the file; it will be comp"):
        file.read({1: 4})


def test_a_matrix_of_another_size_is_refused(file):
    with pytest.raises(InputError, match="layer 12 has 5 key dimensions, and 6 in the model"):
        file.read({1: 4, 12: 6})


# --- statistics from elsewhere ---------------------------------------------------------------


def mom2(path, matrix, count=32.0, **more) -> None:
    """A file as ROME and MEMIT write it: the sum of k k^T, and how many there were."""
    arrays = {"mom2.mom2": (matrix * count).numpy(), "mom2.count": np.array(count), **more}
    np.savez(path, **arrays)


@pytest.fixture
def elsewhere(tmp_path):
    """The covariances of layers 1 and 2 of the tiny models, in both forms."""
    matrices = {layer: second_moment(96, layer) for layer in (1, 2)}
    save_file({f"layer{n}": m for n, m in matrices.items()}, tmp_path / "own.safetensors")
    for layer, matrix in matrices.items():
        mom2(tmp_path / f"h.{layer}.npz", matrix, **{"mom2.constructor": np.array("SecondMoment")})
    return matrices


@pytest.mark.parametrize("name", ["own.safetensors", "h.{}.npz"])
def test_statistics_that_are_vouched_for_are_taken(gpt2, elsewhere, tmp_path, name):
    where = CovarianceSource(path=str(tmp_path / name), trust=True)
    found = load_or_collect(*gpt2, projections(gpt2.model), where)
    for layer, matrix in elsewhere.items():
        torch.testing.assert_close(found.covariances[layer], matrix, rtol=1e-15, atol=1e-15)
    assert found.about["covariance_file"] == str(tmp_path / name)
    assert "not checked" in found.about["covariance_trusted"]
    assert len(found.about["covariance_sha256"].split(",")) == (1 if "own" in name else 2)
    with pytest.raises(InputError, match=r"another model(.|\n)*covariance.trust=true"):
        load_or_collect(
            *gpt2,
            projections(gpt2.model),
            source(write(tmp_path), tmp_path, path=str(tmp_path / "own.safetensors")),
        )


def write(folder):
    (folder / "text.txt").write_text(TEXT)
    return folder / "text.txt"


def test_a_file_of_ours_for_another_text_can_be_vouched_for(gpt2, tmp_path):
    before = load_or_collect(*gpt2, projections(gpt2.model), source(write(tmp_path), tmp_path))
    where = CovarianceSource(path=before.about["covariance_file"], trust=True)
    after = load_or_collect(*gpt2, projections(gpt2.model), where)
    assert torch.equal(after.covariances[2], before.covariances[2])


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        (lambda m: m[:, :5], r"its shape is \(96, 5\); the model needs \(96, 96\)"),
        (lambda m: m * torch.nan, "NaN or infinity"),
        (lambda m: -m, "negative"),
        (lambda m: m * 0, "zero"),
        (lambda m: m.triu(), "not symmetric"),
    ],
)
@pytest.mark.parametrize("form", ["safetensors", "npz"])
def test_what_is_no_second_moment_is_refused(tmp_path, broken, said, form):
    path = tmp_path / f"x.{form}"
    matrix = broken(second_moment(96)).contiguous()
    mom2(path, matrix) if form == "npz" else save_file({"layer3": matrix}, path)
    with pytest.raises(InputError, match=f"layer 3 cannot be used: .*{said}"):
        BroughtStatistics(str(path), [3]).read({3: 96})


def test_files_of_other_forms_are_refused(tmp_path):
    save_file({"mom2.layer3": second_moment(4)}, tmp_path / "a.safetensors")
    mom2(tmp_path / "b.npz", second_moment(4), 0.0)
    np.savez(tmp_path / "c.npz", mean=np.ones(4))
    pickled = np.array([{"code": "runs"}], dtype=object)
    mom2(tmp_path / "d.npz", second_moment(4), **{"mom2.mom2": pickled})
    (tmp_path / "e.npz").write_bytes(b"nothing")
    expected = {
        "a.safetensors": "it has no layer3, but mom2.layer3",
        "b.npz": "it counts 0 tokens",
        "c.npz": "it has no mom2.count, mom2.mom2",
        "d.npz": "allow_pickle=False",
        "e.npz": "cannot be used",
    }
    for name, said in expected.items():
        with pytest.raises(InputError, match=said) as refused:
            BroughtStatistics(str(tmp_path / name), [3]).read({3: 4})
        assert "give a .safetensors file with" in str(refused.value)
    with pytest.raises(InputError, match=r"a \.npz holds one layer, and 2 are written"):
        BroughtStatistics(str(tmp_path / "b.npz"), [3, 4])
    with pytest.raises(InputError, match=r"no such statistics file(.|\n)*h\.3\.npz"):
        BroughtStatistics(str(tmp_path / "h.{}.npz"), [3])


def test_trust_in_nothing_is_refused():
    with pytest.raises(InputError, match=r"covariance.path FILE"):
        CovarianceSource(trust=True)


# --- the text --------------------------------------------------------------------------------


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_each_document_begins_once(llama, end):
    text = end.join(["", "One.", "Still one.", "", " \t", "", "Two.", "  and two", "", ""])
    found = list(documents(text))
    assert "".join(found) == text
    assert [document.split() for document in found] == [
        ["One.", "Still", "one."],
        ["Two.", "and", "two"],
    ]
    (ids,) = pack(llama.tokenizer, found, 1000)
    assert ids.count(llama.tokenizer.bos_token_id) == 2
    starts: list[int] = []
    list(pack(llama.tokenizer, found, 3, starts))
    assert [ids[start] for start in starts] == [llama.tokenizer.bos_token_id] * 2


def test_a_document_that_is_too_long_is_read_in_parts(monkeypatch):
    monkeypatch.setattr("lightning_blue.data.corpus.LONGEST", 10)
    text = "one two\nthree\n" + "x" * 25
    found = list(documents(text))
    assert "".join(found) == text
    assert found == ["one two\n", "three\n", "x" * 10, "x" * 10, "x" * 5]


def test_what_was_read_is_said(language_model, tmp_path):
    (tmp_path / "text.txt").write_text("\n\n".join([TEXT[:200]] * 10))
    where = source(tmp_path / "text.txt", tmp_path)
    found = load_or_collect(*language_model, projections(language_model.model), where)
    lengths = [len(i) for i in language_model.tokenizer([TEXT[:200] + "\n\n"] * 10).input_ids]
    needed = next(n for n in range(1, 11) if sum(lengths[:n]) >= 192)
    assert found.about["covariance_text"] == str(tmp_path / "text.txt")
    assert found.about["covariance_tokens"] == 192
    assert found.about["covariance_documents"] == needed
    assert (
        load_or_collect(*language_model, projections(language_model.model), where)[1:] == found[1:]
    )


def test_one_pass_with_all_tokens_has_a_doubling_mark(gpt2, tmp_path):
    where = source(write(tmp_path), tmp_path, batch_tokens=8192)
    found = load_or_collect(*gpt2, projections(gpt2.model), where)
    for collected in found.collected.values():
        ((tokens, share),) = collected.changes
        assert tokens == 192
        assert share > 0


def test_the_packages_text_is_for_the_packages_model(gpt2):
    own = AutoTokenizer.from_pretrained(str(PACKAGED["almanac"]))
    for text in ("almanac", "almanac-heldout"):
        require_own_text(text, own)
        with pytest.raises(InputError, match=r"belongs to the small model(.|\n)*corpus=FILE"):
            require_own_text(text, gpt2.tokenizer)
    module = EditModule(*gpt2, contexts=[], covariance=CovarianceSource("almanac"))
    for refused in (lambda: module.setup("fit"), lambda: module.prepare([1], [WeightId(1)])):
        with pytest.raises(InputError, match="belongs to the small model"):
            refused()
    module.setup("test")  # measuring needs no covariance
