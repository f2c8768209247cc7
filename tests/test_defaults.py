"""What is decided for a model that nobody has tuned: layers, text, units; and cheap imports."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from blue_callbacks import ClosedFormUpdate
from blue_callbacks.solvers import Solver
from lightning_blue.data.corpus import PLAIN_ENGLISH, corpus_texts, fitting_corpus, read_text
from lightning_blue.editing.depth import layers_by_depth, proposed_layers
from lightning_blue.editing.optimization import (
    Predictions,
    TargetOptimization,
    optimize_targets,
)
from lightning_blue.language_model.loading import load_language_model
from lightning_blue.support.errors import InputError

PUBLISHED = {  # blocks of a model -> its critical layers in MEMIT's or EasyEdit's files
    "Llama-3-8B": (32, range(4, 9)),
    "Llama-3.2-3B": (28, range(4, 9)),
    "Qwen2.5-7B": (28, range(4, 9)),
    "GPT-J-6B": (28, range(3, 9)),
    "Llama-3.2-1B": (16, range(4, 9)),
    "GPT2-XL": (48, range(13, 18)),
}
SHARED = {"GPT-J-6B": 5, "Llama-3.2-1B": 3, "GPT2-XL": 0}  # others: all five


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_rule_beside_what_was_published(name):
    blocks, layers = PUBLISHED[name]
    assert len(set(layers_by_depth(blocks)) & set(layers)) == SHARED.get(name, 5)


@pytest.mark.parametrize("blocks", range(1, 130))
def test_layers_are_there_follow_each_other_and_are_read(blocks):
    layers = layers_by_depth(blocks)
    assert layers == list(range(layers[0], layers[-1] + 1))
    assert 1 <= len(layers) <= 5
    assert blocks == 1 or layers[-1] <= min(blocks - 2, max(1, blocks // 2))
    assert blocks < 12 or len(layers) == 5


def test_layers_that_cannot_be_edited_are_left_out():
    assert proposed_layers(32, [0, 5, 6, 20]) == [5, 6]
    with pytest.raises(InputError, match=r"--update.layers=\[0,1\]"):
        proposed_layers(32, [0, 1])


def test_the_text_fits_the_model(llama):
    assert fitting_corpus("auto", llama.tokenizer) == PLAIN_ENGLISH
    assert fitting_corpus("auto", load_language_model("almanac")[1]) == "almanac"
    assert fitting_corpus("mine.txt", llama.tokenizer) == "mine.txt"


def test_plain_english_is_plain_and_mixed():
    """Half a million characters and more; any beginning holds both kinds of documents."""
    text = read_text(PLAIN_ENGLISH)
    documents = list(corpus_texts(PLAIN_ENGLISH))
    assert "".join(documents) == text
    assert 500_000 < len(text) < 1_000_000
    assert sum(character.isascii() for character in text) > 0.999 * len(text)
    beginning = "".join(documents[:20])
    assert "Congress" in beginning
    assert "independence" in beginning


def test_the_covariance_weighs_as_many_tokens_as_there_are_dimensions():
    torch.manual_seed(0)
    covariance = torch.randn(8, 8, dtype=torch.float64)
    covariance = covariance @ covariance.T
    vector = torch.randn(8, 1, dtype=torch.float64)
    by_default, given = (
        Solver().whitening(covariance),
        Solver(covariance_weight=8).whitening(covariance),
    )
    assert torch.equal(by_default.apply(vector), given.apply(vector))


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_the_first_step_is_half_of_h_on_any_scale(scale):
    """Adam's first step moves each coordinate by the learning rate; numbers may be of any size."""
    initial = scale * torch.tensor([[[3.0, 4.0, 0.0, 0.0], [0.0, 0.0, 0.0, 2.0]]])
    wanted = 10 * scale * torch.ones(4)

    def predict(edits, delta):
        distance = ((delta[0] - wanted) / scale).abs().sum(-1)
        nothing = torch.zeros(len(edits), 2)
        return Predictions(distance, torch.zeros(len(edits), dtype=torch.bool), nothing)

    settings = TargetOptimization(steps=2, weight_decay=0.0, clamp=10.0)
    values = optimize_targets(initial, predict, settings).values
    moved = (values - initial).norm(dim=-1) / initial.norm(dim=-1)
    torch.testing.assert_close(moved, torch.full((1, 2), 0.5), rtol=1e-4, atol=0)


def test_importing_the_package_imports_nothing_heavy():
    code = "import sys, lightning_blue; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    heavy = {"torch", "lightning", "transformers", "numpy", "datasets"} & set(done.stdout.split())
    assert not heavy


def test_reading_what_was_found_imports_nothing_that_finds_it():
    code = "import sys, lightning_blue.cli.found; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    finds = "lightning_blue.locating.", "lightning_blue.tuning."
    assert not [name for name in done.stdout.split() if name.startswith(finds)]


def test_the_package_says_what_it_does_not_have():
    import lightning_blue

    assert {"edit", "EditResult", "load_language_model"} <= set(dir(lightning_blue))
    with pytest.raises(AttributeError, match="no attribute 'edti'"):
        _ = lightning_blue.edti


def test_layers_are_given_or_proposed():
    said = r"the module proposes none(.|\n)*update\.layers(.|\n)*ClosedFormUpdate\(layers="
    with pytest.raises(InputError, match=said):
        ClosedFormUpdate().find_layers(object())
