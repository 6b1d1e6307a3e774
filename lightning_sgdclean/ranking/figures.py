# SPDX-License-Identifier: Apache-2.0
"""The ranking, and some of its samples, as pictures."""

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from lightning_sgdclean.base.randomness import untouched_randomness
from lightning_sgdclean.data.datasets import picture_of
from lightning_sgdclean.ranking.groups import (
    TOO_SMALL,
    GroupEffect,
    bin_edges,
    effects_by_group,
    has_size,
    stretched_ticks,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_NOTES = ("label", "prediction")  # columns that are worth a line under a picture
_LONGEST = 22  # characters of a line


class Ranked(Protocol):
    """What is needed of a :class:`lightning_sgdclean.Ranking`."""

    @property
    def sample_id(self) -> NDArray[Any]:
        """Ids, ``(N,)``."""

    @property
    def influence(self) -> NDArray[np.float64]:
        """Influences, ``(N,)``."""

    @property
    def columns(self) -> dict[str, NDArray[Any]]:
        """Further columns by name, each ``(N,)``."""


@dataclass(frozen=True)
class Exhibit:
    """One sample.

    Attributes:
        rank: 1 is the most harmful sample.
        sample_id: Its id.
        influence: Negative: harmful.
        notes: Its label and prediction, where they are known.
        pixels: Grey values ``(H, W)`` or colours ``(H, W, 3)``.
    """

    rank: int
    sample_id: int | str
    influence: float
    notes: dict[str, Any]
    pixels: NDArray[np.uint8]

    @property
    def lines(self) -> list[str]:
        """What stands under its picture."""
        notes = [f"{name} {value}" for name, value in self.notes.items()]
        return [short(line) for line in (f"#{self.rank}: {self.influence:.3g}", f"sample {self.sample_id}", *notes)]


def worst_pictures(ranked: Ranked, dataset: Any, n: int = 16) -> list[Exhibit]:
    """The ``n`` most harmful samples, fewer if fewer are harmful, none if the worst one holds no picture.

    Args:
        ranked: The ranking.
        dataset: The dataset in which the sample ids are positions.
        n: How many.
    """
    places = range(min(n, int((ranked.influence < 0).sum())))
    if not places or not hasattr(dataset, "__getitem__"):
        return []
    with untouched_randomness(torch.device("cpu")):
        has_picture = picture_of(dataset[ranked.sample_id.tolist()[0]]) is not None
    return exhibits(ranked, places, dataset) if has_picture else []


def exhibits(
    ranked: Ranked, places: Sequence[int], dataset: Any, render: Callable[[Any], Any] | None = None
) -> list[Exhibit]:
    """The samples at these places of a ranking, fetched from the dataset; random states are left as they were.

    Args:
        ranked: The ranking.
        places: Ranks, counted from 0.
        dataset: The dataset in which the sample ids are positions.
        render: Makes a sample into what :func:`picture_of` takes; by default the first picture in it is taken.

    Raises:
        ValueError: If there is no picture in a sample.
    """
    found = []
    with untouched_randomness(torch.device("cpu")):
        for place in places:
            sample_id, influence = ranked.sample_id[place : place + 1].tolist()[0], float(ranked.influence[place])
            sample = dataset[sample_id]
            pixels = picture_of(sample if render is None else render(sample))
            if pixels is None:
                raise ValueError(
                    f"There is no picture in sample {sample_id!r}, a {type(sample).__name__}. Give "
                    "render=, a callable from a sample to a PIL image, an array or a tensor of grey values or colours."
                )
            notes = {name: ranked.columns[name].tolist()[place] for name in _NOTES if name in ranked.columns}
            found.append(Exhibit(place + 1, sample_id, influence, notes, pixels))
    return found


def short(value: Any) -> str:
    """A value in a few characters, on one line; of a long one, both ends."""
    text = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in str(value))
    half = _LONGEST // 2
    return text if len(text) <= _LONGEST else f"{text[:half]}…{text[1 - half :]}"


# Two colours of Okabe and Ito that stay apart in every common form of colour blindness.
HARMFUL, HELPFUL, NEUTRAL = "#D55E00", "#0072B2", "#505050"
_MOST_GROUPS = 12  # rows that have room
_DPI = 120


def plot_influences(
    influence: NDArray[np.float64], unit: str = "the objective", groups: Sequence[Any] | None = None
) -> "Figure":
    """Draw how many samples have which influence, their running sum by rank, and the harm and help of each group.

    Built without pyplot, so it needs no display and leaves no global state behind.

    Args:
        influence: Influences in ascending order, ``(N,)``; negative means harmful.
        unit: Name of the objective whose unit the influences have.
        groups: The group of each sample; without it the third part is left out.

    Returns:
        A figure of two axes, or three; save it with ``savefig``.

    Raises:
        ImportError: If matplotlib is not installed.
    """
    unit = as_it_is(unit)
    figure = new_figure(11.0 if groups is None else 16.5, 4.6)
    axes = figure.subplots(1, 2 if groups is None else 3)
    _draw_spread(axes[0], influence, unit)
    _draw_running_sum(axes[1], influence, unit)
    if groups is not None:
        _draw_groups(axes[2], influence, groups, unit)
    for part in axes:
        part.spines[["top", "right"]].set_visible(False)
        if part.get_legend_handles_labels()[0]:
            part.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=3)
    return figure


