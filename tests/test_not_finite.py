"""NaN and infinity: found before any work, or blamed on the request that brings them."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from blue_callbacks import (
    ClosedFormUpdate,
    NonFiniteError,
    SingularCovarianceError,
    UnsolvableError,
    WeightId,
)
from blue_callbacks.protocol import NAMED, edit_names
from blue_callbacks.transforms import POST_EDIT_TRANSFORMS
from conftest import LanguageModel
from helpers import fit
from lightning_blue.data.requests import EditRequest
from lightning_blue.editing import EditModule, TargetOptimization
from lightning_blue.editing.covariance import CovarianceSource
from lightning_blue.editing.covariance_file import CovarianceFile
from lightning_blue.language_model.loading import load_language_model
from lightning_blue.support.errors import InputError
from test_transforms import twins
from test_update_callback import Chain, batches

PLACES = ["Rome", "Oslo", "Bern", "Lima", "Kyiv", "Riga"]
POISON = "^"  # a token that the culprit's subject alone has


def poisoned(language_model: LanguageModel, corpus: Path, contexts: list[str]) -> EditModule:
    """A module whose model has one token without an embedding; the head has its own weights."""
    model, tokenizer = copy.deepcopy(language_model.model), language_model.tokenizer
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    (token,) = tokenizer(POISON, add_special_tokens=False).input_ids
    model.get_input_embeddings().weight.data[token] = torch.nan
    source = CovarianceSource(str(corpus), tokens_per_dim=20, cache=str(corpus.parent / "stats"))
    settings = TargetOptimization(steps=3)
    return EditModule(model, tokenizer, settings, contexts=contexts, covariance=source)


def requests_with(*culprits: int) -> list[EditRequest]:
    """Six requests of unlike lengths, of which some have the poisoned subject."""
    return [
        EditRequest(
            f"r{i}",
            "{} lies in" if i % 2 else "Long ago {} was built in the town of",
            f"Tower {POISON}{i}" if i in culprits else f"Tower {i}",
            place,
        )
        for i, place in enumerate(PLACES)
    ]


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    path = tmp_path / "corpus.txt"
    path.write_text("The river runs through the town of Basel, and he plays the violin. " * 200)
    return path


def refused(module: EditModule, batch: list[EditRequest]) -> str:
    """Edit, and return what it ends with; the weights must be what they were."""
    before = [weight.clone() for weight in module.model.parameters()]
    with pytest.raises(NonFiniteError) as raised:
        fit(module, ClosedFormUpdate([0, 1, 2], "boundary", 1.0), [batch])
    for old, new in zip(before, module.model.parameters(), strict=True):
        assert torch.equal(old, new) or old.isnan().any()
    return str(raised.value)


@pytest.mark.parametrize("contexts", [[], ["She plays."]], ids=["bare", "contexts"])
@pytest.mark.parametrize("culprit", range(6))
def test_the_loss_names_the_culprit_wherever_it_stands(language_model, corpus, culprit, contexts):
    message = refused(poisoned(language_model, corpus, contexts), requests_with(culprit))
    assert message.startswith(f"the loss of request r{culprit} ('")
    assert message.count("request r") == 1


@pytest.mark.parametrize("what", ["keys", "residual"])
def test_keys_and_residuals_name_all_culprits(gpt2, corpus, what):
    """Where the loss is finite: the others of the batch are innocent here too."""
    module = poisoned(gpt2, corpus, [])
    module.edit_targets = lambda batch, layer: torch.zeros(32, len(batch))
    if what == "residual":
        module.edit_keys = lambda batch, weight: torch.ones(96, len(batch))
    message = refused(module, requests_with(1, 4))
    assert message.startswith(f"{what} of layer0 not finite for request r1 (")
    assert message.count("request r") == 2
    assert "request r4 (" in message


def test_a_target_that_is_not_finite_is_the_culprit(gpt2, corpus):
    module = poisoned(gpt2, corpus, [])

    def targets(batch: Any, layer: int) -> torch.Tensor:
        values = torch.zeros(32, len(batch))
        values[3, 5] = torch.inf
        return values

    module.edit_targets = targets
    message = refused(module, requests_with())
    assert message.startswith("residual of layer0 not finite for request r5 (")


def test_a_message_names_a_few_of_many():
    module: Any = object()
    names = edit_names(module, None, range(NAMED + 3))
    assert names.endswith(f"edit {NAMED - 1} of the batch and 3 more")
    assert edit_names(module, None, [2]) == "edit 2 of the batch"


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_model_with_a_weight_that_is_not_finite_is_not_loaded(gpt2, tmp_path, value):
    gpt2.model.save_pretrained(tmp_path)
    gpt2.tokenizer.save_pretrained(tmp_path)
    load_language_model(str(tmp_path))
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    weights["transformer.h.2.mlp.c_proj.weight"][5, 7] = value
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"weights transformer\.h\.2\.mlp\.c_proj\.weight\n"):
        load_language_model(str(tmp_path))


def test_float16_that_does_not_hold_the_weights_is_not_loaded(gpt2, tmp_path):
    model = copy.deepcopy(gpt2.model)
    model.transformer.h[0].mlp.c_fc.weight.data[0, 0] = 1e5
    model.save_pretrained(tmp_path)
    gpt2.tokenizer.save_pretrained(tmp_path)
    load_language_model(str(tmp_path), "bfloat16")
    with pytest.raises(InputError, match=r"h\.0\.mlp\.c_fc\.weight(.|\n)*float16 holds nothing"):
        load_language_model(str(tmp_path), "float16")


def test_a_covariance_file_that_is_not_finite_is_refused(tmp_path):
    file = CovarianceFile(tmp_path / "c.safetensors", {"model": "m"})
    broken = torch.eye(3)
    broken[1, 2] = torch.nan
    file.add({0: torch.eye(3), 4: broken}, {})
    assert torch.equal(file.read({0: 3})[0], torch.eye(3).double())
    with pytest.raises(InputError, match=r"covariance of layer 4(.|\n)*delete the file"):
        file.read({0: 3, 4: 3})


def test_keys_that_overflow_on_the_corpus_are_no_covariance(gpt2, corpus, tmp_path):
    module = poisoned(gpt2, corpus, [])
    module.model.transformer.h[0].mlp.c_fc.weight.data[:] = 1e30
    module.model.transformer.h[0].mlp.c_fc.bias.data[0] = torch.inf
    with pytest.raises(InputError, match="NaN or infinity in the covariance of layer 0"):
        module.prepare([0], [WeightId(0)])
    assert not list(tmp_path.glob("stats/*.safetensors"))


def test_a_system_that_cannot_be_solved_names_the_weight_and_leaves_it(monkeypatch):
    """The same huge keys again: what they add to the system is lost to rounding."""
    torch.manual_seed(0)
    chain, (data,) = Chain(), batches(1)
    before = [weight.detach().clone() for weight in chain.weights]
    chain.edit_keys = lambda batch, weight: 1e12 * torch.ones(10, 3)
    update = ClosedFormUpdate([0, 1, 2], "boundary", 1e-9)
    with pytest.raises(UnsolvableError, match=r"layer0 cannot be solved(.|\n)*hint"):
        fit(chain, update, [data])
    assert update.committed == 0
    for weight, old in zip(chain.weights, before, strict=True):
        assert torch.equal(weight, old)


def test_keys_that_cannot_be_remembered_leave_the_batch_unwritten(monkeypatch):
    torch.manual_seed(0)
    chain, (data,) = Chain(), batches(1)
    before = [weight.detach().clone() for weight in chain.weights]

    def fail(self, keys):
        raise torch.linalg.LinAlgError("not positive-definite")

    monkeypatch.setattr("blue_callbacks.past_keys.KeyMemory.remember", fail)
    update = ClosedFormUpdate([0, 1, 2], "boundary", 1.0)
    with pytest.raises(UnsolvableError, match="layer0"):
        fit(chain, update, [data])
    assert (update.committed, update.past_keys_by_weight) == (0, {})
    for weight, old in zip(chain.weights, before, strict=True):
        assert torch.equal(weight, old)


def test_a_covariance_of_too_few_inputs_names_the_weight():
    chain = Chain()
    chain.ordinary = torch.randn(4, 10)
    with pytest.raises(SingularCovarianceError, match=r"^layer0: the covariance"):
        fit(chain, ClosedFormUpdate([0, 2], "boundary", 1.0), batches(1))


def test_units_that_never_fire_are_noted():
    torch.manual_seed(0)
    chain = Chain()
    chain.ordinary[:, [2, 7]] = -1.0
    update = ClosedFormUpdate([0], "first", 1.0)
    fit(chain, update, batches(2))
    (note,) = update.notes
    assert note.startswith("layer0: ordinary text never used 2 key dimensions (2, 7); ")


def test_a_transform_that_cannot_be_computed_leaves_the_weights(monkeypatch):
    """Those too that were transformed before."""
    (chain, twin), data = twins(), batches(1)
    fit(twin, ClosedFormUpdate([0, 1, 2], "even", 0.5), data)
    calls: list[int] = []

    def fails_second(original, edited):
        calls.append(1)
        if len(calls) == 2:
            raise torch.linalg.LinAlgError("it did not converge")
        return 0 * edited

    monkeypatch.setitem(POST_EDIT_TRANSFORMS, "prune", fails_second)
    update = ClosedFormUpdate([0, 1, 2], "even", 0.5, post_edit_transform="prune")
    with pytest.raises(UnsolvableError, match=r"prune of layer1 cannot be computed: it did not"):
        fit(chain, update, data)
    for weight, expected in zip(chain.weights, twin.weights, strict=True):
        assert torch.equal(weight, expected)
