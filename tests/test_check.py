"""``check``: what it says of models and facts, against tokenizers, plain passes and real runs."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from blue_callbacks import ClosedFormUpdate, EditGuard
from conftest import LanguageModel
from helpers import brief_run, write_jsonl
from lightning_blue.__main__ import main
from lightning_blue.data.requests import EditRequest
from lightning_blue.editing.depth import layers_by_depth
from lightning_blue.metrics.callback import MeasureEdits
from lightning_blue.preflight.estimate import RANGE, Workload, editing_memory, parts, workload
from lightning_blue.preflight.layout import cut_into_tokens
from lightning_blue.preflight.timing import Rates, Shared, seconds_each, spread
from random_models import random_model, saved

FACTS = [
    {"subject": "Lyon", "prompt": "{} is near", "target_new": "Rome", "target_true": "Paris"},
    {"subject": "José", "prompt": "{} works in", "target_new": "Oslo", "target_true": "São Paulo"},
    {"subject": "Zoë", "prompt": "The town of {} is", "target_new": "a river"},
    {"subject": "Basel", "prompt": "She said of {}: “", "target_new": "Madrid"},
]
BLANK = {"subject": "Oslo", "prompt": "{} is ", "target_new": "Rome"}
FAULTS = [
    {"subject": "Lyon", "prompt": "{} is near", "target_new": "Berlin"},  # line 5, against 1
    {"subject": "José", "prompt": "{} works in", "target_new": "Oslo"},  # 6, again 2
    {"subject": "Paris", "prompt": "Rome is", "target_new": "Oslo"},  # 7, without its subject
    {"subject": "Kraków", "prompt": "river " * 80 + "{} is", "target_new": "Oslo"},  # 8, too long
    {"subject": "Zoë", "prompt": "{} plays", "target_new": "the piano"},  # 9, the subject of 3
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, gpt2, llama) -> Path:
    """Two models, facts and a text."""
    folder = tmp_path_factory.mktemp("check")
    for name, (model, tokenizer) in (("gpt2", gpt2), ("llama", llama)):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    write_jsonl(folder / "facts.jsonl", FACTS)
    write_jsonl(folder / "faulty.jsonl", [*FACTS, *FAULTS])
    (folder / "text.txt").write_text("The river runs through the town of Basel. " * 80)
    return folder


def settings(folder: Path) -> list[str]:
    return [
        "--update.layers=[0,2]",
        *brief_run(folder / "text.txt", folder / "stats"),
        f"--run.root={folder / 'runs'}",
    ]


@pytest.fixture
def run(folder, capsys, monkeypatch):
    """Check a model; return exit code, output and error."""
    monkeypatch.setattr("lightning_blue.preflight.timing.SECONDS", 0.02)

    def go(model: str, *more: str, data: str | None = "facts.jsonl") -> tuple[int, str, str]:
        given = [] if data is None else ["--data", str(folder / data)]
        code = main(["check", str(folder / model), *given, *settings(folder), *more])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return go


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_a_fact_is_shown_as_the_model_reads_it(run, name, request):
    """Tokens and the marked one by the tokenizer's offsets; numbers by a pass of plain text."""
    code, out, err = run(name, "--json=-", "--tokens=5")
    assert code == 0, err
    report = json.loads(out)
    assert [fact["source"] for fact in report["facts"]] == [f"facts.jsonl:{i}" for i in range(1, 5)]
    for fact, record in zip(report["facts"], FACTS, strict=True):
        checked_against_the_tokenizer(fact, record, request.getfixturevalue(name))


