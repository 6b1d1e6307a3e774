# SPDX-License-Identifier: Apache-2.0
"""What TensorBoard and CSV loggers of both Lightning packages hold after publish, and what a failing one costs."""

import ast
import csv
import html
import importlib
import io
import re
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl

from cases import Plain, quiet_trainer
from cases import loaders as batches
from lightning_sgdclean import SGDInfluence
from lightning_sgdclean import report as package
from lightning_sgdclean.ranking.figures import worst_pictures
from lightning_sgdclean.ranking.ranking import Ranking
from lightning_sgdclean.report.destinations import numbers_of, worst_table
from lightning_sgdclean.report.publish import publish

RANKING = Ranking.from_influence(range(40), [0.01 * (i - 20) for i in range(40)], [1] * 40)
SUMMARY = {
    "objective": {"name": "val_loss", "recomputed": 0.75},
    "replay": {"loss_error": 2e-7, "update_error": 0.0},
}
NUMBERS = {f"sgd_influence/{name}": value for name, value in numbers_of(RANKING, SUMMARY).items()}


@pytest.fixture(params=["pytorch_lightning", "lightning.pytorch"])
def loggers(request: pytest.FixtureRequest) -> Any:
    pytest.importorskip(request.param.partition(".")[0])
    return importlib.import_module(f"{request.param}.loggers")


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    table = RANKING.save(tmp_path / "run" / "influence.csv")
    (tmp_path / "run" / "summary.json").write_text('{"id_type": "int"}', encoding="utf-8")
    return [table, table.with_name("summary.json")]


@pytest.fixture
def small_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    figure = pytest.importorskip("matplotlib.figure")
    monkeypatch.setattr(Ranking, "plot", lambda self, unit: figure.Figure(figsize=(1, 1)))


def names_in(folder: str | Path) -> set[str]:
    return {path.name for path in Path(folder).iterdir()}


def is_png(data: bytes) -> bool:
    # Read the pixels if Pillow is there: a PNG that starts well may still be cut off.
    image = pytest.importorskip("PIL.Image")
    with image.open(io.BytesIO(data)) as picture:
        picture.load()
        return picture.format == "PNG" and picture.width > picture.height > 100


def events_of(logger: Any) -> Any:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(logger.log_dir, size_guidance={"tensors": 0, "images": 0})
    return events.Reload()


class FailingLogger:
    """Named like a real one, as a subclass of it would be."""

    def __init__(self, log_dir: Path) -> None:
        self.log_dir = str(log_dir)

    @property
    def experiment(self) -> Any:
        raise ConnectionError("server is down")

    def log_metrics(self, numbers: dict[str, float], step: int) -> None:
        raise ValueError("disk full")


TensorBoardLogger = type("TensorBoardLogger", (FailingLogger,), {})


# --- TensorBoard


