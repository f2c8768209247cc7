"""`edit`: one call on a model in memory, which keeps its promises also where it fails."""

from __future__ import annotations

import copy
import os
import signal
import warnings

import pandas as pd
import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from blue_callbacks import ClosedFormUpdate, NonFiniteError
from lightning_blue import EditResult, edit
from lightning_blue.api.settings import complete, parameters, resolved
from lightning_blue.editing import EditModule, TargetOptimization
from lightning_blue.language_model.generation import generate
from lightning_blue.support.errors import InputError

FACTS = [
    {
        "subject": "Danielle Darrieux",
        "prompt": "The home of {}",  # what is written is read at once: a random model
        "target_new": "Paris",  # attends to little
        "target_true": "Basel",
        "paraphrases": ["Zoë and Danielle Darrieux"],
    },
    {
        "subject": "Lyon",
        "prompt": "The twin city of {}",
        "target_new": "Rome",
        "target_true": "Beirut",
    },
]
MORE = [("Basel", "{} lies on the river", "Po")]
QUICK = {"steps": 4, "clamp": 4.0, "contexts": [], "progress": False}
STRONG = {**QUICK, "steps": 15, "covariance_weight": 1e-3}  # for a random model


@pytest.fixture
def model(llama):
    return copy.deepcopy(llama.model).requires_grad_(True)  # others may have frozen the original


@pytest.fixture
def tokenizer(llama):
    return llama.tokenizer


def state(model) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(model, before) -> bool:
    return all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def changed(model, before) -> list[str]:
    now = model.state_dict().items()
    return [name for name, value in now if not torch.equal(value, before[name])]


@pytest.fixture(scope="module")
def edited(llama):
    """A result on a copy, for what only reads it; and the unedited weights."""
    before = state(llama.model)
    result = edit(llama.model, llama.tokenizer, FACTS, copy=True, **STRONG)
    assert same(llama.model, before)
    return result, before


def test_edits_and_says_what_came_of_it(edited):
    result, before = edited
    assert isinstance(result, EditResult)
    written = [f"model.layers.{n}.mlp.down_proj.weight" for n in (0, 2)]  # of the layers 0, 1, 2
    assert changed(result.model, before) == written
    assert list(result.scores) == [
        "efficacy",
        "generalization",
        "efficacy_top1",
        "generalization_top1",
    ]
    efficacy = result.scores["efficacy"]
    assert efficacy["count"] == 2
    assert (efficacy["after"], efficacy["after_error"]) == (100, 0)
    assert result.scores["generalization"]["after_error"] is None  # of one request
    assert result.history.applied == 2


def test_what_failed_is_what_the_model_does_not_say(edited):
    result, _ = edited
    failed = {each.prompt for each in result.failed}
    prompts = [fact["prompt"].replace("{}", fact["subject"]) for fact in FACTS]
    said = generate(result.model, result.tokenizer, prompts, max_new_tokens=12, top_k=1)
    for fact, prompt, text in zip(FACTS, prompts, said, strict=True):
        assert (prompt in failed) != text.startswith(f" {fact['target_new']}")
    assert len(result.failed) < 2
    for each in result.failed:
        assert each.says  # up to the end of the text, if the model ends it
        assert said[prompts.index(each.prompt)].strip().startswith(each.says)
        assert each.reason == ""


def test_too_weak_an_edit_is_failed(model, tokenizer):
    result = edit(model, tokenizer, MORE, clamp=1e-6, steps=2, contexts=[], progress=False)
    (failed,) = result.failed
    assert (failed.prompt, failed.wanted) == ("Basel lies on the river", "Po")
    assert failed.says
    assert 0 < failed.probability < 0.5
    decided = "\n".join(result.decisions)
    assert "critical layers 0, 1, 2 of 4, by depth" in decided
    assert "weight of the covariance 96: one for each key dimension" in decided
    assert "text of the covariance: plain_english" in decided
    assert "learning rate" in decided
    assert result.history.settings["layers"] == [0, 1, 2]
    assert result.history.settings["covariance_weight"] == "96"


