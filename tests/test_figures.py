# SPDX-License-Identifier: Apache-2.0
"""The figure: what it shows, and that it is drawn whatever the influences are."""

import io
import re
import sys

import numpy as np
import pytest

from lightning_sgdclean.figures import plot_influences
from lightning_sgdclean.ranking import Ranking

pytest.importorskip("matplotlib")

HARMFUL, HELPFUL = (0xD5 / 255, 0x5E / 255, 0.0, 1.0), (0.0, 0x72 / 255, 0xB2 / 255, 1.0)


def rank(influence: object) -> Ranking:
    values = np.asarray(influence, dtype=np.float64)
    return Ranking.from_influence(range(len(values)), values, [1] * len(values))


def bars_by_colour(axes: object) -> dict[tuple[float, ...], list]:
    found: dict[tuple[float, ...], list] = {}
    for bar in axes.patches:
        found.setdefault(bar.get_facecolor(), []).append(bar)
    return found


HEAVY = np.random.default_rng(0).standard_t(1.2, 4000) * 1e-5


@pytest.mark.parametrize(
    "influence",
    [HEAVY, np.random.default_rng(1).normal(size=300), [-0.3, -0.1, 0.05, 0.2, 0.02], [-1.0, 0.0, 1e-3]],
    ids=["heavy tail", "normal", "five", "with zero"],
)
def test_bars_count_every_sample_on_its_side_of_zero(influence: object) -> None:
    ranking = rank(influence)
    bars = bars_by_colour(plot_influences(ranking).axes[0])
    assert sum(bar.get_height() for bar in bars[HARMFUL]) == (ranking.influence < 0).sum()
    assert sum(bar.get_height() for bar in bars[HELPFUL]) == (ranking.influence > 0).sum()
    assert all(bar.get_x() + bar.get_width() <= 1e-12 for bar in bars[HARMFUL])
    assert all(bar.get_x() >= 0.0 for bar in bars[HELPFUL])


def test_a_heavy_tail_is_spread_over_many_bars_with_ticks_apart() -> None:
    axes = plot_influences(rank(HEAVY)).axes[0]
    assert len(axes.patches) > 30
    ticks = np.sort(axes.get_xticks())
    positions = axes.transAxes.inverted().transform(axes.transData.transform([(tick, 0.0) for tick in ticks]))
    assert 0.0 in ticks
    assert np.diff(positions[:, 0]).min() > 0.08


def test_zero_is_marked_and_exact_zeros_are_counted() -> None:
    axes = plot_influences(rank([-1.0, 0.0, 0.0, 1.0])).axes[0]
    (line,) = axes.lines
    assert list(line.get_xdata()) == [0.0, 0.0]
    texts = [text.get_text() for text in axes.get_legend().get_texts()]
    assert set(texts) == {"harmful: 1", "helpful: 1", "exactly 0: 2"}


def test_the_running_sum_descends_over_the_harmful_and_ends_at_the_total() -> None:
    axes = plot_influences(rank([-0.5, -0.25, 0.0, 0.125])).axes[1]
    _, harmful, neutral, helpful, *_ = axes.lines
    assert harmful.get_xydata().tolist() == [[0, 0.0], [1, -0.5], [2, -0.75]]
    assert neutral.get_xydata().tolist() == [[2, -0.75], [3, -0.75]]
    assert helpful.get_xydata().tolist() == [[3, -0.75], [4, -0.625]]
    texts = [text.get_text() for text in axes.get_legend().get_texts()]
    assert texts == ["all 2 harmful: -0.75", "all 4 samples: -0.625"]


@pytest.mark.parametrize(
    ("influence", "text"),
    [
        ([], "no samples"),
        ([0.0, -0.0, 0.0], "all 3 influences are exactly 0"),
        ([5e-324, -5e-324], "all 2 influences are smaller than 1e-280"),
    ],
)
def test_where_nothing_can_be_drawn_the_figure_says_so(influence: list[float], text: str) -> None:
    for axes in plot_influences(rank(influence)).axes:
        assert [found.get_text() for found in axes.texts] == [text]
        assert not axes.patches


@pytest.mark.parametrize(
    "influence",
    [
        [1.0],
        [-1.0],
        [0.1, 0.1],
        [1e300, -1e300],
        [1e-279] * 3,
        [5e-324, 1e5],
        [1e-300, -1.0],
        [1e-12] * 50 + [1.0],
    ],
)
def test_extreme_influences_are_drawn_without_a_warning(influence: list[float]) -> None:
    image = io.BytesIO()
    plot_influences(rank(influence)).savefig(image, format="png", dpi=20)
    assert image.getvalue().startswith(b"\x89PNG")


def test_the_unit_is_shown_as_it_is() -> None:
    figure = plot_influences(rank([-1.0, 1.0]), unit="my_$loss$")
    figure.savefig(io.BytesIO(), format="svg")
    assert figure.axes[0].get_xlabel() == r"influence on my_\$loss\$ (below 0: harmful)"
    assert figure.axes[1].get_ylabel() == r"sum of their influences on my_\$loss\$"


def test_drawing_needs_no_pyplot(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)  # its import would raise
    image = io.BytesIO()
    plot_influences(rank([-1.0, 1.0])).savefig(image, format="png", dpi=20)
    assert image.getvalue().startswith(b"\x89PNG")


def test_missing_matplotlib_is_named_with_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=re.escape("pip install lightning-sgdclean[plot]")):
        plot_influences(rank([-1.0]))
