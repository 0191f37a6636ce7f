"""The page of a document's text, whatever the document is."""

from __future__ import annotations

import json
from html import escape

from fourfold.reporting.html import html_of


def page_of(summary: str) -> str:
    """The report; what goes wrong with it must not cost the checkpoint, and stands in its place."""
    try:
        return html_of(json.loads(summary))
    except Exception as error:
        return f"<!doctype html><p>The report could not be made: {escape(repr(error))}</p>\n"
