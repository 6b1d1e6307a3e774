# SPDX-License-Identifier: Apache-2.0
"""Text for a terminal, and what a finished run left, read without torch."""

import argparse
import math
import shutil
import textwrap
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_sgdclean.base.errors import SGDInfluenceError, printable
from lightning_sgdclean.base.summary import read_summary
from lightning_sgdclean.ranking.columns import SUFFIX, read_ranking
from lightning_sgdclean.ranking.table import CSV_NAME, Table

_LONGEST_CELL = 32


def one_line(error: BaseException) -> str:
    """An error in one line: its text, and its kind where the text may not be meant for people."""
    text = printable(" ".join(str(error).split()))
    if text and isinstance(error, SGDInfluenceError | ValueError | OSError | ImportError):
        return text
    return f"{type(error).__name__}: {text}".rstrip(": ")


def width_of(text: str) -> int:
    """Columns that a text takes on a terminal."""
    return sum(0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "FW" else 1 for c in text)


def terminal_width() -> int:
    """Columns of the terminal; 80 where there is none."""
    return max(20, shutil.get_terminal_size((80, 24)).columns)


def facts(pairs: Sequence[tuple[str, str]]) -> str:
    """Names and values, one below the other, the values wrapped."""
    margin = max((len(name) for name, _ in pairs), default=0) + 2
    lines = []
    for name, value in pairs:
        wrapped = textwrap.wrap(printable(value), max(10, terminal_width() - margin), break_on_hyphens=False) or [""]
        lines += [f"{name:<{margin}}{wrapped[0]}", *(" " * margin + more for more in wrapped[1:])]
    return "\n".join(lines)


def wrapped(text: str) -> str:
    """Lines of text, each wrapped and indented as it begins."""
    lines = []
    for line in text.splitlines():
        indent = " " * (len(line) - len(line.lstrip()))
        filled = textwrap.wrap(printable(line.strip()), terminal_width() - len(indent), break_on_hyphens=False)
        lines += [indent + part for part in filled] or [""]
    return "\n".join(lines)


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A table of as many columns as fit, from the left; what was left out is said below."""
    cells = [[_cell(value) for value in row] for row in (header, *rows)]
    widths = [max(width_of(row[i]) for row in cells) for i in range(len(header))]
    while len(widths) > 3 and sum(widths) + 2 * (len(widths) - 1) > terminal_width():
        widths.pop()
    is_text = [all(isinstance(row[i], str) for row in rows) for i in range(len(header))]
    lines = [
        "  ".join(_padded(cell, width, left) for cell, width, left in zip(row, widths, is_text, strict=False)).rstrip()
        for row in cells
    ]
    left_out = cells[0][len(widths) :]
    return "\n".join([*lines, *([facts([("not shown:", ", ".join(left_out))])] if left_out else [])])


def _padded(cell: str, width: int, left: bool) -> str:
    space = " " * (width - width_of(cell))
    return cell + space if left else space + cell


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return "" if math.isnan(value) else f"{value:.4g}"
    text = printable(str(value))
    if width_of(text) <= _LONGEST_CELL:
        return text
    while width_of(text) > _LONGEST_CELL - 3:
        text = text[:-1]
    return f"{text}..."


RUN_HELP = "run directory, or a ranking saved as CSV or Parquet"


@dataclass(frozen=True)
class FinishedRun:
    """A run's ranking and summary.

    Attributes:
        file: The ranking.
        table: What it holds.
        summary: What the ``summary.json`` beside it holds; empty where there is none.
    """

    file: Path
    table: Table
    summary: dict[str, Any]

    @property
    def num_harmful(self) -> int:
        """Samples with a negative influence, which stand first."""
        return int((self.table.influence < 0).sum())

    def records(self, start: int, stop: int) -> list[dict[str, Any]]:
        """Lines of the ranking, from ``start`` (0: rank 1) up to ``stop``, by column."""
        columns = {name: column[start:stop].tolist() for name, column in self.table.whole().items()}
        return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def read_run(path: str) -> FinishedRun:
    """Read a run directory, or the file of a ranking.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: If a file is damaged.
    """
    file = Path(path)
    if file.is_dir():
        file = file / CSV_NAME
        if not file.is_file():
            raise FileNotFoundError(f"{path} holds no {CSV_NAME}: no run that came to its end.")
    if not file.is_file():
        raise FileNotFoundError(f"There is neither a run directory nor a ranking at {path}.")
    return FinishedRun(file, read_ranking(file), read_summary(file.parent))


def whole_number(text: str) -> int:
    """A number from 0 on, for argparse."""
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError(f"{text} is below 0")
    return number


def table_file(text: str) -> Path:
    """A path that ends in .csv or .parquet, for argparse."""
    if Path(text).suffix not in (".csv", SUFFIX):
        raise argparse.ArgumentTypeError(f"{text} ends neither in .csv nor in {SUFFIX}")
    return Path(text)


def csv_file(text: str) -> Path:
    """A path that ends in .csv, for argparse."""
    if Path(text).suffix != ".csv":
        raise argparse.ArgumentTypeError(f"{text} does not end in .csv")
    return Path(text)