def checked_against_the_tokenizer(
    fact: dict[str, Any], record: dict[str, Any], language_model: LanguageModel
) -> None:
    model, tokenizer = language_model
    start = record["prompt"].index("{}")
    text = record["prompt"].replace("{}", record["subject"])
    encoded = tokenizer(text, return_offsets_mapping=True)
    inside = range(start, start + len(record["subject"]))
    covering = [
        index
        for index, (first, stop) in enumerate(encoded["offset_mapping"])
        if any(first <= character < stop for character in inside)
    ]
    assert fact["lookup"] == covering[-1]
    assert len(fact["tokens"]) == len(encoded["input_ids"])
    kept = [part for part in fact["tokens"] if part != "<|begin|>"]
    if len(set(encoded["offset_mapping"])) == len(encoded["offset_mapping"]):
        assert "".join(kept) == text  # no character is split over tokens
    gap = "" if text.endswith("“") else " "
    assert fact["prefix"] == gap
    for key, shown in (("target_new", "probability_new"), ("target_true", "probability_true")):
        if record.get(key) is not None:
            expected = mean_probability(model, tokenizer, text, gap + record[key])
            assert fact[shown] == pytest.approx(expected, rel=1e-4)
    ids = torch.tensor([encoded["input_ids"]])
    whole = greedy(model, tokenizer, ids, 5)
    assert whole == text + fact["says_now"]


def greedy(model, tokenizer, ids: torch.Tensor, count: int) -> str:
    """What plain transformers write behind the ids ``(1, n)``, up to an end of text."""
    said = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=count,
        do_sample=False,
        eos_token_id=-1,
        pad_token_id=0,
    )
    end, new = tokenizer.eos_token_id, said[0, ids.shape[1] :].tolist()
    new = new[: new.index(end)] if end in new else new
    return tokenizer.decode([*ids[0].tolist(), *new], skip_special_tokens=True)


@torch.no_grad()
def mean_probability(model, tokenizer, prompt: str, target: str) -> float:
    """The geometric mean over the target's tokens, each from a pass of its own."""
    ids, logs = tokenizer(prompt)["input_ids"], []
    for token in tokenizer(target, add_special_tokens=False)["input_ids"]:
        logs.append(model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)[token])
        ids = [*ids, token]
    return float(torch.stack(logs).mean().exp())


def test_what_was_found_in_a_model(run, llama):
    code, out, err = run("llama", "--json=-", data=None)
    assert code == 0, err
    report = json.loads(out)
    found, config = report["model"], llama.model.config
    weight = llama.model.model.layers[0].mlp.down_proj.weight
    assert [found["d_model"], found["d_in"]] == list(weight.shape)
    assert found["n_layers"] == len(llama.model.model.layers)
    assert found["editable"] == [0, 1, 2, 3]
    assert (found["block"], found["down_projection"]) == ("model.layers.{}", "mlp.down_proj")
    assert found["parameters"] == sum(p.numel() for p in llama.model.parameters())
    assert found["context"] == config.max_position_embeddings
    assert found["before_text"] == ["<|begin|>"]
    assert found["tied_head"] is False
    assert found["chat_template"] is False
    assert report["requests"] is None  # none were given
    assert report["facts"] == []
    assert report["cost"]["stand_ins"]
    assert report["cost"]["edits"] == 100
    assert report["settings"]["site"] == "block"
    assert [a["layer"] for a in report["additivity"]] == [0, 2]
    assert all(a["multiple"] == 1 and a["follows"] for a in report["additivity"])


def test_all_that_is_wrong_with_facts_is_listed(run, folder, capsys):
    """The same reasons for which `fit` stops, all of them and not the first five alone."""
    code, out, _ = run("llama", "--facts=1", data="faulty.jsonl")
    assert code == 1
    assert all(len(line) <= 80 for line in out.splitlines())
    said = " ".join(out.split())
    assert "4 of 9 facts cannot be used" in said
    assert "and 4 more, not asked about" in said
    fit = ["fit", f"--model.name_or_path={folder / 'llama'}", *settings(folder)]
    assert main([*fit, f"--data.path={folder / 'faulty.jsonl'}"]) == 2
    reasons = re.findall(r"faulty.jsonl:\d+: .*", capsys.readouterr().err)
    assert len(reasons) == 4
    for reason in reasons:
        assert " ".join(reason.split()) in said
    assert "batch 0, Zoë: faulty.jsonl:3, faulty.jsonl:9" in said
    code, out, _ = run("llama", "--facts=0", "--data.on_unusable=skip", data="faulty.jsonl")
    assert code == 0
    assert "4 of 9 facts cannot be used (above): they are left out" in " ".join(out.split())


