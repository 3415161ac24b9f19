"""A page escapes what it is given, loads nothing, and keeps all rows of a table."""

from __future__ import annotations

import base64

import pytest
from PIL import Image

from autoprune import viz
from autoprune.viz.page import code, heading, page, paragraph, picture, table
from tests.pages import Page

EVIL = """<script>alert("1")</script> & ' </style><img src=x onerror="f()">"""


def test_whatever_is_handed_in_is_shown_as_it_is():
    png = viz.to_png(Image.new("RGB", (2, 2)))
    parts = [
        heading(EVIL),
        paragraph(EVIL),
        code(EVIL),
        picture(png, EVIL, EVIL, png),
        table((EVIL,), [(EVIL,)], [(EVIL,)]),
    ]
    seen = Page(page(EVIL, parts))
    assert seen.tags.count("script") == 1  # the page's own
    assert seen.tags.count("img") == 1
    assert seen.text.count(EVIL) == 8
    assert seen.tables == [[[EVIL], [EVIL]]] and seen.keys == [[[None], [EVIL]]]


def test_a_picture_is_inside_the_page():
    png = viz.to_png(Image.new("RGB", (3, 2), (1, 2, 3)))
    seen = Page(page("title", [picture(png, "words")]))
    (source,) = seen.loaded
    assert source == "data:image/png;base64," + base64.b64encode(png).decode()


def test_what_is_no_picture_is_refused():
    with pytest.raises(ValueError, match="PNG, JPEG or WebP"):
        picture(b"<svg>", "words")


def test_a_table_sorts_by_values_and_a_plain_one_does_not():
    seen = Page(
        page("t", [table(("a",), [("1.0 ms",), ("-",)], [(1.0,), (None,)]), table((), [("x",)])])
    )
    assert seen.sortable == [True, False]
    assert seen.keys[0] == [[None], ["1.0"], [""]]
    assert seen.tables[1] == [["x"]]
