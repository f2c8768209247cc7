"""Answers that a model generates freely: how they are written, compared, kept and reported."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Callback

from conftest import LanguageModel
from helpers import write_jsonl
from lightning_blue.__main__ import main
from lightning_blue.data import EditDataModule
from lightning_blue.data.requests import EditRequest, Probe
from lightning_blue.editing import EditModule, TargetOptimization
from lightning_blue.editing.prompts import edit_prompts
from lightning_blue.language_model.answers import Continuation, _Texts, continue_prompts
from lightning_blue.metrics import table
from lightning_blue.metrics.callback import MeasureEdits
from lightning_blue.metrics.evaluation import evaluate
from lightning_blue.metrics.generated import (
    GenerationSettings,
    prompt_form,
    unedited_continuations,
    with_answers,
)
from lightning_blue.metrics.history import RunHistory
from lightning_blue.metrics.matching import (
    GeneratedAnswer,
    alias_match,
    answer_from,
    avoids,
    containment,
    contains,
    exact_match,
    is_match,
)
from lightning_blue.metrics.protocols import choose
from lightning_blue.reporting import RunRecord
from lightning_blue.reporting.answers import generated_answers
from lightning_blue.support.checkpoints import BatchCheckpoints, WholeCheckpointIO, checkpoints
from lightning_blue.support.errors import InputError
from random_models import random_model
from random_models import tokenizer as random_tokenizer
from test_lightning import FACTS, corpus, data_of, module, trainer_of  # noqa: F401  (fixtures)

PROMPTS = [
    "Where is the Eiffel Tower? It is in",
    "Lyon is",
    "The river runs through the town of",
    "She",
    "In 1998 the committee met in Rome, Berlin and",
    "Zoë",
]


def greedy(language_model: LanguageModel, prompt: str, n: int) -> list[int]:
    """Continue one prompt by whole forward passes, without padding or a cache."""
    model, tokenizer = language_model
    ids = tokenizer(prompt)["input_ids"]
    start = len(ids)
    while len(ids) < start + n:
        with torch.no_grad():
            ids = [*ids, int(model(torch.tensor([ids])).logits[0, -1].argmax())]
    return ids[start:]


def until(language_model: LanguageModel, ids: Sequence[int], stops: Sequence[str]) -> list[int]:
    """Cut tokens behind the first with which a stop string or the end token is there."""
    tokenizer = language_model.tokenizer
    for n in range(1, len(ids) + 1):
        text = tokenizer.decode(ids[:n])
        if ids[n - 1] == tokenizer.eos_token_id or any(stop in text for stop in stops):
            return list(ids[:n])
    return list(ids)


@pytest.fixture
def stops(language_model: LanguageModel) -> tuple[str, ...]:
    """Texts at which some of the prompts' continuations stop, at different lengths."""
    written = [greedy(language_model, prompt, 12) for prompt in PROMPTS]
    chosen = (written[0][0], written[1][3], written[2][7])
    return tuple(language_model.tokenizer.decode([token]) for token in chosen)


@pytest.mark.parametrize("tokens_per_batch", [None, 60])
def test_answers_written_together_are_those_written_one_at_a_time(
    language_model: LanguageModel, stops: tuple[str, ...], tokens_per_batch: int | None
) -> None:
    expected = [
        until(language_model, greedy(language_model, prompt, 12), stops) for prompt in PROMPTS
    ]
    lengths = {len(ids) for ids in expected}
    assert len(lengths) > 2  # rows leave the batch at different times
    written = continue_prompts(
        *language_model,
        [*PROMPTS, PROMPTS[0]],
        [0] * 7,
        stops=stops,
        max_new_tokens=12,
        tokens_per_batch=tokens_per_batch,
    )
    assert [list(each.ids) for each in written] == [*expected, expected[0]]
    assert {each.ended_by for each in written if len(each.ids) == 12} <= {"limit"}
    assert {each.ended_by for each in written if len(each.ids) < 12} <= {"stop", "end"}


