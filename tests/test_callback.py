# SPDX-License-Identifier: Apache-2.0
"""From ``fit`` to the files, as a user meets it."""

import importlib
import json

import pytest
import pytorch_lightning as pl
import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader

from cases import VAL, Plain, loaders, quiet_trainer
from lightning_sgdclean import Ranking, SGDInfluence


@pytest.mark.parametrize("name", ["pytorch_lightning", "lightning.pytorch"])
@pytest.mark.parametrize("alone", [True, False])
def test_both_lightnings_take_the_callback_alone_or_in_a_list(name, alone):
    package = importlib.import_module(name)

    class Module(package.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = torch.nn.Linear(5, 3)

        loss, training_step, validation_step = Plain.loss, Plain.training_step, Plain.validation_step
        sample_weights = None

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    callback = SGDInfluence("val_loss")
    trainer = quiet_trainer(package=package, callbacks=[])
    trainer = package.Trainer(
        max_epochs=2,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=callback if alone else [callback],
    )
    trainer.fit(Module(), *loaders())
    assert len(callback.ranking) == 23


def test_files_hold_what_is_promised(tmp_path, capsys):
    callback = SGDInfluence("val_loss", epochs="all", dirpath=tmp_path / "run")
    trainer = quiet_trainer([callback], precision="32-true", enable_progress_bar=True, num_sanity_val_steps=2)
    trainer.fit(Plain(norm=True), *loaders())
    lines = (tmp_path / "run" / "influence.csv").read_text(encoding="utf-8").splitlines()
    assert lines[0] == "rank,sample_id,influence,effect,visits"
    assert len(lines) == 24
    assert Ranking.load(tmp_path / "run") == callback.ranking
    summary = json.loads((tmp_path / "run" / "summary.json").read_text(encoding="utf-8"))
    assert summary["window"]["words"] == "steps 0 to 14: epochs 0 to 2"
    assert summary["id_type"] == "int"
    assert summary["objective"]["recomputed"] == pytest.approx(summary["objective"]["logged"], rel=1e-5)
    assert summary["replay"]["batches_bit_for_bit"] == summary["replay"]["batches"] == 15
    said = capsys.readouterr().out
    assert str(tmp_path / "run") in said
    assert ", ".join(map(str, callback.ranking.harmful(10))) in said
    assert "losses bit for bit in all 15 batches" in said


def test_trajectory_goes_when_it_is_not_to_be_kept(tmp_path):
    callback = SGDInfluence("val_loss", dirpath=tmp_path / "run", keep_trajectory=False)
    quiet_trainer([callback]).fit(Plain(), *loaders())
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [
        "influence.csv",
        "report.html",
        "summary.json",
    ]


def test_only_the_window_stays_on_disk(tmp_path):
    callback = SGDInfluence("val_loss", dirpath=tmp_path / "run", epochs=1)
    quiet_trainer([callback], max_epochs=4).fit(Plain(), *loaders())
    segments = json.loads((tmp_path / "run" / "trajectory" / "manifest.json").read_text())["segments"]
    assert [segment["epoch"] for segment in segments] == [3]
    assert len(list((tmp_path / "run" / "trajectory").glob("segment-*"))) == 1


def mean_loss(module, batch):
    return F.cross_entropy(module.net(batch[0]), batch[1])


def test_objective_callable_equals_the_logged_value():
    rankings = []
    for options in (
        {"monitor": "val_loss"},
        {"objective": mean_loss, "val_dataloaders": DataLoader(VAL, batch_size=3)},
    ):
        pl.seed_everything(1, verbose=False)
        callback = SGDInfluence(**options)
        quiet_trainer([callback]).fit(Plain(norm=True), *loaders())
        rankings.append(callback.ranking)
    assert rankings[0].influence == pytest.approx(rankings[1].influence, rel=1e-9)


def test_mode_max_turns_the_signs():
    found = []
    for mode in ("min", "max"):
        pl.seed_everything(1, verbose=False)
        callback = SGDInfluence("val_loss", mode=mode)
        quiet_trainer([callback]).fit(Plain(), *loaders())
        found.append(dict(zip(callback.ranking.sample_id, callback.ranking.influence, strict=True)))
    assert all(found[0][sample] == -found[1][sample] for sample in found[0])


def test_the_same_callback_serves_a_second_fit():
    callback = SGDInfluence("val_loss")
    directories = []
    for _ in range(2):
        quiet_trainer([callback]).fit(Plain(), *loaders())
        directories.append(callback.run_dir)
    assert directories[0] != directories[1]


def boring_loss(module, batch):
    return module.loss(module(batch))


@pytest.mark.parametrize("by", ["objective", "subclass"])
def test_a_demo_of_lightning_is_ranked(by):
    from pytorch_lightning.demos.boring_classes import BoringModel

    class Logging(BoringModel):
        def validation_step(self, batch, batch_idx):
            self.log("val_loss", self.loss(self(batch)))

    callback = SGDInfluence("val_loss", objective=boring_loss if by == "objective" else None)
    model = BoringModel() if by == "objective" else Logging()
    quiet_trainer([callback], precision="32-true", max_epochs=1).fit(model)
    assert len(callback.ranking) == 64
    assert callback.summary["replay"]["batches_bit_for_bit"] == 64


def test_validation_loaders_may_come_in_a_dict():
    rankings = []
    for val in ({"only": loaders()[1]}, loaders()[1]):
        pl.seed_everything(1, verbose=False)
        callback = SGDInfluence("val_loss")
        quiet_trainer([callback], num_sanity_val_steps=1).fit(Plain(), loaders()[0], val)
        rankings.append(callback.ranking)
    assert rankings[0] == rankings[1]
