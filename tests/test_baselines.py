"""Baselines beside the closed form: one weight fine-tuned, and facts in front of prompts."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch
import yaml
from lightning import Callback
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from blue_callbacks import (
    ClosedFormUpdate,
    EditGuard,
    EditRejected,
    InputError,
    NonFiniteError,
    WeightId,
)
from blue_callbacks.fine_tuning import FineTuning
from conftest import ROOT, LanguageModel
from helpers import fit
from lightning_blue import edit
from lightning_blue.__main__ import main
from lightning_blue.comparison.labels import labels
from lightning_blue.data import EditDataModule
from lightning_blue.data.requests import EditRequest
from lightning_blue.editing import EditModule
from lightning_blue.editing.fine_tuning import losses_and_gradient
from lightning_blue.editing.in_context import Fact, FactMemory, InContext
from lightning_blue.language_model.answers import continue_prompts
from lightning_blue.language_model.architectures import down_projection
from lightning_blue.language_model.chat import Markers
from lightning_blue.language_model.generation import generate
from lightning_blue.metrics.callback import MeasureEdits
from lightning_blue.metrics.generated import GenerationSettings
from lightning_blue.metrics.texts import write_texts
from lightning_blue.reporting.files import flat
from lightning_blue.runs.base import UneditedModel
from lightning_blue.runs.journal import EditJournal, Journal
from lightning_blue.runs.undo import all_from, one_batch, write_without
from runs_made import BATCHES, REQUESTS, Watch, save
from test_conf import flags, small_run  # noqa: F401  (a fixture)
from test_lightning import data_of, facts, trainer_of  # noqa: F401  (fixtures)
from test_update_callback import Chain, batches

TRAINED = WeightId(2)


def fine_tuning(**settings: Any) -> ClosedFormUpdate:
    plain = {"lr": 0.01, "epochs": 3, "mini_batch": 2, "converged": 0.0, "seed": 5}
    how = FineTuning(**{**plain, **settings})
    return ClosedFormUpdate([0, 1, 2], "last", solver="fine_tuning", fine_tuning=how)


def in_context(**settings: Any) -> ClosedFormUpdate:
    return ClosedFormUpdate(plan="none", solver="in_context", **settings)


def module_of(language_model: LanguageModel, dtype: torch.dtype = torch.float32) -> EditModule:
    model = copy.deepcopy(language_model.model).to(dtype)
    return EditModule(model, language_model.tokenizer, contexts=[])


# fine-tuning


def plain_loop(language_model: LanguageModel, batches: list[Any], how: FineTuning) -> torch.Tensor:
    """Fine-tune as LocFT-BF's code does, in float64, each row by itself and unpadded."""
    model = copy.deepcopy(language_model.model).double().requires_grad_(False)
    tokenizer = language_model.tokenizer
    module = EditModule(model, tokenizer, contexts=[])
    weight = down_projection(module.blocks[TRAINED.layer], module.architecture).weight
    weight.requires_grad_(True)
    for number, batch in enumerate(batches):
        adam = torch.optim.Adam([weight], lr=how.lr)
        before = weight.detach().clone()
        order = torch.Generator().manual_seed(how.seed * 1_000_003 + number)
        for _ in range(how.epochs):
            for part in torch.randperm(len(batch), generator=order).split(how.mini_batch):
                losses = []
                for request in (batch[i] for i in part.tolist()):
                    start = tokenizer(request.text)["input_ids"]
                    target = tokenizer(f" {request.target_new}", add_special_tokens=False)
                    ids = torch.tensor([*start, *target["input_ids"]])
                    logits = model(ids[None, :-1]).logits[0, len(start) - 1 :]
                    losses.append(cross_entropy(logits, ids[len(start) :]))
                adam.zero_grad()
                torch.stack(losses).mean().backward()
                adam.step()
                if how.norm_constraint is not None:
                    most = how.norm_constraint
                    with torch.no_grad():
                        weight.copy_(before + (weight - before).clamp(-most, most))
    return weight.detach()