def test_a_later_batch_supersedes_and_shares_no_subject(run):
    more = ["--data.batch_size=1", "--data.on_unusable=skip", "--json=-"]
    code, out, _ = run("llama", *more, data="faulty.jsonl")
    requests = json.loads(out)["requests"]
    assert code == 0
    assert requests["superseded"] == ["faulty.jsonl:1"]
    assert requests["companions"] == requests["blanks"] == []
    zoe = {"subject": "Zoë", "batches": [2, 5], "sources": ["faulty.jsonl:3", "faulty.jsonl:9"]}
    assert requests["returning"] == [zoe]  # on another prompt, and not Lyon's, on the same
    code, out, _ = run("llama", *more[:2], "--facts=0", data="faulty.jsonl")
    assert "batches 2, 5, Zoë: faulty.jsonl:3, faulty.jsonl:9; their keys are" in " ".join(
        out.split()
    )
    together = json.loads(run("llama", *more[1:], data="faulty.jsonl")[1])["requests"]
    assert together["returning"] == []
    assert [each["subject"] for each in together["companions"]] == ["Zoë"]
    assert [u["source"] for u in requests["unusable"]] == [f"faulty.jsonl:{i}" for i in (7, 8, 6)]


def test_a_blank_behind_a_prompt_is_told(run, folder):
    write_jsonl(folder / "blank.jsonl", [*FACTS, BLANK])
    code, out, _ = run("llama", "--facts=0", data="blank.jsonl")
    assert code == 0
    assert "blank.jsonl:5: prompt ends with a blank" in " ".join(out.split())


def test_no_usable_fact_is_a_problem(run, folder):
    write_jsonl(folder / "none.jsonl", FAULTS[2:3])
    code, out, _ = run("llama", data="none.jsonl")
    assert code == 1
    assert "no fact can be edited" in out


@pytest.fixture(scope="module")
def normed(folder) -> str:
    """A model with a norm behind the FFN."""
    saved(random_model("olmo2"), folder / "olmo2")
    return "olmo2"


def test_a_norm_behind_the_ffn_moves_the_target_site(run, normed):
    code, out, err = run(normed, "--json=-", "--facts=0")
    assert code == 0, err
    report = json.loads(out)
    assert report["settings"]["site"] == "ffn"
    assert not any(a["follows"] for a in report["additivity"])
    assert all(a["missed"] > 0.5 for a in report["additivity"])


def test_a_model_that_is_not_additive_where_it_was_asked_is_not_fit_to_go(
    run, normed, folder, capsys
):
    """With the words of `fit`."""
    site = "--model.target.site=block"
    code, out, _ = run(normed, site)
    assert code == 1
    fit = ["fit", f"--model.name_or_path={folder / normed}", *settings(folder), site]
    assert main([*fit, f"--data.path={folder / 'facts.jsonl'}"]) == 2
    refused = capsys.readouterr().err
    message = refused[refused.index("error: ") :].removeprefix("error: ")
    assert " ".join(message.split()) in " ".join(out.replace("problem", " ").split())
    assert "time" not in out.split("verdict")[0].split("says now")[-1]  # no estimate


