"""The data of a run: edit requests in order, batch by batch."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader

from blue_callbacks import CommittedBatches
from blue_callbacks.ranges import COUNT, SEED, WHOLE, check_ranges
from lightning_blue.data.checks import (
    apply_policy,
    check_tokens,
    end_with_blank,
    pick_control_facts,
    shuffled,
    superseded,
    take_distinct,
    without_unmet_premises,
)
from lightning_blue.data.controls import control_facts_of
from lightning_blue.data.formats import require_format
from lightning_blue.data.hub import to_dataset
from lightning_blue.data.joined import in_chat, with_prefix
from lightning_blue.data.memory import Facts, name_of, rows_of
from lightning_blue.data.reading import ALMANAC, read_requests, require_source
from lightning_blue.data.requests import EditRequest, Probe, Rejected
from lightning_blue.language_model.chat import require_no_slot
from lightning_blue.support.errors import InputError
from lightning_blue.support.text import counted

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

EditBatch = list[EditRequest]


class SortedOut(NamedTuple):
    """The records of a source.

    Attributes:
        chosen: requests to edit, in order.
        rest: usable requests behind the last of them.
        rejected: those that cannot be used, with the reason.
        total: how many records there are.
    """

    chosen: list[EditRequest]
    rest: list[EditRequest]
    rejected: list[Rejected]
    total: int


PROTOCOLS = ("auto", "counterfact", "zsre")


class EditDataModule(LightningDataModule):
    """Edit requests from any source, checked before the run, in the order of the source.

    Args:
        path: a .json, .jsonl, .csv or .parquet file, the folder of a saved dataset, the name of a
            dataset on the Hugging Face hub, ``almanac``, the facts that ship with the package, or
            facts in memory: a list of dictionaries, tuples or requests, a pandas DataFrame, a split
            of ``datasets`` (:func:`lightning_blue.data.memory.rows_of`).
        format: ``auto``, ``counterfact``, ``counterfact-flat``, ``zsre``, ``zsre-alt`` or
            ``facts``.
        split: the split of a dataset.
        batch_size: requests that are edited together.
        edits: how many requests to edit at most, None for all that there are.
        offset: how many usable requests to leave out before the first edit.
        shuffle: seed of a random order of the requests that are edited, the same ones; None keeps
            the order of the source (:func:`lightning_blue.data.checks.shuffled`).
        controls: what retained knowledge is measured on: how many control facts, true facts of the
            data behind the edited requests and on other subjects; or a source of facts as ``path``,
            of which those are kept that the unedited model answers.
        on_unusable: ``stop`` at requests that cannot be used, or ``skip`` them.
        target_prefix: what stands between prompts and objects, for requests that do not say so
            themselves; None: decided prompt by prompt, see
            :func:`lightning_blue.language_model.joining.joint`.
        chat: whether to put the tokenizer's chat template around all prompts that have none.
        system: the system text of the chat template; None leaves it to the template.
        protocol: how efficacy, generalization and specificity are measured: ``counterfact``
            compares the probabilities of two objects, ``zsre`` counts right tokens, ``auto``
            compares where at least half of the requests name their current object.

    Raises InputError for a count that makes no sense.
    """

    def __init__(
        self,
        path: str | Facts = ALMANAC,
        format: str = "auto",
        split: str = "train",
        batch_size: int = 100,
        edits: int | None = None,
        offset: int = 0,
        controls: int | str = 0,
        on_unusable: str = "stop",
        target_prefix: str | None = None,
        chat: bool = False,
        system: str | None = None,
        protocol: str = "auto",
        shuffle: int | None = None,
    ) -> None:
        super().__init__()
        counts = {"batch_size": batch_size, "edits": edits, "offset": offset, "shuffle": shuffle}
        if isinstance(controls, str):
            require_source(controls, "data.controls")
        check_ranges(
            "data",
            {**counts, "controls": 0 if isinstance(controls, str) else controls},
            batch_size=COUNT,
            edits=COUNT,
            offset=WHOLE,
            shuffle=SEED,
            controls=WHOLE,
        )
        # what else makes no sense whatever the data is
        apply_policy((), 0, on_unusable)
        require_format(format)
        if protocol not in PROTOCOLS:
            raise InputError(
                f"There is no protocol {protocol!r}",
                where="--data.protocol",
                hint=f"choose one of: {', '.join(PROTOCOLS)}",
            )
        if system is not None and not chat:
            raise InputError(
                "a system text is given, but no chat template is used",
                where="--data.system",
                hint="add --data.chat=true, or leave out --data.system",
            )
        require_no_slot(system)
        self.target_prefix, self.chat, self.system = target_prefix, chat, system
        self._protocol = protocol
        self.path = str(path) if isinstance(path, str | Path) else rows_of(path)
        if isinstance(self.path, str):
            require_source(self.path)
        self.format, self.split = format, split
        self.batch_size, self.edits, self.offset = batch_size, edits, offset
        self.shuffle = shuffle
        self.on_unusable = on_unusable
        self.controls_wanted = controls
        self._requests: list[EditRequest] | None = None
        self._rejected: list[Rejected] = []
        self._controls: list[Probe] = []
        self._asked: list[Probe] = []  # of these the control facts are
        self._known: list[bool] | None = None  # which of them the unedited model answers

    def prepare(
        self,
        tokenizer: PreTrainedTokenizerBase | None = None,
        max_length: int | None = None,
        contexts_length: int = 0,
        embeddings: int | None = None,
    ) -> None:
        """Read and check the requests, and choose those to edit and the control facts.

        With a tokenizer, tokens are checked as well (:func:`check_tokens`).

        Raises InputError if the source cannot be read, if it holds unusable requests and the
        policy is to stop, if there is none, or if there is no chat template to put around prompts.
        """
        sorted_out = self.sort_out(tokenizer, max_length, contexts_length, embeddings)
        chosen, rest, rejected, total = sorted_out
        apply_policy(rejected, total, self.on_unusable)
        self._require_requests(len(chosen), total, len(rejected))
        if rejected:
            log.warning("%d of %d requests are left out as unusable", len(rejected), total)
        _warn_of_superseded(chosen)
        self._warn_of_blanks(chosen)
        self._requests, self._rejected = chosen, rejected
        wanted, at_most = self.controls_wanted, None
        if isinstance(wanted, str):
            self._asked = control_facts_of(
                wanted,
                self.split,
                chosen,
                self.on_unusable,
                lambda facts: self._readable(facts, tokenizer, max_length, 0, embeddings),
            )
        else:
            self._asked, at_most = pick_control_facts(rest, chosen, wanted), wanted
        self._controls = self._asked
        log.info(
            "%s, %s",
            _amount(len(chosen), "request", "edits", self.edits),
            _amount(len(self._asked), "control fact", "controls", at_most),
        )

    def sort_out(
        self,
        tokenizer: PreTrainedTokenizerBase | None = None,
        max_length: int | None = None,
        contexts_length: int = 0,
        embeddings: int | None = None,
    ) -> SortedOut:
        """Read and check the requests, and say which can be edited; nothing is decided about them.

        With a tokenizer, tokens are checked as well (:func:`check_tokens`).

        Raises InputError if the source cannot be read, or if there is no chat template to put
        around prompts.
        """
        usable, rejected = read_requests(self.path, self.format, self.split)
        total = len(usable) + len(rejected)
        usable, faults = self._readable(usable, tokenizer, max_length, contexts_length, embeddings)
        rejected += faults
        chosen, rest, clashing = take_distinct(usable[self.offset :], self.edits, self.batch_size)
        if self.shuffle is not None:
            chosen = shuffled(chosen, self.shuffle)
        return SortedOut(chosen, rest, [*rejected, *clashing], total)

    def _readable(
        self,
        usable: list[EditRequest],
        tokenizer: PreTrainedTokenizerBase | None,
        max_length: int | None,
        contexts_length: int,
        embeddings: int | None,
    ) -> tuple[list[EditRequest], list[Rejected]]:
        """Join the prompts as the run does, and sort out what the model cannot read."""
        if self.target_prefix is not None:
            usable = [with_prefix(request, self.target_prefix) for request in usable]
        if self.chat and tokenizer is None:
            raise InputError(
                "there is no tokenizer whose chat template could be used",
                where="data.chat",
                hint="leave it out, or give the trainer a module with the model's tokenizer",
            )
        if tokenizer is None:
            return usable, []
        if self.chat:
            usable = in_chat(usable, tokenizer, self.system)
        return check_tokens(usable, tokenizer, max_length, contexts_length, embeddings)

    def setup(self, stage: str) -> None:
        """Prepare with the tokenizer and the ``max_length`` of the trainer's module, once."""
        if self._requests is None:
            module = self.trainer.lightning_module if self.trainer else None
            self.prepare(
                getattr(module, "tokenizer", None),
                getattr(module, "max_length", None),
                getattr(module, "contexts_length", 0),
                getattr(module, "embeddings", None),
            )

    @property
    def requests(self) -> list[EditRequest]:
        """The requests to edit, in order."""
        if self._requests is None:
            raise RuntimeError("call prepare() or setup() before asking for requests")
        return self._requests

    @property
    def rejected(self) -> list[Rejected]:
        """The requests that could not be used, each with its reason."""
        return self._rejected

    @property
    def controls(self) -> list[Probe]:
        """The control facts: known facts that are not edited.

        Of a source of their own (``controls``) all, until `keep_known` was called.
        """
        return self._controls

    @property
    def controls_at_most(self) -> int:
        """How many control facts there can be; a source of their own is read for it."""
        if isinstance(self.controls_wanted, int):
            return self.controls_wanted
        return len(read_requests(self.controls_wanted, "auto", self.split)[0])

    @property
    def controls_open(self) -> bool:
        """Whether the unedited model has still to be asked for the control facts."""
        return self._controls_given and self._known is None

    @property
    def _controls_given(self) -> bool:
        """Whether control facts have a source of their own, and the model is asked for them."""
        return isinstance(self.controls_wanted, str)

    @property
    def controls_kept(self) -> tuple[int, int] | None:
        """How many facts the unedited model answers, of how many; None where it was not asked."""
        return None if self._known is None else (sum(self._known), len(self._known))

    def keep_known(self, known: Sequence[bool]) -> None:
        """Keep those control facts that the unedited model answers; ``known`` says it of each."""
        self._known = list(known)
        self._controls = [fact for fact, yes in zip(self._asked, known, strict=True) if yes]
        kept, asked = len(self._controls), len(self._asked)
        told = log.info if kept else log.warning
        told(
            "of %d facts in %s the unedited model answers %d: they are the control facts",
            asked,
            self.controls_wanted,
            kept,
        )

    @property
    def dataset(self) -> Dataset:
        """The requests to edit as a Hugging Face dataset; reading it gives the same requests."""
        return to_dataset(self.requests)

    @property
    def protocol(self) -> str:
        """How the requests are scored: ``counterfact`` or ``zsre``.

        Unless it was given, the wanted object is compared with the other one (``counterfact``) if
        at least half of the requests name their current object; those that do not then count in
        the top-1 metrics alone. Otherwise the right tokens of all are counted (``zsre``).
        """
        if self._protocol != "auto":
            return self._protocol
        known = sum(request.target_true is not None for request in self.requests)
        return "counterfact" if 2 * known >= len(self.requests) else "zsre"

    @property
    def protocol_given(self) -> bool:
        """Whether ``protocol`` was set, and not left to the requests."""
        return self._protocol != "auto"

    def state_dict(self) -> dict[str, Any]:
        """Return what tells these requests, in this order and these batches, from others."""
        state = {
            "requests": self._fingerprint(),
            "batch_size": self.batch_size,
            "controls_given": self._controls_given,
        }
        return state if self._known is None else {**state, "known_controls": self._known}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Make sure that a resumed run goes on with the requests it was started with.

        Raises:
            InputError: naming what differs.
        """
        if state_dict["batch_size"] != self.batch_size:
            raise InputError(
                f"the run was started with batches of {state_dict['batch_size']}, "
                f"not of {self.batch_size}",
                where="data.batch_size",
                hint="resume it with the same, or start a new run",
            )
        if state_dict["requests"] != self._fingerprint():
            raise InputError(
                "the run was started with other requests or control facts, or in another order",
                where=f"data.path = {name_of(self.path)}",
                hint="bring the data and the options under data back to what they were",
            )
        given = state_dict.get("controls_given", self._controls_given)  # older ones do not say
        if given != self._controls_given:
            raise InputError(
                "the run was started with control facts from "
                + ("a source of their own" if given else "the data itself"),
                where=f"data.controls = {self.controls_wanted}",
                hint="resume it with what it was started with: of facts from a source of their own "
                "those count that the unedited model answers, of the data's own all",
            )
        if "known_controls" in state_dict:
            self.keep_known(state_dict["known_controls"])

    def _fingerprint(self) -> str:
        """Hash the requests in their order, and the control facts; not where they were read.

        Of control facts that the model is asked for, all: which it answers is the model's affair.
        """
        digest = hashlib.sha256()
        for request in self.requests:
            digest.update(repr(replace(request, source="")).encode())
            if request.aliases or request.portability:  # older fingerprints know of neither
                digest.update(repr((request.aliases, request.portability)).encode())
            if any(probe.aliases for probe in request.portability):
                digest.update(repr([probe.aliases for probe in request.portability]).encode())
        digest.update(repr(self._asked).encode())
        return digest.hexdigest()[:16]

    def val_dataloader(self) -> DataLoader[list[EditRequest]]:
        """One batch of all requests: what is measured of them is up to the callback."""
        return DataLoader([self.requests], batch_size=None)  # type: ignore[arg-type]

    def test_dataloader(self) -> DataLoader[list[EditRequest]]:
        """One batch of all requests: what is measured of them is up to the callback."""
        return DataLoader([self.requests], batch_size=None)  # type: ignore[arg-type]

    def train_dataloader(self) -> CommittedBatches[EditRequest]:
        """Edit batches: lists of at most ``batch_size`` requests, in order.

        A resumed run goes on behind the batches that were committed.
        """
        committed = self.trainer.global_step if self.trainer else 0
        return CommittedBatches(self.requests, self.batch_size, committed)

    def _require_requests(self, usable: int, total: int, rejected: int) -> None:
        """Raise InputError if no request is usable."""
        if not usable:
            name = name_of(self.path)
            raise InputError(
                "no usable requests",
                where=f"{name}: {total} read, {rejected} unusable, offset {self.offset}",
                hint="lower --data.offset, or give more data",
            )

    def _warn_of_blanks(self, requests: list[EditRequest]) -> None:
        """Name prompts that end with a blank, which is kept and may be meant or a slip."""
        ends = end_with_blank(requests)
        if ends:
            log.warning(
                "%d of %d prompts end with a blank, which is kept: their objects follow without "
                "another (first: %s)",
                len(ends),
                len(requests),
                ends[0].source or ends[0].case_id,
            )


def _warn_of_superseded(requests: Sequence[EditRequest]) -> None:
    """Say how many requests later ones replace, and for how many that leaves questions out."""
    replaced = len(superseded(requests))
    if replaced:
        log.warning("%d requests are superseded by later ones on the same prompt", replaced)
    kept = without_unmet_premises(requests, requests)
    lost = sum(
        one.portability != other.portability for one, other in zip(requests, kept, strict=True)
    )
    if lost:
        log.warning(
            "portability prompts of %s count on another edit of their record that is not in force "
            "at the end: a run that edits does not ask them then",
            counted(lost, "request"),
        )


def _amount(found: int, what: str, key: str, most: int | None) -> str:
    """Say how much there is, and of which limit it falls short.

    >>> _amount(10, "request", "edits", 200)
    '10 requests (data.edits: at most 200)'
    >>> _amount(1, "control fact", "controls", None)
    '1 control fact'
    """
    limit = f" (data.{key}: at most {most:,})" if most and found < most else ""
    return f"{counted(found, what)}{limit}"