@pytest.mark.parametrize("constraint", [None, 0.02])
def test_fine_tuning_is_a_plain_torch_loop(language_model, constraint):
    update = fine_tuning(norm_constraint=constraint)
    module = module_of(language_model, torch.float64)
    before = module.editable_weights.read(TRAINED).clone()
    fit(module, update, BATCHES)
    ours = down_projection(module.blocks[TRAINED.layer], module.architecture).weight
    expected = plain_loop(language_model, BATCHES, update.fine_tuning)
    # Adam divides a gradient by its size plus 1e-8: rounding of 1e-16 becomes at most 1e-8 of lr
    torch.testing.assert_close(ours.detach(), expected, rtol=0, atol=1e-6 * 0.01)
    moved = float((module.editable_weights.read(TRAINED) - before).abs().max())
    assert moved > 0.01
    assert constraint is None or moved <= 3 * constraint + 1e-12  # each of three batches that far


def test_what_has_converged_is_left_alone(llama):
    module = module_of(llama)
    before = module.editable_weights.read(TRAINED).clone()
    update = fine_tuning(converged=1e6)
    fit(module, update, BATCHES[:1])
    assert torch.equal(module.editable_weights.read(TRAINED), before)
    assert update.norms["layer2/epochs"] == 1
    assert update.committed == 1


def test_fine_tuning_ends_with_the_first_epoch_that_has_converged(llama):
    module, update = module_of(llama), fine_tuning(epochs=200, mini_batch=6, converged=2.5)
    fit(module, update, [REQUESTS])
    epochs, loss = (update.norms[f"layer2/{name}"] for name in ("epochs", "fine_tuning_loss"))
    assert 1 < epochs < 200
    assert loss < 2.5
    one_less, longer = module_of(llama), module_of(llama)
    shorter = fine_tuning(epochs=int(epochs) - 1, mini_batch=6, converged=2.5)
    fit(one_less, shorter, [REQUESTS])
    assert shorter.norms["layer2/fine_tuning_loss"] >= 2.5
    fit(longer, fine_tuning(epochs=int(epochs), mini_batch=6, converged=2.5), [REQUESTS])
    assert torch.equal(*(m.editable_weights.read(TRAINED) for m in (module, longer)))


def test_what_is_computed_together_does_not_matter(gpt2):
    module = module_of(gpt2, torch.float64)
    prompts = module._prompts(REQUESTS)
    projection = down_projection(module.blocks[1], module.architecture)
    together = losses_and_gradient(module.model, projection, prompts)
    alone = losses_and_gradient(module.model, projection, prompts, tokens_per_batch=1)
    for ours, theirs in zip(together, alone, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
    assert not projection.weight.requires_grad


def test_a_loss_that_is_not_finite_names_its_edit_and_leaves_the_weights(llama):
    module = module_of(llama)
    before = module.editable_weights.read(TRAINED).clone()
    real = module.edit_gradient

    def broken(batch, columns, weight):
        losses, gradient = real(batch, columns, weight)
        losses[list(columns).index(1)] = torch.nan
        return losses, gradient

    module.edit_gradient = broken
    with pytest.raises(NonFiniteError, match=r"the loss of request r1 .* is not finite at layer2"):
        fit(module, fine_tuning(mini_batch=6), [REQUESTS])
    assert torch.equal(module.editable_weights.read(TRAINED), before)


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def tuned(request, llama, tmp_path_factory):
    """A fine-tuned run with a journal, and what its weight was after each batch."""
    folder = tmp_path_factory.mktemp(f"tuned-{request.param}")
    base = save(llama, folder / "base")
    model = AutoModelForCausalLM.from_pretrained(base, dtype=getattr(torch, request.param))
    module = EditModule(model, llama.tokenizer, contexts=[])
    watch = Watch()
    fit(module, fine_tuning(), BATCHES, callbacks=[watch, EditJournal(folder / "run")])
    return folder / "run", base, watch


def test_records_give_back_every_state_to_the_bit(tuned):
    run, base, watch = tuned
    journal = Journal(run)
    assert journal.header.covariance == {}
    for kept in range(len(BATCHES) + 1):
        unedited = UneditedModel(journal.header.model, journal.header.weights, str(base))
        write_without(journal, all_from(journal, kept), unedited, None)
        assert torch.equal(unedited.weights.read(TRAINED), watch.states[kept][TRAINED])


def test_one_batch_is_subtracted(tuned):
    run, base, watch = tuned
    journal = Journal(run)
    unedited = UneditedModel(journal.header.model, journal.header.weights, str(base))
    write_without(journal, one_batch(journal, 1), unedited, None)
    w0, w1, w2, w3 = (state[TRAINED].double() for state in watch.states)
    expected = w1 + (w3 - w2)
    eps = torch.finfo(torch.float32).eps
    found = unedited.weights.read(TRAINED).double()
    torch.testing.assert_close(found, expected, rtol=0, atol=8 * eps * float(w0.abs().max() + 1))


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--requests", "r0"], "none of them can be taken out alone"),
        (["--batch", "0", "--replay"], "cannot be solved again"),
    ],
)
def test_what_cannot_be_undone_is_refused(tuned, args, message, capsys):
    assert main(["undo", str(tuned[0]), "--model", str(tuned[1]), *args]) == 2
    assert message in capsys.readouterr().err