@pytest.mark.parametrize(
    "broken",
    [
        {"quantization_config": {"quant_method": "gptq", "bits": 4}},
        {"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]},
        {"model_type": "bert", "architectures": ["BertForMaskedLM"]},
    ],
)
def test_what_fit_refuses_is_refused_with_the_same_words(run, folder, tmp_path, capsys, broken):
    config = json.loads((folder / "llama" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **broken}))
    code, out, refused = run(str(tmp_path))
    assert (code, out) == (2, "")
    fit = ["fit", f"--model.name_or_path={tmp_path}", *settings(folder)]
    assert main([*fit, f"--data.path={folder / 'facts.jsonl'}"]) == 2
    assert capsys.readouterr().err == refused


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ([], "MODEL"),
        (["nothing/here/at/all"], "no folder"),
        (["almanac", "stray"], "unrecognized arguments: stray"),
        (["almanac", "--facts=-1"], "--facts"),
        (["almanac", "--update.layers=[99]"], "no layer 99"),
        (["almanac", "--update.layer=[1]"], "update.layer"),
        (["almanac", "--data", "missing.csv"], "no such file"),
        (["almanac", "--data", "a.csv", "--data.path=b.csv"], "as a.csv and by --data.path=b.csv"),
        (["almanac", "--model.name_or_path=gpt2"], "the model is given twice, as almanac"),
    ],
)
def test_bad_input_is_one_message(args, said, capsys):
    assert main(["check", *args]) == 2
    err = capsys.readouterr().err
    assert said in err
    assert err.count("error: ") == 1
    assert "Traceback" not in err


def test_layers_are_proposed_where_none_are_given(folder, capsys, monkeypatch):
    monkeypatch.setattr("lightning_blue.preflight.timing.SECONDS", 0.02)
    given = [flag for flag in settings(folder) if "layers" not in flag]
    data = ["--data", str(folder / "facts.jsonl"), "--facts=0"]
    file = folder / "report.json"
    assert main(["check", str(folder / "llama"), *data, *given, f"--json={file}"]) == 0
    report = json.loads(file.read_text())
    assert report["settings"]["layers"] == layers_by_depth(4)
    assert report["settings"]["proposed"]
    out = capsys.readouterr().out
    assert "proposed by depth" in out
    assert all(len(line) <= 80 for line in out.splitlines())


def test_what_it_says_of_the_disk_is_what_a_run_writes(run, folder, capsys):
    """Covariances to the byte but for the file's head; the model, checkpoints and records about."""
    own = [f"--model.covariance.cache={folder / 'own'}", f"--run.root={folder / 'own-runs'}"]
    cost = json.loads(run("llama", "--json=-", "--facts=0", *own)[1])["cost"]
    file = Path(cost["covariance_file"])
    assert not file.exists()
    fit = ["fit", f"--model.name_or_path={folder / 'llama'}", *settings(folder), *own]
    assert main([*fit, f"--data.path={folder / 'facts.jsonl'}", "--run.wandb=off"]) == 0
    stated = re.findall(r"this run will write about (\S+ \S+) to", capsys.readouterr().err)
    assert stated
    assert cost["covariance_bytes"] <= file.stat().st_size <= cost["covariance_bytes"] + 4096
    again = json.loads(run("llama", "--json=-", "--facts=0", *own)[1])["cost"]
    assert again["covariance_bytes"] == 0  # they are there
    amounts = {part["name"]: part["amount"] for part in again["parts"]}
    assert amounts["covariance"] == 0
    kinds = ("model/*.safetensors", "checkpoints/*", "records/*.safetensors")
    (folder_of_run,) = (folder / "own-runs").iterdir()
    written = sum(f.stat().st_size for kind in kinds for f in folder_of_run.glob(kind))
    assert cost["disk"] == pytest.approx(written, rel=0.35)  # heads and measurements beside numbers
    assert f"{cost['disk'] / 1000:.1f} kB" in stated


RATES = Rates(2.0, 3.0, 0.5, 7.0, 0.25, 1.5, 0.125, 0.0625)


