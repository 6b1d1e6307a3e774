# SPDX-License-Identifier: Apache-2.0
"""What real loggers of both Lightning packages hold after publish, and what a failing one costs."""

import ast
import html
import importlib
import io
import re
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest

from lightning_sgdclean import artifacts
from lightning_sgdclean.artifacts import publish, worst_table
from lightning_sgdclean.errors import SGDInfluenceWarning
from lightning_sgdclean.ranking import Ranking

RANKING = Ranking.from_influence(range(40), [0.01 * (i - 20) for i in range(40)], [1] * 40)


@pytest.fixture(params=["pytorch_lightning", "lightning.pytorch"])
def loggers(request: pytest.FixtureRequest) -> Any:
    pytest.importorskip(request.param.partition(".")[0])
    return importlib.import_module(f"{request.param}.loggers")


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    csv = RANKING.save(tmp_path / "run" / "influence.csv")
    (tmp_path / "run" / "summary.json").write_text('{"id_type": "int"}', encoding="utf-8")
    return [csv, csv.with_name("summary.json")]


@pytest.fixture
def small_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    figure = pytest.importorskip("matplotlib.figure")
    monkeypatch.setattr(artifacts, "plot_influences", lambda ranking, unit: figure.Figure(figsize=(1, 1)))


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


TensorBoardLogger = type("TensorBoardLogger", (FailingLogger,), {})


# --- TensorBoard


