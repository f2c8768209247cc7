"""Edit requests: what a user wants the model to say."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(unsafe_hash=True)
class Probe:
    """A prompt and the object that the unedited world puts after it.

    ``target_prefix`` is what stands between them, where that is given, as in `EditRequest`;
    ``aliases`` are other names of the answer, read where answers are generated.
    """

    prompt: str
    answer: str
    target_prefix: str | None = None
    aliases: tuple[str, ...] = field(default=(), repr=False)


@dataclass(unsafe_hash=True)
class EditRequest:
    """One fact to write: t = (s, r, o) -> (s, r, o*).

    ``prompt`` holds exactly one ``{}`` where the subject belongs. Objects carry no white space
    around them: what stands between a prompt of the request and an object is ``target_prefix``, or,
    where that is None, what :func:`lightning_blue.language_model.joining.joint` decides.
    ``source`` says where the request was read (``facts.csv:12``) and stands in messages;
    ``relation`` is the data's own name of r, to filter by, and changes nothing;
    ``question`` is the plain prompt with its subject where ``prompt`` carries a chat template that
    the run has put around it. ``aliases`` are other names of the new object, ``portability`` holds
    prompts whose answers follow from the edit; both are read where answers are generated, and only
    there. ``premises`` are the other edits (prompt with subject, object) that the portability
    prompts count on. Treat as frozen; it is not, because Lightning copies batches field by field
    under some precisions.
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
    target_prefix: str | None = None
    question: str = field(default="", compare=False)
    aliases: tuple[str, ...] = field(default=(), repr=False)
    portability: tuple[Probe, ...] = field(default=(), repr=False)
    relation: str = field(default="", compare=False, repr=False)  # no part of what a run is
    premises: tuple[tuple[str, str], ...] = field(default=(), compare=False, repr=False)

    @property
    def text(self) -> str:
        """The prompt with the subject in its place."""
        return self.prompt.replace("{}", self.subject, 1)

    @property
    def place(self) -> str:
        """Where it was read, for messages."""
        return self.source or f"case {self.case_id}"

    @property
    def shown(self) -> str:
        """The prompt with its subject as people read it, without a chat template of the run's."""
        return self.question or self.text


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
