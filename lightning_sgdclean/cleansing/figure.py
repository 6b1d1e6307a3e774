# SPDX-License-Identifier: Apache-2.0
"""A cleansing as a picture: the metric against the number of samples removed."""

from typing import TYPE_CHECKING

import numpy as np

from lightning_sgdclean.cleansing.gains import Measured, Numbers, estimate

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Two colours of Okabe and Ito that stay apart in every common form of colour blindness.
_WORST, _RANDOM, _NONE = "#D55E00", "#0072B2", "#505050"


def plot_cleansing(metric: Measured, counts: tuple[int, ...], name: str, level: float, done: str) -> "Figure":
    """Draw the mean over seeds with its interval as a band, for the worst samples and for random ones.

    Built without pyplot, so it needs no display and leaves no global state behind.

    Args:
        metric: After every training.
        counts: Numbers of samples.
        name: Of the metric.
        level: Of the intervals.
        done: What was done to the samples, in a word.

    Raises:
        ImportError: If matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plot() needs matplotlib: pip install lightning-sgdclean[plot]") from error
    name = name.replace("$", r"\$")  # a pair of them would start a formula
    figure = Figure(figsize=(7.2, 4.6), layout="constrained")
    axes = figure.subplots()
    removed = np.array([0, *counts])
    axes.axhline(metric.none.mean(), color=_NONE, linestyle="--", linewidth=1.2, label="nothing")
    for values, colour, label in (
        (metric.random.mean(-1), _RANDOM, "random samples"),
        (metric.worst, _WORST, "most harmful samples"),
    ):
        _draw_band(axes, removed, np.vstack([metric.none, values]), colour, label, level)
    axes.set_xlabel(f"training samples {done}")
    axes.set_ylabel(f"{name}: mean of {len(metric.none)} seeds, {level:.0%} interval")
    axes.locator_params(axis="x", integer=True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=3)
    return figure


def _draw_band(axes: "Axes", removed: Numbers, values: Numbers, colour: str, label: str, level: float) -> None:
    found = [estimate(row, level) for row in values]
    axes.plot(removed, [one.mean for one in found], "o-", color=colour, linewidth=2, markersize=4, label=label)
    axes.fill_between(
        removed, [one.low for one in found], [one.high for one in found], color=colour, alpha=0.15, linewidth=0
    )
