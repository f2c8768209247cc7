"""Rows of the result, as JSON and as a markdown table."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch


@dataclass
class Row:
    """One measured case.

    Args:
        part: the part of the benchmark.
        case: which case of it.
        unit: what the seconds are counted for: edit, batch, record, token.
        ours: seconds per unit, the fast path.
        textbook: seconds per unit, the textbook way; None where it was not run.
        floor: seconds per unit that the needed operations take at the matmul rate.
        ours_peak: peak memory above the start, bytes.
        textbook_peak: the same of the textbook way.
        details: everything else worth keeping: samples, counts, agreement of the numbers.
    """

    part: str
    case: str
    unit: str
    ours: float
    textbook: float | None = None
    floor: float | None = None
    ours_peak: int | None = None
    textbook_peak: int | None = None
    details: dict[str, Any] = field(default_factory=dict)

    @property
    def ratio(self) -> float | None:
        """How many times faster than the textbook."""
        return None if self.textbook is None else self.textbook / self.ours

    @property
    def of_floor(self) -> float | None:
        """Share of the time that the needed operations take at the matmul rate, 0 to 1."""
        return None if self.floor is None else self.floor / self.ours


HEADER = "| part | case | per | textbook s | ours s | ratio | floor s | floor / ours | peak GB |"


def markdown(rows: Sequence[Row]) -> str:
    """Lay rows out as a table; peak memory is ours and, after a slash, the textbook's."""
    lines = [HEADER, "|" + "---|" * (HEADER.count("|") - 1)]
    for row in rows:
        cells = [
            row.part,
            row.case,
            row.unit,
            _number(row.textbook),
            _number(row.ours),
            _number(row.ratio, " x"),
            _number(row.floor),
            "" if row.of_floor is None else f"{row.of_floor:.0%}",
            " / ".join(f"{p / 1e9:.2f}" for p in (row.ours_peak, row.textbook_peak) if p),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _number(value: float | None, suffix: str = "") -> str:
    return "" if value is None else f"{value:.3g}{suffix}"


def machine(device: str) -> dict[str, Any]:
    """Say where the figures come from."""
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else platform.processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
    }


def write_part(folder: Path, part: str, rows: Sequence[Row], about: dict[str, Any]) -> None:
    """Write one part's JSON, then a table of all parts that the folder holds."""
    folder.mkdir(parents=True, exist_ok=True)
    content = {"about": about, "rows": [asdict(row) for row in rows]}
    (folder / f"{part}.json").write_text(json.dumps(content, indent=1, default=str) + "\n")
    everything = read_rows(folder)
    (folder / "table.md").write_text(markdown(everything) + "\n")


def read_rows(folder: Path) -> list[Row]:
    """Read the rows of all parts in a folder."""
    files = sorted(folder.glob("*.json"))
    return [Row(**row) for file in files for row in json.loads(file.read_text())["rows"]]