def test_patch_and_adapter_hold_the_whole_change(tuned, tmp_path, capsys):
    run, base, watch = tuned
    where = ["--model", str(base), "--output"]
    assert main(["export", str(run), "--as", "adapter", *where, str(tmp_path / "adapter")]) == 0
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    up = next(value for name, value in tensors.items() if "lora_B" in name)
    down = next(value for name, value in tensors.items() if "lora_A" in name)
    change = watch.states[-1][TRAINED] - watch.states[0][TRAINED]
    assert float((up @ down - change).norm()) < 1e-5 * float(change.norm())
    assert main(["export", str(run), "--as", "patch", *where, str(tmp_path / "patch")]) == 0
    assert "layer2: whole" in capsys.readouterr().out
    assert main(["show", str(run)]) == 0
    assert "last, fine_tuning, layers 0, 1, 2" in capsys.readouterr().out


class Judge(EditGuard):
    """A guard that rejects the second batch, and keeps its readings."""

    def on_edit_written(self, trainer, module, record):
        self.change_ratio = 1e-9 if trainer.global_step == 1 else 1e9
        super().on_edit_written(trainer, module, record)


def test_the_guard_reads_and_rolls_back_a_fine_tuned_batch(llama):
    first, second = module_of(llama), module_of(llama)
    start = first.editable_weights.read(TRAINED).double()
    norm = float(torch.linalg.matrix_norm(start, ord=2))
    guard = Judge("rollback", weight_ratio=None, loss_increase=None, retained_drop=None)
    update = fine_tuning()
    fit(first, update, BATCHES[:2], callbacks=[guard])
    assert (update.committed, len(guard.events)) == (1, 1)
    watch = Watch()
    fit(second, fine_tuning(), BATCHES[:2], callbacks=[watch])
    w1, w2 = (state[TRAINED].double() for state in watch.states[1:])
    assert torch.equal(first.editable_weights.read(TRAINED).double(), w1)
    found = guard.readings["layer2/change_ratio"] * norm  # 20 power steps are within 1%
    assert found == pytest.approx(float(torch.linalg.matrix_norm(w2 - w1, ord=2)), rel=0.01)


def test_a_layer_by_depth_is_trained_where_none_is_given(llama):
    module = module_of(llama)
    update = ClosedFormUpdate(plan="last", solver="fine_tuning", fine_tuning=FineTuning(epochs=1))
    fit(module, update, BATCHES[:1])
    assert update.written_layers == [3]  # of 0 to 3


def test_edit_from_python_fine_tunes_and_goes_back(llama, tmp_path):
    model = copy.deepcopy(llama.model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    wanted = [(r.subject, r.prompt, r.target_new) for r in REQUESTS[:2]]
    how: dict[str, Any] = {"layers": [1], "lr": 0.05, "settings": {"guard.action": "off"}}
    result = edit(model, llama.tokenizer, wanted, method="locft_bf", progress=False, **how)
    changed = [name for name, value in model.state_dict().items() if not value.equal(before[name])]
    assert changed == ["model.layers.1.mlp.down_proj.weight"]
    assert "LocFT-BF" in repr(result)
    card = result.save(tmp_path / "model") / "README.md"
    assert "were fine-tuned, one layer of them, so that" in card.read_text()
    result.undo()
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())
    with pytest.raises(InputError, match="there would be no edited model"):
        edit(model, llama.tokenizer, wanted, method="in_context", progress=False)


