"""Start the processes of a sweep on this machine, several at once where there is room."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from pathlib import Path
from queue import SimpleQueue

import torch

from lightning_blue.language_model.sources import PACKAGED
from lightning_blue.sweeps.planned import PlannedRun
from lightning_blue.sweeps.tasks import Outcome, Processes, Task, environment

PROGRAM = 1.5e9  # bytes that a process takes without a model
COPIES = 4  # of the model's files that a run may take on a processor: float32, and its work
OnEnd = Callable[[Outcome], None]


def run_here(tasks: Sequence[Task], jobs: int, on_end: OnEnd) -> None:
    """Run tasks, so many at a time, each with its share of threads or its own GPU.

    A task that fails does not stop the others. One that another sweep works on is put behind the
    others, and looked at again. If this process is asked to end, its processes are, and what had
    not started stays.

    Args:
        tasks: in the order in which they start.
        jobs: tasks at a time.
        on_end: called with the outcome of each task when it ends.
    """
    processes = Processes()
    slots: SimpleQueue[dict[str, str]] = SimpleQueue()
    for slot in slot_environments(jobs):
        slots.put(slot)

    def attempt(task: Task) -> Outcome | None:
        own = slots.get()
        try:
            return task.attempt(own, processes)
        finally:
            slots.put(own)

    pool = ThreadPoolExecutor(jobs)
    try:
        running = {pool.submit(attempt, task): task for task in tasks}
        while running:
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                task, outcome = running.pop(future), future.result()
                if outcome is None:
                    running[pool.submit(attempt, task)] = task
                else:
                    on_end(outcome)
    except BaseException:
        processes.end()
        pool.shutdown(cancel_futures=True)
        raise
    pool.shutdown()


def slot_environments(jobs: int) -> list[dict[str, str]]:
    """Return the environment of each of the tasks that run at a time."""
    devices = visible_devices()
    threads = max(1, cores() // jobs)
    if not devices:
        return [environment(threads) for _ in range(jobs)]
    return [environment(threads, devices[slot % len(devices)]) for slot in range(jobs)]


def jobs_with_room(runs: Sequence[PlannedRun]) -> int:
    """Return how many runs fit at a time: one on each GPU, else what cores and memory allow.

    Of a model that is not on this machine the size is not known: one at a time.
    """
    devices = visible_devices()
    if devices:
        return min(len(devices), max(1, len(runs)))
    sizes = [_model_bytes(str(run.config["model/name_or_path"])) for run in runs]
    if any(size is None for size in sizes):
        return 1
    largest = max((size for size in sizes if size is not None), default=0)
    room = int(_free_memory() // (PROGRAM + COPIES * largest))
    return max(1, min(cores(), room, len(runs)))


def visible_devices() -> list[str]:
    """Return the GPUs that this process may use, as ``CUDA_VISIBLE_DEVICES`` names them."""
    count = torch.cuda.device_count()
    named = [part for part in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if part]
    return named[:count] if named else [str(number) for number in range(count)]


def cores() -> int:
    """Return the cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _model_bytes(name_or_path: str) -> int | None:
    folder = Path(str(PACKAGED.get(name_or_path, name_or_path))).expanduser()
    if not folder.is_dir():
        return None
    return sum(file.stat().st_size for file in folder.rglob("*.safetensors"))


def _free_memory() -> int:
    if not hasattr(os, "sysconf"):
        return 2 * int(PROGRAM)
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