def new_figure(width: float, height: float) -> "Figure":
    """An empty figure of this size in inches.

    Raises:
        ImportError: If matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("Figures need matplotlib: pip install lightning-sgdclean[plot]") from error
    return Figure(figsize=(width, height), layout="constrained")


def as_it_is(text: str) -> str:
    """Text that matplotlib does not take for a formula."""
    return text.replace("$", r"\$")


def save_png(figure: "Figure", path: Path) -> NDArray[np.uint8]:
    """Write a figure as PNG.

    Returns:
        What was drawn, ``(H, W, 3)``.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    figure.dpi = _DPI
    canvas: Any = FigureCanvasAgg(figure)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from", UserWarning)  # a box says it as well
        canvas.draw()
        figure.savefig(path, format="png", dpi=_DPI)
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


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
        ("harmful", influence[influence < 0], HARMFUL),
        ("helpful", influence[influence > 0], HELPFUL),
    ):
        counts, _ = np.histogram(part, edges)
        full = counts > 0  # the outline keeps a bar of one sample visible, and would draw empty ones too
        starts, widths = edges[:-1][full], np.diff(edges)[full]
        label = f"{name}: {len(part)}"
        axes.bar(starts, counts[full], widths, align="edge", color=colour, ec=colour, lw=0.8, label=label)
    zeros = int((influence == 0).sum())
    exactly_zero = f"exactly 0: {zeros}" if zeros else None
    axes.axvline(0.0, color=NEUTRAL, linestyle="--", linewidth=1.2, label=exactly_zero)
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
    axes.axhline(0.0, color=NEUTRAL, linestyle="--", linewidth=1.2)
    for start, end, colour in (
        (0, harmful, HARMFUL),
        (harmful, not_helpful, NEUTRAL),
        (not_helpful, total, HELPFUL),
    ):
        axes.plot(np.arange(start, end + 1), sums[start : end + 1], color=colour, linewidth=2)
    if harmful:
        label = f"all {harmful} harmful: {sums[harmful]:.3g}"
        axes.plot(harmful, sums[harmful], "o", color=HARMFUL, label=label)
    if harmful < total:
        axes.plot(total, sums[-1], "s", color=HELPFUL, label=f"all {total} samples: {sums[-1]:.3g}")
    axes.ticklabel_format(axis="y", scilimits=(-3, 5))
    axes.locator_params(axis="x", integer=True)


def _draw_groups(axes: "Axes", influence: NDArray[np.float64], groups: Sequence[Any], unit: str) -> None:
    effects = effects_by_group(groups, influence.tolist())
    rows = _strongest(effects)
    what = "Groups" if len(rows) == len(effects) else f"{len(rows)} of {len(effects)} groups"
    axes.set_title(f"{what} of samples, most harmful on top")
    axes.set_xlabel(f"sums of influences on {unit}")
    if not has_size(influence):
        _say_nothing_to_draw(axes, influence)
        return
    places = np.arange(len(rows))
    axes.barh(places, [row.harm for row in rows], 0.7, color=HARMFUL, label="harm")
    axes.barh(places, [row.help for row in rows], 0.7, color=HELPFUL, label="help")
    axes.plot([row.total for row in rows], places, "D", color="white", mec="black", ms=5, label="both together")
    names = [as_it_is(f"{_name(row.group)}  ({row.num_harmful} of {row.num_samples})") for row in rows]
    axes.set_yticks(places, names)
    axes.tick_params(axis="y", length=0, labelsize=8)
    axes.set_ylabel("group (how many of its samples are harmful)")
    axes.invert_yaxis()
    axes.axvline(0.0, color=NEUTRAL, linestyle="--", linewidth=1.2)
    axes.locator_params(axis="x", nbins=7)
    axes.ticklabel_format(axis="x", scilimits=(-3, 5))


def _strongest(effects: list[GroupEffect]) -> list[GroupEffect]:
    """As many groups as have room: those whose sums are furthest from 0, in their order."""
    shown = {effect.group for effect in sorted(effects, key=lambda effect: -abs(effect.total))[:_MOST_GROUPS]}
    return [effect for effect in effects if effect.group in shown]


def _name(group: Any) -> str:
    return short(f"{group:g}" if isinstance(group, float) else group)


def _say_nothing_to_draw(axes: "Axes", influence: NDArray[np.float64]) -> None:
    if len(influence) == 0:
        text = "no samples"
    elif influence.any():
        text = f"all {len(influence)} influences are smaller than {TOO_SMALL:g}"
    else:
        text = f"all {len(influence)} influences are exactly 0"
    axes.set(xticks=[], yticks=[])
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", color=NEUTRAL)


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
