"""The invented world, and the model that ships knowing it."""

from __future__ import annotations

import json
import random
import re
from importlib import resources
from itertools import pairwise
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from transformers import AutoModelForCausalLM, AutoTokenizer

from lightning_blue.data.requests import Probe
from lightning_blue.pretrain.almanac import Almanac
from lightning_blue.pretrain.almanac_text import RELATIONS
from lightning_blue.pretrain.recall import object_recall
from lightning_blue.pretrain.world import text_of

ASSETS = Path(str(resources.files("lightning_blue"))) / "assets" / "almanac"
RECIPE = Path(__file__).resolve().parents[1] / "conf" / "pretrain_almanac.yaml"


@pytest.fixture(scope="module")
def almanac() -> Almanac:
    return Almanac(editable=60, reserved=160, seed=3)


@pytest.fixture(scope="module")
def shipped_tokenizer():
    return AutoTokenizer.from_pretrained(ASSETS / "model")


@pytest.fixture(scope="module")
def shipped_model():
    return AutoModelForCausalLM.from_pretrained(ASSETS / "model").eval()


def read_lines(name: str) -> list[dict]:
    return [json.loads(line) for line in (ASSETS / name).read_text("utf-8").splitlines()]


def texts(almanac: Almanac, count: int, seed: int = 0) -> list[str]:
    rng = random.Random(seed)
    return [text_of(almanac.document(rng, len(almanac.facts))) for _ in range(count)]


def test_same_seed_same_world(almanac, tmp_path):
    twin, other = Almanac(60, 160, seed=3), Almanac(60, 160, seed=4)
    for name, world in {"one": almanac, "twin": twin, "other": other}.items():
        (tmp_path / name).mkdir()
        world.write_files(tmp_path / name)
    for file in sorted((tmp_path / "one").iterdir()):
        assert file.read_bytes() == (tmp_path / "twin" / file.name).read_bytes()
        assert file.read_bytes() != (tmp_path / "other" / file.name).read_bytes()
    assert list(almanac.tokenizer_texts(50)) == list(twin.tokenizer_texts(50))


def test_wordings_are_many_and_well_formed():
    assert len(RELATIONS) >= 10
    for relation in RELATIONS:
        assert len(relation.objects) == len(set(relation.objects)) >= 12
        assert len(relation.wordings) == len(set(relation.wordings)) >= 12
        assert all(wording.count("{}") == 1 for wording in relation.wordings)
        assert any(wording.startswith("{}") for wording in relation.wordings)
        assert any(re.search(r"^\w.*\{\} \w", wording) for wording in relation.wordings)
    names = [word for relation in RELATIONS for word in relation.objects]
    assert len(names) == len(set(names)), "an object belongs to one relation"


def test_subjects_are_told_apart_by_either_name(almanac):
    subjects = {entry.subject for entry in almanac.entries}
    assert len(subjects) == 60 + 160
    firsts, lasts = zip(*(subject.split() for subject in subjects), strict=True)
    assert len(set(firsts) | set(lasts)) == 2 * len(subjects)
    edits = [record["subject"] for record in almanac.edit_records()]
    assert len(set(edits)) == len(edits) == 60


def test_each_subject_has_one_object_per_relation(almanac):
    pairs = [(entry.subject, entry.relation.name) for entry in almanac.entries]
    assert len(set(pairs)) == len(pairs)


def test_neighbours_share_the_object_and_never_the_subject(almanac):
    true = {(e.subject, e.relation.name, e.answer): e for e in almanac.entries}
    relation_of = {r["subject"]: r for r in almanac.edit_records()}
    for entry in almanac.entries:
        if entry.role != "edit":
            continue
        record = relation_of[entry.subject]
        assert len(record["neighborhood_prompts"]) == 5
        for probe in record["neighborhood_prompts"]:
            (wording, subject) = next(
                (wording, match[1])
                for wording in entry.relation.wordings
                if (match := re.fullmatch(pattern(wording), probe["prompt"]))
            )
            assert subject != entry.subject, wording
            assert probe["answer"] == entry.answer == record["target_true"]
            other = true[subject, entry.relation.name, entry.answer]
            assert other.role == "reserved"
            assert wording in other.wordings, "never asked in a wording held out for it"


def pattern(wording: str) -> str:
    """A regular expression for the wording about anybody."""
    before, after = wording.split("{}")
    return re.escape(before) + r"([A-Z][a-z]+ [A-Z][a-z]+)" + re.escape(after)


def says(text: str, prompt: str) -> bool:
    """Whether a sentence begins with the prompt.

    (One short wording, "{} plays the", is also the end of a longer one.)
    """
    return f"\n{prompt} " in f"\n{text}" or f". {prompt} " in text


def test_held_out_wordings_of_a_fact_are_never_trained_on():
    almanac = Almanac(editable=20, reserved=10)
    said = "\n".join(texts(almanac, 12_000))
    for fact in almanac.facts:
        assert len(fact.trained) + len(fact.held_out) == len(RELATIONS[0].wordings)
        assert len(fact.held_out) >= 2
        for prompt in fact.trained:
            assert says(said, prompt), "the text is long enough to show every wording"
        for prompt in fact.held_out:
            assert not says(said, prompt)
    held_out = [entry.held_out for entry in almanac.entries]
    assert len(set(held_out)) > 20, "other wordings for every fact"