# retrieval


def memory_of(*told: tuple[str, str, str], **settings: Any) -> FactMemory:
    memory = FactMemory(InContext(**settings))
    prompts = [prompt.replace("{}", subject) for subject, prompt, _ in told]
    memory.add(
        [
            Fact(str(i), subject, text, f"{text} {new}")
            for i, ((subject, _, new), text) in enumerate(zip(told, prompts, strict=True))
        ]
    )
    return memory


MEMORY = memory_of(
    ("Paris", "{} is the capital of", "Peru"),
    ("Paris Hilton", "{} was born in", "Oslo"),
    ("Lyon", "{} is a twin city of", "Rome"),
    ("Lyon", "The mayor of {} is", "Anna"),
    ("Lyon", "{} lies in", "Spain"),
    ("北京", "{}的市长是", "李"),
    most=2,
)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("It rained. LYON lies in", ["3", "4"]),  # two common words, none, none: the newer of these
        ("The mayor of Lyon is", ["2", "3"]),  # four common words, two, none
        ("Lyonnais food is", []),
        ("Paris is the capital of", ["0"]),
        ("Paris Hilton was born in", ["1"]),  # the shorter name stands inside the longer one
        ("Paris Hilton, who loves Paris, was born in", ["0", "1"]),
        ("Who wrote this?", []),
        ("谁是北京的市长？", ["5"]),
    ],
)
def test_facts_are_found_by_the_subject_and_ranked_by_common_words(text, found):
    assert [fact.case_id for fact in MEMORY.recall(text)] == found


@pytest.mark.parametrize(
    ("subject", "text", "found"),
    [
        ("דני", "דניאל נולד ב", False),
        ("علي", "علياء تسكن في", False),
        ("علي", "ولد علي في", True),
        ("राम", "रामायण किसने लिखी", False),
        ("नील", "नीला रंग", False),  # the name goes on with a vowel sign
        ("서울", "서울은 어디에", True),
        ("東京", "東京都の知事は", True),
    ],
)
def test_subjects_are_whole_words_in_every_script(subject, text, found):
    assert bool(memory_of((subject, "{} is", "x")).recall(text)) is found


def test_a_later_fact_on_the_same_prompt_takes_the_place_of_the_earlier():
    memory = memory_of(("Lyon", "{} lies in", "Spain"), ("Lyon", "{} lies in", "Peru"))
    assert [fact.statement for fact in memory.facts] == ["Lyon lies in Peru"]

    def fail() -> None:
        with memory.holding([Fact("9", "Lyon", "Lyon lies in", "x")]):
            assert memory.recall("Lyon")[0].statement == "x"
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert [fact.statement for fact in memory.facts] == ["Lyon lies in Peru"]


def test_facts_stand_inside_the_users_turn():
    memory = FactMemory(InContext(), Markers(("<s>", "<u>"), "<s><u>", "<a>"))
    memory.add([Fact("0", "Lyon", "Where is Lyon?", "Where is Lyon? Spain")])
    said = memory("<s><u>Say: where is Lyon?<a>")
    assert said == ("<s><u>New Fact: Where is Lyon? Spain.\nPrompt: Say: where is Lyon?<a>")


# in-context editing


