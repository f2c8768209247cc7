"""Start the processes of a sweep as SLURM jobs, by submitit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning_blue.support.errors import InputError
from lightning_blue.sweeps.launch import OnEnd
from lightning_blue.sweeps.tasks import Outcome, Task, environment

DEFAULTS = {"job_name": "lightning-blue", "time": 24 * 60, "gpus_per_node": 1}  # minutes
POLL = 10  # seconds from one look at the queue to the next


class Job:
    """A task as submitit sends it; one that runs out of time is queued again and goes on."""

    def __init__(self, task: Task) -> None:
        self.task = task

    def __call__(self) -> Outcome:
        """Run the task on the node that SLURM has chosen, which decides threads and GPUs."""
        return self.task.run(environment())

    def checkpoint(self) -> Any:
        """Tell submitit what to queue again."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


def run_on_slurm(
    tasks: Sequence[Task], jobs: int, options: Mapping[str, Any], folder: Path, on_end: OnEnd
) -> None:
    """Submit tasks as one array and wait for them; jobs go on if this process ends.

    Args:
        tasks: what to run.
        jobs: at a time.
        options: of ``sbatch``, as submitit names them: ``partition``, ``time``, ``gpus_per_node``.
        folder: for submitit's files; on a disk that all nodes see.
        on_end: called with the outcome of each task when it ends.

    Raises:
        InputError: without submitit or SLURM, or for an option that neither knows.
    """
    if not tasks:
        return
    try:
        import submitit
    except ImportError:
        raise InputError(
            "SLURM jobs are started by submitit, which is not installed",
            where="--cluster=slurm",
            hint="pip install 'lightning-blue[sweep]'",
        ) from None
    try:
        executor = submitit.SlurmExecutor(folder)
        executor.update_parameters(**{**DEFAULTS, "array_parallelism": jobs, **options})
    except (RuntimeError, ValueError) as error:
        raise InputError(
            " ".join(str(error).split())[:600],
            where="--cluster=slurm",
            hint="call it on a machine that has sbatch, with --slurm OPTION=VALUE as sbatch has "
            "them",
        ) from error
    submitted = executor.submit_array([Job(task) for task in tasks])
    names = {job.job_id: task for job, task in zip(submitted, tasks, strict=True)}
    for job in submitit.helpers.as_completed(submitted, poll_frequency=POLL):
        on_end(_outcome(job, names[job.job_id]))


def _outcome(job: Any, task: Task) -> Outcome:
    error = job.exception()
    if error is None:
        outcome: Outcome = job.result()
        return outcome
    reason = next(iter(str(error).splitlines()), type(error).__name__)
    return Outcome(task.name, "failed", reason, 0.0, task.log)
