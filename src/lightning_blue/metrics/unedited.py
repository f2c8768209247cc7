"""What was measured of an unedited model, kept for other runs that would measure the same."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lightning.pytorch.strategies import Strategy

from lightning_blue import __version__
from lightning_blue.metrics.evaluation import Evaluation, RequestOutcome
from lightning_blue.metrics.matching import RULES, answer_from
from lightning_blue.support.locks import locked
from lightning_blue.support.storage import unless_full, write_atomic


class UneditedMeasurements:
    """A folder with one JSON file for each model, set of requests and way of measuring.

    Numbers come back to the last bit. Of several runs that want the same, the first measures, and
    the others wait for it behind a lock, which the system frees if its holder dies.

    Args:
        folder: of the files; created where it does not exist.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def shared(
        self, identity: Mapping[str, Any], strategy: Strategy, measure: Callable[[], Evaluation]
    ) -> Evaluation:
        """Return what is kept under an identity, or measure it and keep it.

        All processes of a run must call it: the first one reads and writes, all measure together.
        """
        matching = {"matching": RULES} if "generation" in identity else {}
        identity = {**identity, "version": __version__, **matching}
        path = self._path(identity)
        lock = path.with_suffix(".lock")
        what = "the measurement of the unedited model"
        with locked(lock, what) if strategy.is_global_zero else nullcontext():
            kept = self._read(path, identity) if strategy.is_global_zero else None
            kept = strategy.broadcast(kept)
            if kept is not None:
                return _evaluation(kept)
            measured = measure()
            if strategy.is_global_zero:
                with unless_full("the next run measures the unedited model again"):
                    described = {"identity": identity, **asdict(measured)}
                    write_atomic(path, json.dumps(described))
        return measured

    def _path(self, identity: Mapping[str, Any]) -> Path:
        described = json.dumps(identity, sort_keys=True)
        return self.folder / f"{hashlib.sha256(described.encode()).hexdigest()[:16]}.json"

    def _read(self, path: Path, identity: Mapping[str, Any]) -> dict[str, Any] | None:
        """Return what is kept; None for nothing, for a damaged file or another identity's."""
        try:
            kept = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        same = isinstance(kept, dict) and kept.get("identity") == identity
        return kept if same else None


def _evaluation(kept: Mapping[str, Any]) -> Evaluation:
    outcomes = [
        RequestOutcome(**{**outcome, "correct": tuple(outcome["correct"])})
        for outcome in kept["outcomes"]
    ]
    answers = [answer_from(each) for each in kept.get("answers", [])]
    return Evaluation(kept["metrics"], outcomes, answers)