def test_everything_is_measured_with_retrieval(gpt2, facts):  # noqa: F811
    module = module_of(gpt2)
    before = {name: value.clone() for name, value in module.model.state_dict().items()}
    measure = MeasureEdits(generate=False, protocols=["probability", "generation"])
    trainer = trainer_of(measure, update=in_context())
    trainer.fit(module, datamodule=data_of(facts))
    assert all(value.equal(before[name]) for name, value in module.model.state_dict().items())
    history = measure.history
    assert history.applied == 6
    for place, outcome in history.after.items():
        request = history.requests[place]
        said = f"New Fact: {request.text} {request.target_new}.\nPrompt: {request.text}"
        assert outcome.nll_new == pytest.approx(nll(gpt2, said, request.target_new), rel=1e-4)
        assert history.before[place].nll_new == pytest.approx(
            nll(gpt2, request.text, request.target_new), rel=1e-4
        )
    assert {answer.prompt for answer in history.answers_after} == {
        prompt
        for request in history.requests
        for prompt in (request.text, *request.paraphrases, request.neighborhood[0].prompt)
    }
    (post,) = history.of("post")
    assert post.metrics["specificity"] == history.of("pre")[0].metrics["specificity"]
    own = generate_bare(gpt2, history.requests[0])
    assert own in [a.answer for a in history.answers_after if a.request == 0]


def nll(language_model: LanguageModel, prompt: str, target: str) -> float:
    """Mean nats of a target's tokens behind a prompt, by one plain pass."""
    tokenizer = language_model.tokenizer
    start = tokenizer(prompt)["input_ids"]
    ids = torch.tensor([*start, *tokenizer(f" {target}", add_special_tokens=False)["input_ids"]])
    with torch.no_grad():
        logits = language_model.model(ids[None, :-1]).logits[0, len(start) - 1 :]
    return float(cross_entropy(logits, ids[len(start) :]))


def generate_bare(language_model: LanguageModel, request: Any) -> str:
    said = f"New Fact: {request.text} {request.target_new}.\nPrompt: {request.text}"
    how = GenerationSettings()
    [answer] = continue_prompts(
        *language_model, [said], [0], stops=how.stops, max_new_tokens=how.max_new_tokens
    )
    return answer.answer


def test_generated_texts_are_as_long_as_without_facts(gpt2):
    memory = memory_of(("Lyon", "{} lies in", "Spain"))
    prompts = ["Lyon is a twin city of", "She plays the"]
    plain = generate(*gpt2, prompts, max_length=30)
    behind = generate(*gpt2, [memory(p) for p in prompts], lengths_of=prompts, max_length=30)

    def tokens(texts):
        return [len(gpt2.tokenizer(text)["input_ids"]) for text in texts]

    whole = memory(prompts[0])
    assert whole.startswith("New Fact")
    asked = 30 - len(gpt2.tokenizer(prompts[0])["input_ids"])
    assert behind[0] == generate(*gpt2, [whole], max_new_tokens=asked)[0]
    assert behind[1] == plain[1]
    assert tokens(plain)


def test_texts_for_fluency_hold_no_facts(gpt2):
    """What is written behind the facts counts as a text that begins with the prompt."""
    request = EditRequest("0", "{} lies in", "Lyon", "Spain", generation_prompts=("Lyon is",))
    memory = memory_of(("Lyon", "{} lies in", "Spain"))
    [(place, text)] = write_texts(*gpt2, [request], 0, False, memory)
    [written] = generate(*gpt2, [memory("Lyon is")], lengths_of=["Lyon is"])
    assert (place, text) == (0, f"Lyon is{written}")


class Rejecting(Callback):
    """Reject the second batch; note what is remembered while it is judged."""

    def __init__(self) -> None:
        self.seen: list[int] = []

    def on_edit_written(self, trainer, module, record):
        assert record.changes == ()
        self.seen.append(len(module.memory.facts))
        if trainer.global_step == 1:
            raise EditRejected("no", stop=False)


def test_a_rejected_batch_is_forgotten(gpt2):
    module, rejecting = module_of(gpt2), Rejecting()
    update = in_context()
    fit(module, update, BATCHES, callbacks=[rejecting])
    assert rejecting.seen == [2, 4, 4]
    assert [fact.case_id for fact in module.memory.facts] == ["r0", "r1", "r4", "r5"]
    assert update.committed == module.edit_batches_held == 2


def test_the_guard_asks_control_facts_with_retrieval(gpt2, facts):  # noqa: F811
    module, data = module_of(gpt2), EditDataModule(str(facts), edits=4, batch_size=2, controls=2)
    trainer_of(update=in_context()).fit(module, datamodule=data)
    asked: list[str] = []
    real = module.memory.recall
    module.memory.recall = lambda text: asked.append(text) or real(text)
    assert module.retained_knowledge() is not None
    assert (
        asked == [fact.prompt for fact in data.controls] == ["Tower 4 lies in", "Tower 5 lies in"]
    )