@pytest.mark.parametrize(
    "name", ["gemma3_text", "mistral, short window", "bloom", "gptj", "qwen2_5_vl_text"]
)
def test_rows_leave_a_batch_in_other_architectures_too(name: str) -> None:
    """Sliding windows, positions by bias, rotary ones of several axes: as one at a time."""
    other = LanguageModel(random_model(name), random_tokenizer(bos=True))
    written = [greedy(other, prompt, 8) for prompt in PROMPTS]
    stops = tuple(other.tokenizer.decode(written[row][row : row + 1]) for row in range(4))
    expected = [until(other, ids, stops) for ids in written]
    assert len({len(ids) for ids in expected}) > 1  # rows leave at different times
    ours = continue_prompts(*other, PROMPTS, [0] * 6, stops=stops, max_new_tokens=8)
    assert [list(each.ids) for each in ours] == expected


def test_an_answer_ends_where_the_context_does(gpt2: LanguageModel) -> None:
    prompt = "a b c d e f g h " * 3 + "a b c"  # of 64 positions
    room = 64 - len(gpt2.tokenizer(prompt)["input_ids"])
    assert 0 < room < 20
    (said,) = continue_prompts(*gpt2, [prompt], [0], stops=(), max_new_tokens=50)
    assert len(said.ids) <= room
    assert list(said.ids) == until(gpt2, greedy(gpt2, prompt, room), ())


@pytest.mark.parametrize(
    ("text", "passed_over", "cuts", "ended_by"),
    [
        (" St. Louis. It is", 1, (" St", " St. Louis"), "stop"),
        (" St. Louis. It is", 0, (" St",), "stop"),
        (" the U.S.\nand", 2, (" the U", " the U.S", " the U.S."), "stop"),
        ("\nParis", 0, ("",), "stop"),
        (" Paris<|end|>, a city", 1, (" Paris", " Paris"), "end"),
        (" Paris and then", 1, (" Paris and then", " Paris and then"), "limit"),
    ],
)
def test_where_answers_are_cut(
    language_model: LanguageModel, text: str, passed_over: int, cuts: tuple[str, ...], ended_by: str
) -> None:
    """The reference cuts "St. Louis" at its dot; later cuts go on by as many as a name holds."""
    ids = language_model.tokenizer(text, add_special_tokens=False)["input_ids"]
    said = _Texts(*language_model, (".", "\n")).continuation(ids, passed_over)
    assert (said.answer, said.cuts, said.ended_by) == (cuts[0], cuts, ended_by)


def test_a_chat_models_other_end_token_ends_an_answer_too(gpt2: LanguageModel) -> None:
    model = copy.deepcopy(gpt2.model)
    written = greedy(gpt2, "Lyon is", 12)
    place = next(i for i, token in enumerate(written) if token != written[0])
    model.generation_config.eos_token_id = [gpt2.tokenizer.eos_token_id, written[place]]
    (said,) = continue_prompts(model, gpt2.tokenizer, ["Lyon is"], [0], stops=(), max_new_tokens=12)
    assert (list(said.ids), said.ended_by) == (written[: place + 1], "end")
    assert said.answer == gpt2.tokenizer.decode(written[:place])


