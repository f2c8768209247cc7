"""The data formats: records, as files hold them, turned into edit requests. Pure functions.

A format is a row of data: where in a record each field of an edit request stands. Prompts and
``target_prefix`` are taken to the letter; of other fields the white space around them is no part.
Fields that are not given may be absent, null or, if optional, blank.
"""

from lightning_blue.data.formats.choosing import choose_format, columns_not_used, require_format
from lightning_blue.data.formats.format import Format, ProbeFields
from lightning_blue.data.formats.probes import unanswered
from lightning_blue.data.formats.records import parse_record, parse_records, template
from lightning_blue.data.formats.rows import FACTS, FORMATS, ZSRE

__all__ = [
    "FACTS",
    "FORMATS",
    "ZSRE",
    "Format",
    "ProbeFields",
    "choose_format",
    "columns_not_used",
    "parse_record",
    "parse_records",
    "require_format",
    "template",
    "unanswered",
]
