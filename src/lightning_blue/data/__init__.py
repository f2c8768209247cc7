"""Edit requests: reading them from any source, checking them, and handing them to a run."""

from lightning_blue.data.checks import (
    apply_policy,
    check_tokens,
    count_by_kind,
    pick_control_facts,
    superseded,
    take_distinct,
    without_unmet_premises,
)
from lightning_blue.data.datamodule import EditBatch, EditDataModule
from lightning_blue.data.formats import FORMATS, Format, parse_record
from lightning_blue.data.hub import to_dataset
from lightning_blue.data.reading import read_requests

__all__ = [
    "FORMATS",
    "EditBatch",
    "EditDataModule",
    "Format",
    "apply_policy",
    "check_tokens",
    "count_by_kind",
    "parse_record",
    "pick_control_facts",
    "read_requests",
    "superseded",
    "take_distinct",
    "to_dataset",
    "without_unmet_premises",
]