@pytest.mark.parametrize(
    ("text", "wanted", "expected"),
    [
        (" St. Louis, Missouri", "St. Louis", True),
        (" the city of St. Louis", "St. Louis", True),
        (" It is Englishman", "English", False),
        (" New and York", "New York", False),
        ("首都是东京，对吗", "东京", True),
        (" anything", "the", False),  # nothing is left of it
        (" a+b", "a+b", True),
        (" vitamin B", "a+b", False),  # its first letter is no article
        (" the US, I think", "U.S.", True),
        (" the U.S.", "US", True),
        # punctuation of any kind parts words
        (" It is “English”", "English", True),
        (' It is "English"', "English", True),
        (" English—the language", "English", True),
        (" English/French", "English", True),
        (" English…", "English", True),
        (" the English-speaking world", "English", True),
        (" French,French,French", "French", True),
        (" «Paris»", "Paris", True),
        (" Paris’s river", "Paris", True),
        (" Lyon–Rome", "Rome", True),
        (" “the St Louis”", "St. Louis", True),
        (" O’Brien", "O'Brien", True),
        (" «Beatles»", "The Beatles", True),
        (" Englishman—a man", "English", False),
        (" New—and York", "New York", False),
        ("«东京»", "东京", True),
        # but not numbers
        (" about 1.5 million", "5", False),
        (" 10,000 years", "10", False),
        (" (1.5)", "1.5", True),
        (" 1980–1985", "1980", True),
        (" (a dog)", "A+", False),  # normalization leaves nothing of "A+"
        (" Rome\ufffd", "Rome", False),  # half a character may be a letter
        (" ……", "“”", False),
        # an article that ends the object is a part of it
        (" Serie B", "Serie A", False),
        (" the Serie A, again", "Serie A", True),
        (" hepatitis virus", "Hepatitis A", False),
        (" great Alexander", "Alexander the Great", False),
        # and so is a plus
        (" C, of course", "C++", False),
        (" C++, of course", "c++", True),
        (" F# major", "F#", True),
        # digits are not joined where a sign parts them, but for thousands
        (" 1/10", "110", False),
        (" 1/10 of it", "1/10", True),
        (" 1.5 million", "15", False),
        (" 1,500,000 people", "1500000", True),
        (" 1500 people", "1,500", True),
        (" 1,50", "150", False),
        # one width of characters, whatever the script's habit
        ("１５", "5", False),
        ("２０２３", "２０", False),
        ("２０２３年", "2023", True),
        ("Ｅｎｇｌｉｓｈｍａｎ", "Ｅｎｇｌｉｓｈ", False),
        ("ｱﾒﾘｶへ", "アメリカ", True),
        ("cafe\u0301 noir", "caf\u00e9", True),
        # scripts without spaces write no boundary beside digits and Latin letters either
        ("他于1995年出生", "1995年", True),
        ("他在Apple公司工作", "Apple", True),
        ("1995年5月5日", "5月5日", True),
        ("1995年5月15日", "5日", False),
    ],
)
def test_containment_is_of_whole_words(text: str, wanted: str, expected: bool) -> None:
    assert contains(text, wanted) is expected
    blank = GeneratedAnswer(0, table.OWN_PROMPT, "", wanted, (), text, text, (), "stop")
    assert containment([blank]).tolist() == [expected]
    assert avoids([blank]).tolist() == [not expected]


@pytest.mark.parametrize(
    ("answer", "wanted", "expected"),
    [
        (" the U.S.A.", "usa", True),
        (" the Beatles!", "A Beatles", True),
        (" New   York", "New York", True),
        (" English language", "English", False),
        (" “English”", "English", False),  # ASCII punctuation alone is deleted
        (" English-speaking", "English speaking", False),
        ("", "A", True),  # nothing is left of either
        ("", "Rome", False),
    ],
)
def test_exact_match_is_the_reference_s_rule(answer: str, wanted: str, expected: bool) -> None:
    """SQuAD's: lower case, ASCII punctuation deleted, a, an and the left out, spaces joined."""
    assert is_match(answer, wanted) is expected
    blank = GeneratedAnswer(0, table.OWN_PROMPT, "", wanted, (), answer, answer, (), "stop")
    assert exact_match([blank]).tolist() == [expected]


def request_of(case: str, **fields: Any) -> EditRequest:
    return EditRequest(case, "{} lies in", f"Tower {case}", "Rome", **fields)


REQUESTS = [
    request_of(
        "0",
        paraphrases=("You find Tower 0 in", "Not asked"),
        neighborhood=(Probe("The Louvre lies in", "Paris"),),
        portability=(Probe("The country of Tower 0 is", "Italy"),),
    ),
    request_of("1", aliases=("Roma", "St. Peter's city")),
    request_of("2", neighborhood=(Probe("Lyon is a twin city of", "Beirut"),)),
]


def answered(
    language_model: LanguageModel, settings: GenerationSettings, unedited: Any = None
) -> Any:
    scored = evaluate(*language_model, REQUESTS, generate=False, continuation_tokens=0)
    return with_answers(scored, *language_model, REQUESTS, settings, unedited=unedited)


