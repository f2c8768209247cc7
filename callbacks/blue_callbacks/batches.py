"""Edit batches in their order, from where a run stands."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Generic, TypeVar

Request = TypeVar("Request")


class CommittedBatches(Generic[Request]):
    """A dataloader of edit batches that leaves out those committed before a run was resumed.

    Lightning counts a resumed run's batches on from the committed ones, but starts a dataloader at
    its beginning; here the two agree. The length stays that of all batches. Lightning takes any
    iterable, and leaves this one alone where it would shuffle or divide a ``DataLoader``.

    Args:
        requests: of the whole run, in order.
        batch_size: requests in a batch; the last may have fewer.
        committed: batches to leave out: ``trainer.global_step`` where the dataloader is made.

    >>> list(CommittedBatches("abcde", 2, committed=1))
    [['c', 'd'], ['e']]
    """

    def __init__(self, requests: Sequence[Request], batch_size: int, committed: int = 0) -> None:
        self.requests, self.batch_size, self.committed = requests, batch_size, committed

    def __len__(self) -> int:
        """Return the number of batches of the whole run."""
        return -(-len(self.requests) // self.batch_size)

    def __iter__(self) -> Iterator[list[Request]]:
        """Yield each batch that is still to be applied."""
        for batch in range(self.committed, len(self)):
            first = batch * self.batch_size
            yield list(self.requests[first : first + self.batch_size])

    def state_dict(self) -> dict[str, Any]:
        """Return nothing: the trainer's ``global_step`` tells where a run stands."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take nothing; there being this method tells Lightning that a run can be resumed."""
