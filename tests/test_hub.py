"""Names that stand for nothing: asked for once, answered with what there is; a hub of our own."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from huggingface_hub import constants

from lightning_blue.data.corpus import corpus_texts
from lightning_blue.data.reading import read_requests
from lightning_blue.language_model.loading import load_language_model
from lightning_blue.support import hub
from lightning_blue.support.errors import InputError


class Hub:
    """A server that answers every question in one way, and counts them."""

    def __init__(self) -> None:
        self.answer: tuple[int, dict[str, str], object] | None = None  # None: it hangs up
        self.paths: list[str] = []
        self.waiting = threading.Event()  # clear: requests wait for it
        self.waiting.set()
        owner = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                owner.paths.append(self.path)
                owner.waiting.wait(10)
                if owner.answer is None:
                    self.close_connection = True
                    return
                status, headers, body = owner.answer
                content = json.dumps(body).encode()
                self.send_response(status)
                for key, value in {**headers, "Content-Length": str(len(content))}.items():
                    self.send_header(key, value)
                self.end_headers()
                if self.command == "GET":
                    self.wfile.write(content)

            do_HEAD = do_GET

            def log_message(self, *args: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()


@pytest.fixture
def our_hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    there = Hub()
    monkeypatch.setattr(constants, "ENDPOINT", there.address)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    yield there
    there.waiting.set()
    there.server.shutdown()
    there.server.server_close()


MISSING = (404, {"X-Error-Code": "RepoNotFound"}, {"error": "Repository not found"})
NAMES = {
    "model": ("almanac2", load_language_model, "model.name_or_path = almanac2"),
    "data file": ("almanac2", read_requests, "data.path = almanac2"),
    "text": ("almanac2", lambda name: next(corpus_texts(name)), "where: almanac2"),
}


@pytest.mark.parametrize("kind", NAMES)
@pytest.mark.parametrize(
    ("answer", "said"),
    [(MISSING, "the hub has no public"), (None, "the hub does not answer")],
)
def test_a_slip_of_the_keyboard_costs_one_question(our_hub, kind, answer, said):
    name, load, where = NAMES[kind]
    our_hub.answer = answer
    with pytest.raises(InputError) as refused:
        load(name)
    for part in (f"there is no {kind}", "in the package (which has almanac", said, where):
        assert part in str(refused.value)
    assert "did you mean almanac?" in str(refused.value)
    assert len([path for path in our_hub.paths if name in path]) == 1
    assert constants.HF_HUB_OFFLINE is False  # as it was before


def test_a_hub_that_hangs_is_not_waited_for(our_hub, monkeypatch):
    monkeypatch.setattr(hub, "LOOKUP_SECONDS", 0.2)
    our_hub.waiting.clear()
    with pytest.raises(InputError, match=r"does not answer|did not answer within"):
        load_language_model("gpt2-of-nobody")


def test_what_is_there_is_loaded_as_always(our_hub):
    our_hub.answer = (200, {}, {"id": "someone/model", "siblings": [], "tags": []})
    with hub.asked("model", "someone/model", "main") as reason:
        assert reason is None
        assert constants.HF_HUB_OFFLINE is False
    asked_for = [path for path in our_hub.paths if "someone" in path]
    assert asked_for == ["/api/models/someone/model/revision/main"]


@pytest.mark.parametrize("name", ["./nothing", "nowhere/at/all", "nothing/", "/nowhere/x", "~/x y"])
def test_what_can_only_be_a_path_is_not_asked_for(our_hub, name):
    for load in (load_language_model, read_requests, lambda name: next(corpus_texts(name))):
        with pytest.raises(InputError, match=r"no such file or folder|there is no folder"):
            load(name)
    assert not our_hub.paths


def test_the_nearest_path_is_named(tmp_path):
    (tmp_path / "my_model").mkdir()
    with pytest.raises(InputError, match=r"did you mean '.*my_model'\?"):
        load_language_model(str(tmp_path / "my_modl"))
