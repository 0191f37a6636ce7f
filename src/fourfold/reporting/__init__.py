"""A summary document for people: a table of every linear weight, and a page that stands alone."""

from fourfold.reporting.html import html_of
from fourfold.reporting.page import page_of
from fourfold.reporting.reading import read_summary
from fourfold.reporting.table import LinearTable, chosen_entries, table_of

__all__ = ["LinearTable", "chosen_entries", "html_of", "page_of", "read_summary", "table_of"]