def test_metrics_are_those_of_the_answers(gpt2: LanguageModel) -> None:
    """Each score once more by hand; one answer is empty, one right but for what follows."""
    own = gpt2.tokenizer.decode(greedy(gpt2, REQUESTS[0].text, 6))
    first = gpt2.tokenizer.decode(greedy(gpt2, REQUESTS[1].text, 1))
    settings = GenerationSettings(max_new_tokens=6, stops=(first,))
    evaluation = answered(gpt2, settings)
    said = {(each.request, each.prompts): each for each in evaluation.answers}
    kinds = [table.OWN_PROMPT, table.PARAPHRASES, table.NEIGHBOURS, table.PORTABILITY]
    assert [each.prompts for each in evaluation.answers] == [*kinds, kinds[0], kinds[0], kinds[2]]
    assert (said[1, table.OWN_PROMPT].answer, said[1, table.OWN_PROMPT].ended_by) == ("", "stop")
    asked = [each for each in evaluation.answers if each.prompts != table.NEIGHBOURS]
    empty = sum(not each.answer.strip() for each in asked)
    cut_off = sum(len(each.ids) == 6 and first not in each.longer for each in asked)
    assert empty
    assert cut_off
    values = {name: each["value"] for name, each in evaluation.metrics.items()}
    # per request first: the prompts of one are correlated
    assert values["empty_generation"] == pytest.approx(
        mean_over_requests([(a.request, not a.answer.strip()) for a in asked])
    )
    assert values["cut_off_generation"] == pytest.approx(
        mean_over_requests([(a.request, a.ended_by == "limit") for a in asked])
    )
    assert "locality_generation" not in values  # nothing to compare with
    assert evaluation.metrics["reliability_generation_alias"]["count"] == 1
    assert evaluation.metrics["portability_generation"]["count"] == 1
    assert {"efficacy_top1", "specificity_top1"} <= set(values)  # what was there stays
    assert own.startswith(said[0, table.OWN_PROMPT].answer)


def test_what_is_read_past_a_stop_string_that_an_object_holds(gpt2: LanguageModel) -> None:
    """An object's own stop strings end no answer, an alias's only its own; a neighbour's always."""
    text = REQUESTS[1].text
    written = greedy(gpt2, text, 6)
    stop = gpt2.tokenizer.decode(written[:1])
    assert stop not in gpt2.tokenizer.decode(written[1:])
    settings = GenerationSettings(max_new_tokens=6, stops=(stop,))

    def said(kind: str, **given: Any) -> GeneratedAnswer:
        requests = [request_of("1", **given)]
        scored = evaluate(*gpt2, requests, generate=False, continuation_tokens=0)
        answers = with_answers(scored, *gpt2, requests, settings).answers
        return next(each for each in answers if each.prompts == kind)

    whole, holding = gpt2.tokenizer.decode(written), f"a{stop}b"
    assert said(table.OWN_PROMPT, aliases=("Roma",)).longer == ""
    own = said(table.OWN_PROMPT, aliases=("Roma", holding))
    assert (own.answer, own.longer, own.alias_texts) == ("", "", {holding: whole})
    for holds, expected in ((holding, whole), ("Rome", "")):
        assert said(table.PORTABILITY, portability=(Probe(text, holds),)).longer == expected
        probe = Probe(text, holds, aliases=(holding,))
        neighbour = said(table.NEIGHBOURS, neighborhood=(probe,))
        assert (neighbour.longer, neighbour.alias_texts) == ("", {})


class Says(_Texts):
    """A model that says one text, as it would say any other."""

    def __init__(self, language_model: LanguageModel, text: str) -> None:
        super().__init__(*language_model, (".", "\n"))
        self.ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def __call__(self, *args: Any, **settings: Any) -> list[Continuation]:
        prompts, passed_over = args[2:]
        assert len(prompts) == len(passed_over)
        return [self.continuation(self.ids, count) for count in passed_over]


@pytest.mark.parametrize(
    ("text", "wanted", "aliases", "longer", "contained", "named"),
    [
        (" St. Louis. It is a city.", "St. Louis", ("Saint Louis",), " St. Louis", True, True),
        (" St. Louis. It is a city.", "St. Louis", ("St. Louis, M. O.",), " St. Louis", True, True),
        (" St. Louis. It is. So.", "Rome", ("St. Louis", "S. L. M."), " St", False, True),
        (" Paris. Rome is in Italy.", "Rome", ("St. Peter's city",), " Paris", False, False),
        (" Paris. Rome", "Rome", ("Paris. Rome",), " Paris", False, True),
        (" Paris. Rome. It is.", "Rome", ("Paris Rome.",), " Paris", False, True),
        (" Rome. It is.", "St. Louis", ("Rome",), " Rome. It is", False, True),
    ],
)
def test_each_name_is_read_on_by_its_own_stop_strings(
    gpt2: LanguageModel,
    monkeypatch: pytest.MonkeyPatch,
    text: str,
    wanted: str,
    aliases: tuple[str, ...],
    longer: str,
    contained: bool,
    named: bool,
) -> None:
    """An alias changes neither what containment nor what the judge reads."""
    monkeypatch.setattr("lightning_blue.metrics.generated.continue_prompts", Says(gpt2, text))
    requests = [replace(request_of("1", aliases=aliases), target_new=wanted)]
    scored = evaluate(*gpt2, requests, generate=False, continuation_tokens=0)
    evaluation = with_answers(scored, *gpt2, requests, GenerationSettings())
    (answer,) = evaluation.answers
    assert answer.longer == longer
    values = evaluation.outcomes[0].values
    assert values["reliability_generation_containment"] == contained
    assert values["reliability_generation_alias"] == named
    again = answer_from(json.loads(json.dumps(asdict(answer))))
    assert again == answer