def test_tensorboard_holds_figure_table_and_files(loggers: Any, files: list[Path], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    pytest.importorskip("tensorboard")
    logger = loggers.TensorBoardLogger(tmp_path / "logs")
    publish([logger], RANKING, files, step=17, unit="val_loss")

    events = events_of(logger)  # without finalize: publish itself must flush
    (image,) = events.Images("sgd_influence/influences")
    assert image.step == 17
    assert is_png(image.encoded_image_string)
    (text,) = events.Tensors("sgd_influence/worst/text_summary")
    assert text.step == 17
    assert text.tensor_proto.string_val[0].decode() == worst_table(RANKING)
    assert Ranking.load(logger.log_dir) == RANKING
    assert (Path(logger.log_dir) / "summary.json").read_bytes() == files[1].read_bytes()
    logger.finalize("success")


@pytest.mark.usefixtures("small_figure")
def test_a_subclass_is_served_like_its_logger(loggers: Any, files: list[Path], tmp_path: Path) -> None:
    logger = type("Mine", (loggers.CSVLogger,), {})(tmp_path / "logs")
    publish([logger], RANKING, files, step=1, unit="val_loss")
    assert "influence.csv" in names_in(logger.log_dir)


# --- CSVLogger


def test_csv_logger_holds_files_and_figure(loggers: Any, files: list[Path], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    logger = loggers.CSVLogger(tmp_path / "logs")
    logger.log_metrics({"loss": 1.0}, step=0)
    publish([logger], RANKING, files, step=17, unit="val_loss")
    logger.finalize("success")
    assert names_in(logger.log_dir) == {"influence.csv", "summary.json", "influence.png", "metrics.csv"}
    assert Ranking.load(logger.log_dir) == RANKING
    assert is_png((Path(logger.log_dir) / "influence.png").read_bytes())


@pytest.mark.usefixtures("small_figure")
def test_files_that_lie_in_the_log_dir_are_left_as_they_are(loggers: Any, tmp_path: Path) -> None:
    logger = loggers.CSVLogger(tmp_path / "logs")
    csv = RANKING.save(Path(logger.log_dir) / "influence.csv")
    before = (csv.stat().st_ino, csv.stat().st_mtime_ns)
    publish([logger], RANKING, [csv], step=1, unit="val_loss")
    assert (csv.stat().st_ino, csv.stat().st_mtime_ns) == before
    assert Ranking.load(csv) == RANKING


@pytest.mark.usefixtures("small_figure")
def test_an_older_run_in_the_log_dir_is_replaced(loggers: Any, files: list[Path], tmp_path: Path) -> None:
    logger = loggers.CSVLogger(tmp_path / "logs")
    for _ in range(2):
        publish([logger], RANKING, files, step=1, unit="val_loss")
    Ranking.from_influence([1], [0.5], [1]).save(files[0])
    publish([logger], RANKING, files, step=2, unit="val_loss")
    assert len(Ranking.load(logger.log_dir)) == 1


@pytest.mark.usefixtures("small_figure")
def test_a_log_dir_that_is_an_address_gets_the_files_through_fsspec(loggers: Any, files: list[Path]) -> None:
    fsspec = pytest.importorskip("fsspec")
    logger = loggers.CSVLogger("memory://bucket/logs")
    publish([logger], RANKING, files, step=1, unit="val_loss")
    stored = fsspec.filesystem("memory")
    try:
        assert stored.cat(f"{logger.log_dir}/influence.csv") == files[0].read_bytes()
        assert not Path("memory:").exists()
    finally:
        stored.rm("/bucket", recursive=True)


# --- who is skipped, what fails


def test_loggers_that_log_nowhere_are_skipped_in_silence(loggers: Any, files: list[Path]) -> None:
    dummy = importlib.import_module(f"{loggers.__name__}.logger").DummyLogger()
    publish([dummy], RANKING, files, step=1, unit="val_loss")
    publish([], RANKING, files, step=1, unit="val_loss")


@pytest.mark.usefixtures("small_figure")
def test_an_unknown_logger_is_named_once_and_the_others_are_served(
    loggers: Any, files: list[Path], tmp_path: Path
) -> None:
    unknown = type("Papyrus", (), {})
    logger = loggers.CSVLogger(tmp_path / "logs")
    with pytest.warns(SGDInfluenceWarning, match="Papyrus is not a logger") as caught:
        publish([unknown(), unknown(), logger], RANKING, files, step=1, unit="val_loss")
    assert len(caught) == 1
    assert "influence.csv" in names_in(logger.log_dir)


@pytest.mark.usefixtures("small_figure")
def test_a_failing_logger_costs_a_warning_and_nothing_else(loggers: Any, files: list[Path], tmp_path: Path) -> None:
    before, after = loggers.CSVLogger(tmp_path / "a"), loggers.CSVLogger(tmp_path / "b")
    failing = TensorBoardLogger(tmp_path / "failing")
    with pytest.warns(SGDInfluenceWarning, match=r"TensorBoardLogger .*ConnectionError: server is down") as caught:
        publish([before, failing, after], RANKING, files, step=1, unit="val_loss")
    assert len(caught) == 1
    assert names_in(before.log_dir) == names_in(after.log_dir) >= {"influence.csv", "summary.json"}
    assert names_in(failing.log_dir) == {"influence.csv", "summary.json"}


@pytest.mark.usefixtures("small_figure")
def test_the_others_are_served_where_warnings_are_errors(loggers: Any, files: list[Path], tmp_path: Path) -> None:
    logger = loggers.CSVLogger(tmp_path / "logs")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(SGDInfluenceWarning):
            publish([TensorBoardLogger(tmp_path / "x"), logger], RANKING, files, step=1, unit="val_loss")
    assert "influence.csv" in names_in(logger.log_dir)


def test_without_matplotlib_the_rest_goes_out_with_one_warning(
    loggers: Any, files: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tensorboard")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    board, table = loggers.TensorBoardLogger(tmp_path / "tb"), loggers.CSVLogger(tmp_path / "csv")
    with pytest.warns(SGDInfluenceWarning, match=re.escape("lightning-sgdclean[plot]")) as caught:
        publish([board, table], RANKING, files, step=1, unit="val_loss")
    assert len(caught) == 1
    assert names_in(table.log_dir) == {"influence.csv", "summary.json"}
    events = events_of(board)
    assert events.Tags()["images"] == []
    assert events.Tags()["tensors"] == ["sgd_influence/worst/text_summary"]
    board.finalize("success")


def test_a_figure_that_fails_costs_only_itself(
    loggers: Any, files: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(ranking: Ranking, unit: str) -> None:
        raise OverflowError("too wide")

    monkeypatch.setattr(artifacts, "plot_influences", fails)
    logger = loggers.CSVLogger(tmp_path / "logs")
    with pytest.warns(SGDInfluenceWarning, match="no figure: OverflowError: too wide"):
        publish([logger], RANKING, files, step=1, unit="val_loss")
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
    tree = ast.parse(Path(artifacts.__file__).read_text(encoding="utf-8"))
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    roots = {name.partition(".")[0] for name in imported}
    assert not roots & {"lightning", "pytorch_lightning", "lightning_fabric", "tensorboard", "torch"}
