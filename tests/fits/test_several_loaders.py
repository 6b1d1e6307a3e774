# SPDX-License-Identifier: Apache-2.0
"""Batches of several training loaders: semi-supervised, physics-informed, one after another; against differences."""

import re

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities import CombinedLoader
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset

from cases import VAL, Plain, data, objective, quiet_trainer
from lightning_sgdclean import SGDInfluence, Training, cleanse, retrace
from lightning_sgdclean.base.errors import (
    SampleIdError,
    SGDInfluenceError,
    SGDInfluenceWarning,
    UnsupportedTrainingError,
)
from reference import assert_derivative

NUM_LABELLED, NUM_UNLABELLED = 12, 23
LABELLED, UNLABELLED = data(NUM_LABELLED, 5), data(NUM_UNLABELLED, 6)
MOMENTUM = {"options": {"momentum": 0.9}}


def given(sizes=(4, 5), **options):
    """The two loaders: labelled samples, and others."""
    pairs = zip((LABELLED, UNLABELLED), sizes, strict=True)
    return [DataLoader(of, batch_size=size, **{"shuffle": True, **options}) for of, size in pairs]


class SemiSupervised(Plain):
    """Cross entropy of the labelled, consistency of two views of the others, through one call of the network.

    ``sample_weights`` are those of all samples: first the labelled ones.
    """

    amount = 0.3

    def weights_of(self, batch, first):
        return torch.ones(len(batch[0])) if self.sample_weights is None else self.sample_weights[first + batch[-1]]

    def training_step(self, batch, batch_idx):
        (x, y, _), (u, _, _) = labelled, others = batch["labelled"], batch["others"]
        logits, weak, strong = self.net(torch.cat([x, u, 1.1 * u + 0.1])).split([len(x), len(u), len(u)])
        if self.sample_weights is None:
            return F.cross_entropy(logits, y) + self.amount * F.mse_loss(strong, weak.softmax(1))
        first = F.cross_entropy(logits, y, reduction="none") * self.weights_of(labelled, 0)
        second = F.mse_loss(strong, weak.softmax(1), reduction="none").mean(1) * self.weights_of(others, NUM_LABELLED)
        return first.mean() + self.amount * second.mean()


class OfAList(SemiSupervised):
    """The same of a list, in which the first may be missing."""

    def training_step(self, batch, batch_idx):
        if batch[0] is not None:
            return super().training_step({"labelled": batch[0], "others": batch[1]}, batch_idx)
        u = batch[1]
        weak, strong = self.net(u[0]).softmax(1), self.net(1.1 * u[0] + 0.1)
        if self.sample_weights is None:
            return self.amount * F.mse_loss(strong, weak)
        rows = F.mse_loss(strong, weak, reduction="none").mean(1)
        return self.amount * (rows * self.weights_of(u, NUM_LABELLED)).mean()


class PhysicsInformed(SemiSupervised):
    """Data, and a differential equation at points in between: derivatives by the input within the loss."""

    def training_step(self, batch, batch_idx):
        x, y, _ = batch["labelled"]
        u = batch["others"][0].clone().requires_grad_()
        fit, field = self.net(x)[:, 0], self.net(u)[:, 0]
        (slope,) = torch.autograd.grad(field.sum(), u, create_graph=True)
        residual = slope[:, 0] + 0.5 * field
        if self.sample_weights is None:
            return F.mse_loss(fit, y.to(fit)) + self.amount * F.mse_loss(residual, torch.zeros_like(residual))
        first = F.mse_loss(fit, y.to(fit), reduction="none") * self.weights_of(batch["labelled"], 0)
        second = F.mse_loss(residual, torch.zeros_like(residual), reduction="none")
        return first.mean() + self.amount * (second * self.weights_of(batch["others"], NUM_LABELLED)).mean()


def named(loaders):
    return dict(zip(("labelled", "others"), loaders, strict=True))


FORMS = {
    "semi-supervised, cycling": (SemiSupervised, lambda: CombinedLoader(named(given()), "max_size_cycle")),
    "semi-supervised, dict": (SemiSupervised, lambda: named(given((3, 7)))),
    "a list, until all are at their end": (OfAList, lambda: CombinedLoader(given((6, 5)), "max_size")),
    "physics-informed": (PhysicsInformed, lambda: CombinedLoader(named(given((6, 6))), "min_size")),
}


