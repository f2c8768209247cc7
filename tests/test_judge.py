"""The judge: what it is told, how replies are kept, that no failure costs a run, and a live server.

What goes over the wire is tested against a small HTTP server in this process, and against
``transformers serve``: on a tiny random model, whose replies are compared with the model's own, and
on SmolLM2-135M-Instruct where it can be had (LIGHTNING_BLUE_MODELS).
"""

from __future__ import annotations

import copy
import json
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from conftest import LanguageModel, byte_level_tokenizer
from lightning_blue.__main__ import main
from lightning_blue.data.requests import EditRequest
from lightning_blue.judge import Case, Judge, JudgeSettings
from lightning_blue.judge import settings as settings_module
from lightning_blue.judge.rules import message, verdict
from lightning_blue.judge.settings import KEY
from lightning_blue.metrics import table
from lightning_blue.metrics.callback import MeasureEdits
from lightning_blue.metrics.evaluation import Evaluation, RequestOutcome
from lightning_blue.metrics.generated import GenerationSettings
from lightning_blue.metrics.history import RunHistory
from lightning_blue.metrics.judged import with_verdicts
from lightning_blue.metrics.matching import GeneratedAnswer
from lightning_blue.reporting import RunRecord
from lightning_blue.reporting.answers import generated_answers
from lightning_blue.support.errors import InputError
from test_lightning import corpus, data_of, facts, module, trainer_of  # noqa: F401  (fixtures)

SECRET = "sk-0123456789abcdef"
CHAT = (
    "{% for m in messages %}<|end|>{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|end|>assistant:{% endif %}"
)
needs_client = pytest.mark.skipif(
    find_spec("openai") is None, reason="openai is not installed: lightning-blue[judge]"
)


# what is said and how replies are read, settings


def test_the_judge_is_told_everything_on_lines_of_their_own() -> None:
    text = message(Case("Where\nis {wanted}?", "St. Louis", " in\n\nSt. Louis {answer}"))
    lines = text.splitlines()
    assert "Question: Where is {wanted}?" in lines
    assert "Correct answer: St. Louis" in lines
    assert "Given answer: in St. Louis {answer}" in lines
    assert [line for line in lines if line.startswith("Grade: ")] == [
        *["Grade: A"] * 2,
        *["Grade: B"] * 3,
    ]


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        *[(text, True) for text in ("A", " A\n", "A.", "**A**", "(A)")],
        *[(text, False) for text in ("B", '"B"')],
        *[(text, None) for text in ("", "C", "a", "AB", "A or B", "Answer: A", "Grade A")],
    ],
)
def test_a_verdict_is_a_lone_letter(reply: str, expected: bool | None) -> None:
    assert verdict(reply) is expected


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"url": "http://h/v1"}, "measure.judge.model is not"),
        ({"model": "m"}, "measure.judge.url is not"),
        ({"url": "localhost:8000", "model": "m"}, "not the address of an endpoint"),
        ({"url": "http://h:port/v1", "model": "m"}, "not the address of an endpoint"),
        ({"url": "file:///etc/passwd", "model": "m"}, "not the address of an endpoint"),
        ({"url": f"http://me:{SECRET}@h/v1", "model": "m"}, "would be written to files"),
        ({"url": f"http://h/v1?key={SECRET}", "model": "m"}, "would be written to files"),
        ({"timeout": 0}, "timeout"),
        ({"concurrency": 0}, "concurrency"),
        ({"retries": -1}, "retries"),
        ({"max_tokens": 0}, "max_tokens"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=r"measure\.judge") as raised:
        JudgeSettings(**settings)
    assert said in str(raised.value)
    assert SECRET not in str(raised.value)


def test_without_the_client_a_judge_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settings_module, "find_spec", lambda name: None)
    assert JudgeSettings().url is None  # which needs none
    with pytest.raises(InputError, match=r"lightning-blue\[judge\]"):
        JudgeSettings(url="http://h/v1", model="m")


@needs_client
def test_a_judge_without_answers_is_refused(tmp_path: Path, capsys: Any) -> None:
    flags = ["--measure.judge.url=http://h/v1", "--measure.judge.model=m", "--update.layers=[0]"]
    assert main(["fit", *flags, f"--run.root={tmp_path}"]) == 2
    assert "add generation to measure.protocols" in capsys.readouterr().err


# over the wire


Behaviour = Callable[["Endpoint", dict[str, Any]], tuple[int, str]]


class Endpoint(ThreadingHTTPServer):
    """An endpoint of the protocol; ``behaviour`` turns a request's body into status and reply."""

    daemon_threads = True

    def __init__(self, behaviour: Behaviour) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.behaviour = behaviour
        self.bodies: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.at_once = self.most_at_once = 0
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"


