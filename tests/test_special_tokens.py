"""Tokenizers that put tokens behind a text, and those that know more tokens than the model."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
from tokenizers import processors
from transformers import PreTrainedTokenizerFast

from blue_callbacks import WeightId
from conftest import CORPUS, LanguageModel
from lightning_blue.data import EditDataModule
from lightning_blue.data.requests import EditRequest, Probe
from lightning_blue.editing.collecting import pack
from lightning_blue.editing.covariance import CovarianceSource
from lightning_blue.editing.health import percent_known
from lightning_blue.editing.module import EditModule
from lightning_blue.editing.prompts import edit_prompts
from lightning_blue.language_model.generation import generate
from lightning_blue.language_model.scoring import perplexity, score_targets
from lightning_blue.language_model.tokens import encode_prompts, leading_ids
from lightning_blue.metrics.evaluation import evaluate
from lightning_blue.support.errors import InputError

REQUEST = EditRequest(
    "0",
    "The mother tongue of {} is",
    "Danielle Darrieux",
    "English",
    "French",
    paraphrases=("Danielle Darrieux speaks",),
    neighborhood=(Probe("José speaks", "Spanish"),),
    generation_prompts=("Danielle Darrieux lives in",),
)


def ending(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """Return a copy that puts an end of text behind every text, and what it did before it."""
    changed = copy.deepcopy(tokenizer)
    bos = "<|begin|> " if tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id else ""
    special = [(token, changed.convert_tokens_to_ids(token)) for token in ("<|end|>",)]
    if bos:
        special.append(("<|begin|>", changed.bos_token_id))
    changed.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos}$A <|end|>", special_tokens=special
    )
    assert changed("Lyon is")["input_ids"] == [
        *tokenizer("Lyon is")["input_ids"],
        changed.eos_token_id,
    ]
    return changed


def test_tokens_behind_a_text_are_no_part_of_a_prompt(language_model: LanguageModel) -> None:
    """Everything that reads text gets the numbers of the tokenizer without them."""
    model, plain = language_model
    changed = ending(plain)
    assert leading_ids(changed) == leading_ids(plain)
    texts = [*CORPUS, "", "<|end|>"]
    assert encode_prompts(changed, texts)[:-1] == plain(texts[:-1])["input_ids"]
    # Written by the user, an end of text stays, and it brings its special tokens along.
    assert encode_prompts(changed, texts)[-1] == [plain.eos_token_id]
    templates = ["{}", "So it is. {}"]
    assert edit_prompts(changed, [REQUEST], templates) == edit_prompts(plain, [REQUEST], templates)
    prompts, targets = ["Lyon is in", "José works"], ["Rome", "Paris"]
    expected = score_targets(model, plain, prompts, targets)
    assert score_targets(model, changed, prompts, targets) == expected
    written = generate(model, plain, prompts, max_new_tokens=5)
    assert generate(model, changed, prompts, max_new_tokens=5) == written
    assert perplexity(model, changed, CORPUS[0]) == perplexity(model, plain, CORPUS[0])
    assert list(pack(changed, CORPUS, 16)) == list(pack(plain, CORPUS, 16))
    facts = [Probe("Lyon is in", "Rome")]
    assert percent_known(model, changed, facts) == percent_known(model, plain, facts)
    assert evaluate(model, changed, [REQUEST]) == evaluate(model, plain, [REQUEST])


@pytest.fixture
def longer(gpt2: LanguageModel) -> LanguageModel:
    """A model whose tokenizer has a token more than its embedding has rows."""
    tokenizer = copy.deepcopy(gpt2.tokenizer)
    tokenizer.add_tokens(["Zorblax"])
    return LanguageModel(gpt2.model, tokenizer)


def sizes(language_model: LanguageModel) -> str:
    rows = language_model.model.get_input_embeddings().weight.shape[0]
    return f"'Zorblax'.*tokenizer has {rows + 1} tokens.*embedding {rows} rows"


@pytest.mark.parametrize(
    "changed",
    [
        {"subject": "Zorblax"},
        {"target_new": "Zorblax"},
        {"target_true": "Zorblax"},
        {"paraphrases": ["Zorblax is in"]},
        {"neighborhood_prompts": [{"prompt": "Nice is in", "answer": "Zorblax"}]},
        {"generation_prompts": ["Zorblax is"]},
    ],
)
def test_a_request_with_a_token_without_embedding_is_named(
    tmp_path: Path, longer: LanguageModel, changed: dict[str, object]
) -> None:
    fact = {"subject": "Lyon", "prompt": "{} is in", "target_new": "Rome"}
    path = tmp_path / "facts.jsonl"
    path.write_text("\n".join(map(json.dumps, [fact, fact | {"subject": "Nice"} | changed])))
    module = EditModule(*longer)
    arguments = (longer.tokenizer, module.max_length, 0, module.embeddings)
    with pytest.raises(InputError, match=f"(?s)facts.jsonl:2.*{sizes(longer)}.*resize"):
        EditDataModule(str(path)).prepare(*arguments)
    data = EditDataModule(str(path), on_unusable="skip")
    data.prepare(*arguments)
    assert [fault.kind for fault in data.rejected] == ["token without embedding"]
    assert [request.subject for request in data.requests] == ["Lyon"]


def test_texts_with_a_token_without_embedding_are_refused(longer: LanguageModel) -> None:
    model, tokenizer = longer
    expected = f"(?s){sizes(longer)}.*resize"
    with pytest.raises(InputError, match=expected):
        score_targets(model, tokenizer, ["Lyon is in"], ["Zorblax"])
    with pytest.raises(InputError, match=expected):
        generate(model, tokenizer, ["Zorblax is in"], max_new_tokens=2)
    with pytest.raises(InputError, match=expected):
        perplexity(model, tokenizer, "Lyon is in Zorblax, as all know.")
    module = EditModule(model, tokenizer, contexts=["In Zorblax."])
    with pytest.raises(InputError, match=expected):
        module.edit_outputs([REQUEST], 0)
    assert score_targets(model, tokenizer, ["Lyon is in"], ["Rome"])  # only what is used counts


def test_a_covariance_text_with_a_token_without_embedding_is_refused(
    tmp_path: Path, longer: LanguageModel
) -> None:
    (tmp_path / "text.txt").write_text("\n".join([*CORPUS * 12, "In Zorblax."]))
    source = CovarianceSource(
        str(tmp_path / "text.txt"), tokens_per_dim=24, cache=str(tmp_path / "stats")
    )
    module = EditModule(*longer, contexts=[], covariance=source)
    with pytest.raises(InputError, match=f"(?s){sizes(longer)}.*text.txt.*resize"):
        module.prepare([0], [WeightId(0)])