def trained(make, loaders, weights=None, callback=None, **options):
    pl.seed_everything(1, verbose=False)
    module = make(**MOMENTUM, **options)
    module.sample_weights = weights
    quiet_trainer([callback] if callback else []).fit(module, loaders(), DataLoader(VAL, batch_size=4))
    return module


def found_by(ranking, names=("labelled", "others")):
    starts = dict(zip(names, (0, NUM_LABELLED), strict=True))
    found = np.zeros(NUM_LABELLED + NUM_UNLABELLED)
    for sample, influence in zip(ranking.sample_id, ranking.influence, strict=True):
        name, position = sample.split(":")
        found[starts[name] + int(position)] = influence
    return found


@pytest.mark.parametrize("form", FORMS)
def test_influences_of_all_loaders_samples_are_derivatives(form):
    make, loaders = FORMS[form]
    callback = SGDInfluence("val_loss", epochs="all", verify=0)
    trained(make, loaders, callback=callback)
    names = ("0", "1") if make is OfAList else ("labelled", "others")
    found = found_by(callback.ranking, names)
    assert callback.summary["batches"]["why"] == "they cannot be fetched again"
    assert_derivative(found, lambda weights: objective(trained(make, loaders, weights)))


def test_workers_draw_ahead_and_the_names_stay_right():
    alone, ahead = (SGDInfluence("val_loss", verify=0) for _ in range(2))
    for callback, num_workers in ((alone, 0), (ahead, 1)):
        train = CombinedLoader(named(given(num_workers=num_workers, shuffle=False)), "max_size_cycle")
        trained(SemiSupervised, lambda train=train: train, callback=callback)
    assert found_by(ahead.ranking).tolist() == found_by(alone.ranking).tolist()


def test_everything_else_knows_the_names(tmp_path):
    """Samples left out, columns, the page, another process; and the training is what it was."""
    make, loaders = FORMS["semi-supervised, cycling"]
    columns = ("label", "prediction", "loss")
    callback = SGDInfluence("val_loss", epochs="all", verify=3, columns=columns, dirpath=tmp_path / "run")
    watched, bare = trained(make, loaders, callback=callback), trained(make, loaders)
    assert all(torch.equal(a, b) for a, b in zip(bare.parameters(), watched.parameters(), strict=True))
    ranking = callback.ranking
    labels = dict(zip(ranking.sample_id, ranking.columns["label"], strict=True))
    assert all(labels[f"labelled:{i}"] == LABELLED[i][1] for i in range(NUM_LABELLED))
    losses = dict(zip(ranking.sample_id, ranking.columns["loss"], strict=True))
    with torch.no_grad():
        own = F.cross_entropy(watched.eval().net(LABELLED[3][0][None].double()), LABELLED[3][1][None])
    assert losses["labelled:3"] == pytest.approx(float(own))
    assert "labelled:" in (callback.run_dir / "report.html").read_text()
    again = retrace(
        callback.run_dir,
        make(**MOMENTUM).double(),
        train_dataloaders=loaders(),
        val_dataloaders=DataLoader(VAL, batch_size=4),
        epochs="all",
        verify=0,
    )
    assert again.sample_id.tolist() == ranking.sample_id.tolist()
    assert again.influence.tolist() == ranking.influence.tolist()
    with pytest.raises(TypeError, match=re.escape('i.startswith("name:")')):
        ranking.keep(LABELLED, 3)


def test_cleansing_says_that_the_names_are_no_positions(tmp_path):
    class Tested(SemiSupervised):
        def test_step(self, batch, batch_idx):
            self.log("test_loss", self.loss(batch))

    def build(seed):
        return Training(
            quiet_trainer(max_epochs=1),
            Tested(),
            train_dataloaders=named(given()),
            val_dataloaders=DataLoader(VAL, batch_size=4),
            test_dataloaders=DataLoader(VAL, batch_size=4),
        )

    with pytest.raises(ValueError, match=r"of several training loaders are names.*build\(seed, without\)"):
        cleanse(build, metric="test_loss", drop=(2,), seeds=2, random_draws=1, dirpath=tmp_path / "c", verbose=False)


class Stream(IterableDataset):
    def __iter__(self):
        return iter([LABELLED[i] for i in range(NUM_LABELLED)])


class Shuffles(SemiSupervised):
    def on_after_batch_transfer(self, batch, dataloader_idx):
        return batch


def reversing(items):
    return torch.utils.data.default_collate(items[::-1])


