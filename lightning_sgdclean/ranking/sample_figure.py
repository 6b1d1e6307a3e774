# SPDX-License-Identifier: Apache-2.0
"""The pictures of a few samples side by side, with what the ranking says of each."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from lightning_sgdclean.ranking.exhibits import Exhibit
from lightning_sgdclean.ranking.figures import HARMFUL, HELPFUL, NEUTRAL, as_it_is, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_COLUMNS = 8
_WIDTH = 1.7  # inches of a picture
_LINE = 0.19  # of a line of text


def plot_samples(exhibits: Sequence[Exhibit]) -> "Figure":
    """Draw samples in rows, framed in the colour of their effect.

    Args:
        exhibits: The samples, in the order in which they are drawn.

    Raises:
        ImportError: If matplotlib is not installed.
    """
    if not exhibits:
        figure = new_figure(4.0, 1.0)
        figure.text(0.5, 0.5, "no samples", ha="center", va="center", color=NEUTRAL)
        return figure
    columns = min(_COLUMNS, len(exhibits))
    rows = math.ceil(len(exhibits) / columns)
    height = _WIDTH + _LINE * max(len(exhibit.lines) for exhibit in exhibits)
    figure = new_figure(_WIDTH * columns, height * rows)
    for number, exhibit in enumerate(exhibits, start=1):
        axes = figure.add_subplot(rows, columns, number)
        axes.imshow(exhibit.pixels, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
        axes.set(xticks=[], yticks=[])
        axes.set_xlabel(as_it_is("\n".join(exhibit.lines)), fontsize=8)
        axes.spines[:].set(color=HARMFUL if exhibit.influence < 0 else HELPFUL, linewidth=2)
    return figure
