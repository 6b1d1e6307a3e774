# SPDX-License-Identifier: Apache-2.0
"""Whose row is whose: what stands between the draw and the batch is followed, named or refused."""

import random

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, SequentialSampler, default_collate
from torch.utils.data.dataloader import _SingleProcessDataLoaderIter

from cases import TRAIN, VAL, Plain, Remembering, objective, quiet_trainer
from datasets import KEPT, Augmented, ByThePrevious, Wrapped, filled_up, sound
from lightning_sgdclean import SGDInfluence
from lightning_sgdclean.base.errors import LossSplitError, SampleIdError, SGDInfluenceWarning
from lightning_sgdclean.report.samples import ids_to_show
from lightning_sgdclean.trajectory.store import Trajectory
from reference import assert_derivative, influences

pytestmark = pytest.mark.filterwarnings(f"ignore:{KEPT}")  # a sample that is replaced by another one looks random

NOT_STRAIGHT = r"come out of .*, not straight from torch's DataLoader.*Give sample_ids="


def rank(train, module=None, callbacks=(), trainer=None, **options):
    """The callback and the module of a fit, which may have been refused."""
    pl.seed_everything(1, verbose=False)
    callback, module = SGDInfluence("val_loss", **options), module or Remembering()
    running = quiet_trainer([callback, *callbacks], **(trainer or {}))
    running.fit(module, train, DataLoader(VAL, batch_size=4))
    return callback, module


def recorded(callback):
    return [step.micro[0].ids for step in Trajectory(callback.run_dir / "trajectory").steps]


class Passing(DataLoader):
    def __iter__(self):
        return (batch for number, batch in enumerate(super().__iter__()) if number % 3 != 1)

    def __len__(self):
        return super().__len__() - len(range(1, super().__len__(), 3))


class Repeating(DataLoader):
    def __iter__(self):
        for batch in super().__iter__():
            yield batch
            yield batch

    def __len__(self):
        return 2 * super().__len__()


class Buffering(DataLoader):
    def __iter__(self):
        yield from list(super().__iter__())


class Shuffling(DataLoader):
    def __iter__(self):
        batches = list(super().__iter__())
        random.shuffle(batches)
        return iter(batches)


class Behind(DataLoader):
    """Its base iterator is another one's."""

    def _get_iterator(self):
        return filter(lambda batch: 3 not in batch[2], super()._get_iterator())

    def __len__(self):
        return super().__len__() - 1


class Twice(_SingleProcessDataLoaderIter):
    def _next_data(self):
        super()._next_data()
        return super()._next_data()


class Doubled(DataLoader):
    def _get_iterator(self):
        return Twice(self)

    def __len__(self):
        return super().__len__() // 2


def patched(**options):
    """A loader whose base iterator is patched on the instance."""
    loader = DataLoader(TRAIN, **options)
    make = loader._get_iterator

    def made():
        iterator = make()
        deliver = iterator._next_data
        iterator._next_data = lambda: (deliver(), deliver())[1]
        return iterator

    loader._get_iterator = made
    return loader


LOADERS = {
    "passes over": lambda **o: Passing(TRAIN, **o),
    "repeats": lambda **o: Repeating(TRAIN, **o),
    "buffers": lambda **o: Buffering(TRAIN, **o),
    "shuffles": lambda **o: Shuffling(TRAIN, **o),
    "base iterator": lambda **o: Behind(TRAIN, **o),
    "own iterator": lambda **o: Doubled(TRAIN, **o),
    "patched": patched,
}


@pytest.mark.parametrize("keep", [True, "auto"])
@pytest.mark.parametrize("name", LOADERS)
def test_a_loader_with_a_way_of_its_own_to_iterate_is_refused_before_training(name, keep):
    module = Remembering()
    with pytest.raises(SampleIdError, match=NOT_STRAIGHT):
        rank(LOADERS[name](batch_size=5), module, keep_batches=keep)
    assert module.order == []


@pytest.mark.parametrize("name", ["passes over", "base iterator"])
def test_with_workers_likewise(name):
    with pytest.raises(SampleIdError, match=NOT_STRAIGHT):
        rank(LOADERS[name](batch_size=5, num_workers=2, persistent_workers=True), keep_batches=True)


