"""Which endpoint judges answers, and how much it may cost."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from urllib.parse import urlsplit

from blue_callbacks.ranges import COUNT, POSITIVE, WHOLE, check_ranges
from lightning_blue.support.errors import InputError

KEY = "JUDGE_API_KEY"  # in the environment, and nowhere else


@dataclass(frozen=True)
class JudgeSettings:
    """A language model that judges generated answers, behind an OpenAI-compatible endpoint.

    The key, where the endpoint wants one, is read from ``JUDGE_API_KEY`` in the environment.

    Args:
        url: base of the endpoint, ``http://127.0.0.1:8000/v1`` for instance; None: no judge.
        model: name under which the endpoint knows the judge.
        max_tokens: tokens of a reply, of which one is needed; None leaves it to the endpoint, for
            models that think before they answer.
        timeout: seconds that one attempt may take.
        retries: further attempts where the endpoint is busy, down or slow, after growing pauses.
        concurrency: answers that are judged at the same time.
        replies: folder that keeps them, by everything that was sent; None keeps nothing.
    """

    url: str | None = None
    model: str | None = None
    max_tokens: int | None = 16
    timeout: float = 60.0
    retries: int = 3
    concurrency: int = 4
    replies: str | None = "stats/judge"

    def __post_init__(self) -> None:
        check_ranges(
            "measure.judge",
            vars(self),
            max_tokens=COUNT,
            timeout=POSITIVE,
            retries=WHOLE,
            concurrency=COUNT,
        )
        if self.url is None and self.model is None:
            return
        if not self.url or not self.model:
            given, missing = ("url", "model") if self.url else ("model", "url")
            raise InputError(
                f"measure.judge.{given} is given and measure.judge.{missing} is not",
                where="measure.judge",
                hint=f"give both, or leave out measure.judge.{given} for no judge",
            )
        _require_plain(self.url)
        if find_spec("openai") is None:
            raise InputError(
                "the judge is asked through the package openai, which is not installed",
                where="measure.judge.url",
                hint="pip install 'lightning-blue[judge]'",
            )


def _require_plain(url: str) -> None:
    """Refuse what is no address, and one that carries a secret: it would be written to files."""
    try:
        parts = urlsplit(url)
        _ = parts.port
        plain = parts.scheme in ("http", "https") and bool(parts.hostname)
    except ValueError:
        plain = False
    if not plain:
        raise InputError(
            "that is not the address of an endpoint",
            where="measure.judge.url",
            hint="give the base of an OpenAI-compatible one: http://127.0.0.1:8000/v1",
        )
    if parts.username or parts.password or parts.query or parts.fragment:
        raise InputError(
            "the address carries more than host and path, and would be written to files",
            where="measure.judge.url",
            hint=f"leave out what stands before an @ and behind a ? or #; a key belongs into {KEY} "
            "in the environment",
        )
