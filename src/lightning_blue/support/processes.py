"""Several processes at one run: each holds the whole model and does a part of the work."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any, TypeVar

from lightning import Trainer
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher
from lightning.pytorch.utilities import rank_zero_only
from torch import distributed
from tqdm.auto import tqdm

from blue_callbacks.ranges import POSITIVE, check_ranges
from lightning_blue.support.checkpoints import BatchCheckpoints, checkpoints
from lightning_blue.support.watch import Watch

Item = TypeVar("Item")
Result = TypeVar("Result")

PARENT = "LIGHTNING_BLUE_PARENT"  # in the environment: the process that started this one

_sharing: ContextVar[bool] = ContextVar("sharing", default=False)
_meet: ContextVar[Callable[[], None]] = ContextVar("meet", default=lambda: None)
_no_bars: ContextVar[bool] = ContextVar("no_bars", default=False)
_speaks: ContextVar[bool | None] = ContextVar("speaks", default=None)


class EditStrategy(DDPStrategy):
    """Start processes as ``ddp`` does, but average no gradients: an edit has none to average.

    All of them write the same updates, from the same targets and keys; their devices should be of
    one kind. When one of them fails, is killed or falls silent, the others end too, with one
    message and `ProcessLost`.

    Args:
        lost_after: seconds without a sign of life after which a process counts as lost. One that
            has ended on this machine is noticed within seconds, whatever it is.
        **kwargs: of ``DDPStrategy``.
    """

    def __init__(self, lost_after: float = 45.0, **kwargs: Any) -> None:
        check_ranges("trainer.strategy", {"lost_after": lost_after}, lost_after=POSITIVE)
        super().__init__(**kwargs)
        self.lost_after = lost_after
        self._watch: Watch | None = None
        self._sigterm: Any = None  # the handler before Lightning's

    def setup_environment(self) -> None:
        """Join the others, and watch them from then on."""
        super().setup_environment()
        if self._watch is not None:
            self._watch.connect(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))

    def setup(self, trainer: Trainer) -> None:
        """Let :func:`distribute` share the work; every process sees every batch, whole."""
        trainer._accelerator_connector.use_distributed_sampler = False
        super().setup(trainer)
        share_work(True, self._meet)

    def teardown(self) -> None:
        """Let each process work for itself again."""
        share_work(False)
        super().teardown()

    def configure_ddp(self) -> None:
        """Leave the module unwrapped; the stock wrapper refuses one without trainable weights."""

    def barrier(self, *args: Any, **kwargs: Any) -> None:
        """Wait for all processes, so that signals are heard and losses noticed meanwhile."""
        self._meet()
        super().barrier(*args, **kwargs)

    def broadcast(self, obj: Any, src: int = 0) -> Any:
        """Wait for all processes as `barrier` does, then hand the object of one to all."""
        self._meet()
        return super().broadcast(obj, src)

    def on_train_start(self) -> None:
        """Take SIGTERM back: Lightning's handler waits for the others, which may wait for us."""
        if self._sigterm is not None:
            signal.signal(signal.SIGTERM, self._sigterm)

    on_test_start = on_train_start

    def watched(
        self, children: Sequence[subprocess.Popen[bytes]], trainer: Trainer, work: Callable[[], Any]
    ) -> Any:
        """Do a Trainer's work under the watch that this process keeps over the others.

        Args:
            children: processes that this one has started, in the order of their ranks.
            trainer: whose work it is.
            work: all of it.

        Returns:
            What the work returns.

        Raises:
            ProcessLost: if another process has ended.
        """
        if threading.current_thread() is threading.main_thread():
            self._sigterm = signal.getsignal(signal.SIGTERM)
        first = self.global_rank - self.local_rank  # of this machine
        started = self.local_rank > 0 and PARENT in os.environ
        self._watch = Watch(
            self.global_rank,
            self.num_nodes * self.num_processes,
            self.lost_after,
            children=dict(enumerate(children, start=first + 1)),
            parent=(first, int(os.environ[PARENT])) if started else None,
            kept=partial(kept_checkpoint, trainer),
        )
        try:
            result = work()
            self._watch.leave()
        except BaseException as error:
            share_work(False)  # from here on each process works for itself, if at all
            reason = self._watch.fail(error)
            _speaks.set(self._watch.speaks)
            if reason is error:
                raise
            raise reason from None
        finally:
            self._watch = None
        return result

    def _meet(self) -> None:
        if self._watch is not None:
            self._watch.meet()

    def _configure_launcher(self) -> None:
        """Start processes by a launcher that leaves watching them to this strategy."""
        super()._configure_launcher()
        if isinstance(self._launcher, _SubprocessScriptLauncher):
            assert self.cluster_environment is not None
            self._launcher = WatchedLauncher(self)


class WatchedLauncher(_SubprocessScriptLauncher):
    """Lightning's launcher without its observer, which kills all without a word.

    Args:
        strategy: that watches the processes.
    """

    def __init__(self, strategy: EditStrategy) -> None:
        assert strategy.cluster_environment is not None
        super().__init__(strategy.cluster_environment, strategy.num_processes, strategy.num_nodes)
        self.strategy = strategy
        self.children: list[subprocess.Popen[bytes]] = []

    def launch(
        self,
        function: Callable[..., Any],
        *args: Any,
        trainer: Trainer | None = None,
        **kwargs: Any,
    ) -> Any:
        """Start the processes and call the function of a Trainer, watched."""
        assert trainer is not None
        work = partial(function, *args, **kwargs)
        return super().launch(
            lambda: self.strategy.watched(self.children, trainer, work), trainer=trainer
        )

    def kill(self, signum: int) -> None:
        """Send a signal to all children."""
        for child in self.children:
            child.send_signal(signum)

    def _call_children_scripts(self) -> None:
        os.environ[PARENT] = str(os.getpid())
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # or a lost store is a stack of C++
        super()._call_children_scripts()
        self.children, self.procs = self.procs, []  # what is not in procs is not observed


def kept_checkpoint(trainer: Trainer) -> str:
    """Say which checkpoint a run that ends now leaves, and how to go on from it."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, BatchCheckpoints) and callback.folder is not None:
            saved = checkpoints(callback.folder)
            return f"{saved[-1]}; --ckpt_path last goes on from there" if saved else "nothing yet"
    return ""


def speaks() -> bool:
    """Whether this process should tell the user why it ends: one of several does, not each."""
    told = _speaks.get()
    if told is not None:
        return told
    rank: int = rank_zero_only.rank  # type: ignore[attr-defined]
    return rank == 0 or PARENT in os.environ  # a child that ends early ends alone


def share_work(together: bool, meet: Callable[[], None] = lambda: None) -> None:
    """Say whether the processes of the default group work together; all must say the same.

    Args:
        together: whether they do.
        meet: waits until all processes have called it.
    """
    _sharing.set(together)
    _meet.set(meet)


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
    _meet.get()()
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


@contextmanager
def no_progress_bars() -> Iterator[None]:
    """Show no bar of a part of the work inside the block, where one stands for all of it."""
    token = _no_bars.set(True)
    try:
        yield
    finally:
        _no_bars.reset(token)


def progress_bar(total: int, label: str | None, unit: str = "it") -> tqdm[Any]:
    """Return a bar that a terminal shows for the first process's part; none without a label."""
    hidden = label is None or _no_bars.get() or rank_zero_only.rank != 0  # type: ignore[attr-defined]
    return tqdm(total=total, desc=label, unit=unit, leave=False, disable=hidden or None)