@pytest.mark.parametrize("name", LOADERS)
def test_with_sample_ids_it_is_followed(name):
    callback, module = rank(LOADERS[name](batch_size=5, shuffle=True), sample_ids=lambda batch: batch[2], epochs="all")
    assert recorded(callback) == module.order
    assert set(callback.ranking.sample_id) == {i for batch in module.order for i in batch}
    assert callback.summary["batches"]["why"] == "they cannot be fetched again"


def test_influences_under_a_loader_that_passes_over_batches_are_the_derivative():
    def fit(weights=None, callbacks=()):
        pl.seed_everything(1, verbose=False)
        module = Plain(options={"momentum": 0.9})
        module.sample_weights = weights
        quiet_trainer(callbacks).fit(module, Passing(TRAIN, batch_size=5, shuffle=True), DataLoader(VAL, batch_size=4))
        return module

    callback = SGDInfluence("val_loss", epochs="all", sample_ids=lambda batch: batch[2])
    fit(callbacks=[callback])
    assert_derivative(influences(callback), lambda weights: objective(fit(weights)))


def test_what_cannot_be_fetched_again_must_be_kept():
    with pytest.raises(SampleIdError, match=r"Passing.*can only be kept, but keep_batches=False"):
        rank(Passing(TRAIN, batch_size=5), sample_ids=lambda batch: batch[2], keep_batches=False)


class Counting(DataLoader):
    """Its ``__iter__`` does what it likes, and returns torch's iterator."""

    epochs = 0

    def __iter__(self):
        self.epochs += 1
        return super().__iter__()


class Short(DataLoader):
    def __len__(self):
        return 3


class Unsized(RandomSampler):
    """Lightning then fetches a batch ahead, to know which one is the last."""

    def __len__(self):
        raise NotImplementedError


class Endless(BatchSampler):
    def __iter__(self):
        while True:
            yield from super().__iter__()


class Stopping(pl.Callback):
    def on_train_batch_end(self, trainer, *_):
        trainer.should_stop = trainer.global_step == 7


WELCOME = {
    "counts": (lambda: Counting(TRAIN, batch_size=5, shuffle=True), {}),
    "short": (lambda: Short(TRAIN, batch_size=5, shuffle=True), {}),
    "short, workers": (lambda: Short(TRAIN, batch_size=5, shuffle=True, num_workers=2, prefetch_factor=4), {}),
    "unsized": (lambda: DataLoader(TRAIN, batch_size=5, sampler=Unsized(TRAIN)), {}),
    "unsized, persistent": (
        lambda: DataLoader(TRAIN, batch_size=5, sampler=Unsized(TRAIN), num_workers=2, persistent_workers=True),
        {},
    ),
    "endless": (
        lambda: DataLoader(TRAIN, batch_sampler=Endless(SequentialSampler(TRAIN), 5, False), num_workers=1),
        {"limit_train_batches": 7},
    ),
    "limited": (lambda: DataLoader(TRAIN, batch_size=5, num_workers=2), {"limit_train_batches": 2}),
    "max_steps": (lambda: DataLoader(TRAIN, batch_size=5, num_workers=2, persistent_workers=True), {"max_steps": 8}),
    "stopped": (lambda: DataLoader(TRAIN, batch_size=5, num_workers=2), {"callbacks": [Stopping()], "min_epochs": 0}),
    "batch alone": (lambda: DataLoader(TRAIN, batch_size=1, shuffle=True), {"limit_train_batches": 5}),
}


@pytest.mark.filterwarnings("ignore:.*limit_train_batches", "ignore:.*max_steps")
@pytest.mark.parametrize("name", WELCOME)
def test_what_torch_and_lightning_do_themselves_gives_no_false_alarm(name):
    make, trainer = WELCOME[name]
    trainer = dict(trainer)
    callback, module = rank(make(), callbacks=trainer.pop("callbacks", ()), trainer=trainer, epochs="all")
    assert recorded(callback) == module.order


class Skipping(DataLoader):
    """From its third pass on it takes a batch for itself."""

    num = 0

    def __iter__(self):
        self.num += 1
        iterator = super().__iter__()
        if self.num == 3:
            next(iterator)
        return iterator

    def __len__(self):
        return 4


class Peeking(pl.Callback):
    """Looks at a batch of persistent workers, of which there is one iterator only."""

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if trainer.global_step == 7:
            next(trainer.fit_loop._combined_loader._iterator.iterators[0])


