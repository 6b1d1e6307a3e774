# SPDX-License-Identifier: Apache-2.0
"""Samples that are named by the user or by what they hold: by ids that can be written, from the first batch on."""

import os

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from cases import TRAIN, Plain, loaders, quiet_trainer
from datasets import KEPT, Augmented, Wrapped
from lightning_sgdclean import SGDInfluence
from lightning_sgdclean.base.errors import LossSplitError, SampleIdError, SGDInfluenceWarning
from lightning_sgdclean.data.packing import content_ids
from reference import influences


def rank(train, module=None, **options):
    pl.seed_everything(1, verbose=False)
    callback, module = SGDInfluence("val_loss", epochs="all", **options), module or Plain()
    quiet_trainer([callback]).fit(module, train, loaders()[1])
    return callback, module


class Stream(IterableDataset):
    def __iter__(self):
        return iter([TRAIN[i] for i in range(23)])


class Cycling(IterableDataset):
    """Twice the same samples, in the second half of another order."""

    def __iter__(self):
        return iter([TRAIN[i] for i in [*range(20), *reversed(range(20))]])


def names_of(num=23):
    """The ids by content, of the precision that the Trainer converts batches to."""
    x, y, i = (column[:num] for column in TRAIN.tensors)
    return content_ids([x.double(), y, i])


def by_content(callback):
    """The influences by position, where the ids are those of content."""
    names = names_of()
    found = dict(zip(callback.ranking.sample_id.tolist(), callback.ranking.influence, strict=True))
    return np.array([found[name] for name in names])


def test_a_stream_is_ranked_by_the_content_of_its_samples_as_a_table_is_by_their_positions():
    stream, module = rank(DataLoader(Stream(), batch_size=5), sample_ids="content")
    table, twin = rank(DataLoader(TRAIN, batch_size=5))
    assert np.array_equal(by_content(stream), influences(table))
    assert all(torch.equal(one, other) for one, other in zip(module.parameters(), twin.parameters(), strict=True))
    assert stream.summary["dataset_size"] is None


def test_equal_samples_are_one_with_several_visits():
    callback, _ = rank(DataLoader(Cycling(), batch_size=5), sample_ids="content")
    assert sorted(callback.ranking.sample_id) == sorted(names_of(20))
    assert set(callback.ranking.visits) == {6}


@pytest.mark.filterwarnings(f"ignore:{KEPT}")
def test_augmentation_gives_a_sample_another_name_each_time():
    callback, _ = rank(DataLoader(Augmented(), batch_size=5), sample_ids="content")
    assert len(callback.ranking) == 3 * 23
    assert set(callback.ranking.visits) == {1}


def test_content_that_does_not_tell_samples_apart_is_refused_before_training():
    def of_one_piece(items):
        return {"batch": torch.utils.data.default_collate(items), "matrix": torch.eye(9)}

    trainer = quiet_trainer([SGDInfluence("val_loss", sample_ids="content")])
    with pytest.raises(SampleIdError, match="cannot be named by their content"):
        trainer.fit(Plain(), DataLoader(Stream(), batch_size=5, collate_fn=of_one_piece), loaders()[1])
    assert trainer.global_step == 0


class Iterable:
    """A loader that is none of torch's."""

    def __init__(self, batches):
        self.batches = batches

    def __len__(self):
        return len(self.batches)

    def __iter__(self):
        return iter(self.batches)


@pytest.mark.parametrize("name", [lambda batch: batch[2], "content"])
def test_any_iterable_is_a_loader_where_its_samples_have_names(name):
    callback, _ = rank(Iterable(list(DataLoader(TRAIN, batch_size=5))), sample_ids=name, columns=("label", "source"))
    table, _ = rank(DataLoader(TRAIN, batch_size=5))
    found = by_content(callback) if name == "content" else influences(callback)
    assert np.array_equal(found, influences(table))


class Files(Wrapped):
    """Named as files are, one of them not in UTF-8."""

    names = tuple(os.fsdecode(b"caf\xe9.png") if i == 3 else f"{i}.png" for i in range(23))

    def __getitem__(self, index):
        return *self.inner[index][:2], self.names[index]


@pytest.mark.parametrize("keep", ["auto", True, False])
def test_names_that_are_no_utf_8_are_escaped(keep):
    callback, _ = rank(
        DataLoader(Files(), batch_size=5), sample_ids=lambda batch: batch[2], keep_batches=keep, formats=("parquet",)
    )
    table, _ = rank(DataLoader(TRAIN, batch_size=5))
    places = {name.encode("utf-8", "backslashreplace").decode(): i for i, name in enumerate(Files.names)}
    assert "caf\\udce9.png" in places
    found = np.zeros(23)
    found[[places[name] for name in callback.ranking.sample_id]] = callback.ranking.influence
    assert np.array_equal(found, influences(table))
    assert type(callback.ranking).load(callback.run_dir / "influence.csv").sample_id.tolist() == (
        callback.ranking.sample_id.tolist()
    )


WRONG = {
    "int here and str there": lambda i: ["a", 1, 2, 3, 4],
    "does not fit into 64 bits": lambda i: [1, 2, 3, 4, 1 << 63],
    "written alike in UTF-8": lambda i: ["\udce9", "\\udce9", "a", "b", "c"],
}


@pytest.mark.parametrize("match", WRONG)
def test_ids_that_cannot_stand_in_one_ranking_are_refused_before_training(match):
    trainer = quiet_trainer([SGDInfluence("val_loss", sample_ids=lambda batch: WRONG[match](batch[2]))])
    with pytest.raises(SampleIdError, match=match):
        trainer.fit(Plain(), *loaders())
    assert trainer.global_step == 0


def test_such_an_id_in_a_later_batch_ends_the_recording_and_not_the_training():
    trainer = quiet_trainer([SGDInfluence("val_loss", sample_ids=lambda batch: [
        f"{i}" if i == 12 else int(i) for i in batch[2]
    ])])  # fmt: skip
    with (
        pytest.warns(SGDInfluenceWarning, match="Recording stopped at step 2"),
        pytest.raises(SampleIdError, match="int here and str there"),
    ):
        trainer.fit(Plain(), *loaders(shuffle=False))
    assert trainer.global_step == 15


def test_positions_of_two_types_are_refused_where_they_come():
    class Mixed(Wrapped):
        def __getitem__(self, index):
            return self.inner[int(index)]

    trainer = quiet_trainer([SGDInfluence("val_loss")])
    with pytest.raises(SampleIdError, match="int here and str there"):
        trainer.fit(Plain(), DataLoader(Mixed(), batch_size=5, sampler=["1", 2, "3", 4, "5"]), loaders()[1])


def test_a_list_of_pairs_is_not_taken_for_other_samples():
    """Vectors as long as each other look like samples; the loss tells."""

    class Pairs(Plain):
        def training_step(self, batch, batch_idx):
            return super().training_step([torch.stack(part) for part in zip(*batch, strict=True)], batch_idx)

    data = TensorDataset(*(column[:20] for column in TRAIN.tensors))
    trainer = quiet_trainer([SGDInfluence("val_loss", sample_ids="content")])
    with pytest.raises((SampleIdError, LossSplitError)):
        trainer.fit(Pairs(), DataLoader(data, batch_size=4, collate_fn=list), loaders()[1])
    assert trainer.global_step == 0
