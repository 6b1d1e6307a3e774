# SPDX-License-Identifier: Apache-2.0
"""The page that a training leaves: what it says of samples is true, and whatever goes wrong costs only the page."""

import json
import re
import warnings

import pytest
import pytorch_lightning as pl
import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset

from cases import TRAIN, VAL, Plain, loaders, quiet_trainer
from lightning_sgdclean import SGDInfluence, apply_decisions, write_report
from lightning_sgdclean.base.errors import SGDInfluenceWarning
from lightning_sgdclean.ranking.ranking import run_id
from lightning_sgdclean.report.samples import row_of


class Rows(Dataset):
    """Pairs, as most datasets have them, with names of classes; samples and labels are listed."""

    classes = ("red", "green", "blue")

    def __init__(self, source=TRAIN):
        self.rows = [(x, int(y)) for x, y, _ in source]
        self.targets = [y for _, y in self.rows]

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index]


class OfPairs(Plain):
    def loss(self, batch, reduction="mean"):
        return F.cross_entropy(self.net(batch[0]), batch[1], reduction=reduction)

    def training_step(self, batch, batch_idx):
        return self.loss(batch)


def train(callback, data=None, module=None, **options):
    pl.seed_everything(1, verbose=False)
    data = Rows() if data is None else data
    module = OfPairs() if module is None else module
    quiet_trainer([callback], **{"max_epochs": 2, "precision": "32-true", **options}).fit(
        module, DataLoader(data, batch_size=5, shuffle=not isinstance(data, IterableDataset)), DataLoader(Rows(VAL), 4)
    )
    return module


def data_of(callback):
    text = (callback.run_dir / "report.html").read_text(encoding="utf-8")
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)[1])


@pytest.mark.parametrize("indices", [None, [*range(22, 2, -1)]], ids=["whole", "subset"])
def test_what_the_page_says_of_a_sample_is_what_the_final_model_says(tmp_path, indices):
    rows = Rows() if indices is None else Subset(Rows(), indices)
    callback = SGDInfluence(dirpath=tmp_path / "run")
    module = train(callback, rows).eval()
    data = data_of(callback)
    assert data["run"] == run_id(callback.ranking)
    assert len(data["samples"]) == len(rows)
    for row, sample in data["samples"].items():
        x, y = rows[data["ids"][int(row)]]
        scores = module.net(x[None])
        assert sample["label"] == Rows.classes[y]
        assert sample["prediction"] == Rows.classes[scores.argmax()]
        assert sample["disagrees"] == (int(scores.argmax()) != y)
        assert sample["loss"] == pytest.approx(F.cross_entropy(scores, torch.tensor([y])).item(), rel=1e-5)
        assert [float(value) for _, value in sample["features"]] == pytest.approx(x.tolist(), rel=1e-4)
    (labels,) = data["fields"]
    assert [labels["values"][code]["name"] for code in labels["codes"]] == [
        Rows.classes[rows[name][1]] for name in data["ids"]
    ]


def test_decisions_of_the_page_apply_to_the_dataset_of_the_run(tmp_path):
    callback, rows = SGDInfluence(dirpath=tmp_path / "run"), Rows()
    train(callback, rows)
    worst = callback.ranking.harmful(1)[0]
    path = callback.run_dir / "decisions.csv"
    path.write_text(f"sample_id,decision,label,was,run\n{worst},drop,,{rows[worst][1]},{run_id(callback.ranking)}\n")
    assert len(apply_decisions(rows, path)) == len(rows) - 1
    with pytest.raises(ValueError, match="drew from a dataset of 23 samples, but this one has 22"):
        apply_decisions(Subset(rows, range(22)), path)


def test_names_given_by_the_user_are_led_back_to_samples(tmp_path):
    rows = Rows()
    names = {tuple(x.tolist()): f"row {i}" for i, (x, _) in enumerate(rows.rows)}
    callback = SGDInfluence(
        dirpath=tmp_path / "run", sample_ids=lambda batch: [names[tuple(x.tolist())] for x in batch[0]]
    )
    train(callback, rows)
    data = data_of(callback)
    assert len(data["samples"]) == 23
    for row, sample in data["samples"].items():
        x, y = rows[int(data["ids"][int(row)].removeprefix("row "))]
        assert [float(value) for _, value in sample["features"]] == pytest.approx(x.tolist(), rel=1e-4)
        assert sample["label"] == Rows.classes[y]
    with pytest.raises(TypeError, match="sample ids are names"):
        write_report(callback.run_dir, rows)


class Stream(IterableDataset):
    def __iter__(self):
        return iter([(x, y, i) for x, y, i in TRAIN])


class Once(Rows):
    """Hands out each sample once."""

    def __getitem__(self, index):
        row, self.rows[index] = self.rows[index], None
        return row[0], row[1]


