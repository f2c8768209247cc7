"""Measure a run and write what it leaves behind."""

from lightning_blue.reporting.history import LossCurve, Measurement, RunHistory
from lightning_blue.reporting.measure import MeasureEdits
from lightning_blue.reporting.record import RunRecord

__all__ = ["LossCurve", "MeasureEdits", "Measurement", "RunHistory", "RunRecord"]
