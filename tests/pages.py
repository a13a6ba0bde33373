"""A report's page as a browser sees it, for tests."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path

from analysis.load import load_sweep
from analysis.report import write_report


class Markup(HTMLParser):
    """What a browser sees: attributes, text outside scripts, ids and the scripts themselves."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.attributes: list[tuple[str, str, str]] = []
        self.tags: list[str] = []
        self.text, self.scripts, self._in = "", [], ""
        self.tables: list[list[str]] = []
        """The headings of each table."""
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag != "wbr":  # a name may break there, and has no end
            self._in = tag
        if tag == "script":
            self.scripts.append("")
        if tag == "table":
            self.tables.append([])
        if tag == "th":
            self.tables[-1].append("")

    def handle_endtag(self, tag):
        self._in = ""

    def handle_data(self, data):
        if self._in == "script":
            self.scripts[-1] += data
        elif self._in != "style":
            self.text += data
        if self._in == "th":
            self.tables[-1][-1] += data

    def figures(self) -> dict:
        return json.loads(self.scripts[0])

    def boards(self) -> dict:
        """The leaderboards as the browser gets them, by id."""
        return json.loads(self.scripts[2])


def read(sweep_store: str, name: str, folder: Path) -> Markup:
    """The page of a recorded sweep, written into `folder`."""
    return Markup(write_report(load_sweep(sweep_store, name), folder).read_text("utf-8"))


def headings(markup: Markup, table: int) -> list[str]:
    """Of the page's tables the first is the winning configuration, the second the leaderboard."""
    return markup.tables[table]
