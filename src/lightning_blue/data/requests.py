"""Edit requests: what a user wants the model to say."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(unsafe_hash=True)
class Probe:
    """A prompt and the object that the unedited world puts after it."""

    prompt: str
    answer: str


@dataclass(unsafe_hash=True)
class EditRequest:
    """One fact to write: t = (s, r, o) -> (s, r, o*).

    ``prompt`` holds exactly one ``{}`` where the subject belongs. Objects carry no leading space;
    whoever tokenises them adds it. ``source`` says where the request was read (``facts.csv:12``)
    and stands in messages. Treat as frozen; it is not, because Lightning copies batches field by
    field under some precisions.
    """

    case_id: str
    prompt: str
    subject: str
    target_new: str
    target_true: str | None = None
    paraphrases: tuple[str, ...] = ()
    neighborhood: tuple[Probe, ...] = ()
    generation_prompts: tuple[str, ...] = ()
    reference_texts: tuple[str, ...] = ()
    source: str = ""

    @property
    def text(self) -> str:
        """The prompt with the subject in its place."""
        return self.prompt.replace("{}", self.subject, 1)


@dataclass(frozen=True)
class Rejected:
    """A request that cannot be used: where it was read, why, and how to fix it.

    ``kind`` is a short class of reasons (``"missing field"``) to count by; ``reason`` names the
    field and its value. ``case_id`` is empty where the record has none that can be read.
    """

    source: str
    case_id: str
    kind: str
    reason: str
    hint: str

    def __str__(self) -> str:
        return f"{self.source}: {self.reason}; {self.hint}"
