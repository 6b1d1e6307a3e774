# SPDX-License-Identifier: Apache-2.0
"""The figure: what it shows, and that it is drawn whatever the influences are."""

import io
import re
import sys
from pathlib import Path

import numpy as np
import pytest

from lightning_sgdclean.ranking.figures import save_png
from lightning_sgdclean.ranking.ranking import Ranking

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
    bars = bars_by_colour(ranking.plot().axes[0])
    assert sum(bar.get_height() for bar in bars[HARMFUL]) == (ranking.influence < 0).sum()
    assert sum(bar.get_height() for bar in bars[HELPFUL]) == (ranking.influence > 0).sum()
    assert all(bar.get_x() + bar.get_width() <= 1e-12 for bar in bars[HARMFUL])
    assert all(bar.get_x() >= 0.0 for bar in bars[HELPFUL])


def test_a_heavy_tail_is_spread_over_many_bars_with_ticks_apart() -> None:
    axes = rank(HEAVY).plot().axes[0]
    assert len(axes.patches) > 30
    ticks = np.sort(axes.get_xticks())
    positions = axes.transAxes.inverted().transform(axes.transData.transform([(tick, 0.0) for tick in ticks]))
    assert 0.0 in ticks
    assert np.diff(positions[:, 0]).min() > 0.08


def test_zero_is_marked_and_exact_zeros_are_counted() -> None:
    axes = rank([-1.0, 0.0, 0.0, 1.0]).plot().axes[0]
    (line,) = axes.lines
    assert list(line.get_xdata()) == [0.0, 0.0]
    texts = [text.get_text() for text in axes.get_legend().get_texts()]
    assert set(texts) == {"harmful: 1", "helpful: 1", "exactly 0: 2"}


def test_the_running_sum_descends_over_the_harmful_and_ends_at_the_total() -> None:
    axes = rank([-0.5, -0.25, 0.0, 0.125]).plot().axes[1]
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
    for axes in rank(influence).plot().axes:
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
    rank(influence).plot().savefig(image, format="png", dpi=20)
    assert image.getvalue().startswith(b"\x89PNG")


def test_the_unit_is_shown_as_it_is() -> None:
    figure = rank([-1.0, 1.0]).plot(unit="my_$loss$")
    figure.savefig(io.BytesIO(), format="svg")
    assert figure.axes[0].get_xlabel() == r"influence on my_\$loss\$ (below 0: harmful)"
    assert figure.axes[1].get_ylabel() == r"sum of their influences on my_\$loss\$"


def test_drawing_needs_no_pyplot(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)  # its import would raise
    image = io.BytesIO()
    rank([-1.0, 1.0]).plot().savefig(image, format="png", dpi=20)
    assert image.getvalue().startswith(b"\x89PNG")


def test_missing_matplotlib_is_named_with_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=re.escape("pip install lightning-sgdclean[plot]")):
        rank([-1.0]).plot()


# --- groups


def group_axes(figure):
    _, _, axes = figure.axes
    names = [label.get_text() for label in axes.get_yticklabels()]
    harm, help_ = ([bar.get_width() for bar in bars] for bars in axes.containers)
    return names, harm, help_


def test_groups_show_harm_help_and_both_most_harmful_first() -> None:
    ranking = rank([-0.5, -0.25, 0.0, 0.125, 0.5])
    figure = ranking.plot(groups=["b", "a", "a", "a", "$c$"])
    names, harm, help_ = group_axes(figure)
    assert names == ["b  (1 of 1)", "a  (1 of 3)", r"\$c\$  (0 of 1)"]
    assert (harm, help_) == ([-0.5, -0.25, 0.0], [0.0, 0.125, 0.5])
    assert list(figure.axes[2].lines[0].get_xdata()) == [-0.5, -0.125, 0.5]
    assert figure.axes[2].yaxis_inverted()


def test_groups_agree_with_a_sum_by_hand() -> None:
    generator = np.random.default_rng(4)
    values, groups = generator.normal(size=500), generator.integers(0, 9, 500)
    names, harm, help_ = group_axes(rank(values).plot(groups=groups))
    for name, negative, positive in zip(names, harm, help_, strict=True):
        group = values[groups == int(name.split()[0])]
        assert negative == pytest.approx(group[group < 0].sum(), rel=1e-12)
        assert positive == pytest.approx(group[group > 0].sum(), rel=1e-12)
        assert name.endswith(f"({(group < 0).sum()} of {len(group)})")