class Handler(BaseHTTPRequestHandler):
    server: Endpoint

    def do_POST(self) -> None:
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with server.lock:
            server.bodies.append(body)
            server.keys.append(self.headers["Authorization"])
            server.at_once += 1
            server.most_at_once = max(server.most_at_once, server.at_once)
        status, content = server.behaviour(server, body)
        with server.lock:
            server.at_once -= 1
        self.send_response(status if self.path == "/v1/chat/completions" else 404)
        self.send_header("Content-Type", "application/json" if content[:1] == "{" else "text/html")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content.encode())

    def log_message(self, *args: Any) -> None:
        pass


def completion(reply: str | None) -> str:
    choice = {"index": 0, "finish_reason": "stop"}
    said = {"role": "assistant", "content": reply}
    about = {"id": "1", "object": "chat.completion", "created": 1, "model": "m"}
    return json.dumps({**about, "choices": [{**choice, "message": said}]})


def failure(text: str) -> str:
    return json.dumps({"error": {"message": text}})


def given(body: dict[str, Any]) -> str:
    """The answer that a request asks about: that of the last case in its message."""
    lines = body["messages"][-1]["content"].splitlines()
    return [line for line in lines if line.startswith("Given answer: ")][-1].split(": ", 1)[1]


def by_answer(server: Endpoint, body: dict[str, Any]) -> tuple[int, str]:
    """Call right what says Rome, wrong what says Oslo; of others say more than a letter."""
    said = given(body)
    return 200, completion("A" if "Rome" in said else "B" if "Oslo" in said else "I think A")


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Behaviour], Endpoint]]:
    monkeypatch.delenv(KEY, raising=False)
    started: list[Endpoint] = []

    def start(behaviour: Behaviour) -> Endpoint:
        started.append(Endpoint(behaviour))
        threading.Thread(target=started[-1].serve_forever, args=(0.05,), daemon=True).start()
        return started[-1]

    yield start
    for server in started:
        server.shutdown()
        server.server_close()


def judge_at(url: str, **settings: Any) -> Judge:
    return Judge(JudgeSettings(url, "m", **{"replies": None, "retries": 0, **settings}))


CASES = [Case("Where?", "Rome", answer) for answer in (" Rome", " Oslo", " Bern", " Rome")]


@needs_client
def test_what_is_sent_and_what_comes_back(serve, monkeypatch, recwarn) -> None:
    server = serve(by_answer)
    monkeypatch.setenv(KEY, f"{SECRET}\n")
    monkeypatch.setenv("OPENAI_API_KEY", "another")
    assert judge_at(server.url).ask(CASES) == [True, False, None, True]
    assert sorted(map(given, server.bodies)) == ["Bern", "Oslo", "Rome"]  # of equal ones one
    assert set(server.keys) == {f"Bearer {SECRET}"}
    for body in server.bodies:
        assert (body["model"], body["temperature"], body["max_tokens"]) == ("m", 0, 16)
        assert [each["role"] for each in body["messages"]] == ["user"]
    (warning,) = [str(w.message) for w in recwarn if "judge" in str(w.message)]
    assert "has judged 2 of 3 different answers" in warning
    assert "1 replies are not the letter asked for ('I think A')" in warning
    monkeypatch.delenv(KEY)
    assert judge_at(server.url, max_tokens=None).ask(CASES[:1]) == [True]
    assert "max_tokens" not in server.bodies[-1]
    assert server.keys[-1] == "Bearer none"


@needs_client
def test_replies_are_kept_by_content(serve, tmp_path, monkeypatch) -> None:
    server = serve(by_answer)
    monkeypatch.setenv(KEY, SECRET)
    cache = tmp_path / "judge"
    expected = [True, False, None, True]
    assert judge_at(server.url, replies=str(cache)).ask(CASES) == expected
    assert len(server.bodies) == 3
    monkeypatch.delenv(KEY)  # which no reply depends on
    assert judge_at(server.url, replies=str(cache)).ask(CASES) == expected
    assert len(server.bodies) == 3
    files = [path for path in cache.rglob("*") if path.is_file()]
    assert [path.suffix for path in files] == [".json"] * 3  # no half-written one beside them
    assert not any(SECRET in path.read_text() for path in files)
    # everything that is sent is part of it: another model, limit, wanted object
    other = Judge(JudgeSettings(server.url, "other", replies=str(cache)))
    assert other.ask(CASES[:1]) == [True]
    assert judge_at(server.url, replies=str(cache), max_tokens=8).ask(CASES[:1]) == [True]
    assert judge_at(server.url, replies=str(cache)).ask([CASES[0]._replace(wanted="x")]) == [True]
    assert len(server.bodies) == 6
    # a damaged file, or one of another content, is asked anew and replaced
    for content in ("", "[]", json.dumps({"sent": {}, "reply": "B"})):
        for path in files:
            path.write_text(content)
        assert judge_at(server.url, replies=str(cache)).ask(CASES) == expected
    assert len(server.bodies) == 15
    assert judge_at(server.url, replies=str(cache)).ask(CASES) == expected
    assert len(server.bodies) == 15