@pytest.mark.parametrize(
    ("answer", "wanted", "aliases", "named"),
    [
        ("", "A", ("Type A",), False),
        ("", "Queen", ("The",), False),
        (" the", "Queen", ("The",), True),
        (" A+", "A+", ("A positive",), True),
        (" A-", "A+", ("A positive",), False),
        (" A positive", "A+", ("A positive",), True),
    ],
)
def test_an_empty_answer_is_no_alias(
    answer: str, wanted: str, aliases: tuple[str, ...], named: bool
) -> None:
    """Not even of what exact match leaves nothing of, where the reference calls it right."""
    said = GeneratedAnswer(0, table.OWN_PROMPT, "", wanted, aliases, answer, answer, (), "stop")
    assert alias_match([said]).tolist() == [named]
    history = RunHistory(requests=[request_of("0")], answers_after=[said, said])
    report = " ".join(generated_answers(history).split())
    excepted = not answer and wanted == "A"
    but = ", but for 2 in exact match, whose object is only an article or punctuation"
    empty = 0 if answer else 2
    assert f"{empty} are empty, which counts as a failure{but if excepted else ''}." in report


def test_an_alias_of_a_multi_hop_answer_counts_as_such(gpt2: LanguageModel) -> None:
    question = "The wife of Tower 1 is a citizen of"
    said = gpt2.tokenizer.decode(greedy(gpt2, question, 3))
    for alias, value in ((said, 100.0), (f"not {said}", 0.0)):
        hop = Probe(question, "Chile", aliases=("Peru", alias))
        requests = [request_of("1", portability=(hop,)), REQUESTS[0]]
        scored = evaluate(*gpt2, requests, generate=False, continuation_tokens=0)
        settings = GenerationSettings(max_new_tokens=3, stops=("never said",))
        metrics = with_answers(scored, *gpt2, requests, settings).metrics
        assert metrics["portability_generation"]["value"] == 0.0
        assert metrics["portability_generation_alias"]["value"] == value
        assert metrics["portability_generation_alias"]["count"] == 1


def mean_over_requests(pairs: Sequence[tuple[int, bool]]) -> float:
    by_request: dict[int, list[bool]] = {}
    for request, flag in pairs:
        by_request.setdefault(request, []).append(flag)
    return 100 * sum(sum(v) / len(v) for v in by_request.values()) / len(by_request)


def test_exact_containment_and_alias_matches_are_told_apart() -> None:
    blank = GeneratedAnswer(0, table.OWN_PROMPT, "", "St. Louis", ("Saint Louis",), "", "", (), "")
    cases = {
        "cut at its dot": replace(blank, answer=" St", longer=" St. Louis"),
        "goes on": replace(blank, answer=" St Louis in Missouri", longer=" St Louis in Missouri"),
        "alias": replace(blank, answer=" Saint Louis", longer=" Saint Louis"),
        "exact": replace(blank, answer=" St Louis", longer=" St Louis"),
        "wrong": replace(blank, answer=" Rome", longer=" Rome"),
    }
    judged = {}
    for suffix in ("", "_containment", "_alias"):
        measure = table.by_name(f"reliability_generation{suffix}").measure("zsre")
        judged[suffix] = measure.metric().function(list(cases.values())).tolist()
    assert judged[""] == [False, False, False, True, False]
    assert judged["_containment"] == [True, True, False, True, False]
    assert judged["_alias"] == [True, False, True, True, False]


