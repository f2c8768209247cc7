"""The judge behind its endpoint: asked at most once for each case, and never at a run's cost."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

from lightning.pytorch.utilities import rank_zero_warn

from lightning_blue.judge.rules import Case, message, verdict
from lightning_blue.judge.settings import KEY, JudgeSettings
from lightning_blue.support.processes import n_processes, progress_bar
from lightning_blue.support.storage import NotWritten, write_atomic

if TYPE_CHECKING:
    from openai import OpenAI

GIVEN_UP_AFTER = 3  # cases in a row that the endpoint has failed on, with all attempts
NO_KEY = "none"  # what is sent where there is no key: the client wants one
SHOWN = 200  # characters of an error


class Judge:
    """Judges cases by a language model behind an OpenAI-compatible endpoint.

    Attempts, pauses between them and timeouts are those of the package ``openai``. An endpoint that
    fails on several cases in a row is not asked for the others of the call.

    Args:
        settings: with ``url`` and ``model``.
    """

    def __init__(self, settings: JudgeSettings) -> None:
        self.settings = settings

    def ask(self, cases: Sequence[Case], *, progress: bool = False) -> list[bool | None]:
        """Judge n cases; of equal ones one is sent.

        What cannot be judged costs a warning: a failure of the endpoint is no error.

        Returns:
            Whether each answer is right; None where the endpoint has failed, or has replied with
            anything but the letter it was asked for.
        """
        distinct = list(dict.fromkeys(cases))
        if not distinct:
            return []
        with self._client() as client:
            asking = _Asking(self.settings, client)
            replies = asking.all(distinct, "judge" if progress else None)
        verdicts = [None if reply is None else verdict(reply) for reply in replies]
        _warn(asking, replies, verdicts)
        by_case = dict(zip(distinct, verdicts, strict=True))
        return [by_case[case] for case in cases]

    def _client(self) -> OpenAI:
        from openai import OpenAI  # seconds to import, often not needed

        return OpenAI(
            base_url=self.settings.url,
            api_key=_key() or NO_KEY,
            timeout=self.settings.timeout,
            max_retries=self.settings.retries,
        )


class _Asking:
    """One call: what is asked and kept, and what has failed."""

    def __init__(self, settings: JudgeSettings, client: OpenAI) -> None:
        self.settings, self.client = settings, client
        self.error = ""  # the first one
        self.failed = self.not_asked = 0
        self.not_kept = ""  # why replies could not be written
        self._in_a_row = 0
        self._stopped = False
        self._lock = Lock()

    def all(self, cases: Sequence[Case], label: str | None) -> list[str | None]:
        """Return the reply to each case, several at a time; None where there is none."""
        workers = max(1, self.settings.concurrency // n_processes())
        replies = []
        pool = ThreadPoolExecutor(workers, thread_name_prefix="judge")
        try:
            with progress_bar(len(cases), label) as bar:
                for reply in pool.map(self._reply, cases):
                    replies.append(reply)
                    bar.update()
        finally:  # of an interrupt, too: what is not begun is left
            self._stopped = True
            pool.shutdown(wait=len(replies) == len(cases), cancel_futures=True)
        return replies

    def _reply(self, case: Case) -> str | None:
        sent = self._sent(case)
        kept = self._read(sent)
        if kept is not None:
            return kept
        if self._stopped or self._in_a_row >= GIVEN_UP_AFTER:
            with self._lock:
                self.not_asked += 1
            return None
        try:
            reply = self._asked(sent)
        except Exception as error:  # of many kinds: a page of HTML is one, too
            with self._lock:
                self.error = self.error or _said(error)
                self.failed += 1
                self._in_a_row += 1
            return None
        self._in_a_row = 0
        self._keep(sent, reply)
        return reply

    def _asked(self, sent: dict[str, Any]) -> str:
        response = self.client.chat.completions.create(**sent)
        return response.choices[0].message.content or ""

    def _sent(self, case: Case) -> dict[str, Any]:
        limit = {} if self.settings.max_tokens is None else {"max_tokens": self.settings.max_tokens}
        return {
            "model": self.settings.model,
            "messages": [{"role": "user", "content": message(case)}],
            "temperature": 0,
            **limit,
        }

    def _content(self, sent: dict[str, Any]) -> dict[str, Any]:
        """Return everything that a reply depends on; no key is part of it."""
        return {"url": self.settings.url, **sent}

    def _path(self, sent: dict[str, Any]) -> Path | None:
        if self.settings.replies is None:
            return None
        described = json.dumps(self._content(sent), sort_keys=True)
        name = hashlib.sha256(described.encode()).hexdigest()[:32]
        return Path(self.settings.replies) / name[:2] / f"{name}.json"

    def _read(self, sent: dict[str, Any]) -> str | None:
        """Return what is kept; None for nothing, for a damaged file or another content's."""
        path = self._path(sent)
        if path is None:
            return None
        try:
            kept = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        same = isinstance(kept, dict) and kept.get("sent") == self._content(sent)
        reply = kept.get("reply") if same else None
        return reply if isinstance(reply, str) else None

    def _keep(self, sent: dict[str, Any], reply: str) -> None:
        path = self._path(sent)
        if path is None or self.not_kept:
            return
        try:
            write_atomic(path, json.dumps({"sent": self._content(sent), "reply": reply}))
        except NotWritten as error:
            self.not_kept = str(error.reason)


def _key() -> str:
    return os.environ.get(KEY, "").strip()


def _said(error: Exception) -> str:
    """Say what went wrong on one line, without the key; of a refused key, that it was refused."""
    status = getattr(error, "status_code", None)
    if status in (401, 403):
        return f"the endpoint refuses the key (HTTP {status}): set {KEY} in the environment"
    text = " ".join(str(error).split())
    if _key():
        text = text.replace(_key(), "***")
    return f"{type(error).__name__}: {text[:SHOWN]}"


def _warn(asking: _Asking, replies: Sequence[str | None], verdicts: Sequence[bool | None]) -> None:
    """Say what could not be judged, and why."""
    unread = [
        reply
        for reply, said in zip(replies, verdicts, strict=True)
        if said is None and reply is not None
    ]
    parts = []
    if asking.failed:
        parts.append(f"the endpoint failed on {asking.failed:,} ({asking.error})")
    if asking.not_asked:
        parts.append(f"{asking.not_asked:,} were then not asked any more")
    if unread:
        parts.append(f"{len(unread):,} replies are not the letter asked for ({unread[0][:40]!r})")
    if parts:
        judged = len(replies) - asking.failed - asking.not_asked - len(unread)
        rank_zero_warn(
            f"the judge has judged {judged:,} of {len(replies):,} different answers: "
            f"{'; '.join(parts)}. The others count in no metric of the judge"
        )
    if asking.not_kept:
        rank_zero_warn(f"replies of the judge could not be kept: {asking.not_kept}")