@needs_client
def test_a_cache_that_cannot_be_written_costs_a_warning(serve, tmp_path, recwarn) -> None:
    server = serve(by_answer)
    (tmp_path / "file").write_text("in the way")
    judge = judge_at(server.url, replies=str(tmp_path / "file"))
    assert judge.ask(CASES[:2]) == [True, False]
    said = [str(w.message) for w in recwarn if "could not be kept" in str(w.message)]
    assert len(said) == 1


@needs_client
def test_a_busy_endpoint_is_tried_again(serve, recwarn) -> None:
    def busy_once(server: Endpoint, body: dict[str, Any]) -> tuple[int, str]:
        return by_answer(server, body) if len(server.bodies) > 1 else (503, "busy")

    server = serve(busy_once)
    assert judge_at(server.url, retries=1).ask(CASES[:1]) == [True]
    assert len(server.bodies) == 2
    assert not recwarn


def asleep(server: Endpoint, body: dict[str, Any]) -> tuple[int, str]:
    time.sleep(1)
    return by_answer(server, body)


@needs_client
@pytest.mark.parametrize(
    ("behaviour", "said"),
    [
        (lambda server, body: (500, "<p>broken</p>"), "InternalServerError"),
        (lambda server, body: (200, "<p>a page</p>"), "Error"),
        (lambda server, body: (200, "{}"), "Error"),
        (lambda server, body: (400, failure(f"no model m for {SECRET}")), "no model m for **"),
        (lambda server, body: (401, failure(f"{SECRET[:9]}...?")), f"set {KEY}"),
        (asleep, "APITimeoutError"),
    ],
    ids=["500", "html", "empty", "400", "401", "asleep"],
)
def test_an_endpoint_that_fails_is_not_asked_for_long(
    serve, tmp_path, monkeypatch, recwarn, behaviour, said
) -> None:
    server = serve(behaviour)
    monkeypatch.setenv(KEY, SECRET)
    judge = judge_at(
        server.url,
        concurrency=2,
        timeout=0.2 if behaviour is asleep else 60,
        replies=str(tmp_path / "cache"),
    )
    cases = [Case("Where?", "Rome", f"{i}") for i in range(20)]
    assert judge.ask(cases) == [None] * 20
    assert 1 <= len(server.bodies) <= 4  # three in a row, and what was in flight
    (warning,) = [str(w.message) for w in recwarn if "judge" in str(w.message)]
    assert "has judged 0 of 20 different answers" in warning
    assert said in warning
    assert SECRET[:9] not in warning
    assert not (tmp_path / "cache").exists()  # a failure is not kept


@needs_client
def test_one_failure_among_many_costs_one_verdict(serve) -> None:
    def moody(server: Endpoint, body: dict[str, Any]) -> tuple[int, str]:
        return (400, "{}") if given(body).endswith("0") else by_answer(server, body)

    server = serve(moody)
    cases = [Case("Where?", "Rome", f"Rome {i}") for i in range(40)]
    verdicts = judge_at(server.url, concurrency=1).ask(cases)
    assert verdicts == [None if i % 10 == 0 else True for i in range(40)]


@needs_client
def test_so_many_are_judged_at_the_same_time(serve) -> None:
    def slowly(server: Endpoint, body: dict[str, Any]) -> tuple[int, str]:
        time.sleep(0.05)
        return by_answer(server, body)

    server = serve(slowly)
    cases = [Case("Where?", "Rome", f"Rome {i}") for i in range(24)]
    assert judge_at(server.url, concurrency=3).ask(cases) == [True] * 24
    assert 1 < server.most_at_once <= 3


# metrics and reports

REQUESTS = [EditRequest(f"{i}", "{} lies in", f"Tower {i}", "Rome") for i in range(2)]


def said(request: int, prompts: str, answer: str, wanted: str = "Rome") -> GeneratedAnswer:
    prompt = f"{prompts} of {request}"
    return GeneratedAnswer(request, prompts, prompt, wanted, (), answer, answer, (1,), "stop")


