# SPDX-License-Identifier: Apache-2.0
"""Trainings without some samples or with other labels, against trainings on data that were changed by hand."""

import importlib

import pytest
import torch
from torch.nn import functional as F
from torch.utils.data import (
    DataLoader,
    TensorDataset,
)
from torch.utils.data import Subset as TorchSubset

from cases import quiet_trainer
from lightning_sgdclean import SGDInfluence
from lightning_sgdclean.base.errors import UnsupportedTrainingError
from lightning_sgdclean.cleansing.cleansed import Cleansed

SIZE, DROP = 23, (0, 4, 5, 17, 22)


KEPT = [position for position in range(SIZE) if position not in DROP]


# In a Trainer ------------------------------------------------------------------------------------------

X, Y = torch.randn(SIZE, 5, generator=torch.Generator().manual_seed(1)), torch.arange(SIZE) % 3


TRAIN, VAL = TensorDataset(X, Y), TensorDataset(X[:6], Y[:6])


def classes_of(name):
    """Module and DataModule of one of the two packages."""
    package = importlib.import_module(name)

    class Net(package.LightningModule):
        def __init__(self, train=None):
            super().__init__()
            torch.manual_seed(3)
            self.layer = torch.nn.Linear(5, 3)
            self.train_data = train
            self.seen = []

        def training_step(self, batch, batch_idx):
            self.seen += batch[0][:, 0].tolist()
            return F.cross_entropy(self.layer(batch[0]), batch[1])

        def validation_step(self, batch, batch_idx):
            self.log("val_loss", F.cross_entropy(self.layer(batch[0]), batch[1]))

        def train_dataloader(self):
            return DataLoader(self.train_data, batch_size=4, shuffle=True)

        def configure_optimizers(self):
            self.num_steps = self.trainer.estimated_stepping_batches
            return torch.optim.SGD(self.parameters(), lr=0.1)

    class Data(package.LightningDataModule):
        def __init__(self, train):
            super().__init__()
            self.train_data = train

        def train_dataloader(self):
            return DataLoader(self.train_data, batch_size=4, shuffle=True)

    return package, Net, Data


def trained(name, source, train, callbacks=(), **options):
    package, net, data = classes_of(name)
    module = net(train if source == "module" else None)
    trainer = quiet_trainer(callbacks, package, precision="32-true", reload_dataloaders_every_n_epochs=1, **options)
    torch.manual_seed(5)
    if source == "fit":
        trainer.fit(module, DataLoader(train, batch_size=4, shuffle=True), DataLoader(VAL, batch_size=4))
    else:
        trainer.fit(module, datamodule=data(train) if source == "datamodule" else None)
    assert "process_dataloader" not in vars(trainer.strategy)
    return module


@pytest.mark.parametrize("name", ["pytorch_lightning", "lightning.pytorch"])
@pytest.mark.parametrize("source", ["fit", "module", "datamodule"])
def test_fit_is_that_on_the_rest_of_the_data(name, source):
    found = trained(name, source, TRAIN, [Cleansed(drop=DROP)])
    by_hand = trained(name, source, TorchSubset(TRAIN, KEPT))
    assert found.seen == by_hand.seen
    assert found.num_steps == by_hand.num_steps
    assert torch.equal(found.layer.weight, by_hand.layer.weight)


@pytest.mark.parametrize("name", ["pytorch_lightning", "lightning.pytorch"])
def test_fit_is_that_on_the_data_with_other_labels(name):
    labels = {0: 2, 7: 0, 22: 0}
    others = Y.clone()
    others[list(labels)] = torch.tensor(list(labels.values()))
    found = trained(name, "fit", TRAIN, [Cleansed(labels=labels)])
    by_hand = trained(name, "fit", TensorDataset(X, others))
    assert torch.equal(found.layer.weight, by_hand.layer.weight)
    assert not torch.equal(found.layer.weight, trained(name, "fit", TRAIN).layer.weight)


def test_a_ranking_of_the_rest_names_samples_as_in_the_whole(tmp_path):
    influence = SGDInfluence(epochs="all", dirpath=tmp_path / "run")
    found = trained("pytorch_lightning", "fit", TRAIN, [influence, Cleansed(drop=DROP)])
    assert sorted(influence.ranking.sample_id.tolist()) == KEPT
    by_hand = SGDInfluence(epochs="all", dirpath=tmp_path / "by hand")
    trained("pytorch_lightning", "fit", TorchSubset(TRAIN, KEPT), [by_hand])
    assert found.seen
    assert influence.ranking.influence == pytest.approx(by_hand.ranking.influence)
    with pytest.raises(ValueError, match="List Cleansed behind SGDInfluence"):
        trained("pytorch_lightning", "fit", TRAIN, [Cleansed(drop=DROP), SGDInfluence()])


class Own(DataLoader):
    def __iter__(self):
        return iter([[X[:4], Y[:4]]] * len(self))


def test_loaders_that_do_not_ask_their_sampler_are_refused():
    package, net, _ = classes_of("pytorch_lightning")
    with pytest.raises(UnsupportedTrainingError, match="Own delivers batches that its sampler did not draw"):
        quiet_trainer([Cleansed(drop=[1])], package, precision="32-true").fit(net(), Own(TRAIN, batch_size=4))