def test_locality_compares_with_the_unedited_model(language_model: LanguageModel) -> None:
    settings = GenerationSettings(max_new_tokens=6)
    before = unedited_continuations(answered(language_model, settings).answers)
    assert set(before) == {"The Louvre lies in", "Lyon is a twin city of"}
    same = answered(language_model, settings, before)
    assert same.metrics["locality_generation"]["value"] == 100
    changed = {**before, "The Louvre lies in": (*before["The Louvre lies in"][:-1], 1)}
    other = answered(language_model, settings, changed)
    assert [o.values.get("locality_generation") for o in other.outcomes] == [0.0, None, 1.0]
    one = answered(language_model, settings, {k: v for k, v in before.items() if "Lyon" in k})
    assert one.metrics["locality_generation"]["count"] == 1


def test_prompt_forms(gpt2: LanguageModel) -> None:
    tokenizer = copy.deepcopy(gpt2.tokenizer)
    assert prompt_form(tokenizer, "bare")("Where?") == "Where?"
    assert prompt_form(tokenizer, "qa")("Where is {}?").endswith("\n\nQ: Where is {}?\nA:")
    with pytest.raises(InputError, match="no chat template"):
        prompt_form(tokenizer, "chat")
    tokenizer.chat_template = (
        "{% for m in messages %}<|end|>{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}<|end|>assistant:{% endif %}"
    )
    sent = prompt_form(tokenizer, "chat")("Where?")
    assert sent == "<|end|>user: Where?\n<|end|>assistant:"
    assert prompt_form(tokenizer, "chat")(sent) == sent
    with pytest.raises(InputError, match="carries a chat template"):
        prompt_form(tokenizer, "qa")(sent)


@pytest.mark.parametrize(
    "settings", [{"max_new_tokens": 0}, {"prompts_per_kind": 0}, {"prompt": "x"}, {"stops": ("",)}]
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any]) -> None:
    said = r"where: measure\.generation(.|\n)*hint:  (leave it out|choose one of|give)"
    with pytest.raises(InputError, match=said):
        GenerationSettings(**settings)


def test_which_protocol_is_the_main_one() -> None:
    every = ["generation", "probability", "teacher_forced"]
    assert choose(None, "zsre") == ("zsre", ())
    assert choose(every, "counterfact") == ("counterfact", ("teacher_forced", "generation"))
    assert choose(every, "zsre") == ("zsre", ("probability", "generation"))
    assert choose(["probability"], "zsre") == ("counterfact", ())
    with pytest.raises(InputError, match=r"data\.protocol is zsre"):
        choose(["probability"], "zsre", given=True)
    for wrong in (["wild"], [], ["generation", "generation"]):
        said = r"where: measure\.protocols\n  hint:  name some of: probability, teacher_forced"
        with pytest.raises(InputError, match=said):
            MeasureEdits(protocols=wrong)


def test_the_command_refuses_an_unknown_protocol(tmp_path: Path, capsys: Any) -> None:
    assert (
        main(["fit", "--update.layers=[0]", "--measure.protocols=[wild]", f"--run.root={tmp_path}"])
        == 2
    )
    assert "there is no protocol 'wild'" in capsys.readouterr().err


# a run

WANTED = ["probability", "teacher_forced", "generation"]


def measuring(**settings: Any) -> MeasureEdits:
    generation = GenerationSettings(max_new_tokens=4, **settings)
    return MeasureEdits(generate=False, protocols=WANTED, generation=generation)


@pytest.fixture
def facts(tmp_path: Path) -> Path:
    more = {"aliases": ["Roma"], "portability": [{"prompt": "The language is", "answer": "Latin"}]}
    path = tmp_path / "facts.jsonl"
    rows = [{**fact, **(more if i == 0 else {})} for i, fact in enumerate(FACTS[:4])]
    write_jsonl(path, rows)
    return path