def evaluated(answers: list[GeneratedAnswer], requests: int) -> Evaluation:
    outcome = RequestOutcome("", {}, 1.0, None, 0.4, None, (), "")
    return Evaluation({}, [outcome] * requests, answers)


@needs_client
def test_metrics_are_those_of_the_verdicts(serve, gpt2: LanguageModel) -> None:
    own, other, hop = table.OWN_PROMPT, table.PARAPHRASES, table.PORTABILITY
    answers = [
        said(0, own, " Rome"),  # right, and so says exact match
        said(0, other, " Oslo"),  # wrong, and so says exact match
        said(0, other, " Rome in Italy"),  # right, where exact match says wrong
        said(1, own, ""),  # wrong without being sent
        said(1, hop, " Bern"),  # no verdict
        said(1, table.NEIGHBOURS, " Rome"),  # not judged
        said(1, table.NEGATED, " Rome"),  # not judged
    ]
    server = serve(by_answer)
    judged = with_verdicts(evaluated(answers, 2), judge_at(server.url), gpt2.tokenizer)
    assert [a.judged for a in judged.answers] == [True, False, True, False, None, None, None]
    assert len(server.bodies) == 4
    value = {name: each["value"] for name, each in judged.metrics.items()}
    assert value == {
        "reliability_generation_judge": 50.0,
        "generalization_generation_judge": 50.0,
        "agreement_generation_judge": pytest.approx(200 / 3),
        "unjudged_generation_judge": pytest.approx(100 * (0 + 1 / 2) / 2),
    }
    assert judged.metrics["agreement_generation_judge"]["prompts"] == 3
    assert judged.outcomes[0].values["generalization_generation_judge"] == 0.5
    history = RunHistory(answers_after=judged.answers, judge="m", requests=REQUESTS)
    text = " ".join(generated_answers(history).split())
    assert "The judge, m, has judged 3 of them: 2 right, where exact match has 1." in text
    assert "They agree on 2, 66.7% (Cohen's kappa 0.40)." in text  # (2/3 - 4/9) / (1 - 4/9)
    same = [replace(each, judged=True) for each in answers[:1]]
    text = generated_answers(replace(history, answers_after=same))
    assert "kappa is undefined" in " ".join(text.split())


@needs_client
def test_the_judge_sees_no_chat_template(serve, gpt2: LanguageModel) -> None:
    tokenizer = copy.deepcopy(gpt2.tokenizer)
    tokenizer.chat_template = CHAT
    wrapped = replace(
        said(0, table.OWN_PROMPT, " Rome"), prompt="<|end|>user: Where?\n<|end|>assistant:"
    )
    server = serve(by_answer)
    with_verdicts(evaluated([wrapped], 1), judge_at(server.url), tokenizer)
    assert "Question: Where?" in server.bodies[0]["messages"][0]["content"].splitlines()


def measuring(url: str, tmp_path: Path, **settings: Any) -> MeasureEdits:
    judge = JudgeSettings(url, "m", retries=0, replies=str(tmp_path / "cache"), **settings)
    return MeasureEdits(
        generate=False,
        cumulative=0,
        protocols=["probability", "generation"],
        generation=GenerationSettings(max_new_tokens=3),
        unedited_cache=str(tmp_path / "unedited"),
        judge=judge,
    )


@needs_client
def test_a_run_says_what_the_judge_says(serve, module, facts, tmp_path, monkeypatch) -> None:  # noqa: F811
    def all_right(server: Endpoint, body: dict[str, Any]) -> tuple[int, str]:
        return 200, completion("A")

    server = serve(all_right)
    monkeypatch.setenv(KEY, SECRET)
    unedited = copy.deepcopy(module)
    for name, url, of_judge in (("up", server.url, 100.0), ("down", "http://127.0.0.1:9/v1", None)):
        record = RunRecord(name, str(tmp_path), wandb="off", export=False)
        measure = measuring(url, tmp_path)
        trainer_of(measure, record).fit(copy.deepcopy(unedited), datamodule=data_of(facts))
        folder = tmp_path / name
        summary = json.loads((folder / "summary.json").read_text())
        assert summary.get("post/reliability_generation_judge") == of_judge
        unjudged = 0.0 if of_judge else 100.0
        stages = [summary[f"{stage}/unjudged_generation_judge"] for stage in ("pre", "post")]
        assert stages == [unjudged] * 2
        assert summary["settings/judge"] == "m"
        assert summary["seconds/judge"] > 0
        lines = [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]
        asked = {line["judge"] for line in lines if line["prompts"] != table.NEIGHBOURS}
        assert asked == {True if of_judge else None}
        report = " ".join((folder / "report.md").read_text().split())
        count = sum(line["stage"] == "post" for line in lines if line["judge"] is not None)
        assert f"The judge, m, has judged {count} of them" in report
        asked_at_end = [a for a in measure.history.answers_after if a.compared]
        assert f"rest on the {count} of {len(asked_at_end)} answers that have a verdict" in report
        files = [path for path in tmp_path.rglob("*") if path.is_file()]
        assert not any(SECRET.encode() in path.read_bytes() for path in files)
    # verdicts are no part of what is kept of the unedited model: the second run had its own
    assert len(list((tmp_path / "unedited").glob("*.json"))) == 1