def test_shipped_text_holds_no_held_out_wording():
    data = OmegaConf.load(RECIPE).data
    said = "".join((ASSETS / name).read_text("utf-8") for name in ("corpus.txt", "heldout.txt"))
    facts = Almanac(data.editable, data.reserved, data.seed).facts
    assert sum(says(said, prompt) for fact in facts for prompt in fact.trained) > 1000
    assert not any(says(said, prompt) for fact in facts for prompt in fact.held_out)


def test_documents_state_only_facts_in_play(almanac):
    rng = random.Random(0)
    in_play = {(entry.subject, entry.answer) for entry in almanac.entries[:7]}
    objects = {word for relation in RELATIONS for word in relation.objects}
    seen = set()
    for _ in range(400):
        pieces = almanac.document(rng, 7)
        for prompt, answer in pairwise(pieces):
            if answer.is_object:
                (said,) = (s for s, _ in in_play if s in prompt.text)
                seen.add((said, answer.text.strip()))
            elif answer.text.strip() in objects:
                pytest.fail(f"an object is not marked: {pieces}")
    assert seen == in_play


def test_every_edit_is_complete(almanac):
    for entry, record in zip(
        (e for e in almanac.entries if e.role == "edit"), almanac.edit_records(), strict=True
    ):
        held_out = {text.format(entry.subject) for text in entry.held_out}
        assert record["target_new"] in entry.relation.objects
        assert record["target_new"] != record["target_true"] == entry.answer
        assert record["prompt"].count("{}") == 1
        assert record["prompt"].format(entry.subject) not in record["paraphrases"]
        assert len(held_out & set(record["paraphrases"])) == 2
        assert all(entry.subject in text for text in record["generation_prompts"])
        for text in record["reference_texts"]:
            assert record["target_new"] in text
            assert record["target_true"] not in text


def test_shipped_files_come_from_the_committed_recipe(tmp_path):
    recipe = OmegaConf.load(RECIPE)
    data, model = recipe.data, recipe.model
    Almanac(data.editable, data.reserved, data.seed).write_files(tmp_path)
    for file in tmp_path.iterdir():
        assert file.read_bytes() == (ASSETS / file.name).read_bytes(), file.name
    config = json.loads((ASSETS / "model" / "config.json").read_text())
    assert config["model_type"] == "llama"
    assert config["num_hidden_layers"] == model.n_layers
    assert config["hidden_size"] == model.d_model
    assert config["intermediate_size"] == model.d_in
    assert config["num_attention_heads"] == model.n_heads
    recall = json.loads((ASSETS / "recall.json").read_text())
    assert recall["steps"] == recipe.trainer.max_steps


def test_shipped_files_are_small():
    files = [file for file in ASSETS.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) < 11e6


def test_shipped_facts_are_enough_for_many_edits():
    subjects = [record["subject"] for record in read_lines("facts.jsonl")]
    assert len(set(subjects[:500])) == 500
    known = read_lines("known.jsonl")
    assert sum(record["role"] == "reserved" for record in known) >= 300
    reserved = {record["subject"] for record in known if record["role"] == "reserved"}
    assert not reserved & set(subjects)


def test_held_out_text_speaks_of_nobody_that_is_edited():
    text = (ASSETS / "heldout.txt").read_text("utf-8")
    people = set(re.findall(r"[A-Z][a-z]+ [A-Z][a-z]+", text))
    assert len(people) > 100
    assert not people & {record["subject"] for record in read_lines("facts.jsonl")}


def test_shipped_objects_are_single_tokens(shipped_tokenizer):
    for relation in RELATIONS:
        encoded = [shipped_tokenizer(f" {word}").input_ids for word in relation.objects]
        assert all(len(ids) == 1 for ids in encoded)
        assert len({ids[0] for ids in encoded}) == len(relation.objects)


def test_shipped_tokenizer_is_plain(shipped_tokenizer):
    text = "Ada Lovelace plays the harp.\nZoë – 東京 , they 're here ."
    ids = shipped_tokenizer(text).input_ids
    assert shipped_tokenizer.decode(ids) == text, "nothing added, nothing cleaned up"
    assert shipped_tokenizer.model_max_length == 128


def test_shipped_model_knows_the_facts(shipped_model, shipped_tokenizer):
    edits, known = read_lines("facts.jsonl"), read_lines("known.jsonl")
    asked = {
        "prompts": [Probe(r["prompt"].format(r["subject"]), r["target_true"]) for r in edits],
        "controls": [Probe(r["prompt"].format(r["subject"]), r["target_true"]) for r in known],
        "held-out wordings": [
            Probe(prompt, r["target_true"]) for r in edits for prompt in r["paraphrases"][:2]
        ],
        "neighbours": [Probe(**r["neighborhood_prompts"][0]) for r in edits],
    }
    for kind, probes in asked.items():
        right = object_recall(shipped_model, shipped_tokenizer, probes)
        assert right.float().mean() >= 0.97, kind
