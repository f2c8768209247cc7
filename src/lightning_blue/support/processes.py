"""Several processes at one run: each holds the whole model and does a part of the work."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from typing import Any, TypeVar

from lightning import Trainer
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities import rank_zero_only
from torch import distributed
from tqdm.auto import tqdm

Item = TypeVar("Item")
Result = TypeVar("Result")

_sharing: ContextVar[bool] = ContextVar("sharing", default=False)


class EditStrategy(DDPStrategy):
    """Start processes as ``ddp`` does, but average no gradients: an edit has none to average.

    All of them write the same updates, from the same targets and keys; their devices should be of
    one kind.
    """

    def setup(self, trainer: Trainer) -> None:
        """Let :func:`distribute` divide the work."""
        super().setup(trainer)
        share_work(True)

    def teardown(self) -> None:
        """Let each process work for itself again."""
        share_work(False)
        super().teardown()

    def configure_ddp(self) -> None:
        """Leave the module unwrapped; the stock wrapper refuses one without trainable weights."""

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        """Let each process see every batch, whole: it is inside the batch that work is split."""
        return {"num_replicas": 1, "rank": 0}


def share_work(together: bool) -> None:
    """Set whether the processes of the default group work together; all must agree."""
    _sharing.set(together)


def n_processes() -> int:
    """Return how many processes work together."""
    return distributed.get_world_size() if _sharing.get() else 1


def distribute(
    items: Sequence[Item], work: Callable[[Sequence[Item]], Sequence[Result]]
) -> list[Result]:
    """Let each process do a part of the items; give all of them all results, in order.

    Every process must call it, with the same items. Where processes do not work together (see
    :class:`EditStrategy`), each does everything.

    Args:
        items: n pieces of work; a process gets those that follow each other.
        work: from one or more of them to as many results that pickle, tensors on the CPU and not
            views of larger ones.

    Returns:
        n results.

    Raises:
        Exception: in every process, what the first process that failed has raised.
    """
    world = n_processes()
    if world == 1:
        return list(work(items)) if items else []
    rank = distributed.get_rank()
    part = items[len(items) * rank // world : len(items) * (rank + 1) // world]
    failure: Exception | None = None
    results: list[Result] = []
    try:
        results = list(work(part)) if part else []
    except Exception as error:  # the others wait for an answer
        failure = _picklable(error, rank)
    answers: list[Any] = [None] * world
    distributed.all_gather_object(answers, (len(items), failure, results))
    for _, raised, _ in answers:
        if raised is not None:
            raise raised
    if len({count for count, _, _ in answers}) > 1:
        raise RuntimeError("processes that work together were given different batches")
    return [result for _, _, part_results in answers for result in part_results]


def _picklable(error: Exception, rank: int) -> Exception:
    """Return the error, or one that says the same where it does not survive pickling."""
    try:
        return pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"process {rank} failed: {error!r}")


def progress_bar(total: int, label: str | None, unit: str = "it") -> tqdm[Any]:
    """Return a bar that a terminal shows for the first process's part; none without a label."""
    hidden = label is None or rank_zero_only.rank != 0  # type: ignore[attr-defined]
    return tqdm(total=total, desc=label, unit=unit, leave=False, disable=hidden or None)