def test_tensorboard_holds_figure_table_and_files(loggers: Any, files: list[Path], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    pytest.importorskip("tensorboard")
    logger = loggers.TensorBoardLogger(tmp_path / "logs")
    assert publish([logger], RANKING, files, step=17, summary=SUMMARY) == []

    events = events_of(logger)  # without finalize: publish itself must flush
    (image,) = events.Images("sgd_influence/influence")
    assert image.step == 17
    assert is_png(image.encoded_image_string)
    (text,) = events.Tensors("sgd_influence/worst/text_summary")
    assert text.step == 17
    assert text.tensor_proto.string_val[0].decode() == worst_table(RANKING)
    for name, value in NUMBERS.items():
        (number,) = events.Scalars(name)
        assert (number.step, number.value) == (17, pytest.approx(value, rel=1e-6))
    assert Ranking.load(logger.log_dir) == RANKING
    assert (Path(logger.log_dir) / "summary.json").read_bytes() == files[1].read_bytes()
    logger.finalize("success")


@pytest.mark.usefixtures("small_figure")
def test_a_subclass_is_served_like_its_logger(loggers: Any, files: list[Path], tmp_path: Path) -> None:
    logger = type("Mine", (loggers.CSVLogger,), {})(tmp_path / "logs")
    assert publish([logger], RANKING, files, step=1, summary=SUMMARY) == []
    assert "influence.csv" in names_in(logger.log_dir)


# --- CSVLogger


def test_csv_logger_holds_files_and_figure(loggers: Any, files: list[Path], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    logger = loggers.CSVLogger(tmp_path / "logs")
    logger.log_metrics({"loss": 1.0}, step=0)
    assert publish([logger], RANKING, files, step=17, summary=SUMMARY) == []
    logger.finalize("success")
    kept = names_in(logger.log_dir) - {"hparams.yaml"}  # which Lightning 2.4 writes although there are none
    assert kept == {"influence.csv", "summary.json", "influence.png", "metrics.csv"}
    with (Path(logger.log_dir) / "metrics.csv").open(newline="") as file:
        first, last = csv.DictReader(file)
    assert (first["loss"], first["step"], last["loss"], last["step"]) == ("1.0", "0", "", "17")
    assert {name: float(last[name]) for name in NUMBERS} == NUMBERS
    assert Ranking.load(logger.log_dir) == RANKING
    assert is_png((Path(logger.log_dir) / "influence.png").read_bytes())


@pytest.mark.usefixtures("small_figure")
def test_files_that_lie_in_the_log_dir_are_left_as_they_are(loggers: Any, tmp_path: Path) -> None:
    logger = loggers.CSVLogger(tmp_path / "logs")
    assert logger.experiment  # as a fit makes it when it begins
    file = RANKING.save(Path(logger.log_dir) / "influence.csv")
    before = (file.stat().st_ino, file.stat().st_mtime_ns)
    assert publish([logger], RANKING, [file], step=1, summary=SUMMARY) == []
    assert (file.stat().st_ino, file.stat().st_mtime_ns) == before
    assert Ranking.load(file) == RANKING


@pytest.mark.usefixtures("small_figure")
def test_an_older_run_in_the_log_dir_is_replaced(loggers: Any, files: list[Path], tmp_path: Path) -> None:
    logger = loggers.CSVLogger(tmp_path / "logs")
    for _ in range(2):
        assert publish([logger], RANKING, files, step=1, summary=SUMMARY) == []
    Ranking.from_influence([1], [0.5], [1]).save(files[0])
    assert publish([logger], RANKING, files, step=2, summary=SUMMARY) == []
    assert len(Ranking.load(logger.log_dir)) == 1


@pytest.mark.usefixtures("small_figure")
def test_a_log_dir_that_is_an_address_gets_the_files_through_fsspec(loggers: Any, files: list[Path]) -> None:
    fsspec = pytest.importorskip("fsspec")
    logger = loggers.CSVLogger("memory://bucket/logs")
    assert publish([logger], RANKING, files, step=1, summary=SUMMARY) == []
    stored = fsspec.filesystem("memory")
    try:
        assert stored.cat(f"{logger.log_dir}/influence.csv") == files[0].read_bytes()
        assert not Path("memory:").exists()
    finally:
        stored.rm("/bucket", recursive=True)


# --- who is skipped, what fails


def test_loggers_that_log_nowhere_are_skipped_in_silence(loggers: Any, files: list[Path]) -> None:
    dummy = importlib.import_module(f"{loggers.__name__}.logger").DummyLogger()
    assert publish([dummy], RANKING, files, step=1, summary=SUMMARY) == []
    assert publish([], RANKING, files, step=1, summary=SUMMARY) == []


@pytest.mark.usefixtures("small_figure")
def test_an_unknown_logger_is_named_once_and_the_others_are_served(
    loggers: Any, files: list[Path], tmp_path: Path
) -> None:
    unknown = type("Papyrus", (), {})
    logger = loggers.CSVLogger(tmp_path / "logs")
    (problem,) = publish([unknown(), unknown(), logger], RANKING, files, step=1, summary=SUMMARY)
    assert "Papyrus is not a logger" in problem
    assert "influence.csv" in names_in(logger.log_dir)


@pytest.mark.usefixtures("small_figure")
def test_a_failing_logger_costs_a_warning_and_nothing_else(loggers: Any, files: list[Path], tmp_path: Path) -> None:
    before, after = loggers.CSVLogger(tmp_path / "a"), loggers.CSVLogger(tmp_path / "b")
    failing = TensorBoardLogger(tmp_path / "failing")
    numbers, rest = publish([before, failing, after], RANKING, files, step=1, summary=SUMMARY)
    assert numbers.endswith("TensorBoardLogger did not take the influences' numbers: ValueError: disk full")
    assert rest.endswith("did not take the influences' figures, table: ConnectionError: server is down")
    assert names_in(before.log_dir) == names_in(after.log_dir) >= {"influence.csv", "summary.json", "influence.png"}
    assert names_in(failing.log_dir) == {"influence.csv", "summary.json"}


def test_without_matplotlib_the_rest_goes_out_with_one_warning(
    loggers: Any, files: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tensorboard")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    board, table = loggers.TensorBoardLogger(tmp_path / "tb"), loggers.CSVLogger(tmp_path / "csv")
    (problem,) = publish([board, table], RANKING, files, step=1, summary=SUMMARY)
    assert "lightning-sgdclean[plot]" in problem
    assert names_in(table.log_dir) == {"influence.csv", "summary.json"}
    events = events_of(board)
    assert events.Tags()["images"] == []
    assert events.Tags()["tensors"] == ["sgd_influence/worst/text_summary"]
    board.finalize("success")


def test_a_figure_that_fails_costs_only_itself(
    loggers: Any, files: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(self: Ranking, unit: str) -> None:
        raise OverflowError("too wide")

    monkeypatch.setattr(Ranking, "plot", fails)
    logger = loggers.CSVLogger(tmp_path / "logs")
    assert publish([logger], RANKING, files, step=1, summary=SUMMARY) == [
        "The loggers got no figure: OverflowError: too wide"
    ]
    assert names_in(logger.log_dir) == {"influence.csv", "summary.json"}


# --- the table


def test_the_table_shows_the_ten_worst() -> None:
    lines = worst_table(RANKING).splitlines()
    assert lines[0] == "| rank | sample_id | influence | effect | visits |"
    assert lines[2] == "| 1 | 0 | -0.2 | harmful | 1 |"
    assert len(lines) == 2 + 10


def test_the_table_holds_harmful_samples_only() -> None:
    two = Ranking.from_influence([1, 2, 3], [-2.0, -1.0, 1.0], [1, 1, 1])
    assert len(worst_table(two).splitlines()) == 2 + 2
    assert worst_table(Ranking.from_influence([1], [0.0], [1])) == "No sample is harmful.\n"


@pytest.mark.parametrize(
    "sample",
    ["<script>alert(1)</script>", "a|b", "**bold** _it_ `code`", "[x](http://y)", "&amp;", r"\| #~>!"],
)
def test_ids_are_shown_and_not_interpreted(sample: str) -> None:
    row = worst_table(Ranking.from_influence([sample], [-1.0], [1])).splitlines()[2]
    assert row.count("|") == 6
    cell = row.split("|")[2].strip()
    assert re.fullmatch(r"(?:[A-Za-z0-9 ]|&#\d+;)+", cell)
    assert html.unescape(cell) == sample


def test_ids_in_tensorboard_come_out_as_text() -> None:
    renderer = pytest.importorskip("tensorboard.plugin_util")
    ranking = Ranking.from_influence(["<b>|*x*", "two\nlines"], [-2.0, -1.0], [1, 1])
    rendered = renderer.markdown_to_safe_html(worst_table(ranking))
    cells = [html.unescape(cell) for cell in re.findall("<td[^>]*>(.*?)</td>", rendered)]
    assert cells[1] == "<b>|*x*"
    assert cells[6] == r"two\nlines"
    assert len(cells) == 2 * 5


def test_long_ids_are_cut_in_the_table() -> None:
    table = worst_table(Ranking.from_influence(["x" * 5000], [-1.0], [1]))
    assert len(table) < 300
    assert "x…" in table


def test_neither_lightning_nor_a_logging_library_is_imported() -> None:
    imported = set()
    for path in Path(package.__path__[0]).glob("*.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:  # at the top: a logger's own library comes later
            imported |= {alias.name for alias in node.names} if isinstance(node, ast.Import) else set()
            imported |= {str(node.module)} if isinstance(node, ast.ImportFrom) else set()
    roots = {name.partition(".")[0] for name in imported}
    assert not roots & {
        "lightning",
        "pytorch_lightning",
        "lightning_fabric",
        "tensorboard",
        "wandb",
        "mlflow",
        "comet_ml",
    }


# --- numbers, and who gets only these


class Numbers:
    """Knows no more than Lightning asks of a logger."""

    def __init__(self) -> None:
        self.logged: list[Any] = []

    def log_metrics(self, metrics: dict[str, float], step: int) -> None:
        self.logged.append((metrics, step))


@pytest.mark.usefixtures("small_figure")
def test_a_logger_that_is_not_known_gets_the_numbers_and_is_named(files: list[Path]) -> None:
    logger = Numbers()
    (problem,) = publish([logger], RANKING, files, step=17, summary=SUMMARY)
    assert re.search(r"Numbers is not known here: it got .* numbers, but no files", problem)
    assert logger.logged == [(NUMBERS, 17)]


def test_numbers_are_those_of_the_ranking_and_the_summary() -> None:
    generator = np.random.default_rng(0)
    influence = generator.normal(size=150)
    found = numbers_of(Ranking.from_influence(range(150), influence, [1] * 150), SUMMARY)
    worst_first = sorted(influence)
    harm = sum(value for value in worst_first if value < 0)
    assert found == {
        "objective": 0.75,
        "replay_loss_error": 2e-7,
        "replay_update_error": 0.0,
        "harm": pytest.approx(harm, rel=1e-12),
        "harmful_share": np.mean(influence < 0),
        "harm_in_worst_10": pytest.approx(sum(worst_first[:10]) / harm, rel=1e-12),
        "harm_in_worst_100": pytest.approx(1.0, rel=1e-12),  # more than there are harmful ones
    }


def test_numbers_that_there_are_not_are_left_out() -> None:
    nothing = Ranking.from_influence([1] * 0, [], [1] * 0)
    assert numbers_of(nothing, {}) == {"harm": 0.0}
    unharmed = Ranking.from_influence(range(20), [1.0] * 20, [1] * 20)
    assert numbers_of(unharmed, {"replay": {"loss_error": float("nan")}}) == {"harm": 0.0, "harmful_share": 0.0}


# --- pictures, the page, ranks


PIXELS = np.arange(40 * 30, dtype=np.uint8).reshape(40, 5, 6)


def test_pictures_of_the_worst_are_a_second_figure(loggers: Any, files: list[Path], tmp_path: Path) -> None:
    board, table = loggers.TensorBoardLogger(tmp_path / "tb"), loggers.CSVLogger(tmp_path / "csv")
    pictures = partial(worst_pictures, RANKING, [(pixels, 1) for pixels in PIXELS])
    assert publish([board, table], RANKING, files, step=17, summary=SUMMARY, pictures=pictures) == []
    (image,) = events_of(board).Images("sgd_influence/worst_samples")
    assert is_png(image.encoded_image_string)
    assert names_in(table.log_dir) >= {"influence.png", "worst_samples.png"}
    board.finalize("success")


@pytest.mark.usefixtures("small_figure")
def test_pictures_that_fail_cost_only_themselves(loggers: Any, files: list[Path], tmp_path: Path) -> None:
    def gone() -> list[Any]:
        raise FileNotFoundError("cat.png")

    logger = loggers.CSVLogger(tmp_path / "logs")
    assert publish([logger], RANKING, files, step=1, summary=SUMMARY, pictures=gone) == [
        "The loggers got no pictures: FileNotFoundError: cat.png"
    ]
    assert names_in(logger.log_dir) == {"influence.csv", "summary.json", "influence.png"}


def test_without_a_logger_no_picture_is_fetched(files: list[Path]) -> None:
    assert publish([], RANKING, files, step=1, summary=SUMMARY, pictures=lambda: pytest.fail("fetched")) == []


@pytest.mark.parametrize("dataset", [[(np.zeros(7), 1)] * 40, iter([]), np.zeros((40, 7))])
def test_of_samples_without_pictures_none_are_shown(dataset: Any) -> None:
    assert worst_pictures(RANKING, dataset) == []


@pytest.mark.usefixtures("small_figure")
def test_the_page_goes_out_with_the_files(loggers: Any, files: list[Path], tmp_path: Path) -> None:
    page = files[0].with_name("report.html")
    page.write_text("<!doctype html>", encoding="utf-8")
    logger = loggers.CSVLogger(tmp_path / "logs")
    assert publish([logger], RANKING, [*files, page], step=1, summary=SUMMARY) == []
    assert (Path(logger.log_dir) / "report.html").read_text(encoding="utf-8") == "<!doctype html>"


def test_only_rank_zero_writes_to_the_loggers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fits of several processes are refused so far; so the rank is another one at the end of fit only."""

    class Other(pl.Callback):
        def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
            monkeypatch.setattr(type(trainer.strategy), "is_global_zero", False)

    logger = pl.loggers.CSVLogger(tmp_path / "logs")
    callback = SGDInfluence("val_loss", dirpath=tmp_path / "run")
    quiet_trainer([Other(), callback], max_epochs=1, logger=logger).fit(Plain(), *batches())
    assert len(callback.ranking) > 0
    assert "influence.csv" not in names_in(logger.log_dir)
