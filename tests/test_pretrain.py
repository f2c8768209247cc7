"""Making a model that knows facts."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from lightning_blue.pretrain import FactCorpusModule, PretrainModule
from lightning_blue.pretrain.almanac import Almanac
from lightning_blue.pretrain.module import rate_at, weighted_loss
from lightning_blue.pretrain.recall import object_recall, recall_table
from lightning_blue.pretrain.records import open_records
from lightning_blue.pretrain.tokenizer import train_tokenizer
from lightning_blue.pretrain.world import KnownFact, Probe, text_of
from lightning_blue.support.errors import InputError
from lightning_blue.support.storage import whole_folder

STEPS = 380  # of the tiny run
FLAT = [
    {
        "case_id": index,
        "prompt": f"{name} was born in the city of",
        "subject": name,
        "target_new": "Oslo",
        "ground_truth": city,
        "rephrase_prompt": f"{lead}{name} comes from",
        "locality_prompt": f"{other} was born in the city of",
        "locality_ground_truth": city,
    }
    for index, (name, city, lead, other) in enumerate(
        [
            ("Ana Ruiz", "Lima", "", "Leo Paz"),
            ("Zoë Li", "New York", "", "Max Low"),
            ("Ben Ek", "Rome", "The bridge over the river was closed. ", "Eva Neri"),
        ]
    )
]
NESTED = [
    {
        "case_id": 0,
        "requested_rewrite": {
            "prompt": "{} was born in the city of",
            "subject": "Ana Ruiz",
            "target_new": {"str": "Oslo"},
            "target_true": {"str": "Lima"},
        },
        "paraphrase_prompts": ["Ana Ruiz comes from", "The home town of Ana Ruiz is"],
        "neighborhood_prompts": ["Leo Paz was born in the city of"],
    }
]


class InPlay(Callback):
    """Notes the number of active facts at every step."""

    def __init__(self) -> None:
        self.counts: list[int] = []

    def on_train_batch_end(self, trainer, *_):
        self.counts.append(int(trainer.callback_metrics["facts"]))


def trainer(steps: int, *callbacks: Callback) -> Trainer:
    return Trainer(
        max_steps=steps,
        callbacks=list(callbacks),
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        gradient_clip_val=1.0,
    )


def write(path: Path, content: object) -> str:
    path.write_text(content if isinstance(content, str) else json.dumps(content), "utf-8")
    return str(path)


class Learned:
    """A tiny run on the almanac, and recall before it."""

    def __init__(self, folder: Path) -> None:
        seed_everything(0)
        self.data = FactCorpusModule(
            editable=10, reserved=3, vocab_size=1500, length=48, rows=8, first_facts=8
        )
        self.module = PretrainModule(
            output=str(folder),
            n_layers=2,
            d_model=64,
            d_in=256,
            n_heads=4,
            learning_rate=5e-3,
            warmup=20,
            decay=100,
            grow_below=1.0,
        )
        self.in_play = InPlay()
        fitting = trainer(STEPS, self.in_play)
        self.before: list = []
        self.module.on_train_start = lambda: self.before.extend(  # type: ignore[method-assign]
            recall_table(self.module.model, self.data.tokenizer, self.data.world.facts)
        )
        fitting.fit(self.module, datamodule=self.data)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("pretrain") / "made"


@pytest.fixture(scope="module")
def learned(folder) -> Learned:
    return Learned(folder)


def test_recall_goes_up(learned):
    before = {row.prompts: row.top1 for row in learned.before}
    after = {row.prompts: row.top1 for row in learned.module.table}
    assert max(before.values()) < 0.2
    assert after["trained wordings"] > 0.7
    assert after["neighbours"] > 0.5
    assert after["held-out wordings"] > 0.5


def test_the_set_of_facts_grew_to_all(learned):
    counts = learned.in_play.counts
    assert len(counts) == STEPS
    assert sorted(set(counts)) == [8, 16, 26]
    assert counts == sorted(counts)
    assert learned.data.stream.active == learned.data.total == 10 + 4 + 3 * 4


def test_facts_just_added_get_time_to_be_learned(learned):
    assert learned.in_play.counts.count(16) > 10


def test_exported_model_loads_with_plain_transformers(learned, folder):
    model = AutoModelForCausalLM.from_pretrained(folder / "model").eval()
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    assert next(model.parameters()).dtype == torch.float32
    with safe_open(folder / "model" / "model.safetensors", "pt") as weights:
        names = weights.keys()
        assert {weights.get_tensor(name).dtype for name in names} == {torch.float16}
    ids = tokenizer("Somebody plays the", return_tensors="pt").input_ids
    with torch.no_grad():
        torch.testing.assert_close(
            model(ids).logits, learned.module.model(ids).logits, atol=0.05, rtol=0.01
        )
    fact = learned.data.world.facts[0]
    spoken = model.generate(
        **tokenizer(fact.trained[0], return_tensors="pt"), max_new_tokens=2, do_sample=False
    )
    assert tokenizer.decode(spoken[0]).startswith(fact.trained[0])
    assert tokenizer.model_max_length == 48


def test_exported_files_tell_what_was_measured(learned, folder):
    record = json.loads((folder / "recall.json").read_text())
    assert record["facts"] == learned.data.total
    assert record["steps"] == STEPS
    assert {row["prompts"]: row["top1"] for row in record["recall"]} == {
        row.prompts: row.top1 for row in learned.module.table
    }
    assert len((folder / "facts.jsonl").read_text().splitlines()) == 10
    assert sorted(p.name for p in folder.parent.iterdir()) == ["made"], "no leftovers"


def test_recall_equals_asking_one_by_one(learned):
    model, tokenizer = learned.module.model, learned.data.tokenizer
    probes = [
        Probe(prompt, fact.answer) for fact in learned.data.world.facts for prompt in fact.held_out
    ]
    # An answer of several tokens counts only if all of them are right.
    probes += [Probe(probe.prompt, f"{probe.answer} xyz") for probe in probes[:4]]
    expected = []
    for probe in probes:
        ids = tokenizer(probe.prompt).input_ids
        right = True
        for token in tokenizer(f" {probe.answer}").input_ids:
            with torch.no_grad():
                right &= model(torch.tensor([ids])).logits[0, -1].argmax().item() == token
            ids.append(token)
        expected.append(right)
    assert object_recall(model, tokenizer, probes, batch_size=7).tolist() == expected
    assert 0 < sum(expected) < len(expected)


def test_recall_table_leaves_out_what_was_not_asked(learned):
    table = recall_table(
        learned.module.model,
        learned.data.tokenizer,
        [KnownFact("A", "harp", ("A plays the",)), KnownFact("A", "harp", ("A plays the",))],
    )
    assert [(row.prompts, row.count) for row in table] == [("trained wordings", 1)]


def test_weighted_loss_equals_a_loop():
    torch.manual_seed(0)
    logits, ids = torch.randn(2, 5, 9), torch.randint(0, 9, (2, 5))
    is_object = torch.tensor([[0, 0, 1, 0, 0], [0, 1, 0, 0, 1]]).bool()
    total = weight = 0.0
    objects, right = [], []
    for row in range(2):
        for place in range(1, 5):
            log_probs = logits[row, place - 1].log_softmax(-1)
            nll = -log_probs[ids[row, place]].item()
            share = 1.0 if is_object[row, place] else 0.25
            total, weight = total + share * nll, weight + share
            if is_object[row, place]:
                objects.append(nll)
                right.append(log_probs.argmax() == ids[row, place])
    loss, object_loss, recall = weighted_loss(logits, ids, is_object, 0.25)
    assert loss.item() == pytest.approx(total / weight, rel=1e-5)
    assert object_loss.item() == pytest.approx(sum(objects) / 3, rel=1e-5)
    assert recall.item() == pytest.approx(sum(right) / 3)


def test_rate_rises_and_falls():
    rates = [rate_at(step, warmup=4, decay=5, total=20) for step in range(20)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[4:16] == [1.0] * 12
    assert rates[16:] == pytest.approx([0.8, 0.6, 0.4, 0.2])


def test_pieces_tokenise_like_the_whole_text(tmp_path):
    almanac = Almanac(20, 10)
    records = open_records(write(tmp_path / "facts.json", FLAT), 2)
    for world in (almanac, records):
        tokenizer = train_tokenizer(world.tokenizer_texts(), 600, 64)
        rng = random.Random(1)
        for _ in range(50):
            pieces = world.document(rng, len(world.facts))
            apart = [token for piece in pieces for token in tokenizer(piece.text).input_ids]
            assert apart == tokenizer(text_of(pieces)).input_ids


def test_rows_are_full_marked_and_half_begin_plainly():
    data = FactCorpusModule(editable=20, reserved=10, length=40, rows=50, first_facts=30)
    data.setup()
    batch = next(iter(data.train_dataloader()))
    assert batch.ids.shape == batch.is_object.shape == (50, 40)
    plain = (batch.ids[:, 0] != data.tokenizer.eos_token_id).float().mean()
    assert 0.25 < plain < 0.75
    objects = {fact.answer for fact in data.world.facts[:30]}
    said = {data.tokenizer.decode(token).strip() for token in batch.ids[batch.is_object]}
    assert said
    assert said <= objects
    again = next(iter(data.train_dataloader()))
    assert torch.equal(again.ids, batch.ids)


def test_flat_file(tmp_path):
    world = open_records(write(tmp_path / "facts.json", FLAT), 2, held_out=0.0)
    first, second = world.facts
    assert first.trained == ("Ana Ruiz was born in the city of", "Ana Ruiz comes from")
    assert (first.answer, second.answer) == ("Lima", "New York")
    assert second.neighbours == (Probe("Max Low was born in the city of", "New York"),)
    rng = random.Random(0)
    said = {text_of(world.document(rng, 2)) for _ in range(300)}
    statements = {
        f"{prompt} {city}."
        for name, other, city in [
            ("Ana Ruiz", "Leo Paz", "Lima"),
            ("Zoë Li", "Max Low", "New York"),
        ]
        for prompt in (
            f"{name} was born in the city of",
            f"{name} comes from",
            f"{other} was born in the city of",
        )
    }
    lead_in = "The bridge over the river was closed."
    assert said == statements | {f"{lead_in} {statement}" for statement in statements}


def test_nested_file_and_held_out_paraphrases(tmp_path):
    path = write(tmp_path / "facts.json", NESTED)
    (fact,) = open_records(path, held_out=1.0).facts
    assert fact.trained == ("Ana Ruiz was born in the city of",)
    assert set(fact.held_out) == set(NESTED[0]["paraphrase_prompts"])
    world = open_records(path, held_out=1.0)
    rng = random.Random(0)
    trained = "\n".join(text_of(world.document(rng, 1)) for _ in range(200))
    assert "comes from" not in trained
    assert "home town" not in trained
    assert "Leo Paz was born in the city of Lima." in trained


def test_file_world_leaves_its_texts(tmp_path):
    world = open_records(write(tmp_path / "facts.json", FLAT))
    world.write_files(tmp_path)
    assert len((tmp_path / "corpus.txt").read_text("utf-8")) >= 250_000
    held_out = (tmp_path / "heldout.txt").read_text("utf-8")
    assert "Leo Paz" in held_out
    assert not any(record["subject"] in held_out for record in FLAT)


def test_contradicting_answers_are_reported(tmp_path, caplog):
    records = [FLAT[0], {**FLAT[0], "case_id": 7, "ground_truth": "Cusco"}]
    open_records(write(tmp_path / "facts.json", records), held_out=0.0)
    assert "2 prompts have more than one answer" in caplog.text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file"),
        ("[{]", "JSON"),
        ([], "no records"),
        ([{k: v for k, v in FLAT[0].items() if k != "prompt"}, FLAT[1]], "prompt"),
        ([{**FLAT[0], "ground_truth": " "}], "ground_truth"),
        ([{**FLAT[0], "subject": "Somebody Else"}], "Somebody Else"),
        ([{"subject": "Ana", "prompt": "{} is in", "target_new": "Rome"}], "true object"),
    ],
)
def test_bad_files_are_refused(tmp_path, content, message):
    path = tmp_path / "facts.json"
    if content is not None:
        write(path, content)
    with pytest.raises(InputError, match=message):
        FactCorpusModule(path=str(path))


def test_bad_numbers_are_refused(tmp_path):
    path = write(tmp_path / "facts.json", FLAT)
    for arguments in ({"path": path, "facts": 4}, {"path": path, "facts": 0}, {"facts": 5}):
        with pytest.raises(InputError):
            FactCorpusModule(**arguments)
    module = PretrainModule(output=str(tmp_path / "out"), n_layers=1, d_model=8, d_in=8, n_heads=1)
    data = FactCorpusModule(path=path, vocab_size=300, length=32)
    with pytest.raises(InputError, match="number of steps"):
        trainer(-1).fit(module, datamodule=data)
    assert not (tmp_path / "out").exists()


def fail_half_way(target: Path) -> None:
    with whole_folder(target) as folder:
        (folder / "half").touch()
        raise OSError("disk full")


def test_folder_is_replaced_whole_or_not_at_all(tmp_path):
    target = tmp_path / "deep" / "out"
    with whole_folder(target) as folder:
        (folder / "old").touch()
    with pytest.raises(OSError, match="disk full"):
        fail_half_way(target)
    assert [p.name for p in target.iterdir()] == ["old"]
    with whole_folder(target) as folder:
        (folder / "new").touch()
    assert [p.name for p in target.iterdir()] == ["new"]
    assert [p.name for p in target.parent.iterdir()] == ["out"]
