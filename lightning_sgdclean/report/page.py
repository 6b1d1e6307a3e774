# SPDX-License-Identifier: Apache-2.0
"""The page as one file: template, style, script and data put together, nothing to be loaded from elsewhere."""

import base64
import hashlib
import os
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from lightning_sgdclean.base.files import appearing_whole
from lightning_sgdclean.data.classes import ClassNames
from lightning_sgdclean.ranking.ranking import Ranking
from lightning_sgdclean.report.content import Labels, embedded, page_data
from lightning_sgdclean.report.samples import Shown
from lightning_sgdclean.report.words import trust_lines

PAGE_NAME = "report.html"

_SCRIPTS = ("dom", "data", "charts", "filters", "decisions", "samples", "tallies", "detail", "keys", "main")


def write_page(
    path: "str | os.PathLike[str]",
    ranking: Ranking,
    summary: Mapping[str, Any],
    shown: Sequence[Shown] = (),
    *,
    labels: Labels | None = None,
    class_names: ClassNames | None = None,
) -> Path:
    """Write the page, under a temporary name until it is complete.

    Args:
        path: The file, usually ``report.html`` in the run directory, whose name stands in the title.
        ranking: The ranking. Its columns ``label``, ``prediction``, ``loss`` and ``source`` are shown, and others that
            sort the samples into groups.
        summary: What ``summary.json`` holds; of what it lacks the page says nothing.
        shown: Samples to be shown with more than a row of the table.
        labels: The dataset's label of each sample by rank, for the harm by class.
        class_names: Names of labels.

    Returns:
        ``path``.
    """
    path = Path(path)
    text = page_text(page_data(ranking, shown, labels, class_names), summary, path.absolute().parent.name)
    with appearing_whole(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n", errors="replace")
    return path


def page_text(data: Mapping[str, Any], summary: Mapping[str, Any], title: str) -> str:
    """The whole page from its parts."""
    style, script = _style(), _script()
    objective = summary.get("objective", {})
    return (
        _environment()
        .from_string(_part("template.html"))
        .render(
            title=title,
            style=Markup(style),
            script=Markup(script),
            data=Markup(embedded({**data, "objective": _objective(objective)})),
            policy=_policy(style, script),
            objective=objective.get("name", "the objective"),
            is_max=objective.get("mode") == "max",
            value=objective.get("recomputed"),
            window=summary.get("window", {}).get("words", ""),
            versions=summary.get("versions", {}),
            trust=trust_lines(summary),
            num=data["num"],
            counts=data["counts"],
            concentration=data["concentration"],
            worst=_worst(data),
            has_data=bool(data["samples"]),
        )
    )


def _objective(objective: Mapping[str, Any]) -> dict[str, Any]:
    return {"name": str(objective.get("name", "the objective")), "isMax": objective.get("mode") == "max"}


def _worst(data: Mapping[str, Any]) -> dict[str, Any] | None:
    """The most harmful sample, as an example of what a number means."""
    if not data["counts"]["harmful"]:
        return None
    return {"id": data["ids"][0], "size": f"{-data['influence'][0]:.3g}"}


def _policy(style: str, script: str) -> str:
    """Content-Security-Policy under which this style and this script run, and nothing else, not even from data."""
    return (
        f"default-src 'none'; img-src data:; style-src {_hash(style)}; script-src {_hash(script)}; "
        "base-uri 'none'; form-action 'none'"
    )


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


@cache
def _environment() -> Environment:
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["count"] = lambda number: f"{number:,}"
    environment.filters["digits"] = lambda number: f"{number:.4g}"
    environment.filters["percent"] = lambda share: f"{share:.0%}"
    return environment


@cache
def _style() -> str:
    return "\n" + _part("page.css")


@cache
def _script() -> str:
    bodies = [_part(f"{name}.js") for name in _SCRIPTS]
    return '\n(() => {\n"use strict";\n' + "\n".join(bodies) + "\n})();\n"


def _part(name: str) -> str:
    return files("lightning_sgdclean.report").joinpath(name).read_text(encoding="utf-8")