class Swapping(pl.Callback):
    """Lets the loader go over other data."""

    def on_train_epoch_end(self, trainer, module):
        trainer.train_dataloader.__dict__["dataset"] = Wrapped()


@pytest.mark.parametrize(
    ("make", "callbacks", "match"),
    [
        (Skipping, [], "drew 2 batches since the last one"),
        (DataLoader, [Peeking()], "drew 2 batches since the last one"),
        (DataLoader, [Swapping()], "goes over another dataset"),
    ],
)
def test_what_goes_another_way_later_ends_the_recording_but_not_the_training(make, callbacks, match):
    module, is_swapped = Remembering(), "dataset" in match
    train = make(TRAIN, batch_size=5, **({} if is_swapped else {"num_workers": 2, "persistent_workers": True}))
    with (
        pytest.warns(SGDInfluenceWarning, match="Recording stopped.*training goes on"),
        pytest.raises(SampleIdError, match=f"{match}.*Give sample_ids="),
    ):
        rank(train, module, callbacks, epochs="all", keep_batches=True)
    assert len(module.order) >= 12


BROKEN = 13


class Fragile(Wrapped):
    """One of its samples cannot be read."""

    def __getitem__(self, index):
        return None if index == BROKEN else self.inner[index]


def by_a_neighbour(items):
    return default_collate([items[i - 1] if item is None else item for i, item in enumerate(items)])


def by_the_first(items):
    return default_collate([sound(items)[0] if item is None else item for item in items])


def by_the_largest(items):
    largest = max(sound(items), key=lambda item: float(item[0].sum()))
    return default_collate([largest if item is None else item for item in items])


def by_a_random_one(items):
    return default_collate([random.choice(sound(items)) if item is None else item for item in items])


def with_two_swapped(items):
    items = list(items)
    if any(item is None for item in items):
        items[0], items[1] = items[1], items[0]
    return default_collate([(torch.zeros(5), torch.tensor(0), torch.tensor(0)) if i is None else i for i in items])


def with_rows_swapped(items):
    batch = default_collate(items)
    if 7 in batch[2]:
        at = batch[2].tolist().index(7)
        order = list(range(len(items)))
        order[at], order[at - 1] = order[at - 1], order[at]
        batch = [column[order] for column in batch]
    return batch


COLLATES = {
    "by a neighbour": by_a_neighbour,
    "by the first": by_the_first,
    "by the largest": by_the_largest,
    "by the previous": ByThePrevious(torch.zeros(5), torch.tensor(0), torch.tensor(0)),
    "filled up": filled_up,
    "two swapped": with_two_swapped,
}


@pytest.mark.parametrize("keep", [True, "auto"])
@pytest.mark.parametrize("size", [4, 8, 23])
@pytest.mark.parametrize("name", COLLATES)
def test_a_collate_function_that_gives_a_rare_sample_the_row_of_another_is_refused(name, size, keep):
    train = DataLoader(Fragile(), batch_size=size, shuffle=True, collate_fn=COLLATES[name])
    with pytest.raises((SampleIdError, LossSplitError), match=r"sample_ids=|sample_losses="):
        rank(train, keep_batches=keep, trainer={"max_epochs": 2})


@pytest.mark.parametrize("keep", [True, "auto"])
@pytest.mark.parametrize("size", [2, 5])
def test_a_collate_function_that_swaps_two_on_rare_samples_is_refused(size, keep):
    train = DataLoader(TRAIN, batch_size=size, collate_fn=with_rows_swapped)
    with pytest.raises((SampleIdError, LossSplitError), match=r"sample_ids=|sample_losses="):
        rank(train, keep_batches=keep, trainer={"max_epochs": 1})


def test_a_random_replacement_is_refused():
    train = DataLoader(Fragile(), batch_size=5, collate_fn=by_a_random_one)
    with pytest.raises((SampleIdError, LossSplitError), match="sample_ids="):
        rank(train, keep_batches=True)


def test_replacement_among_random_data_is_refused():
    class Both(Fragile):
        def __init__(self):
            super().__init__(Augmented())

    train = DataLoader(Both(), batch_size=5, shuffle=True, collate_fn=by_a_neighbour)
    with pytest.raises(SampleIdError, match=r"the row of sample 13 is not its own.*by_a_neighbour.*sample_ids="):
        rank(train, keep_batches=True)