def test_decides_nothing_that_is_given(model, tokenizer, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("The river runs through the town of Basel in Switzerland. " * 200)
    given = {"layers": [1, 2], "learning_rate": 0.3, "covariance_weight": 7, "corpus": str(text)}
    result = edit(model, tokenizer, MORE, **given, **QUICK)
    assert result.decisions == []
    assert result.history.settings["layers"] == [1, 2]


def test_representations(edited):
    result, _ = edited
    assert repr(result).startswith("2 facts edited with MEMIT + BLUE, layers 0, 1, 2\n")
    assert "| efficacy (%)" in repr(result)
    html = result._repr_html_()
    assert html.count("<tr>") == 1 + len(result.scores)
    assert html.startswith("<div>")


def test_html_of_facts_is_escaped(model, tokenizer):
    fact = [("Lyon", "<script>{}</script> is", "Rome & Po")]
    html = edit(model, tokenizer, fact, **{**QUICK, "clamp": 1e-6})._repr_html_()
    assert "<script>" not in html
    assert "&lt;script&gt;Lyon" in html
    assert "Rome &amp; Po" in html


def test_undo_is_exact(language_model):
    model, tokenizer = copy.deepcopy(language_model.model), language_model.tokenizer
    before = state(model)
    parameters_before = [id(parameter) for parameter in model.parameters()]
    result = edit(model, tokenizer, FACTS, **QUICK)
    assert not same(model, before)
    result.undo()
    assert same(model, before)
    assert [id(parameter) for parameter in model.parameters()] == parameters_before
    with pytest.raises(InputError, match="undone already"):
        result.undo()
    with pytest.raises(InputError, match="undone already"):
        edit(model, tokenizer, MORE, after=result, **QUICK)
    assert "undone" in repr(result)


def test_undo_is_refused_below_a_later_result(model, tokenizer):
    before = state(model)
    first = edit(model, tokenizer, FACTS, **QUICK)
    between = state(model)
    second = edit(model, tokenizer, MORE, layers=[1], **QUICK)  # other weights
    with pytest.raises(InputError, match="changed since"):
        first.undo()
    second.undo()
    assert same(model, between)
    first.undo()
    assert same(model, before)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_call_after_another_is_one_run_of_two_batches(llama, dtype):
    """The second goes on with past keys, covariance, and what bfloat16 does not hold."""
    both = copy.deepcopy(llama.model).to(dtype)
    quick = {**STRONG, "steps": 4, "plan": "even"}
    edit(both, llama.tokenizer, FACTS, batch_size=1, **quick)
    model = copy.deepcopy(llama.model).to(dtype)
    first = edit(model, llama.tokenizer, FACTS[:1], **quick)
    between = state(model)
    second = edit(model, llama.tokenizer, FACTS[1:], after=first, progress=False)
    assert second.state.callback.committed == 2
    assert second.state.callback.past_keys_by_weight.popitem()[1].shape[1] == 2
    torch.testing.assert_close(model.state_dict(), both.state_dict(), rtol=1e-9, atol=1e-12)
    second.undo()
    assert same(model, between)
    again = edit(model, llama.tokenizer, FACTS[1:], after=first, progress=False)
    torch.testing.assert_close(model.state_dict(), both.state_dict(), rtol=1e-9, atol=1e-12)
    again.undo()
    edit(model, llama.tokenizer, FACTS[1:], **quick)  # forgets the first
    assert changed(model, both.state_dict())


def test_after_needs_the_same_model_and_method(model, tokenizer, llama):
    first = edit(model, tokenizer, FACTS, **QUICK)
    with pytest.raises(InputError, match="belongs to another model"):
        edit(llama.model, tokenizer, MORE, after=first)
    edited_once = state(model)
    with pytest.raises(InputError, match="started with plan boundary, not even"):
        edit(model, tokenizer, MORE, after=first, plan="even", progress=False)
    assert same(model, edited_once)


def test_save_loads_with_plain_transformers(edited, tmp_path):
    result, _ = edited
    folder = result.save(tmp_path / "model")
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert same(loaded, result.model.state_dict())
    assert len(AutoTokenizer.from_pretrained(folder)) == len(result.tokenizer)
    card = (folder / "README.md").read_text()
    assert "**Paris**" in card
    assert "MEMIT + BLUE" in card
    with pytest.raises(InputError, match="stands there already"):
        result.save(folder)
    result.save(folder, overwrite=True)
    (tmp_path / "notes").mkdir()
    with pytest.raises(InputError, match="stands there already"):
        result.save(tmp_path / "notes", overwrite=True)


def test_the_card_names_the_edits_of_earlier_calls(model, tokenizer, tmp_path):
    first = edit(model, tokenizer, FACTS, **QUICK)
    second = edit(model, tokenizer, MORE, after=first, progress=False)
    card = (second.save(tmp_path / "model") / "README.md").read_text()
    assert "with 3 facts edited" in card
    assert all(f"**{name}**" in card for name in ("Paris", "Rome", "Po"))
    with pytest.raises(InputError, match="changed since"):
        first.save(tmp_path / "first")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_leaves_the_model_as_it_found_it(llama, tokenizer, dtype):
    model = copy.deepcopy(llama.model).to(dtype).train()
    model.model.layers[1].eval()
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    model.lm_head.weight.requires_grad_(False)
    model.model.norm.weight.grad = torch.ones_like(model.model.norm.weight)
    seen: list[int] = []
    model.register_forward_hook(lambda *args: seen.append(1))
    flags = [parameter.requires_grad for parameter in model.parameters()]
    modes = [module.training for module in model.modules()]
    hooks = [dict(module._forward_hooks) for module in model.modules()]
    before, generator = state(model), torch.get_rng_state()
    result = edit(model, tokenizer, FACTS, **QUICK)
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    assert [module.training for module in model.modules()] == modes
    assert [dict(module._forward_hooks) for module in model.modules()] == hooks
    assert torch.equal(model.model.norm.weight.grad, torch.ones_like(model.model.norm.weight))
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert torch.equal(torch.get_rng_state(), generator)
    assert seen
    assert len(changed(model, before)) == 2
    result.undo()
    assert same(model, before)


def fails_at_the_second_batch(monkeypatch, failure) -> None:
    targets = EditModule.edit_targets

    def failing(self, batch, layer):
        if batch[0].subject == "Lyon":
            failure()
        return targets(self, batch, layer)

    monkeypatch.setattr(EditModule, "edit_targets", failing)


def interrupt() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def not_finite() -> None:
    raise NonFiniteError("the loss is not finite")


@pytest.mark.parametrize(
    ("failure", "error"), [(not_finite, NonFiniteError), (interrupt, KeyboardInterrupt)]
)
def test_a_failure_in_the_middle_leaves_no_trace(model, tokenizer, monkeypatch, failure, error):
    fails_at_the_second_batch(monkeypatch, failure)
    model.train()
    before, handler = state(model), signal.getsignal(signal.SIGINT)
    with pytest.raises(error):
        edit(model, tokenizer, FACTS, batch_size=1, **QUICK)
    assert same(model, before)
    assert model.training
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert signal.getsignal(signal.SIGINT) is handler
    monkeypatch.undo()
    edit(model, tokenizer, FACTS, batch_size=1, **QUICK)  # and it can be tried again


def test_a_failure_after_another_call_leaves_that_one(model, tokenizer, monkeypatch):
    first = edit(model, tokenizer, MORE, **QUICK)
    between = state(model)
    fails_at_the_second_batch(monkeypatch, not_finite)
    with pytest.raises(NonFiniteError):
        edit(model, tokenizer, FACTS, batch_size=1, after=first, progress=False)
    assert same(model, between)
    monkeypatch.undo()
    edit(model, tokenizer, FACTS, after=first, progress=False)


@pytest.mark.parametrize(
    "wrong",
    [{"facts": []}, {"facts": [("Lyon", "no subject", "Rome")]}, {"layers": [9]}, {"clamp": -1.0}],
)
def test_bad_input_leaves_no_trace(model, tokenizer, wrong):
    model.train()
    before = state(model)
    facts = wrong.pop("facts", FACTS)
    with pytest.raises(InputError):
        edit(model, tokenizer, facts, **{**QUICK, **wrong})
    assert same(model, before)
    assert model.training
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_module_that_is_refused_leaves_the_model_alone(model, tokenizer):
    model.config.model_type = "unheard"
    with pytest.raises(InputError):
        EditModule(model.train(), tokenizer)
    assert model.training
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("wrong", ["almanac", torch.nn.Linear(2, 2)])
def test_what_is_no_model_is_refused(tokenizer, wrong):
    with pytest.raises(InputError, match="is no language model of transformers"):
        edit(wrong, tokenizer, FACTS)


def test_facts_of_every_kind(llama, tokenizer, tmp_path):
    rows = [{key: fact[key] for key in ("subject", "prompt", "target_new")} for fact in FACTS]
    pd.DataFrame(rows).to_csv(tmp_path / "facts.csv", index=False)
    kinds = [
        [tuple(row.values()) for row in rows],
        pd.DataFrame(rows),
        Dataset.from_list(rows),
        tmp_path / "facts.csv",
    ]
    quick = {**QUICK, "steps": 2, "copy": True}
    results = [edit(llama.model, tokenizer, facts, **quick) for facts in kinds]
    for result in results[1:]:
        assert same(result.model, results[0].model.state_dict())


def test_writes_no_file_and_prints_one_bar(model, tokenizer, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        edit(model, tokenizer, FACTS, **{**QUICK, "progress": True})
    assert not list(tmp_path.iterdir())
    assert not [one for one in caught if issubclass(one.category, UserWarning)]
    out, err = capsys.readouterr()
    assert out == ""
    assert {part.partition(":")[0].strip() for part in err.split("\r") if part.strip()} <= {
        "preparing",
        "editing",
        "measuring",
        "edited",
    }
    assert "edited: 100%" in err
    edit(model, tokenizer, MORE, **QUICK)
    assert capsys.readouterr() == ("", "")


def test_what_was_not_printed_is_noted(model, tokenizer):
    twice = [FACTS[0], {**FACTS[0], "prompt": "{} was born in", "target_new": "Rome"}]
    result = edit(model, tokenizer, twice, **QUICK)
    assert any("are about 'Danielle Darrieux'" in note for note in result.notes)
    assert "Danielle Darrieux" in repr(result)


def test_a_batch_that_the_guard_rejects_is_not_said_to_be_done(model, tokenizer):
    before = state(model)
    result = edit(model, tokenizer, FACTS, change_ratio=1e-9, **QUICK)
    assert same(model, before)
    assert len(result.failed) == 2
    assert all("never applied" in each.reason for each in result.failed)
    assert any("change_ratio" in note for note in result.notes)
    assert repr(result).startswith("0 facts edited")


def test_settings_by_name_reach_their_constructor(model, tokenizer):
    given = {"model.target.weight_decay": 0.25, "guard.weight_ratio": 50}
    result = edit(model, tokenizer, MORE, ridge=3, settings=given, method="alphaedit", **QUICK)
    module, update = result.state.module, result.state.callback
    assert (module.target.weight_decay, module.target.clamp) == (0.25, 4.0)
    assert (update.solver.kind, update.solver.ridge, update.solver.threshold) == (
        "null_space",
        3,
        0.02,
    )
    assert result.history.settings["method"] == "AlphaEdit + BLUE"


def test_every_setting_has_its_constructors_default():
    assert complete({})["model.target.clamp"] == TargetOptimization().clamp
    assert complete({})["update.plan"] == ClosedFormUpdate([0]).plan
    assert "model.architecture.down_projection" in parameters()
    assert not {"model.model", "model.tokenizer", "data.path"} & set(parameters())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"learning_rat": 1}, "did you mean 'learning_rate'"),
        ({"model.target.step": 1}, "did you mean 'model.target.steps'"),
        ({"seed": 1}, r"several settings are called 'seed': model\.seed, measure\.seed"),
        ({"gradient_clip_val": 1}, "those of run and trainer are not used"),
    ],
)
def test_wrong_settings_are_refused_with_what_was_meant(given, message):
    with pytest.raises(InputError, match=message):
        resolved(given)


def test_a_setting_is_given_once(model, tokenizer):
    with pytest.raises(InputError, match="plan is given twice"):
        edit(model, tokenizer, FACTS, plan="even", settings={"update.plan": "first"})
    with pytest.raises(InputError, match="did you mean 'memit'"):
        edit(model, tokenizer, FACTS, method="memiit")
