# SPDX-License-Identifier: Apache-2.0
"""Bad input: a typed error with its remedy, as early as it can be known."""

import shutil

import pytest
import pytorch_lightning as pl
import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset

from cases import TRAIN, VAL, Plain, loaders, quiet_trainer
from lightning_sgdclean import SGDInfluence
from lightning_sgdclean.base.errors import (
    LossSplitError,
    NonFiniteError,
    ObjectiveError,
    ReplayMismatchError,
    RunDirectoryError,
    SampleIdError,
    UnsupportedTrainingError,
)


def refuse(error, match, module, train=None, trainer=None, **options):
    """Fit must fail with this error; gives the Trainer, to ask how far it came."""
    running = quiet_trainer(
        [SGDInfluence(**{"monitor": "val_loss", **options})], **{"num_sanity_val_steps": 1, **(trainer or {})}
    )
    with pytest.raises(error, match=match):
        running.fit(module, *([train, loaders()[1]] if train is not None else loaders()))
    return running


def with_step(step, **options):
    module = Plain(**options)
    module.training_step = step.__get__(module)
    return module


def test_missing_validation_value_lists_the_names_seen_before_training():
    trainer = refuse(ObjectiveError, "No value named 'loss/val'.*names seen: val_loss", Plain(), monitor="loss/val")
    assert trainer.global_step == 0


def test_value_without_a_graph_is_refused_before_training():
    class Detached(Plain):
        def validation_step(self, batch, batch_idx):
            self.log("val_loss", F.cross_entropy(self.net(batch[0]), batch[1]).detach())

    assert refuse(ObjectiveError, "without a graph.*objective=", Detached()).global_step == 0


def test_no_validation_data_is_refused_before_training():
    trainer = quiet_trainer([SGDInfluence("val_loss")])
    with pytest.raises(ObjectiveError, match="nothing to validate on"):
        trainer.fit(Plain(), loaders()[0])
    assert trainer.global_step == 0


def test_a_second_of_these_callbacks_is_refused_before_training_and_says_what_to_do_instead(tmp_path):
    ours = [SGDInfluence("val_loss", dirpath=tmp_path / name) for name in ("a", "b")]
    running, (train, val) = quiet_trainer(ours), loaders()
    with pytest.raises(
        UnsupportedTrainingError, match=r"2 SGDInfluence callbacks.*objective=\{name: callable.*retrace"
    ):
        running.fit(Plain(), train, val)
    assert running.global_step == 0
    assert list(tmp_path.iterdir()) == []
    assert "process_dataloader" not in vars(running.strategy)
    assert ours[0].state_key != ours[1].state_key  # of checkpoints that hold both


def test_several_optimizers():
    class Two(Plain):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = True

        def configure_optimizers(self):
            return [torch.optim.SGD([p], lr=0.1) for p in self.parameters()]

    running = quiet_trainer([SGDInfluence("val_loss")])
    with pytest.raises((UnsupportedTrainingError, RuntimeError), match="optimizers"):
        running.fit(Two(), *loaders())


@pytest.mark.parametrize("kind", [torch.optim.LBFGS, torch.optim.Rprop])
def test_optimizer_without_a_transpose(kind):
    module = Plain(make_optimizer=kind)
    assert refuse(UnsupportedTrainingError, f"{kind.__name__} cannot be followed backwards", module).global_step == 0


class Stream(IterableDataset):
    def __iter__(self):
        return iter([TRAIN[i] for i in range(10)])


def test_iterable_dataset_needs_sample_ids():
    train = DataLoader(Stream(), batch_size=5)
    assert refuse(SampleIdError, "Give sample_ids=", Plain(), train).global_step == 0


def test_iterable_dataset_with_sample_ids_is_ranked():
    callback = SGDInfluence("val_loss", sample_ids=lambda batch: [f"row {i}" for i in batch[2].tolist()])
    quiet_trainer([callback], max_epochs=1).fit(Plain(), DataLoader(Stream(), batch_size=5), loaders()[1])
    assert sorted(callback.ranking.sample_id) == sorted(f"row {i}" for i in range(10))


