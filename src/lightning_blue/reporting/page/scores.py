"""The tables of scores."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning_blue.metrics import table
from lightning_blue.metrics.evaluation import Metrics
from lightning_blue.metrics.history import RunHistory
from lightning_blue.reporting.tables import estimate_text
from lightning_blue.reporting.views import measured


def score_tables(history: RunHistory, stages: Mapping[str, Metrics]) -> list[dict[str, Any]]:
    """Return a table for each group of metrics that was measured at any of the stages.

    Returns:
        Of each table ``columns``, the stages, and ``rows``: ``title``, ``unit``, ``direction``,
        ``definition`` and ``cells``, one for each column.
    """
    found = [spec for spec in measured(history) if any(spec.name in m for m in stages.values())]
    tables = []
    for group in table.GROUPS:
        specs = [spec for spec in found if spec.group == group]
        if not specs:
            continue
        columns = {
            label: metrics
            for label, metrics in stages.items()
            if any(spec.name in metrics for spec in specs)
        }
        rows = [
            {
                "title": spec.title,
                "direction": spec.direction,
                "definition": spec.measure(history.protocol).definition,
                "cells": [estimate_text(m.get(spec.name), spec.unit) for m in columns.values()],
            }
            for spec in specs
        ]
        tables.append({"group": group, "columns": list(columns), "rows": rows})
    return tables
