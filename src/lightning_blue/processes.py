"""Several processes at one run: each holds the whole model and does a share of the work."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities import rank_zero_only
from torch import distributed
from tqdm.auto import tqdm

Item = TypeVar("Item")
Result = TypeVar("Result")


class EditStrategy(DDPStrategy):
    """Start processes as ``ddp`` does, but average no gradients: an edit has none to average.

    All of them write the same updates, from the same targets and keys.
    """

    def configure_ddp(self) -> None:
        """Leave the module unwrapped; the stock wrapper refuses one without trainable weights."""

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        """Let each process see every batch, whole: it is inside the batch that work is split."""
        return {"num_replicas": 1, "rank": 0}


def n_processes() -> int:
    """Return how many processes work together, 1 outside a distributed run."""
    together = distributed.is_available() and distributed.is_initialized()
    return distributed.get_world_size() if together else 1


def spread(
    items: Sequence[Item], work: Callable[[Sequence[Item]], Sequence[Result]]
) -> list[Result]:
    """Let each process do a share of the items; give all of them all results, in order.

    Every process must call it, with the same items.

    Args:
        items: n pieces of work; a process gets those that follow each other.
        work: from some of them, maybe none, to as many results that pickle, tensors on the CPU.

    Returns:
        n results.

    Raises:
        RuntimeError: in the other processes, if one fails; in that one its own error.
    """
    world = n_processes()
    if world == 1:
        return list(work(items))
    rank = distributed.get_rank()
    cuts = [len(items) * i // world for i in range(world + 1)]
    failure: Exception | None = None
    found: Sequence[Result] = []
    try:
        found = list(work(items[cuts[rank] : cuts[rank + 1]]))
    except Exception as error:  # the others wait for an answer
        failure = error
    shares: list[Any] = [None] * world
    distributed.all_gather_object(shares, (None if failure is None else repr(failure), found))
    if failure is not None:
        raise failure
    for number, (said, _) in enumerate(shares):
        if said is not None:
            raise RuntimeError(f"process {number} failed: {said}")
    return [result for _, share in shares for result in share]


def progress_bar(total: int, label: str | None, unit: str = "it") -> tqdm[Any]:
    """Return a bar that a terminal shows for the first process's share; none without a label."""
    hidden = label is None or rank_zero_only.rank != 0  # type: ignore[attr-defined]
    return tqdm(total=total, desc=label, unit=unit, leave=False, disable=hidden or None)