def test_directory_that_holds_another_run(tmp_path):
    first = SGDInfluence("val_loss", dirpath=tmp_path / "run")
    quiet_trainer([first]).fit(Plain(), *loaders())
    trainer = refuse(RunDirectoryError, "already holds a run.*overwrite=True", Plain(), dirpath=tmp_path / "run")
    assert trainer.global_step == 0
    again = SGDInfluence("val_loss", dirpath=tmp_path / "run", overwrite=True)
    quiet_trainer([again]).fit(Plain(), *loaders())
    assert (tmp_path / "run" / "influence.csv").exists()


def test_default_directory_takes_the_next_free_name(tmp_path):
    names = []
    for _ in range(2):
        callback = SGDInfluence("val_loss")
        quiet_trainer([callback], default_root_dir=tmp_path).fit(Plain(), *loaders())
        names.append(callback.run_dir.name)
    assert names == ["sgd_influence", "sgd_influence-2"]


def hand_written(self, batch, batch_idx):
    picked = self.net(batch[0]).log_softmax(1).gather(1, batch[1][:, None])
    return (-picked.mean()).exp()  # the perplexity


def swapped(self, batch, batch_idx):
    order = torch.arange(len(batch[0]) - 1, -1, -1)
    return F.cross_entropy(self.net(batch[0][order]), batch[1][order])


def mixing(self, batch, batch_idx):
    x = 0.5 * (batch[0] + batch[0].roll(1, 0))
    return F.cross_entropy(self.net(x), batch[1])


def partly_split(self, batch, batch_idx):
    logits = self.net(batch[0])
    return F.cross_entropy(logits, batch[1]) + logits.std(0).mean()


def penalised(self, batch, batch_idx):
    picked = self.net(batch[0]).log_softmax(1).gather(1, batch[1][:, None])
    return 0.01 * self.net[0].weight.pow(2).sum() - picked.mean()


@pytest.mark.parametrize(
    ("step", "match"),
    [
        (hand_written, "depends on several samples.*'Exp' gives"),
        (swapped, "depends on another sample"),
        (mixing, "depends on several samples"),
        (partly_split, "depends on several samples.*'Std' gives"),
    ],
)
def test_loss_that_cannot_be_split_is_refused_at_the_first_batch(step, match):
    assert refuse(LossSplitError, f"(?s){match}.*sample_losses=", with_step(step)).global_step == 0


def test_collate_that_reorders_is_found_though_it_cannot_be_seen_in_the_batch():
    def by_first_feature(items):
        return torch.utils.data.default_collate(sorted(items, key=lambda item: float(item[0][0])))

    train = DataLoader(TRAIN, batch_size=5, shuffle=True, collate_fn=by_first_feature)
    with pytest.warns(UserWarning, match="or a collate function that reorders samples"):
        refuse(LossSplitError, "swapped", Plain(), train)


def test_nan_loss_refuses_to_rank_and_names_the_step_and_leaves_training_alone():
    def step(self, batch, batch_idx):
        return F.cross_entropy(self.net(batch[0]), batch[1]) * (float("nan") if self.global_step == 7 else 1.0)

    trainer = refuse(NonFiniteError, "at step 7 .epoch 1. was nan", with_step(step), epochs="all")
    assert trainer.global_step == 15


class Jittered(torch.utils.data.Dataset):
    def __len__(self):
        return len(TRAIN)

    def __getitem__(self, index):
        x, y, i = TRAIN[index]
        return x + torch.randn(5), y, i


def test_random_augmentation_that_is_not_kept_is_found_and_named():
    train = DataLoader(Jittered(), batch_size=5)
    with pytest.warns(UserWarning, match="random numbers were drawn while a batch was loaded, but keep_batches=False"):
        refuse(ReplayMismatchError, "Step 14.*hold other data.*keep_batches=True", Plain(), train, keep_batches=False)