def test_a_run_is_not_resumed_with_another_protocol() -> None:
    state = RunHistory(protocol="counterfact").state_dict()
    RunHistory(protocol="counterfact").load_state_dict(state)
    with pytest.raises(InputError, match="started with the protocol counterfact, not zsre"):
        RunHistory(protocol="zsre").load_state_dict(state)
    del state["protocol"]  # of an older checkpoint
    RunHistory(protocol="zsre").load_state_dict(state)


def test_a_run_is_not_resumed_with_another_judge() -> None:
    state = RunHistory(judge="m").state_dict()
    RunHistory(judge="m").load_state_dict(state)
    for other in ("", "n"):
        with pytest.raises(InputError, match="was started with judge: m"):
            RunHistory(judge=other).load_state_dict(state)


# a live server


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama with a chat template, and room for what a judge is told."""
    tokenizer = byte_level_tokenizer(bos=True)
    tokenizer.chat_template = CHAT
    tokenizer.model_max_length = 4096
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        max_position_embeddings=4096,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.15,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id,
    )
    folder = tmp_path_factory.mktemp("tiny")
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def real_model() -> Path:
    folder = Path(os.environ.get("LIGHTNING_BLUE_MODELS", "real-models"))
    return folder / "smollm2-135m-instruct"


@pytest.fixture(scope="module", params=["tiny", "smollm2"])
def live(request: pytest.FixtureRequest) -> Iterator[tuple[Path, str]]:
    """``transformers serve`` on a model: the model's folder, and the address."""
    for package in ("openai", "fastapi", "uvicorn"):
        pytest.importorskip(package, reason=f"transformers serve needs {package}: the extra test")
    if request.param == "smollm2":
        model = real_model()
        if not model.is_dir():
            pytest.skip("no SmolLM2-135M-Instruct; LIGHTNING_BLUE_MODELS names its folder")
    else:
        model = request.getfixturevalue("tiny")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    code = "from transformers.cli.transformers import main; main()"
    flags = ["serve", str(model), "--host=127.0.0.1", f"--port={port}", "--device=cpu"]
    process = subprocess.Popen(
        [sys.executable, "-c", code, *flags, "--dtype=float32"],
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    try:
        _wait_for(f"http://127.0.0.1:{port}/health", process)
        yield model, f"http://127.0.0.1:{port}/v1"
    finally:
        process.kill()
        process.wait()


def _wait_for(address: str, process: subprocess.Popen[bytes]) -> None:
    while process.poll() is None:
        try:
            with urllib.request.urlopen(address, timeout=5):
                return
        except OSError:
            time.sleep(0.2)
    _, err = process.communicate()
    pytest.fail(f"transformers serve has ended: {err.decode()[-2000:]}")


def test_a_live_server_is_asked_for_what_the_model_itself_says(live, tmp_path) -> None:
    """Greedy, as many tokens as allowed: the reply is the served model's own continuation."""
    folder, url = live
    settings = JudgeSettings(url, str(folder), max_tokens=4, replies=str(tmp_path), timeout=300)
    cases = CASES[:2]
    verdicts = Judge(settings).ask(cases)
    model, tokenizer = (
        each.from_pretrained(folder) for each in (AutoModelForCausalLM, AutoTokenizer)
    )
    kept = [json.loads(path.read_text()) for path in tmp_path.glob("*/*.json")]
    assert len(kept) == 2
    for case, said_of_it in zip(cases, verdicts, strict=True):
        asked = [{"role": "user", "content": message(case)}]
        prompt = tokenizer.apply_chat_template(asked, add_generation_prompt=True, tokenize=False)
        ids = tokenizer(prompt, add_special_tokens=False, return_tensors="pt")
        with torch.no_grad():
            new = model.float().generate(**ids, max_new_tokens=4, do_sample=False)
        own = tokenizer.decode(new[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
        (reply,) = [each["reply"] for each in kept if each["sent"]["messages"] == asked]
        assert reply.strip() == own.strip()
        assert said_of_it is verdict(own)
