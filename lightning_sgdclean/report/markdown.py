# SPDX-License-Identifier: Apache-2.0
"""The worst samples as a Markdown table in which ids and labels are shown as they are, never interpreted."""

from typing import Any

from lightning_sgdclean.ranking.ranking import Ranking
from lightning_sgdclean.ranking.table import COLUMNS
from lightning_sgdclean.report.results import worst_rows

_MAX_LENGTH = 80


def worst_table(ranking: Ranking, n: int = 10) -> str:
    """The ``n`` most harmful samples, most harmful first."""
    names, rows = worst_rows(ranking, n)
    if not rows:
        return "No sample is harmful.\n"
    head = [name if name in COLUMNS else _literal(name) for name in names]
    sides = [":---" if any(isinstance(row[i], str) for row in rows) else "---:" for i in range(len(names))]
    lines = [head, sides, *([_cell(value) for value in row] for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _cell(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else _literal(str(value))


def _literal(text: str) -> str:
    """Text that Markdown and HTML show as it is: punctuation as entities, control characters escaped."""
    if len(text) > _MAX_LENGTH:
        text = text[: _MAX_LENGTH - 1] + "…"
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)
    return "".join(c if c.isalnum() or c == " " or not c.isascii() else f"&#{ord(c)};" for c in shown)