@pytest.mark.parametrize("data", [Stream, Once], ids=["stream", "once"])
def test_samples_that_cannot_be_fetched_again_are_taken_from_the_kept_batches(tmp_path, data):
    options = {"sample_ids": lambda batch: batch[2]} if data is Stream else {"keep_batches": True}
    callback = SGDInfluence(dirpath=tmp_path / "run", **options)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*could not be found out")
        module = train(callback, data(), max_epochs=1).eval()
    samples, ids = data_of(callback)["samples"], data_of(callback)["ids"]
    assert len(samples) == 23
    for row, sample in samples.items():
        x, y, _ = TRAIN[ids[int(row)]]
        names = Rows.classes if data is Once else ("0", "1", "2")
        assert (sample["label"], sample["prediction"]) == (names[int(y)], names[int(module.net(x).argmax())])
        shown = [float(value) for name, value in sample["features"] if "[" in name or name.startswith("feature")]
        assert shown == pytest.approx(x.tolist(), rel=1e-4)


def test_a_row_of_a_batch_is_the_sample_in_the_same_nesting():
    class Box:
        def __init__(self, x):
            self.x = x

    batch = {
        "x": torch.arange(6).reshape(3, 2),
        "words": ["a", "b", "c"],
        "time": torch.arange(6).reshape(2, 3),
        "pair": (torch.arange(3), torch.zeros(4)),
        "box": Box(torch.arange(3)),
        "scale": 0.5,
    }
    row = row_of(batch, 1, 3)
    assert {key: value.tolist() if isinstance(value, torch.Tensor) else value for key, value in row.items()} == {
        "x": [2, 3],
        "words": "b",
        "time": [1, 4],
        "pair": [1, None],
        "box": {"x": 1},
        "scale": None,
    }


def test_no_data_of_samples_stand_in_a_page_that_is_to_show_none(tmp_path):
    callback = SGDInfluence(dirpath=tmp_path / "run", show_samples=False)
    train(callback)
    data = data_of(callback)
    assert (data["samples"], data["fields"], data["choices"], data["loss"]) == ({}, [], [], None)


def test_without_a_page_none_is_written(tmp_path):
    callback = SGDInfluence(dirpath=tmp_path / "run", page=False)
    train(callback)
    assert not (callback.run_dir / "report.html").exists()
    assert (callback.run_dir / "influence.csv").exists()


def test_render_and_class_names_are_used(tmp_path):
    callback = SGDInfluence(
        dirpath=tmp_path / "run", render=lambda row: {"sum": float(row[0].sum())}, class_names=["r", "g", "b"]
    )
    train(callback)
    sample = data_of(callback)["samples"]["0"]
    assert sample["label"] in ("r", "g", "b")
    assert [name for name, _ in sample["features"]] == ["sum"]


def test_a_render_that_fails_costs_the_pictures_not_the_ranking(tmp_path):
    callback = SGDInfluence(dirpath=tmp_path / "run", render=lambda row: row.picture)
    with pytest.warns(SGDInfluenceWarning, match="23 of 23 samples could not be shown"):
        train(callback)
    assert len(callback.ranking) == 23
    assert data_of(callback)["samples"]["0"]["prediction"] in Rows.classes


def test_a_page_that_cannot_be_written_costs_only_itself(tmp_path):
    class Blocks(pl.Callback):
        def on_fit_start(self, trainer, pl_module):
            (tmp_path / "run" / "report.html").mkdir()

    callback = SGDInfluence(dirpath=tmp_path / "run")
    trainer = quiet_trainer([callback, Blocks()])
    with pytest.warns(SGDInfluenceWarning, match=re.escape("report.html was not written")):
        trainer.fit(Plain(), *loaders())
    assert len(callback.ranking) == 23
    assert (callback.run_dir / "influence.csv").exists()


def test_a_render_that_cannot_be_called_is_refused():
    with pytest.raises(ValueError, match="render must be a callable"):
        SGDInfluence(render="picture")


def test_a_new_run_takes_the_old_page_with_it(tmp_path):
    train(SGDInfluence(dirpath=tmp_path / "run"))
    train(SGDInfluence(dirpath=tmp_path / "run", overwrite=True, page=False))
    assert not (tmp_path / "run" / "report.html").exists()


class Categories(Dataset):
    """Samples whose label is text, under a key that no rule knows."""

    def __init__(self):
        self.rows = [{"x": x, "category": Rows.classes[int(y)]} for x, y, _ in TRAIN]

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index]


class OfCategories(OfPairs):
    def loss(self, batch, reduction="mean"):
        if not isinstance(batch, dict):  # of the validation set
            return super().loss(batch, reduction)
        labels = torch.tensor([Rows.classes.index(name) for name in batch["category"]])
        return F.cross_entropy(self.net(batch["x"]), labels, reduction=reduction)


def test_a_label_that_only_the_loss_tells_is_shown_but_never_taken_for_the_datasets(tmp_path):
    callback, rows = SGDInfluence(dirpath=tmp_path / "run"), Categories()
    train(callback, rows, OfCategories())
    data = data_of(callback)
    worst = data["samples"]["0"]
    assert Rows.classes[int(worst["label"])] == rows[data["ids"][0]]["category"]
    assert "labelText" not in worst
    assert data["choices"] == []
    path = callback.run_dir / "decisions.csv"  # as the page writes it where the dataset's label is not known
    lines = [f"{data['ids'][0]},drop,,,{data['run']}", f"{data['ids'][1]},relabel,blue,,{data['run']}"]
    path.write_text("\n".join(["sample_id,decision,label,was,run", *lines]) + "\n")
    assert len(apply_decisions(rows, path, label="category")) == len(rows) - 1
