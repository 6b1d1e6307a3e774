# SPDX-License-Identifier: Apache-2.0
"""The file of a page: data stay data, and it is whole."""

import json
import os
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from lightning_sgdclean.report.appearance import Appearance
from lightning_sgdclean.report.content import embedded
from lightning_sgdclean.report.page import write_page
from lightning_sgdclean.report.samples import Shown
from rankings import SUMMARY, ranking_of

HOSTILE = [
    "<script>alert(1)</script>",
    "</script><img src=x onerror=alert(1)>",
    "<!--<script>",
    '=HYPERLINK("http://x","y")',
    "\u2028\u2029",
    "'\"&amp;",
    "{{ 7 * 7 }}",
    "__proto__",
]


class Page(HTMLParser):
    """Tags and the text of scripts, as a browser's parser sees them."""

    def __init__(self, path):
        super().__init__()
        self.tags, self.scripts, self.text, self._inside = [], [], [], None
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self._inside = tag
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag):
        self._inside = None

    def handle_data(self, text):
        if self._inside == "script":
            self.scripts[-1] += text
        else:
            self.text.append(text)


@pytest.mark.parametrize("text", HOSTILE)
def test_embedded_data_come_back_and_cannot_get_out(text):
    script = embedded({"value": text})
    assert json.loads(script) == {"value": text}
    assert not re.search(r"[<>&\u2028\u2029]", script)


def test_hostile_data_stay_data(tmp_path):
    ranking = ranking_of(np.arange(-4.0, 4.0), HOSTILE, label=HOSTILE)
    shown = [Shown(name, Appearance(text=name, features=((name, name),), note=name), label=name) for name in HOSTILE]
    summary = SUMMARY | {
        "objective": SUMMARY["objective"] | {"name": HOSTILE[1]},
        "replay": {"words": HOSTILE[0], "complaints": HOSTILE},
    }
    harmless = Page(write_page(tmp_path / "a.html", ranking_of(np.arange(-4.0, 4.0)), SUMMARY))
    page = Page(write_page(tmp_path / "b.html", ranking, summary, shown, class_names={HOSTILE[0]: HOSTILE[1]}))
    assert len(page.scripts) == 2
    assert page.scripts[1] == harmless.scripts[1]
    assert {tag for tag, _ in page.tags} == {tag for tag, _ in harmless.tags}
    assert json.loads(page.scripts[0])["ids"] == HOSTILE
    assert HOSTILE[1] in "".join(page.text)


def test_the_page_loads_nothing(tmp_path):
    page = Page(write_page(tmp_path / "report.html", ranking_of(np.arange(-4.0, 4.0)), SUMMARY))
    addresses = [attrs[name] for _, attrs in page.tags for name in ("src", "href") if name in attrs]
    assert set(addresses) == {"data:,", "#samples", "#meaning"}
    (policy,) = [attrs["content"] for _, attrs in page.tags if attrs.get("http-equiv") == "Content-Security-Policy"]
    assert policy.startswith("default-src 'none'; img-src data:; style-src 'sha256-")


def test_the_page_appears_whole_or_not_at_all(tmp_path, monkeypatch):
    path = write_page(tmp_path / "report.html", ranking_of(np.arange(3.0)), SUMMARY)
    before = path.read_bytes()
    monkeypatch.setattr(os, "replace", lambda *args: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        write_page(path, ranking_of(np.arange(4.0)), SUMMARY)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["report.html"]


@pytest.mark.parametrize("summary", [{}, SUMMARY], ids=["no summary", "summary"])
@pytest.mark.parametrize("influence", [[], [0.0], [1.0]], ids=["empty", "zero", "helpful"])
def test_any_ranking_makes_a_page(tmp_path, summary, influence):
    text = write_page(tmp_path / "report.html", ranking_of(np.array(influence)), summary).read_text(encoding="utf-8")
    assert text.rstrip().endswith("</html>")