def by_a_constant(items):
    blank = torch.zeros(5), torch.tensor(0), torch.tensor(BROKEN)
    return default_collate([blank if item is None else item for item in items])


def dropped(items):
    return default_collate(sound(items))


def doubled(items):
    return default_collate([*items, items[0]] if any(item[2] == BROKEN for item in items) else items)


def test_a_constant_in_the_place_of_a_rare_sample_is_its_own():
    callback, module = rank(DataLoader(Fragile(), batch_size=5, shuffle=True, collate_fn=by_a_constant), epochs="all")
    assert recorded(callback) == module.order


@pytest.mark.parametrize(("data", "collate", "rows"), [(Fragile(), dropped, 3), (TRAIN, doubled, 5)])
def test_a_batch_of_fewer_or_more_rows_than_were_drawn_is_refused_where_it_comes(data, collate, rows):
    module = Remembering()
    with (
        pytest.warns(SGDInfluenceWarning, match="Recording stopped at step 3"),
        pytest.raises(SampleIdError, match=f"has {rows} rows, but 4 samples were drawn.*Give sample_ids="),
    ):
        rank(DataLoader(data, batch_size=4, collate_fn=collate), module)
    assert len(module.order) == 18


@pytest.mark.parametrize("keep", [True, "auto"])
@pytest.mark.parametrize(
    ("data", "collate"),
    [(Fragile(), by_a_neighbour), (Fragile(), dropped), (TRAIN, doubled), (TRAIN, with_rows_swapped)],
)
def test_with_sample_ids_whatever_a_collate_function_does_is_followed(data, collate, keep):
    train = DataLoader(data, batch_size=5, shuffle=True, collate_fn=collate)
    callback, module = rank(train, sample_ids=lambda batch: batch[2], epochs="all", keep_batches=keep)
    assert recorded(callback) == module.order


@pytest.mark.parametrize(
    "make",
    [
        lambda: Passing(TRAIN, batch_size=5, shuffle=True),
        lambda: DataLoader(TRAIN, batch_size=5, shuffle=True, collate_fn=with_rows_swapped),
        lambda: DataLoader(Fragile(), batch_size=5, shuffle=True, collate_fn=dropped),
    ],
)
def test_the_page_shows_the_samples_that_sample_ids_named(make):
    shown = []
    callback, _ = rank(
        make(), sample_ids=lambda batch: batch[2], render=lambda sample: str(shown.append(int(sample[2])))
    )
    assert shown == ids_to_show(callback.ranking)


def test_a_sampler_whose_draws_are_no_ids_needs_sample_ids_only():
    class Asked(Wrapped):
        def __getitem__(self, query):
            return self.inner[query["row"]]

    def train():
        return DataLoader(Asked(), batch_size=5, sampler=[{"row": i} for i in range(23)])

    callback, module = rank(train(), sample_ids=lambda batch: batch[2], epochs="all")
    assert recorded(callback) == module.order
    with pytest.raises(SampleIdError, match=r"of type dict.*Give sample_ids="):
        rank(train())


def numbered(items):
    x, y, i = default_collate(items)
    return {"x": x, "y": y, "index": i, "row": torch.arange(len(items)), "ratio": torch.tensor([1.0, 2.0])}


def time_first(items):
    x, y, i = default_collate(items)
    return {"x": x.T.contiguous(), "y": y, "index": i}


def of_two_views(items):
    x, y, i = default_collate(items)
    return {"x": x, "y": y, "index": i, "again": list(x.unbind())}


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("collate", [numbered, time_first, of_two_views])
def test_collate_functions_that_keep_the_samples_in_order_give_no_false_alarm(collate, size):
    class Taking(Remembering):
        def training_step(self, batch, batch_idx):
            x = batch["x"].T if collate is time_first else batch["x"]
            return super().training_step([x, batch["y"], batch["index"]], batch_idx)

        def on_train_batch_end(self, outputs, batch, batch_idx):
            self.order.append(batch["index"].tolist())

    callback, module = rank(DataLoader(TRAIN, batch_size=size, shuffle=True, collate_fn=collate), Taking())
    assert np.isfinite(callback.ranking.influence).all()
    assert recorded(callback)[-len(module.order) // 3 :] == module.order[-len(module.order) // 3 :]