def requests(n: int) -> list[EditRequest]:
    return [
        EditRequest(str(i), "{} is", f"s{i}", "x", generation_prompts=("a", "b")) for i in range(n)
    ]


def seconds(n: int, **changes: Any) -> dict[str, float]:
    chosen = {"missing_layers": 2, "tokens": 960, "compared": True, "controls": 5} | changes
    update = ClosedFormUpdate([0, 1, 2])
    measure = MeasureEdits(text="almanac", text_tokens=1000, cumulative=10)
    work = workload(requests(n), 10, update, measure, EditGuard(), **chosen)
    return {part.name: part.seconds for part in parts(work, RATES)}


def test_twice_the_facts_take_twice_the_targets():
    one, two = seconds(40), seconds(80)
    assert min(one.values()) > 0
    for name in ("targets", "keys and solves", "texts"):
        assert two[name] == 2 * one[name]
    assert one["targets"] == 40 * 2.0
    assert one["covariance"] == two["covariance"] == 960 * 0.5
    # 2 written weights, and for 2 missing layers 3 systems each
    assert one["factorisation"] == two["factorisation"] == (2 + 6) * 7.0
    # before and after: a dozen tokens of each fact, 100 of each generated text; the first is dear
    assert one["texts"] == 2 * 40 * (3 * 1.5 + (11 + 2 * 99) * 0.125)
    # before, after, each batch, 10 after each of 4 batches, the first; controls 6 times, 5 watched
    assert one["probabilities"] == (3 * 40 + 4 * 10 + 10 + 6 * 5 + 5 * 5) * 0.25
    assert one["ordinary text"] == (6 * 1000 + 5 * 1024) * 0.0625


def test_what_is_switched_off_costs_nothing_and_the_last_batch_may_be_short():
    given: dict[str, Any] = {"missing_layers": 2, "tokens": 960, "compared": False, "controls": 4}
    cases = ((12, 10 + 12 + 12, 2 + 3), (100, 10 + 20 + 25, 2 + 3), (0, 0, 2))
    for cumulative, sampled, times in cases:
        measure = MeasureEdits(cumulative=cumulative, generate=False)
        work = workload(
            requests(25), 10, ClosedFormUpdate([0, 1, 2]), measure, EditGuard("off"), **given
        )
        assert work == Workload(
            edits=25,
            covariance_tokens=960,
            factors=2,
            questions=3 * 25 + sampled + 10 + times * 4,
            texts=2 * 25,
            written_tokens=2 * 25 * 12,
        )
    measure = MeasureEdits(cumulative=0, generate=False)
    guard = EditGuard(loss_increase=None)  # it still asks for the control facts, after each batch
    work = workload(requests(25), 10, ClosedFormUpdate([0, 1, 2]), measure, guard, **given)
    assert (work.scored_tokens, work.questions) == (0, 3 * 25 + 10 + 2 * 4 + (1 + 3) * 4)


def test_covariances_that_are_there_take_no_time():
    found = seconds(40, missing_layers=0)
    assert found["covariance"] == 0
    assert found["factorisation"] == 2 * 7.0


def test_the_time_of_an_item_is_that_of_later_ones(monkeypatch):
    """The first, slow one warms up; then ever more as fit into the time, of those there are."""
    clock, done = [0.0], []
    monkeypatch.setattr("time.perf_counter", lambda: clock[0])

    def work(count: int) -> None:
        done.append(count)
        clock[0] += 1.0 if len(done) == 1 else 0.25 * count

    assert seconds_each(work, 100, torch.device("cpu")) == 0.25
    assert done == [1, 4, 16]  # four times as many would take 16 seconds
    assert seconds_each(work, 3, torch.device("cpu")) == 0.25
    assert done[3:] == [1, 3]


