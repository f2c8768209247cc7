"""Measure a run and write what it leaves behind."""

from lightning_blue.metrics.callback import MeasureEdits
from lightning_blue.metrics.history import LossCurve, Measurement, RunHistory
from lightning_blue.reporting.record import RunRecord

__all__ = ["LossCurve", "MeasureEdits", "Measurement", "RunHistory", "RunRecord"]
