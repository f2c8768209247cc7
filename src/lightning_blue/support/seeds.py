"""One seed decides everything random in a run."""

from __future__ import annotations

import os


def run_seed(seed: int | None) -> int:
    """Return a seed that was given, or else the one of ``seed_everything``, or else 0."""
    return int(os.environ.get("PL_GLOBAL_SEED", "0")) if seed is None else seed