def test_several_protocols_in_one_run(module, facts, tmp_path) -> None:  # noqa: F811
    alone = trainer_of(MeasureEdits(generate=False))
    alone.fit(copy.deepcopy(module), datamodule=data_of(facts))
    measure, record = measuring(), RunRecord("run", str(tmp_path), wandb="off", export=False)
    unedited = copy.deepcopy(module.model)
    trainer = trainer_of(measure, record)
    trainer.fit(module, datamodule=data_of(facts))
    history = measure.history
    # the main protocol's figures are those of a run without others
    (plain,) = alone.callbacks[1].history.of("post")
    (post,) = history.of("post")
    assert plain.metrics.items() <= post.metrics.items()
    # the other one's are those of a run that has it for its main one
    other = evaluate(
        module.model, module.tokenizer, history.requests, protocol="zsre", generate=False
    )
    for name in ("efficacy", "generalization", "specificity", "score"):
        assert post.metrics[f"{name}_teacher_forced"] == other.metrics[name]
    # answers are generated before and at the end only
    generated = {spec.name for spec in table.of_group("generation")}
    assert {m.stage for m in history.measurements if generated & set(m.metrics)} == {"pre", "post"}
    assert "batch/efficacy_teacher_forced" in trainer.callback_metrics
    # locality, once more by hand
    for answer in history.answers_after:
        if answer.prompts == table.NEIGHBOURS:
            before = greedy(LanguageModel(unedited, module.tokenizer), answer.prompt, 4)
            cut = until(LanguageModel(unedited, module.tokenizer), before, (".", "\n"))
            assert list(answer.unedited) == cut
    files_say_so(tmp_path / "run", history)


def files_say_so(run: Path, history: Any) -> None:
    """The files of a run name each metric by its protocol, and hold all answers."""
    summary = json.loads((run / "summary.json").read_text())
    assert summary["protocol"] == "counterfact"
    assert summary["protocol/added"] == "teacher_forced, generation"
    shared = ("reliability_generation", "efficacy_teacher_forced", "efficacy")
    assert all(f"{stage}/{name}" in summary for stage in ("pre", "post") for name in shared)
    assert "pre/locality_generation" not in summary
    assert summary["seconds/answers"] > 0
    edits = [json.loads(line) for line in (run / "edits.jsonl").read_text().splitlines()]
    assert edits[0]["after"]["reliability_generation_alias"] is not None
    assert edits[1]["after"]["reliability_generation_alias"] is None
    lines = [json.loads(line) for line in (run / "answers.jsonl").read_text().splitlines()]
    assert len(lines) == len(history.answers_before) + len(history.answers_after)
    assert [line["stage"] for line in lines] == ["pre"] * 13 + ["post"] * 13
    (portability,) = [
        line
        for line in lines
        if (line["prompts"], line["stage"]) == ("portability prompts", "post")
    ]
    assert (portability["wanted"], portability["same"]) == ("Latin", None)
    report = (run / "report.md").read_text()
    for said in (
        "efficacy (teacher-forced)",
        "reliability (containment)",
        "locality (generation)",
        "## The protocols side by side",
        "| own prompt",
        "## Generated answers",
        "Of 9 answers (own prompts, paraphrases, portability)",
        "Measured besides, and named by it:",
    ):
        assert said in " ".join(report.split())


def test_targets_may_end_in_an_end_of_text_token(module, facts, tmp_path) -> None:  # noqa: F811
    """It is part of what is optimised, and stands in the report; the model learns to stop there."""
    end = module.tokenizer.eos_token_id
    likely = {}
    for end_of_text in (False, True):
        model = copy.deepcopy(module.model)
        target = replace(module.target, end_of_text=end_of_text)
        again = EditModule(
            model, module.tokenizer, target, ["She plays."], covariance=module.covariance
        )
        record = RunRecord(f"{end_of_text}", str(tmp_path), wandb="off", export=False)
        trainer_of(measuring(), record).fit(again, datamodule=data_of(facts))
        ids = module.tokenizer("Tower 0 lies in Rome")["input_ids"]
        likely[end_of_text] = model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)[end].item()
        (row,) = edit_prompts(again.tokenizer, [request_of("0")], again.templates, end_of_text)
        assert (row.target[-1] == end) is end_of_text
        assert [ids_.ids[-1] == end for ids_ in row.rewriting] == [False, False]
        report = " ".join((tmp_path / f"{end_of_text}" / "report.md").read_text().split())
        assert f"optimised {'with' if end_of_text else 'without'} an end-of-text token." in report
    assert likely[True] > likely[False]


def test_a_tokenizer_without_an_end_of_text_token_is_refused(gpt2: LanguageModel) -> None:
    tokenizer = copy.deepcopy(gpt2.tokenizer)
    tokenizer.eos_token = None
    with pytest.raises(InputError, match=r"model\.target\.end_of_text"):
        EditModule(gpt2.model, tokenizer, TargetOptimization(end_of_text=True))


