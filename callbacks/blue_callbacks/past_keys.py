"""What later batches respect of earlier ones: their keys, and the systems factored with them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from blue_callbacks.closed_form import KeyMemory, SingularCovarianceError, Whitening
from blue_callbacks.errors import EditRejected, InputError, UnsolvableError, first_line
from blue_callbacks.protocol import EditableModule
from blue_callbacks.records import EditRecord, WeightChange
from blue_callbacks.solvers import Solver
from blue_callbacks.weights import WeightId

SAMPLED_VALUES = 65536  # of a covariance, for its fingerprint


class PastBatch(NamedTuple):
    """Keys of a committed batch at one weight, on the CPU.

    Attributes:
        solved: those that its update was solved for, ``(d_in, n)``.
        respected: those that later batches respect, ``(d_in, n)``; others only under RECT.
    """

    solved: Tensor
    respected: Tensor


class PastKeys:
    """The keys of committed batches, weight by weight, and the memories that are built of them.

    A memory is a `KeyMemory`: a factored system, which can be built anew from the covariance and
    the committed keys at any time. Only these are in a checkpoint.

    Args:
        solver: whitens the covariances.
        on_whitening: is told of each covariance that was whitened.
    """

    def __init__(self, solver: Solver, on_whitening: Callable[[WeightId, Whitening], None]) -> None:
        self.solver, self.on_whitening = solver, on_whitening
        self.batches: dict[WeightId, list[PastBatch]] = {}
        self._covariances: dict[str, str] = {}  # weight -> fingerprint
        self._memory: dict[WeightId, KeyMemory] = {}

    def memory_of(self, module: EditableModule, weight: WeightId) -> KeyMemory:
        """Return the weight's memory, built on first use and after a restart.

        Raises:
            SingularCovarianceError, UnsolvableError: naming the weight.
        """
        if weight not in self._memory:
            with solving(weight):
                memory = KeyMemory(self.solver.whitening(module.key_covariance(weight)))
                self.on_whitening(weight, memory.whitening)
                for past in self.batches.get(weight, []):
                    memory.observe(past.solved)
                    memory.remember(past.respected)
            self._memory[weight] = memory
        return self._memory[weight]

    def remember(self, record: EditRecord) -> None:
        """Let later batches respect the keys of one that is about to be committed."""
        for change in record.changes:
            with solving(change.weight):
                self._memory[change.weight].remember(_past_batch(change).respected)

    def commit(self, record: EditRecord) -> None:
        """Keep the keys of a batch, from which memories are built anew."""
        for change in record.changes:
            self.batches.setdefault(change.weight, []).append(_past_batch(change))

    @contextmanager
    def rebuilt_on_error(self) -> Iterator[None]:
        """Have memories built anew from committed keys, should a batch fail halfway.

        A batch is rejected before any of its keys are remembered.
        """
        try:
            yield
        except EditRejected:
            raise
        except BaseException:
            self._memory = {}
            raise

    def require_same_covariance(self, weight: WeightId, covariance: Tensor) -> None:
        """Refuse to go on with a covariance that is not the one a run was started with.

        Raises:
            InputError: naming the weight.
        """
        newest = fingerprint(covariance)
        if self._covariances.setdefault(str(weight), newest) != newest:
            raise InputError(
                f"the covariance of {weight} is not the one that the run was started with",
                where="the statistics file",
                hint="bring the file back, or start a new run",
            )

    def state_dict(self) -> dict[str, Any]:
        """Return keys and fingerprints as tensors and plain values.

        Keys are kept batch by batch, so that a resumed run adds them up as the run did.
        """
        return {
            "past": {
                str(weight): [batch._asdict() for batch in past]
                for weight, past in self.batches.items()
            },
            "covariances": {**self._covariances},
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take over keys and fingerprints; memories are built when they are needed."""
        self.batches = {
            WeightId.parse(name): [PastBatch(**batch) for batch in past]
            for name, past in state_dict["past"].items()
        }
        self._covariances = {**state_dict["covariances"]}
        self._memory = {}


def fingerprint(tensor: Tensor) -> str:
    """Hash the shape and an even sample of the values of a tensor."""
    flat = tensor.detach().flatten()
    sample = flat[:: max(1, len(flat) // SAMPLED_VALUES)].cpu().double().contiguous()
    digest = hashlib.sha256(str(tuple(tensor.shape)).encode())
    digest.update(sample.numpy().tobytes())
    return digest.hexdigest()[:16]


@contextmanager
def solving(weight: WeightId) -> Iterator[None]:
    """Name the weight in what its covariance or its system is refused with."""
    try:
        yield
    except SingularCovarianceError as error:
        raise SingularCovarianceError(f"{weight}: {error}") from error
    except torch.linalg.LinAlgError as error:
        raise UnsolvableError(
            f"the update of {weight} cannot be solved: {first_line(error)}\n"
            "  hint:  raise update.covariance_weight (null space: update.ridge), or collect the "
            "covariance from more tokens; the weights are as they were before this batch"
        ) from error


def _past_batch(change: WeightChange) -> PastBatch:
    """Return what is kept of a batch's keys at a weight."""
    respected = change.keys if change.past_keys is None else change.past_keys
    return PastBatch(change.keys, respected)
