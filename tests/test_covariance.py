"""Covariances against a naive loop, and their files."""

from __future__ import annotations

import json
import math
import statistics

import pytest
import torch
from safetensors.torch import load_file

from helpers import load_model
from lightning_blue.editing.collecting import collect_covariance, pack, read_keys
from lightning_blue.editing.convergence import UpdateChange, solved_keys
from lightning_blue.editing.covariance import CovarianceSource, covariance_file, load_or_collect
from lightning_blue.editing.covariance_file import CovarianceFile
from lightning_blue.language_model.architectures import blocks, down_projection, find_architecture
from lightning_blue.support.errors import InputError

TEXT = "The river runs through the town of Basel in Switzerland. " * 60


def projections(model, layers=(1, 2)):
    row = find_architecture(model)
    layers_of = blocks(model, row)
    return {layer: down_projection(layers_of[layer], row) for layer in layers}


@pytest.fixture
def corpus(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


def source(corpus, tmp_path, **settings) -> CovarianceSource:
    defaults = {"tokens_per_dim": 2, "max_length": 16, "cache": str(tmp_path / "stats")}
    return CovarianceSource(corpus=str(corpus), **{**defaults, **settings})


def test_equals_a_loop_over_tokens(language_model):
    model, tokenizer = language_model
    sequences = list(pack(tokenizer, [TEXT], 16))
    ours, seen = collect_covariance(model, projections(model), sequences, 100, batch_tokens=40)
    assert seen == 100
    for layer, module in projections(model).items():
        total, left = torch.zeros(96, 96, dtype=torch.float64), 100
        for sequence in sequences:
            keys = []
            hook = module.register_forward_pre_hook(lambda _m, a, k=keys: k.append(a[0]))
            with torch.no_grad():
                model(torch.tensor([sequence]))
            hook.remove()
            for key in keys[0].reshape(-1, 96)[:left].double():
                total += torch.outer(key, key)
                left -= 1
        torch.testing.assert_close(ours[layer], total / 100, rtol=1e-4, atol=1e-6)


def test_packing_loses_no_token(language_model):
    tokenizer = language_model.tokenizer
    texts = ["One sentence here.", "Another one, in Rome.", "A third."]
    packed = list(pack(tokenizer, texts, 7))
    joined = [token for text in texts for token in tokenizer(text).input_ids]
    assert [token for sequence in packed for token in sequence] == joined
    assert {len(sequence) for sequence in packed[:-1]} == {7}


def test_second_call_reads_the_file(language_model, corpus, tmp_path, monkeypatch):
    model, tokenizer = language_model
    where = source(corpus, tmp_path)
    first = load_or_collect(model, tokenizer, projections(model), where)
    monkeypatch.setattr("lightning_blue.editing.covariance.collect_covariance", None)
    again = load_or_collect(model, tokenizer, projections(model), where)
    assert torch.equal(first.covariances[1], again.covariances[1])
    assert first[1:] == again[1:]


def test_missing_layers_are_added_to_the_file(language_model, corpus, tmp_path):
    model, tokenizer = language_model
    where = source(corpus, tmp_path)
    load_or_collect(model, tokenizer, projections(model, [1]), where)
    load_or_collect(model, tokenizer, projections(model, [1, 3]), where)
    (file,) = (tmp_path / "stats").glob("*.safetensors")
    assert set(load_file(file)) == {"layer1", "layer3"}


@pytest.mark.parametrize("change", ["weights", "corpus", "tokens"])
def test_a_given_file_of_something_else_is_refused(gpt2, corpus, tmp_path, change):
    import copy

    model, tokenizer = copy.deepcopy(gpt2.model), gpt2.tokenizer
    load_or_collect(model, tokenizer, projections(model), source(corpus, tmp_path))
    (file,) = (tmp_path / "stats").glob("*.safetensors")
    settings = {"path": str(file)}
    if change == "weights":
        model.transformer.h[3].mlp.c_proj.weight.data += 0.01
    elif change == "corpus":
        corpus.write_text(TEXT.replace("Basel", "Geneva"))
    else:
        settings["tokens_per_dim"] = 3
    said = {"weights": "another model", "corpus": "another corpus", "tokens": "tokens_per_dim"}
    with pytest.raises(InputError, match=said[change]):
        load_or_collect(model, tokenizer, projections(model), source(corpus, tmp_path, **settings))


def test_a_file_that_is_no_covariance_is_refused(tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(b"not safetensors")
    with pytest.raises(InputError, match="cannot be read"):
        CovarianceFile(path, {}).read({1: 2})


def test_a_given_file_that_is_not_there_is_named(gpt2, corpus, tmp_path):
    (tmp_path / "mine.safetensors").write_bytes(b"")
    where = source(corpus, tmp_path, path=str(tmp_path / "mime.safetensors"))
    with pytest.raises(InputError, match=r"no such file(.|\n)*did you mean '.*mine.safetensors'"):
        load_or_collect(*gpt2, projections(gpt2.model), where)


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="could not be written"):
        CovarianceFile(tmp_path / "file" / "c.safetensors", {}).add({1: torch.eye(2)}, {})


def test_a_corpus_that_is_too_short_is_refused(gpt2, corpus, tmp_path):
    with pytest.raises(InputError, match="only 661 of 96,000 tokens available"):
        load_or_collect(
            *gpt2, projections(gpt2.model), source(corpus, tmp_path, tokens_per_dim=1000)
        )


@pytest.mark.parametrize("name", ["tiny-gpt2", "tiny-llama"])
def test_equals_the_reference_on_its_texts(shared, name):
    """The reference takes one text a sequence; packing is off by passing its sequences."""
    model, tokenizer = load_model(shared / "golden/models" / name)
    texts = json.loads((shared / "golden/cov_texts.json").read_text())
    texts = texts if isinstance(texts, list) else texts["texts"]
    longest = 512 if name == "tiny-gpt2" else 4096  # what the reference cut at
    sequences = [tokenizer(text).input_ids[:longest] for text in texts]
    layers = (1, 2, 3, 4)
    ours, _ = collect_covariance(
        model, projections(model, layers), sequences, sum(map(len, sequences))
    )
    golden = load_file(shared / "golden/cov" / f"{name}.safetensors")
    for layer in layers:
        reference = golden[f"mom2.layer{layer}"]
        assert (ours[layer] - reference).norm() / reference.norm() < 1e-4


def test_sums_are_those_of_float64(language_model):
    """Products or sums in float32 would be off by a million times as much."""
    model, tokenizer = language_model
    sequences = list(pack(tokenizer, [TEXT] * 20, 16))
    n = 16 * (len(sequences) - 1)
    ours, _ = collect_covariance(model, projections(model), sequences, n, batch_tokens=16)
    for layer, keys in read_keys(model, projections(model), sequences[:-1]).items():
        expected = keys.double().T @ keys.double() / n
        # n products are summed in another order: each addition rounds once
        rounding = n * torch.finfo(torch.float64).eps * float(expected.diagonal().max())
        torch.testing.assert_close(ours[layer], expected, rtol=0, atol=rounding)
        assert torch.equal(ours[layer], ours[layer].T)


def test_the_solution_is_that_of_equation_5():
    torch.manual_seed(0)
    keys = torch.randn(12, 3, dtype=torch.float64)
    moment = torch.randn(12, 40, dtype=torch.float64)
    covariance = moment @ moment.T / 40
    dense = torch.linalg.inv(7.0 * covariance + keys @ keys.T) @ keys
    torch.testing.assert_close(solved_keys(covariance, keys, 7.0), dense)
    assert solved_keys(torch.zeros(12, 12), keys, 7.0).isnan().all()


def test_the_last_doubling_tells_what_is_left():
    """Known keys: the change from n / 2 to n is near the distance at n to unlimited tokens."""
    torch.manual_seed(0)
    d_in, n = 16, 4000
    mix = torch.randn(d_in, d_in, dtype=torch.float64)
    probe = {0: mix @ torch.randn(d_in, 8, dtype=torch.float64)}
    truth = solved_keys(mix @ mix.T, probe[0], 100.0)
    changes, distances = [], []
    for _ in range(30):
        keys = mix @ torch.randn(d_in, n, dtype=torch.float64)
        change = UpdateChange(probe, 100.0)
        for tokens in (n // 2, n):
            change(tokens, {0: keys[:, :tokens] @ keys[:, :tokens].T / tokens})
        ((tokens, share),) = change.changes[0]
        assert tokens == n
        changes.append(share)
        solved = solved_keys(keys @ keys.T / n, probe[0], 100.0)
        distances.append(float((solved - truth).norm() / truth.norm()))
    assert statistics.mean(changes) == pytest.approx(statistics.mean(distances), rel=0.15)


def test_a_singular_half_is_an_infinite_change():
    change = UpdateChange({0: torch.ones(2, 1)}, 1.0)
    change(1, {0: torch.zeros(2, 2)})
    change(2, {0: torch.eye(2)})
    assert change.changes[0] == [(2, math.inf)]


def test_the_file_says_how_far_the_update_moved(language_model, corpus, tmp_path):
    model, tokenizer = language_model
    where = source(corpus, tmp_path, tokens_per_dim=4, batch_tokens=64)
    covariances = load_or_collect(
        model, tokenizer, projections(model, [1]), where, weight=50
    ).covariances
    load_or_collect(model, tokenizer, projections(model, [3]), where, weight=50)
    collected = covariance_file(model, tokenizer, where).collected([0, 1, 2, 3])
    assert set(collected) == {1, 3}
    changes = {layer: each.changes for layer, each in collected.items()}
    assert [tokens for tokens, _ in changes[1]] == [192, 384]

    sequences = list(pack(tokenizer, [TEXT], 16))
    keys = read_keys(model, projections(model, [1]), sequences[24:26])[1].T  # behind the 384
    half, _ = collect_covariance(model, projections(model, [1]), sequences, 192)
    whole, _ = collect_covariance(model, projections(model, [1]), sequences, 384)
    torch.testing.assert_close(covariances[1], whole[1])
    before, after = (solved_keys(c[1], keys, 50) for c in (half, whole))
    expected = float((after - before).norm() / after.norm())
    assert changes[1][-1].fraction == pytest.approx(expected, rel=1e-3)


def test_the_report_changes_no_covariance(gpt2, corpus, tmp_path):
    found = {}
    for said in (True, False):
        cache = str(tmp_path / str(said))
        where = source(corpus, tmp_path, report_change=said, cache=cache, batch_tokens=64)
        found[said] = load_or_collect(*gpt2, projections(gpt2.model, [1]), where).covariances[1]
        assert bool(covariance_file(*gpt2, where).collected([1])[1].changes) == said
    assert torch.equal(found[True], found[False])
