# SPDX-License-Identifier: Apache-2.0
"""W&B, MLflow and Comet, really run without a network in a real fit, and what they then hold, read back."""

import csv
import importlib
import io
import json
import random
import struct
import zipfile
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from cases import NUM_TRAIN, Plain, loaders, quiet_trainer
from lightning_sgdclean import Ranking, SGDInfluence
from lightning_sgdclean.base.errors import SGDInfluenceWarning
from lightning_sgdclean.data.datasets import picture_of
from lightning_sgdclean.ranking.figures import worst_pictures
from lightning_sgdclean.report.destinations import Results, numbers_of, parts_for_comet
from lightning_sgdclean.report.publish import publish

pytest.importorskip("matplotlib")
Image = pytest.importorskip("PIL.Image")

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of these libraries, about each other

SOURCE = torch.Generator().manual_seed(0)
IMAGES = TensorDataset(torch.rand(24, 1, 6, 6, generator=SOURCE), torch.randint(0, 3, (24,), generator=SOURCE))


@pytest.fixture(params=["pytorch_lightning", "lightning.pytorch"])
def package(request: pytest.FixtureRequest) -> Any:
    pytest.importorskip(request.param.partition(".")[0])
    return importlib.import_module(request.param)


@pytest.fixture(autouse=True)
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No network, no reports home, and every file in the test's own folder."""
    home = tmp_path / "home"
    home.mkdir()
    for name in ("HOME", "XDG_CACHE_HOME", "XDG_CONFIG_HOME", "XDG_DATA_HOME", "COMET_OFFLINE_DIRECTORY"):
        monkeypatch.setenv(name, str(home))
    for name in ("WANDB_DIR", "WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "wandb"))
    for name, value in {
        "WANDB_MODE": "offline",
        "WANDB_ERROR_REPORTING": "false",
        "WANDB_SILENT": "true",
        "WANDB_CONSOLE": "off",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "DO_NOT_TRACK": "true",
        "COMET_ERROR_TRACKING_ENABLE": "false",
        "COMET_DISABLE_AUTO_LOGGING": "1",
        "COMET_LOGGING_CONSOLE": "ERROR",
    }.items():
        monkeypatch.setenv(name, value)


def fit(package: Any, loggers: list[Any], tmp_path: Path, **wishes: Any) -> SGDInfluence:
    """A fit whose ranking goes to these loggers, from a run directory that holds a page."""

    class Classifier(package.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = torch.nn.Linear(36, 3)

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = F.cross_entropy(self.net(batch[0].flatten(1)), batch[1])
            self.log("train_loss", loss)
            return loss

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val_loss", F.cross_entropy(self.net(batch[0].flatten(1)), batch[1]))

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    callback = SGDInfluence("val_loss", dirpath=tmp_path / "run", **wishes)
    options = {"logger": loggers, "max_epochs": 2, "log_every_n_steps": 1, "precision": "32-true"}
    trainer = quiet_trainer([callback], package, **options)
    trainer.fit(Classifier(), DataLoader(IMAGES, 8, shuffle=True), DataLoader(IMAGES, 12))
    return callback


def numbers(callback: SGDInfluence) -> dict[str, float]:
    return {f"sgd_influence/{name}": value for name, value in numbers_of(callback.ranking, callback.summary).items()}


# --- Weights & Biases


def records_of(path: Path) -> list[Any]:
    """The records of an offline run: LevelDB's log format, blocks of 32 KiB with a record's pieces in them."""
    protocol = importlib.import_module("wandb.proto.wandb_internal_pb2")
    data, position, piece, found = path.read_bytes(), 7, b"", []
    while position + 7 <= len(data):
        room = 32768 - position % 32768
        if room < 7:
            position += room
            continue
        length, kind = struct.unpack("<HB", data[position + 4 : position + 7])
        piece += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or the last piece
            found.append(protocol.Record.FromString(piece))
            piece = b""
    return found


def history_of(records: list[Any]) -> dict[str, Any]:
    """The last value of everything that was logged."""
    items = [item for record in records for item in record.history.item]
    return {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in items}


@pytest.fixture
def wandb() -> Any:
    module = pytest.importorskip("wandb")
    yield module
    written(module)


def written(wandb: Any) -> None:
    """End the run, and the process that writes its file."""
    wandb.finish()
    wandb.teardown()


def test_a_run_of_wandb_that_the_module_holds_is_left_alone(wandb: Any, tmp_path: Path) -> None:
    class Holding(Plain):
        held: Any = None

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx)
            if self.held is not None:
                self.held["run"].log({"seen": batch_idx})
            return loss

    def trained(held: Any, callbacks: list[Any]) -> Any:
        pl.seed_everything(1, verbose=False)
        module = Holding()
        module.held = held
        quiet_trainer(callbacks).fit(module, *loaders())
        return module.state_dict()

    callback = SGDInfluence("val_loss", dirpath=tmp_path / "run")
    weights = trained({"run": wandb.init(project="held", dir=tmp_path)}, [callback])
    assert len(callback.ranking) == NUM_TRAIN
    for name, tensor in trained(None, []).items():
        assert torch.equal(weights[name], tensor), name


def test_wandb_holds_artifact_numbers_figure_and_table(package: Any, wandb: Any, tmp_path: Path) -> None:
    logger = package.loggers.WandbLogger(save_dir=tmp_path, offline=True)
    callback = fit(package, [logger], tmp_path)
    media, run_id = Path(logger.experiment.dir) / "media", logger.experiment.id
    written(wandb)
    records = records_of(next(tmp_path.rglob("*.wandb")))

    (artifact,) = (record.artifact for record in records if record.artifact.type == "influence")
    assert artifact.name == f"sgd_influence-{run_id}"
    staged = {entry.path: Path(entry.local_path).read_bytes() for entry in artifact.manifest.contents}
    assert set(staged) == {"influence.csv", "summary.json", "report.html", "influence.png", "worst_samples.png"}
    for name in ("influence.csv", "summary.json", "report.html"):
        assert staged[name] == (callback.run_dir / name).read_bytes()
    assert json.loads(artifact.metadata) == numbers(callback)

    history = history_of(records)
    assert {name: history[name] for name in numbers(callback)} == numbers(callback)
    assert history["trainer/global_step"] == 6
    assert history["sgd_influence/influence/_type"] == "images/separated"
    (figure,) = (media / "images" / "sgd_influence").glob("influence_*")
    assert figure.read_bytes() == staged["influence.png"]
    captions = history["sgd_influence/worst_pictures/captions"]
    assert [caption.split("\n")[1] for caption in captions] == [f"sample {i}" for i in callback.ranking.harmful(16)]
    (file,) = (media / "table" / "sgd_influence").iterdir()
    table = json.loads(file.read_text())
    assert table["columns"] == ["rank", "sample_id", "influence", "effect", "visits"]
    assert [row[1] for row in table["data"]] == callback.ranking.harmful(100)


def test_wandb_shows_the_page_and_the_pictures_of_the_worst(wandb: Any, tmp_path: Path) -> None:
    ranking = Ranking.from_influence(range(24), np.linspace(-1, 1, 24), [1] * 24, {"label": IMAGES.tensors[1]})
    page = tmp_path / "report.html"
    page.write_text("<!doctype html><title>Report</title>", encoding="utf-8")
    logger = pl.loggers.WandbLogger(save_dir=tmp_path, offline=True)
    pictures = partial(worst_pictures, ranking, IMAGES, 5)
    assert publish([logger], ranking, [page], summary={}, step=3, pictures=pictures) == []
    media = Path(logger.experiment.dir) / "media"
    written(wandb)
    (report,) = (media / "html" / "sgd_influence").iterdir()
    assert report.read_text(encoding="utf-8") == page.read_text(encoding="utf-8")

    history = history_of(records_of(next(tmp_path.rglob("*.wandb"))))
    assert history["sgd_influence/worst_pictures/captions"][0] == f"#1: -1\nsample 0\nlabel {IMAGES[0][1]}"
    shown = [media.parent / name for name in history["sgd_influence/worst_pictures/filenames"]]
    assert len(shown) == 5
    for place, file in enumerate(shown):
        with Image.open(file) as picture:
            assert np.array_equal(np.asarray(picture.convert("L")), picture_of(IMAGES[place]))
    assert len(history["sgd_influence/worst_samples/filenames"]) == 1


# --- MLflow


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    """One for all tests: making its tables takes seconds."""
    return f"sqlite:///{tmp_path_factory.mktemp('mlflow')}/mlflow.db"


def test_mlflow_holds_artifacts_and_numbers(package: Any, tmp_path: Path, store: str) -> None:
    tracking = pytest.importorskip("mlflow.tracking")
    logger = package.loggers.MLFlowLogger(
        package.__name__, tracking_uri=store, artifact_location=str(tmp_path / "kept")
    )
    callback = fit(package, [logger], tmp_path)

    client = tracking.MlflowClient(store)
    assert client.get_run(logger.run_id).info.status == "FINISHED"  # Lightning's finalize came after
    found = {Path(item.path).name for item in client.list_artifacts(logger.run_id, "sgd_influence")}
    assert found == {"influence.csv", "summary.json", "report.html", "influence.png", "worst_samples.png"}
    folder = Path(client.download_artifacts(logger.run_id, "sgd_influence", str(tmp_path)))
    assert Ranking.load(folder) == callback.ranking
    with Image.open(folder / "influence.png") as picture:
        assert picture.width > picture.height > 100
    for name, value in numbers(callback).items():
        (number,) = client.get_metric_history(logger.run_id, name)
        assert (number.value, number.step) == (value, 6)
    assert client.get_metric_history(logger.run_id, "train_loss")


# --- Comet


def test_comet_holds_assets_numbers_figure_and_table(package: Any, tmp_path: Path) -> None:
    comet = pytest.importorskip("comet_ml")
    logger = package.loggers.CometLogger(online=False, offline_directory=str(tmp_path))
    # Lightning starts offline experiments disabled, so that they log nothing; this one is not.
    quiet = {"log_code": False, "log_graph": False, "log_env_details": False, "auto_output_logging": False}
    logger._experiment = comet.OfflineExperiment(offline_directory=str(tmp_path), parse_args=False, **quiet)
    callback = fit(package, [logger], tmp_path)
    logger.experiment.end()

    (path,) = tmp_path.glob("*.zip")
    with zipfile.ZipFile(path) as archive:
        messages = [json.loads(line) for line in archive.read("messages.json").splitlines()]
        uploads = [message["payload"] for message in messages if message["type"] == "file_upload"]
        files = {}
        for upload in uploads:
            names = upload["additional_params"]
            files[names.get("fileName") or names["figName"]] = archive.read(upload["file_path"])
    logged = [message["payload"]["metric"] for message in messages if message["type"] == "metric_msg"]
    assert {metric["metricName"]: metric["metricValue"] for metric in logged}.items() >= numbers(callback).items()
    assert {metric["step"] for metric in logged if metric["metricName"] in numbers(callback)} == {6}
    for name in ("influence.csv", "summary.json", "report.html"):
        assert files[f"sgd_influence/{name}"] == (callback.run_dir / name).read_bytes()
    with Image.open(io.BytesIO(files["sgd_influence/influence"])) as picture:
        assert picture.width > picture.height > 100
    table = list(csv.DictReader(io.StringIO(files["sgd_influence/worst.csv"].decode())))
    assert [int(row["sample_id"]) for row in table] == callback.ranking.harmful(100)


def test_a_table_in_comet_is_no_formula(tmp_path: Path) -> None:
    ranking = Ranking.from_influence(["=1+1", "+x"], [-1.0, -0.5], [1, 1], {"source": ["@a", "b"]})
    got: dict[str, Any] = {}
    experiment = SimpleNamespace(log_table=lambda name, **options: got.update(options))
    parts_for_comet(SimpleNamespace(experiment=experiment), Results(ranking, (), (), (), {}, 0))["table"]()
    assert [(row[1], row[-1]) for row in got["tabular_data"]] == [("'=1+1", "'@a"), ("'+x", "b")]


# --- all of them


def brightness(batch: Any) -> list[str]:
    return [str(image.sum().item()) for image in batch[0]]


@pytest.mark.parametrize(
    ("wishes", "is_shown"), [({}, True), ({"show_samples": False}, False), ({"sample_ids": brightness}, False)]
)
def test_pictures_are_shown_where_wanted_and_where_ids_are_positions(
    wishes: dict[str, Any], is_shown: bool, tmp_path: Path
) -> None:
    logger = pl.loggers.CSVLogger(tmp_path / "csv")
    fit(pl, [logger], tmp_path, **wishes)
    assert (Path(logger.log_dir) / "influence.png").exists()
    assert (Path(logger.log_dir) / "worst_samples.png").exists() is is_shown


def test_one_that_fails_costs_the_others_nothing(wandb: Any, tmp_path: Path, store: str) -> None:
    class Broken(pl.loggers.Logger):
        name, version = "broken", 0

        def log_metrics(self, metrics: Any, step: Any = None) -> None:
            if any(name.startswith("sgd_influence/") for name in metrics):
                raise ConnectionError("gone")

        def log_hyperparams(self, params: Any) -> None:
            """Takes none."""

    loggers = [
        Broken(),
        pl.loggers.TensorBoardLogger(tmp_path / "board"),
        pl.loggers.WandbLogger(save_dir=tmp_path, offline=True),
        pl.loggers.MLFlowLogger("all", tracking_uri=store, artifact_location=str(tmp_path / "kept")),
        pl.loggers.CSVLogger(tmp_path / "csv"),
    ]
    with pytest.warns(SGDInfluenceWarning, match="Broken did not take the influences' numbers: ConnectionError: gone"):
        callback = fit(pl, loggers, tmp_path)
    written(wandb)
    assert Ranking.load(callback.run_dir) == callback.ranking
    for logger in (loggers[1], loggers[4]):
        assert Ranking.load(logger.log_dir) == callback.ranking
    assert any(record.artifact.type == "influence" for record in records_of(next(tmp_path.rglob("*.wandb"))))
    assert len(loggers[3].experiment.list_artifacts(loggers[3].run_id, "sgd_influence")) == 5


def test_random_states_are_left_as_they_were(wandb: Any, tmp_path: Path) -> None:
    logger = pl.loggers.WandbLogger(save_dir=tmp_path, offline=True)
    before = logger.experiment and (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state())
    ranking = Ranking.from_influence(range(24), np.linspace(-1, 1, 24), [1] * 24)
    assert publish([logger], ranking, [], summary={}, step=3, pictures=partial(worst_pictures, ranking, IMAGES)) == []
    written(wandb)
    assert random.getstate() == before[0]
    assert np.random.get_state()[1].tolist() == before[1]
    assert torch.equal(torch.get_rng_state(), before[2])
