"""Models larger than memory: one block at a time, from file to file."""

from eckart.streaming.journal import Journal, open_journal
from eckart.streaming.passes import Measure, scratch_bytes
from eckart.streaming.plan import FORMS, Wanted, equal_widths, foreseen_bytes
from eckart.streaming.route import Route
from eckart.streaming.run import Streamed, stream

__all__ = [
    "FORMS",
    "Journal",
    "Measure",
    "Route",
    "Streamed",
    "Wanted",
    "equal_widths",
    "foreseen_bytes",
    "open_journal",
    "scratch_bytes",
    "stream",
]