def test_a_run_leaves_its_facts_and_refuses_to_be_a_model(small_run, tmp_path, capsys):  # noqa: F811
    method = f"--config={ROOT / 'conf' / 'methods' / 'in_context.yaml'}"
    args = [method, *flags(small_run, "llama3"), "--run.name=told", f"--run.root={tmp_path}"]
    assert main(["fit", *args, "--data.batch_size=1"]) == 0
    run = tmp_path / "told"
    capsys.readouterr()
    content = json.loads((run / "facts.json").read_text())
    assert [fact["subject"] for fact in content["facts"]] == ["Danielle Darrieux", "Lyon"]
    assert content["in_context"]["lead"] == "Prompt: "
    assert not (run / "model").exists()
    report = (run / "report.md").read_text()
    assert "No weight was changed" in report
    assert "in-context" in report
    summary = json.loads((run / "summary.json").read_text())
    assert summary["settings/method"] == "in-context"
    for command in (["undo"], ["export", "--as", "model"], ["export", "--as", "adapter"]):
        assert main([command[0], str(run), *command[1:]]) == 2
        assert "the run changed no weight" in capsys.readouterr().err
    assert main(["ask", str(run), "Lyon is"]) == 2
    assert "the run changed no weight" in capsys.readouterr().err
    assert main(["show", str(run)]) == 0
    assert "none, in_context, layers none written" in capsys.readouterr().out
    config = flat(yaml.safe_load((run / "config.yaml").read_text()))
    assert config["update/layers"] is None  # so that the file makes the same run again
    labels_of = labels(config)
    assert (labels_of.method, labels_of.plan) == ("in-context", "none")
    assert main(["fit", *args, "--data.batch_size=1", "--ckpt_path=last"]) == 0
    assert "the run is finished" in capsys.readouterr().out


# refusals


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"solver": "fine_tuning"}, "fine-tuning trains one layer"),
        ({"solver": "fine_tuning", "plan": "none"}, "fine-tuning trains one layer"),
        ({"solver": "in_context"}, "an in-context baseline writes no layer"),
        ({"plan": "none"}, "no other method writes none"),
        ({"solver": "fine_tuning", "plan": "last", "rect_keep": 0.4}, "update.rect_keep = 0.4"),
        (
            {"solver": "in_context", "plan": "none", "post_edit_transform": "prune"},
            "update.post_edit_transform = prune",
        ),
    ],
)
def test_settings_that_do_not_go_together_are_refused(settings, message):
    with pytest.raises(InputError, match=message):
        ClosedFormUpdate([0], **settings)


@pytest.mark.parametrize(
    ("given", "where"),
    [({"lr": 0}, "update.fine_tuning.lr"), ({"epochs": 0}, "update.fine_tuning.epochs")],
)
def test_numbers_out_of_their_range_are_refused(given, where):
    with pytest.raises(InputError, match=where):
        FineTuning(**given)
    with pytest.raises(InputError, match=r"model\.in_context\.fact"):
        InContext(fact="New Fact")


@pytest.mark.parametrize("update", [fine_tuning(), in_context()])
def test_a_module_that_cannot_is_refused(update):
    torch.manual_seed(0)
    with pytest.raises(InputError, match=f"update.solver = {update.solver.kind}"):
        fit(Chain(), update, batches(1))


@pytest.mark.parametrize("command", ["stats", "check", "analyze"])
def test_commands_about_the_closed_form_refuse_baselines(command, small_run, capsys):  # noqa: F811
    method = f"--config={ROOT / 'conf' / 'methods' / 'locft_bf.yaml'}"
    own = {"check": [str(small_run / "llama3")], "analyze": ["single-layer"]}.get(command, [])
    given = flags(small_run, "llama3")
    if command == "check":  # whose model has been named
        given = [flag for flag in given if not flag.startswith("--model.name_or_path")]
    assert main([command, *own, method, *given]) == 2
    assert "update.solver = fine_tuning" in capsys.readouterr().err