def naming(batch):
    return [f"l{i}" for i in batch["labelled"][2].tolist()] + [f"u{i}" for i in batch["others"][2].tolist()]


@pytest.mark.parametrize(
    ("make", "loaders", "options", "error", "found"),
    [
        (SemiSupervised, lambda: named(given()), {"keep_batches": False}, SampleIdError, "keep_batches=False"),
        (SemiSupervised, lambda: named(given(collate_fn=reversing)), {}, SampleIdError, "collate_fn of its own"),
        (Shuffles, lambda: named(given()), {}, SampleIdError, "Shuffles.on_after_batch_transfer may move samples"),
        (
            SemiSupervised,
            lambda: {"labelled": DataLoader(Stream(), 4), "others": given()[1]},
            {},
            SampleIdError,
            "Stream",
        ),
        (SemiSupervised, lambda: {"a:b": given()[0], "c": given()[1]}, {}, UnsupportedTrainingError, "without a colon"),
        (SemiSupervised, lambda: {"a": given(), "b": given()[0]}, {}, UnsupportedTrainingError, "are nested"),
        (SemiSupervised, lambda: named(given((1, 5))), {}, SGDInfluenceError, "the samples of loader 0"),
    ],
    ids=["no room", "collate", "hook", "stream", "colon", "nested", "one sample"],
)
def test_what_is_not_followed_is_refused_before_the_first_step(make, loaders, options, error, found):
    trainer = quiet_trainer([SGDInfluence("val_loss", **options)])
    with pytest.raises(error, match=re.escape(found)):
        trainer.fit(make().double(), loaders(), DataLoader(VAL, batch_size=4))
    assert trainer.global_step == 0


def test_with_names_of_the_users_any_order_is_followed():
    loaders = lambda: CombinedLoader(named(given(collate_fn=reversing)), "max_size_cycle")  # noqa: E731
    callback = SGDInfluence("val_loss", epochs="all", verify=0, sample_ids=naming)
    trained(SemiSupervised, loaders, callback=callback)
    found = np.zeros(NUM_LABELLED + NUM_UNLABELLED)
    for sample, influence in zip(callback.ranking.sample_id, callback.ranking.influence, strict=True):
        found[int(sample[1:]) + NUM_LABELLED * (sample[0] == "u")] = influence
    assert_derivative(found, lambda weights: objective(trained(SemiSupervised, loaders, weights)))


def test_names_by_content_are_of_each_loaders_samples():
    by_position = SGDInfluence("val_loss", verify=0)
    by_content = SGDInfluence("val_loss", verify=0, sample_ids="content")
    for callback in (by_position, by_content):
        trained(SemiSupervised, lambda: named(given((4, 4))), callback=callback)  # as many rows of each
    assert sorted(by_content.ranking.influence) == sorted(by_position.ranking.influence)


def test_another_number_of_names_than_samples_is_refused():
    with pytest.raises(SampleIdError, match="4 ids for a batch of 8 samples"):
        trained(
            SemiSupervised,
            lambda: named(given((4, 4))),
            callback=SGDInfluence("val_loss", sample_ids=lambda batch: batch["labelled"][2]),
        )


class Mixes(SemiSupervised):
    """Mixes samples of both loaders, as MixMatch does."""

    def training_step(self, batch, batch_idx):
        (x, y, _), (u, _, _) = batch["labelled"], batch["others"]
        return F.cross_entropy(self.net(0.8 * x + 0.2 * u[: len(x)]), y)


class Unused(SemiSupervised):
    def training_step(self, batch, batch_idx):
        x, y, _ = batch["labelled"]
        return F.cross_entropy(self.net(x), y)


def test_a_loader_on_whose_samples_no_loss_depends_is_refused():
    with pytest.raises(SGDInfluenceError, match="depend on the samples of loader 1"):
        trained(Unused, lambda: named(given()), callback=SGDInfluence("val_loss"))


def test_the_column_relabel_stays_empty_and_says_so():
    callback = SGDInfluence("val_loss", verify=0, columns=("relabel",))
    with pytest.warns(SGDInfluenceWarning, match="'relabel', which stays empty"):
        trained(SemiSupervised, lambda: named(given()), callback=callback)
    assert not any(callback.ranking.columns["relabel"])


def test_rows_that_mix_loaders_are_refused():
    with pytest.raises(SGDInfluenceError, match="depends on several samples of the batch"):
        trained(Mixes, lambda: named(given()), callback=SGDInfluence("val_loss"))
