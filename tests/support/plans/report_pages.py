"""An HTML report taken apart, for the tests of reports."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from typing import Any


class Page(HTMLParser):
    """A page taken apart: text by section, table rows by section, plots by id, every attribute that could fetch something."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.sections: dict[str, str] = {"": ""}
        self.rows: dict[str, list[list[str]]] = {"": []}
        self.plots: dict[str, dict[str, Any]] = {}
        self.fetching: list[tuple[str, str, str | None]] = []
        self.scripts: list[str] = []
        self.policy: str | None = None
        self._section, self._in, self._id = "", "", ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        self.fetching += [
            (tag, key, value) for key, value in attrs if key in ("src", "href", "data", "action", "poster", "srcset")
        ]
        if tag == "meta" and found.get("http-equiv") == "Content-Security-Policy":
            self.policy = found["content"]
        if tag == "section":
            self._section = found["id"]
            self.sections[self._section], self.rows[self._section] = "", []
        if tag == "tr":
            self.rows[self._section].append([])
        if tag in ("td", "th"):
            self.rows[self._section][-1].append("")
        if tag in ("td", "th", "script", "style"):
            self._in, self._id = tag, found.get("id", "")

    def handle_endtag(self, tag):
        if tag == self._in:
            self._in = ""

    def handle_data(self, data):
        if self._in == "script":
            if self._id:
                self.plots[self._id.removesuffix("-data")] = json.loads(data)
            else:
                self.scripts.append(data)
        elif self._in != "style":
            self.sections[self._section] += data
            if self._in in ("td", "th"):
                self.rows[self._section][-1][-1] += data
