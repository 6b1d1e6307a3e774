# SPDX-License-Identifier: Apache-2.0
"""What a retrace says at its end: ``summary.json`` for programs and a few lines for people."""

import importlib.metadata
import platform
from pathlib import Path
from typing import Any

import torch

from lightning_sgdclean.ranking.ranking import Ranking
from lightning_sgdclean.replay.fidelity import Fidelity


def versions() -> dict[str, str]:
    """Versions of what computed the influences."""
    found = {"python": platform.python_version(), "torch": torch.__version__}
    for name in ("lightning-sgdclean", "pytorch-lightning", "lightning"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def replay_in_words(error: Fidelity) -> str:
    """How far the replay was off, e.g. ``bit for bit in all 320 batches``."""
    if error.num_bitwise == error.num_batches:
        losses = f"losses bit for bit in all {error.num_batches} batches"
    else:
        losses = (
            f"losses off by at most {error.loss:.1e} ({error.num_bitwise} of {error.num_batches} batches bit for bit)"
        )
    return f"{losses}; updates off by at most {error.update:.1e} of their length"


def closing_text(ranking: Ranking, summary: dict[str, Any], folder: Path) -> str:
    """The last word on the terminal."""
    worst = ", ".join(map(str, ranking.harmful(10))) or "none"
    lines = [
        f"SGD influence on {summary['objective']['name']} (negative: the objective would be lower without the sample)",
        f"  files    {folder}",
        f"  window   {summary['window']['words']}; {len(ranking)} samples, engine {summary['engine']}",
        f"  replay   {summary['replay']['words']}",
        f"  worst    {worst}",
    ]
    if summary.get("trust"):
        lines.insert(-1, f"  trust    {summary['trust']['words']}")
    if (folder / "report.html").is_file():
        lines.insert(2, f"  page     {folder / 'report.html'}")
    return "\n".join(lines)
