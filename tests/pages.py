"""A page as a reader's program has it: its tables, what it loads, and whether its tags fit."""

from __future__ import annotations

import re
from html.parser import HTMLParser

_ALONE = {"meta", "img", "source", "br"}


class Page(HTMLParser):
    """Parses a page; a tag that is closed before it is opened, or never, is an AssertionError.

    tables: the texts of each table's rows. keys: the sort keys of each table's rows. sortable: whether each
    can be sorted. loaded: what images, styles, scripts and links point to. text: all text but scripts
    and styles.
    """

    def __init__(self, content: str):
        super().__init__()
        self.tables: list[list[list[str]]] = []
        self.keys: list[list[list[str | None]]] = []
        self.sortable: list[bool] = []
        self.loaded: list[str] = []
        self.text = ""
        self.tags: list[str] = []
        self._open: list[str] = []
        self.feed(content)
        self.close()
        assert not self._open, self._open
        # What a style could load.
        self.loaded += re.findall(r"url\((.*?)\)|@import (\S+)", content)

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self.tags.append(tag)
        if tag not in _ALONE:
            self._open.append(tag)
        self.loaded += [given[name] for name in ("src", "srcset", "href") if name in given]
        if tag == "table":
            self.tables.append([])
            self.keys.append([])
            self.sortable.append("sortable" in (given.get("class") or "").split())
        if tag == "tr":
            self.tables[-1].append([])
            self.keys[-1].append([])
        if tag in ("td", "th"):
            self.tables[-1][-1].append("")
            self.keys[-1][-1].append(given.get("data-value"))

    def handle_endtag(self, tag):
        assert self._open and self._open.pop() == tag, tag

    def handle_data(self, data):
        if not {"script", "style"} & set(self._open):
            self.text += data
        if {"td", "th"} & set(self._open):
            self.tables[-1][-1][-1] += data