def test_after_each_batch_if_asked(module, facts) -> None:  # noqa: F811
    measure = measuring(each_batch=True)
    trainer_of(measure).fit(module, datamodule=data_of(facts))
    stages = {m.stage for m in measure.history.measurements if "locality_generation" in m.metrics}
    assert stages == {"batch", "cumulative", "first_batch", "post"}


class Crash(Callback):
    def on_train_batch_start(self, trainer: Any, *args: Any) -> None:
        if trainer.global_step == 1:
            raise ZeroDivisionError


def run(module: Any, facts: Path, folder: Path, *callbacks: Any, resume: bool = False) -> Any:  # noqa: F811
    checkpointing = BatchCheckpoints()
    checkpointing.folder = folder
    trainer = trainer_of(checkpointing, *callbacks, plugins=[WholeCheckpointIO()])
    path = checkpoints(folder)[-1] if resume else None
    trainer.fit(module, datamodule=data_of(facts), ckpt_path=path, weights_only=True)
    return trainer


def test_a_resumed_run_compares_with_the_unedited_model(module, facts, tmp_path) -> None:  # noqa: F811
    whole, unedited, third = (copy.deepcopy(module) for _ in range(3))
    expected = measuring()
    run(whole, facts, tmp_path / "whole", expected)
    with pytest.raises(ZeroDivisionError):
        run(module, facts, tmp_path / "halves", measuring(), Crash())
    resumed = measuring()
    run(unedited, facts, tmp_path / "halves", resumed, resume=True)
    ours, theirs = resumed.history, expected.history
    assert ours.resumed_after == [2]
    assert ours.answers_before == theirs.answers_before != []
    assert ours.answers_after == theirs.answers_after
    assert ours.of("post") == theirs.of("post")
    with pytest.raises(InputError, match="was started with protocols"):
        run(third, facts, tmp_path / "halves", MeasureEdits(generate=False), resume=True)


# the data


def test_aliases_and_portability_are_read(tmp_path: Path) -> None:
    fact = {
        **FACTS[0],
        "aliases": ["Roma", "Rome"],
        "portability": [{"prompt": "P", "answer": "A"}],
    }
    data = EditDataModule([fact])
    data.prepare()
    (read,) = data.requests
    assert (read.aliases, read.portability) == (("Roma",), (Probe("P", "A"),))
    again = EditDataModule(data.dataset)
    again.prepare()
    assert again.requests == data.requests
    path = tmp_path / "facts.csv"
    path.write_text("subject,prompt,target_new,aliases\nLyon,{} is in,Rome,Roma | Urbs\n")
    table_of = EditDataModule(str(path))
    table_of.prepare()
    assert table_of.requests[0].aliases == ("Roma", "Urbs")
    unusable = EditDataModule([{**FACTS[0], "portability": ["P"]}])
    with pytest.raises(InputError, match="'portability'"):
        unusable.prepare()


def test_zsre_has_aliases_where_it_has_several_answers() -> None:
    record = {
        "subject": "Lyon",
        "src": "Where is Lyon?",
        "answers": ["France", "French Republic", ""],
        "alt": "Italy",
    }
    for name, aliases in {"zsre": ("French Republic",), "zsre-alt": ()}.items():
        data = EditDataModule([record], format=name)
        data.prepare()
        assert data.requests[0].aliases == aliases


def test_fingerprints_of_requests_without_aliases_stay_what_they_were() -> None:
    data = EditDataModule(FACTS)
    data.prepare()
    digest = sha256()
    for request in data.requests:
        fields = replace(request, source="")
        names = [
            "case_id", "prompt", "subject", "target_new", "target_true", "paraphrases",
            "neighborhood", "generation_prompts", "reference_texts", "source", "target_prefix",
            "question",
        ]  # fmt: skip
        said = ", ".join(f"{name}={getattr(fields, name)!r}" for name in names)
        digest.update(f"EditRequest({said})".encode())
    digest.update(b"[]")
    assert data.state_dict()["requests"] == digest.hexdigest()[:16]
    more = EditDataModule([{**fact, "aliases": ["x"]} for fact in FACTS])
    more.prepare()
    assert more.state_dict() != data.state_dict()
