# SPDX-License-Identifier: Apache-2.0
"""`quant_summary.json` for people: a page that works offline, and a table for the terminal."""

from fourfold.reporting.page import render_report, write_report
from fourfold.reporting.table import LinearTable, select, table_of
from fourfold.storage.quant_summary import QuantSummary, read_summary

__all__ = [
    "LinearTable",
    "QuantSummary",
    "read_summary",
    "render_report",
    "select",
    "table_of",
    "write_report",
]