def test_validation_that_disagrees_with_what_was_logged_is_refused():
    class Annealed(Plain):
        def validation_step(self, batch, batch_idx):
            is_over = self.trainer.fit_loop.epoch_progress.total.completed >= self.trainer.max_epochs
            self.log("val_loss", F.cross_entropy(self.net(batch[0]), batch[1]) * (1.1 if is_over else 1.0))

    refuse(ReplayMismatchError, "recomputed on the final weights", Annealed())


def test_validation_that_never_gives_one_value_twice_is_refused_before_the_first_step():
    class Counting(Plain):
        calls = 0

        def validation_step(self, batch, batch_idx):
            type(self).calls += 1
            self.log("val_loss", F.cross_entropy(self.net(batch[0]), batch[1]) + 0.01 * self.calls)

    refuse(ObjectiveError, "or counts its calls", Counting())


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"mode": "low"}, "mode must be one of"),
        ({"epochs": 0}, "epochs must be a positive int"),
        ({"curvature": "gauss"}, "curvature must be one of"),
        ({"finite_radius": 0.0}, "finite_radius must be positive"),
        ({"objective": 3}, "objective must be a callable"),
    ],
)
def test_wrong_arguments_are_refused_at_once(options, match):
    with pytest.raises(ValueError, match=match):
        SGDInfluence("val_loss", **options)


def test_fast_dev_run_is_left_alone():
    callback = SGDInfluence("val_loss")
    quiet_trainer([callback], fast_dev_run=True).fit(Plain(), *loaders())
    assert callback.ranking is None
    assert VAL is not None


def test_batches_of_one_sample_are_ranked_or_refused_but_never_all_zero():
    for size in (1, None):
        callback = SGDInfluence("val_loss")
        module = Plain()
        if size is None:
            module.net[1] = torch.nn.Identity()
        quiet_trainer([callback]).fit(module, DataLoader(TRAIN, batch_size=size), loaders()[1])
        assert (callback.ranking.influence != 0).all()
    refuse(LossSplitError, "batch of one sample", with_step(penalised), DataLoader(TRAIN, batch_size=1))


def test_loader_that_delivers_out_of_order():
    train = DataLoader(TRAIN, batch_size=5, num_workers=1, in_order=False)
    refuse(UnsupportedTrainingError, "in_order=False", Plain(), train)


@pytest.mark.filterwarnings("ignore:You are using the `dataloader_iter`")
def test_training_step_over_an_iterator():
    class Iterating(Plain):
        def training_step(self, dataloader_iter):
            raise AssertionError

    refuse(UnsupportedTrainingError, "dataloader_iter", Iterating())


def test_callbacks_that_move_weights_are_named():
    averaging = pl.callbacks.StochasticWeightAveraging(swa_lrs=0.05, swa_epoch_start=1)
    callback = SGDInfluence("val_loss", on_mismatch="warn")
    with pytest.warns(UserWarning, match="StochasticWeightAveraging replaces the weights"):
        quiet_trainer([callback, averaging]).fit(Plain(norm=True), *loaders())
    with pytest.raises(UnsupportedTrainingError, match="BackboneFinetuning adds parameters"):
        quiet_trainer([SGDInfluence("val_loss"), pl.callbacks.BackboneFinetuning()]).fit(_with_backbone(), *loaders())


def _with_backbone():
    module = Plain()
    module.backbone = module.net[0]
    return module


class Unstorable(IterableDataset):
    def __iter__(self):
        return iter([TRAIN[i] for i in range(10)])


def test_batch_that_cannot_be_kept_is_refused_at_the_first_batch():
    class Unpacking(Plain):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch[:3], batch_idx)

    train = DataLoader(Unstorable(), batch_size=5, collate_fn=_with_iterator)
    trainer = refuse(
        UnsupportedTrainingError, "without pickle", Unpacking(), train, sample_ids=lambda batch: batch[2].tolist()
    )
    assert trainer.global_step == 0