def test_of_many_groups_the_strongest_are_shown_and_the_title_says_so() -> None:
    figure = rank(np.linspace(-1.0, 1.0, 40)).plot(groups=range(40))
    names, harm, _ = group_axes(figure)
    assert [name.split()[0] for name in names] == [str(i) for i in (*range(6), *range(34, 40))]
    assert harm[:2] == [-1.0, pytest.approx(-1 + 2 / 39)]
    assert figure.axes[2].get_title() == "12 of 40 groups of samples, most harmful on top"


def test_labels_are_the_groups_where_the_ranking_has_few_of_them() -> None:
    influence, once = [-1.0, 0.5, 0.25], [1, 1, 1]
    labelled = Ranking.from_influence([0, 1, 2], influence, once, {"label": [3, None, 3]})
    assert group_axes(labelled.plot())[0] == ["3  (1 of 2)", "unknown  (0 of 1)"]
    assert group_axes(labelled.plot(groups="xyy"))[0] == ["x  (1 of 1)", "y  (0 of 2)"]
    assert len(rank(influence).plot().axes) == 2
    many = range(300)
    measured = Ranking.from_influence(many, [float(i) for i in many], [1] * 300, {"label": [i / 7 for i in many]})
    assert len(measured.plot().axes) == 2


# --- pictures


PIXELS = np.arange(40 * 30, dtype=np.uint8).reshape(40, 5, 6)
DATASET = [(pixels, number % 2) for number, pixels in enumerate(PIXELS)]
PICTURED = Ranking.from_influence(range(40), np.linspace(-1, 1, 40), [1] * 40, {"label": [i % 2 for i in range(40)]})


def test_pictures_of_the_worst_come_in_the_order_of_the_ranks() -> None:
    axes = PICTURED.plot_samples(DATASET, 11).axes
    assert len(axes) == 11
    for place, part in enumerate(axes):
        assert np.array_equal(part.images[0].get_array(), PIXELS[place])
        rank_line, sample, label = part.get_xlabel().split("\n")
        assert rank_line == f"#{place + 1}: {PICTURED.influence[place]:.3g}"
        assert (sample, label) == (f"sample {place}", f"label {place % 2}")
        assert part.spines["left"].get_edgecolor() == HARMFUL


def test_pictures_of_the_best_have_their_ranks() -> None:
    axes = PICTURED.plot_samples(DATASET, 2, effect="helpful").axes
    assert [part.get_xlabel().split("\n")[:2] for part in axes] == [
        ["#40: 1", "sample 39"],
        ["#39: 0.949", "sample 38"],
    ]
    assert axes[0].spines["left"].get_edgecolor() == HELPFUL


def test_render_makes_pictures_of_anything() -> None:
    ranking = Ranking.from_influence(["a", "b"], [-1.0, -0.5], [1, 1])
    waves = {"a": np.zeros(25), "b": np.arange(25.0)}
    axes = ranking.plot_samples(waves, render=lambda wave: wave.reshape(5, 5)).axes
    assert [part.images[0].get_array().max() for part in axes] == [0, 255]


def test_samples_without_a_picture_are_refused_with_the_way_out() -> None:
    with pytest.raises(ValueError, match=r"no picture in sample 0, a ndarray\. Give render="):
        rank([-1.0]).plot_samples([np.zeros(7)])
    with pytest.raises(ValueError, match='"harmful" or "helpful", got \'worst\''):
        PICTURED.plot_samples(DATASET, effect="worst")


def test_where_no_sample_is_harmful_the_figure_says_so() -> None:
    figure = rank([1.0]).plot_samples(DATASET)
    assert [text.get_text() for text in figure.texts] == ["no samples"]


def test_looking_at_random_samples_leaves_the_random_state() -> None:
    class Random:
        def __getitem__(self, index: int) -> np.ndarray:
            return np.random.rand(5, 5)

    before = np.random.get_state()[1].tolist()
    rank([-1.0, -0.5]).plot_samples(Random())
    assert np.random.get_state()[1].tolist() == before


@pytest.mark.parametrize("sample", ["x" * 500, "$a_$b", "two\nlines", "写真.png", "<b>"])
def test_any_id_and_label_is_drawn_on_short_lines(sample: str, tmp_path: Path) -> None:
    ranking = Ranking.from_influence([sample], [-1.0], [1], {"label": [sample]})
    figure = ranking.plot_samples({sample: PIXELS[0]})
    lines = figure.axes[0].get_xlabel().replace("\\", "").split("\n")
    assert len(lines) == 3
    assert max(map(len, lines)) <= 22
    drawn = save_png(figure, tmp_path / "figure.png")
    save_png(ranking.plot(), tmp_path / "groups.png")
    image = pytest.importorskip("PIL.Image")
    with image.open(tmp_path / "figure.png") as picture:
        assert np.array_equal(np.asarray(picture.convert("RGB")), drawn)
