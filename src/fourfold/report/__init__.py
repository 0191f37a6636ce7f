"""A summary document for people: a table of every linear weight, and a page that stands alone."""

from fourfold.report.html import html_of
from fourfold.report.page import page_of
from fourfold.report.reading import read_summary
from fourfold.report.table import LinearTable, chosen_entries, table_of

__all__ = ["LinearTable", "chosen_entries", "html_of", "page_of", "read_summary", "table_of"]