def _with_iterator(items):
    collated = torch.utils.data.default_collate(items)
    return [*collated, iter("nothing that can be written down")]


@pytest.mark.filterwarnings("ignore:.*fork", "ignore:.*does not have many workers")
def test_several_processes_are_refused_before_training():
    trainer = quiet_trainer([SGDInfluence("val_loss")], devices=2, strategy="ddp_fork", max_epochs=1)
    with pytest.raises(Exception, match=r"Training runs in 2 processes.*devices=1"):
        trainer.fit(Plain(), *loaders())
    assert trainer.global_step == 0


def test_an_optimized_tensor_outside_the_module_is_refused_before_training():
    class Stray(Plain):
        def configure_optimizers(self):
            return torch.optim.SGD([*self.parameters(), torch.zeros(2, requires_grad=True)], lr=0.1)

    match = r"holds a tensor of shape \(2,\) that is no parameter.*nn.Parameter"
    assert refuse(UnsupportedTrainingError, match, Stray()).global_step == 0


@pytest.mark.filterwarnings("ignore:.*validation")
def test_a_module_without_validation_step_needs_an_objective():
    class Unvalidated(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = torch.nn.Linear(5, 3)

        training_step, loss, sample_weights = Plain.training_step, Plain.loss, None

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    trainer = quiet_trainer([SGDInfluence("val_loss")])
    with pytest.raises(ObjectiveError, match=r"has no validation_step.*give objective="):
        trainer.fit(Unvalidated(), loaders()[0])
    assert trainer.global_step == 0


@pytest.mark.filterwarnings("ignore:Recording stopped at step")
def test_a_trajectory_that_cannot_be_written_any_more_leaves_the_training_alone(tmp_path):
    class Remove(pl.Callback):
        def on_train_epoch_start(self, trainer, module):
            if trainer.current_epoch == 1:
                shutil.rmtree(tmp_path / "run")

    trainer = quiet_trainer([SGDInfluence("val_loss", dirpath=tmp_path / "run"), Remove()])
    with pytest.raises(RunDirectoryError, match=r"could not be written any more.*No such file"):
        trainer.fit(Plain(), *loaders())
    assert trainer.global_step == 15


@pytest.mark.filterwarnings("ignore:Recording stopped at step")
@pytest.mark.parametrize("given", [lambda ids: 1 / 0, lambda ids: ids[:-1], lambda ids: ids.double()])
def test_sample_ids_that_fail_late_leave_the_training_alone(given):
    seen = []

    def late(batch):
        seen.append(0)
        return given(batch[2]) if len(seen) == 9 else batch[2]

    trainer = quiet_trainer([SGDInfluence("val_loss", sample_ids=late)])
    with pytest.raises(SampleIdError, match=r"sample_ids=|could not be named: ZeroDivisionError"):
        trainer.fit(Plain(), *loaders())
    assert trainer.global_step == 15


@pytest.mark.filterwarnings("ignore:Recording stopped at step")
def test_an_epoch_left_within_an_accumulation_is_refused():
    class Leaving(Plain):
        def on_train_batch_start(self, batch, batch_idx):
            return -1 if self.current_epoch < 2 and batch_idx == 3 else None

    trainer = quiet_trainer([SGDInfluence("val_loss", epochs="all")], accumulate_grad_batches=2)
    with pytest.raises(UnsupportedTrainingError, match=r"left over before step .* return -1"):
        trainer.fit(Leaving(), *loaders())


def test_a_sparse_buffer_is_refused_by_name_before_training():
    module = Plain()
    module.register_buffer("graph", torch.eye(3).to_sparse())
    with pytest.raises(UnsupportedTrainingError, match="'graph' is a sparse tensor"):
        quiet_trainer([SGDInfluence("val_loss")]).fit(module, *loaders())