def test_many_that_hardly_take_longer_than_few_are_timed_together(monkeypatch):
    """As with tokens that are written: a pass takes a second, and each text in it little more."""
    clock, done = [0.0], []
    monkeypatch.setattr("time.perf_counter", lambda: clock[0])

    def work(count: int) -> None:
        done.append(count)
        clock[0] += 1 + count / 64

    assert seconds_each(work, 50, torch.device("cpu")) == pytest.approx((1 + 50 / 64) / 50)
    assert done == [1, 4, 16, 50]


def test_an_item_that_takes_longer_than_the_time_is_done_once(monkeypatch):
    clock, done = [0.0], []
    monkeypatch.setattr("time.perf_counter", lambda: clock[0])

    def work(count: int) -> None:
        done.append(count)
        clock[0] += each * count

    each = 60.0
    assert seconds_each(work, 100, torch.device("cpu")) == 60
    each = 3.0  # four of them do not fit, and are done all the same
    assert seconds_each(work, 100, torch.device("cpu")) == 3
    assert done == [1, 1, 4]


@pytest.mark.parametrize(
    ("device", "worked", "slowed"), [("cpu", 2.0, 4.0), ("cpu", 16.0, 1.0), ("meta", 2.0, 1.0)]
)
def test_other_programs_are_told_by_the_processor_s_own_clock(monkeypatch, device, worked, slowed):
    clocks = iter([0.0, 8.0]), iter([5.0, 5.0 + worked])
    monkeypatch.setattr("time.perf_counter", lambda: next(clocks[0]))
    monkeypatch.setattr("time.process_time", lambda: next(clocks[1]))
    with Shared(torch.device(device)) as timing:
        pass
    assert timing.slowed == slowed


def test_on_a_busy_machine_the_shorter_time_is_without_the_others(run, monkeypatch):
    monkeypatch.setattr(Shared, "__exit__", lambda self, *_: setattr(self, "slowed", 4.0))
    cost = json.loads(run("llama", "--json=-", "--facts=0")[1])["cost"]
    total = sum(part["seconds"] for part in cost["parts"])
    assert cost["seconds"] == pytest.approx([RANGE[0] * total / 4, RANGE[1] * total])
    assert "other programs had 75% of the processor meanwhile" in " ".join(
        run("llama", "--facts=0")[1].split()
    )


def test_memory_is_counted_by_matrix():
    """Two weights of (32, 96), by hand."""
    one = 2 * (2 * 8 * 96 * 96 + 2 * 8 * 10 * 96 + 4 * 32 * 96) + 2 * 8 * 96 * 96
    given: dict[str, Any] = {"edits": 10, "batch_tokens": 1, "token_bytes": 1}
    shapes = [(32, 96), (32, 96)]
    assert editing_memory(shapes, **given, half_precision=False, transformed=False) == one
    more = editing_memory(shapes, **given, half_precision=True, transformed=True)
    assert more == one + 2 * 2 * 4 * 32 * 96
    given |= {"batch_tokens": 10**6, "token_bytes": 5}
    large = editing_memory(shapes, **given, half_precision=False, transformed=False)
    assert large == one - 2 * 8 * 96 * 96 + 5 * 10**6


def test_a_sample_is_spread_over_all_requests():
    assert [r.case_id for r in spread(requests(10), 3)] == ["0", "3", "6"]
    assert spread(requests(2), 5) == requests(2)


def test_checking_leaves_the_model_alone(run, monkeypatch):
    seen = []
    real = copy.deepcopy

    def look(plans, **kwargs):
        from lightning_blue.preflight.checking import examine

        model = plans.module.model
        before = real(model.state_dict())
        report = examine(plans, **kwargs)
        seen.append(all(torch.equal(before[k], v) for k, v in model.state_dict().items()))
        return report

    monkeypatch.setattr("lightning_blue.cli.check.examine", look)
    assert run("gpt2")[0] == 0
    assert seen == [True]


def test_tokens_are_shown_as_they_are():
    assert cut_into_tokens([" a", "\t", "b"], 0) == r"|[ a]|\t|b|"
