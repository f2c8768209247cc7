"""The stream of training rows, written while training runs."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import NamedTuple

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset
from transformers import PreTrainedTokenizerFast

from blue_callbacks.ranges import COUNT, SEED, WHOLE, Range, check_ranges
from lightning_blue.pretrain.almanac import Almanac
from lightning_blue.pretrain.records import open_records
from lightning_blue.pretrain.tokenizer import train_tokenizer
from lightning_blue.pretrain.world import Piece, World
from lightning_blue.support.errors import InputError

MIN_VOCABULARY = 257  # bytes, and the end of a text
END_OF_TEXT_SHARE = 0.5  # rows and documents that begin with an end-of-text token


class Rows(NamedTuple):
    """A training batch."""

    ids: Tensor  # (rows, length) token ids
    is_object: Tensor  # (rows, length) booleans: the token belongs to the object of a fact


class RowStream(IterableDataset[Rows]):
    """Endless batches of rows that state facts among the first ``active`` ones.

    Half of the rows begin without an end-of-text token, because editing prompts have none.
    """

    def __init__(
        self,
        world: World,
        tokenizer: PreTrainedTokenizerFast,
        *,
        rows: int,
        length: int,
        active: int,
        seed: int,
    ) -> None:
        super().__init__()
        self.world, self.tokenizer = world, tokenizer
        self.rows, self.length, self.seed = rows, length, seed
        self.active = active

    def __iter__(self) -> Iterator[Rows]:
        rng = random.Random(f"rows {self.seed}")
        while True:
            rows = [self._row(rng) for _ in range(self.rows)]
            ids, is_object = zip(*rows, strict=True)
            yield Rows(torch.tensor(ids), torch.tensor(is_object))

    def _row(self, rng: random.Random) -> tuple[list[int], list[bool]]:
        """Put documents after one another until the row is full; the last one is cut."""
        ids: list[int] = []
        is_object: list[bool] = []
        while len(ids) < self.length:
            if rng.random() < END_OF_TEXT_SHARE:
                ids.append(self.tokenizer.eos_token_id)
                is_object.append(False)
            elif ids:
                self._append([Piece("\n")], ids, is_object)
            self._append(self.world.document(rng, self.active), ids, is_object)
        return ids[: self.length], is_object[: self.length]

    def _append(self, pieces: list[Piece], ids: list[int], is_object: list[bool]) -> None:
        texts = [piece.text for piece in pieces]
        for piece, encoding in zip(
            pieces, self.tokenizer.backend_tokenizer.encode_batch(texts), strict=True
        ):
            ids += encoding.ids
            is_object += [piece.is_object] * len(encoding.ids)


class FactCorpusModule(LightningDataModule):
    """Facts to learn, the text that states them, and a tokenizer made for that text.

    Args:
        path: a CounterFact-like file, in any form that facts to edit may have; without it the
            facts are those of the invented almanac.
        facts: how many facts to take from the file, the first ones; all without a number.
        held_out: file only: share of paraphrases that training never sees.
        editable: almanac only: number of subjects with a fact that may be edited.
        reserved: almanac only: number of subjects that are never edited, four facts each.
        vocab_size: tokens of the tokenizer.
        length: tokens in a row; the context length of the model.
        rows: rows in a batch.
        first_facts: number of facts to start with; the set grows as they are learned.
        seed: seeds the world and the rows.

    Raises:
        InputError: the file cannot be used.
    """

    def __init__(
        self,
        path: str | None = None,
        facts: int | None = None,
        held_out: float = 0.2,
        editable: int = 510,
        reserved: int = 160,
        vocab_size: int = 2304,
        length: int = 128,
        rows: int = 6,
        first_facts: int = 250,
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_ranges(
            "data",
            locals(),
            facts=COUNT,
            held_out=Range(0, 1),
            editable=WHOLE,
            reserved=WHOLE,
            vocab_size=Range(MIN_VOCABULARY, whole=True),
            length=Range(2, whole=True),
            rows=COUNT,
            first_facts=COUNT,
            seed=SEED,
        )
        self.vocab_size, self.length, self.rows = vocab_size, length, rows
        self.seed = seed
        self.world = _open_world(path, facts, held_out, editable, reserved, seed)
        self.first_facts = min(first_facts, len(self.world.facts))
        if self.first_facts < 1:
            raise InputError("no fact to learn", where="first_facts", hint="give 1 or more")
        self._stream: RowStream | None = None

    def setup(self, stage: str | None = None) -> None:
        """Train the tokenizer."""
        if self._stream is None:
            self.tokenizer = train_tokenizer(
                self.world.tokenizer_texts(), self.vocab_size, self.length
            )
            self._stream = RowStream(
                self.world,
                self.tokenizer,
                rows=self.rows,
                length=self.length,
                active=self.first_facts,
                seed=self.seed,
            )

    @property
    def stream(self) -> RowStream:
        """The training rows; ``stream.active`` is the number of active facts."""
        if self._stream is None:
            raise RuntimeError("call setup() first")
        return self._stream

    @property
    def total(self) -> int:
        """Number of facts that the world has."""
        return len(self.world.facts)

    def grow(self, factor: float) -> int:
        """Bring more facts into play and return how many there are now."""
        self.stream.active = min(self.total, max(round(self.stream.active * factor), 1))
        return self.stream.active

    def train_dataloader(self) -> DataLoader[Rows]:
        """Batches are made in this process, so that a grown set of facts counts at once."""
        return DataLoader(self.stream, batch_size=None, num_workers=0)


def _open_world(
    path: str | None, facts: int | None, held_out: float, editable: int, reserved: int, seed: int
) -> World:
    if path is None:
        if facts is not None:
            raise InputError(
                f"facts={facts} without a file",
                where="data.facts",
                hint="give data.path as well, or data.editable and data.reserved for the almanac",
            )
        return Almanac(editable, reserved, seed)
    return open_records(path, facts, seed, held_out)
