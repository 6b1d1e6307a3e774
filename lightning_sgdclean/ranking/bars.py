# SPDX-License-Identifier: Apache-2.0
"""How influences are gathered into bars: edges, the stretch of a heavy tail, and the marks of its scale."""

import math

import numpy as np
from numpy.typing import NDArray

TOO_SMALL = 1e-280  # matplotlib cannot place ticks on such an axis
_HEAVY_TAIL = 30.0  # largest over median size from which equal bins would show little but one bar
_TICK_GAP = 0.11  # of the axis, so that labels do not run into each other


def bin_edges(influence: NDArray[np.float64]) -> tuple[NDArray[np.float64], float]:
    """Edges of the bars, 0 among them, so that no bar mixes harmful and helpful samples.

    Returns:
        The edges, and for a heavy tail the size up to which the scale is about linear (else 0).
    """
    size = np.abs(influence[influence != 0])
    typical = max(float(np.median(size)), TOO_SMALL)
    stretch = typical if size.max() > _HEAVY_TAIL * typical else 0.0
    ends = np.array([min(influence.min(), 0.0), max(influence.max(), 0.0)])
    low, high = np.arcsinh(ends / stretch) if stretch else ends
    width = (high - low) / int(np.clip(np.sqrt(len(influence)), 8, 60))
    edges = width * np.arange(np.floor(low / width), np.ceil(high / width) + 1)
    # Rounding may leave the outermost sample a hair outside its bar.
    edges[0], edges[-1] = min(edges[0], low), max(edges[-1], high)
    if stretch:
        edges = stretch * np.sinh(edges)
        edges[0], edges[-1] = min(edges[0], ends[0]), max(edges[-1], ends[1])
    return edges, stretch


def stretched_ticks(edges: NDArray[np.float64], stretch: float) -> list[float]:
    """Where a stretched scale has its marks: powers of ten from the outside in, as many as have room."""
    low, high = np.arcsinh(edges[[0, -1]] / stretch)
    ticks = [0.0]
    for sign, end in ((-1, -edges[0]), (1, edges[-1])):
        outermost = math.inf
        for power in range(math.floor(math.log10(end)), -300, -1) if end > 0 else ():
            position = math.asinh(10.0**power / stretch)
            if position < _TICK_GAP * (high - low):
                break
            if outermost - position > _TICK_GAP * (high - low):
                ticks.append(sign * 10.0**power)
                outermost = position
    return sorted(ticks)


def has_size(influence: NDArray[np.float64]) -> bool:
    """Whether there is anything to draw."""
    return len(influence) > 0 and bool(np.abs(influence).max() > TOO_SMALL)
