"""Edit batches in their order, from where a run stands."""

from __future__ import annotations

from collections.abc import Iterator

from torch.utils.data import Sampler


class CommittedBatches(Sampler[list[int]]):
    """Batches of indices in order, without those that were committed before a run was resumed.

    Lightning counts a resumed run's batches on from the committed ones, but starts a dataloader at
    its beginning; with this for ``batch_sampler`` the two agree. The length stays that of all
    batches.

    Args:
        n: number of requests.
        batch_size: requests in a batch; the last may have fewer.
        committed: batches to leave out, ``trainer.global_step`` where the dataloader is made.

    >>> list(CommittedBatches(5, 2, committed=1))
    [[2, 3], [4]]
    """

    def __init__(self, n: int, batch_size: int, committed: int = 0) -> None:
        self.n, self.batch_size, self.committed = n, batch_size, committed

    def __len__(self) -> int:
        """Return the number of batches of the whole run."""
        return -(-self.n // self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        """Yield the indices of each batch that is still to be applied."""
        for first in range(self.committed * self.batch_size, self.n, self.batch_size):
            yield list(range(first, min(first + self.batch_size, self.n)))
