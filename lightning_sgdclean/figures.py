# SPDX-License-Identifier: Apache-2.0
"""The ranking as a picture: how the influences are spread, and what they add up to."""

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from lightning_sgdclean.bars import TOO_SMALL, bin_edges, has_size, stretched_ticks
from lightning_sgdclean.ranking import Ranking

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Two colours of Okabe and Ito that stay apart in every common form of colour blindness.
_HARMFUL, _HELPFUL, _NEUTRAL = "#D55E00", "#0072B2", "#505050"


def plot_influences(ranking: Ranking, unit: str = "val_loss") -> "Figure":
    """Draw a ranking: left how many samples have which influence, right their running sum by rank.

    Built without pyplot, so it needs no display and leaves no global state behind.

    Args:
        ranking: The ranking; negative influence means harmful.
        unit: Name of the objective whose unit the influences have.

    Returns:
        A figure of two axes; save it with ``savefig``.

    Raises:
        ImportError: If matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plot_influences() needs matplotlib: pip install lightning-sgdclean[plot]") from error
    unit = unit.replace("$", r"\$")  # a pair of them would start a formula
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    _draw_spread(left, ranking.influence, unit)
    _draw_running_sum(right, ranking.influence, unit)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=3)
    return figure


def _draw_spread(axes: "Axes", influence: NDArray[np.float64], unit: str) -> None:
    axes.set_title("How many samples have which influence")
    axes.set_xlabel(f"influence on {unit} (below 0: harmful)")
    axes.set_ylabel("number of samples")
    if not has_size(influence):
        _say_nothing_to_draw(axes, influence)
        return
    edges, stretch = bin_edges(influence)
    if stretch:
        axes.set_xscale("asinh", linear_width=stretch)
        axes.set_xlabel(f"influence on {unit} (below 0: harmful; log scale away from 0)")
        ticks = stretched_ticks(edges, stretch)
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks], minor=False)
        axes.set_xticks([], minor=True)
    else:
        axes.locator_params(axis="x", nbins=7)
        axes.ticklabel_format(axis="x", scilimits=(-3, 5))
    for name, part, colour in (
        ("harmful", influence[influence < 0], _HARMFUL),
        ("helpful", influence[influence > 0], _HELPFUL),
    ):
        counts, _ = np.histogram(part, edges)
        full = counts > 0  # the outline keeps a bar of one sample visible, and would draw empty ones too
        starts, widths = edges[:-1][full], np.diff(edges)[full]
        label = f"{name}: {len(part)}"
        axes.bar(starts, counts[full], widths, align="edge", color=colour, ec=colour, lw=0.8, label=label)
    zeros = int((influence == 0).sum())
    exactly_zero = f"exactly 0: {zeros}" if zeros else None
    axes.axvline(0.0, color=_NEUTRAL, linestyle="--", linewidth=1.2, label=exactly_zero)
    axes.locator_params(axis="y", integer=True)


def _draw_running_sum(axes: "Axes", influence: NDArray[np.float64], unit: str) -> None:
    axes.set_title("Influences added up, most harmful first")
    axes.set_xlabel("number of samples, from the most harmful on")
    axes.set_ylabel(f"sum of their influences on {unit}")
    if not has_size(influence):
        _say_nothing_to_draw(axes, influence)
        return
    total = len(influence)
    sums = np.concatenate([[0.0], np.cumsum(influence)])
    harmful, not_helpful = int((influence < 0).sum()), int((influence <= 0).sum())
    axes.axhline(0.0, color=_NEUTRAL, linestyle="--", linewidth=1.2)
    for start, end, colour in (
        (0, harmful, _HARMFUL),
        (harmful, not_helpful, _NEUTRAL),
        (not_helpful, total, _HELPFUL),
    ):
        axes.plot(np.arange(start, end + 1), sums[start : end + 1], color=colour, linewidth=2)
    if harmful:
        label = f"all {harmful} harmful: {sums[harmful]:.3g}"
        axes.plot(harmful, sums[harmful], "o", color=_HARMFUL, label=label)
    if harmful < total:
        axes.plot(total, sums[-1], "s", color=_HELPFUL, label=f"all {total} samples: {sums[-1]:.3g}")
    axes.ticklabel_format(axis="y", scilimits=(-3, 5))
    axes.locator_params(axis="x", integer=True)


def _say_nothing_to_draw(axes: "Axes", influence: NDArray[np.float64]) -> None:
    if len(influence) == 0:
        text = "no samples"
    elif influence.any():
        text = f"all {len(influence)} influences are smaller than {TOO_SMALL:g}"
    else:
        text = f"all {len(influence)} influences are exactly 0"
    axes.set(xticks=[], yticks=[])
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", color=_NEUTRAL)
