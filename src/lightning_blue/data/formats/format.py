"""What a data format is: where in a record each field of an edit request stands."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

Record = Mapping[str, Any]


class ProbeFields(NamedTuple):
    """Where a neighbourhood or portability prompt that is an object keeps its parts.

    Attributes:
        prompt: place of the prompt in the object.
        answer: place of its answer.
        aliases: place of other names of the answer.
        listed: whether answers may be lists of names, nested at will, of which the first is the
            answer and the others are its aliases. Prompts without any are left out, and counted.
    """

    prompt: str = "prompt"
    answer: str = "answer"
    aliases: str = "aliases"
    listed: bool = False


PLAIN = ProbeFields()


@dataclass(frozen=True)
class Format:
    """Where a format keeps the fields of an edit request.

    ``required_columns``: those by which a file of this format is known. ``paths``: field to place
    in the record, dots leading into objects and lists; ``*`` is each value of an object or each
    item of a list, ``|`` separates names of which each that is there is taken. ``needed``: fields
    without which a record cannot be used. ``otherwise``: where a field stands in a record that
    lacks it at its place in ``paths``. ``absent``: columns that no record of a file may have for it
    to be known as this. ``unused``: columns that the format has and no edit needs.
    ``neighbor_ending`` closes each neighbourhood prompt that does not end with it already.
    ``probe``: the parts of a neighbourhood or portability prompt that is an object; one that is a
    text has the record's ``neighborhood_answer`` or ``portability_answer``. ``edits``: the column
    that holds a list of edits where a record makes several; its portability prompts need all of
    them, and go with the last. ``derive`` works out columns that a record holds in another form.
    """

    name: str
    required_columns: tuple[str, ...]
    paths: Mapping[str, str]
    needed: tuple[str, ...] = ("subject", "prompt", "target_new")
    otherwise: Mapping[str, str] = field(default_factory=dict)
    absent: frozenset[str] = frozenset()
    unused: frozenset[str] = frozenset()
    neighbor_ending: str = ""
    probe: ProbeFields = PLAIN
    edits: str | None = None
    derive: Callable[[Record], Record] | None = None

    def columns(self) -> set[str]:
        """The top-level columns that the format knows."""
        places = [*self.paths.values(), *self.otherwise.values()]
        tops = {name for path in places for name in path.partition(".")[0].split("|")}
        return tops | self.unused
