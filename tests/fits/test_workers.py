# SPDX-License-Identifier: Apache-2.0
"""Whatever pickles without the callback pickles with it, at any time of a fit: workers are spawned in its middle."""

import copy
import pickle

import pytest
import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader

from cases import TRAIN, VAL, Plain, loaders, quiet_trainer
from lightning_sgdclean import SGDInfluence
from lightning_sgdclean.data.samplers import NotingSampler, note_samples
from processes import python

SPAWNED = """
import sys
import torch
import pytorch_lightning as pl
from torch.utils.data import DataLoader, default_collate
from cases import TRAIN, VAL, Plain, quiet_trainer
from lightning_sgdclean import SGDInfluence

class Data(pl.LightningDataModule):
    def __init__(self, start):
        super().__init__()
        self.start = start
    def pack(self, items):
        return default_collate(items)
    def train_dataloader(self):
        workers = dict(num_workers=1, multiprocessing_context=self.start) if self.start else {}
        return DataLoader(TRAIN, 8, shuffle=True, collate_fn=self.pack, **workers)
    def val_dataloader(self):
        return DataLoader(VAL, 11)

def trained(start, callbacks, max_epochs):
    pl.seed_everything(1, verbose=False)
    module = Plain(options={"momentum": 0.9})
    quiet_trainer(callbacks, max_epochs=max_epochs).fit(module, Data(start))
    return module.state_dict()

if __name__ == "__main__":
    start, max_epochs = sys.argv[1], int(sys.argv[2])
    callback = SGDInfluence(epochs="all", objective=lambda module, batch: module.loss(batch), verify=0)
    found, plain = trained(start, [callback], max_epochs), trained(None, [], max_epochs)
    assert all(torch.equal(found[name], plain[name]) for name in plain)
    print("ranked", len(callback.ranking))
"""


@pytest.mark.parametrize(("start", "max_epochs"), [("spawn", 2), ("forkserver", 1)])  # each epoch starts its own
def test_workers_that_are_spawned_with_a_method_of_the_datamodule_are_followed(start, max_epochs, tmp_path):
    (tmp_path / "script.py").write_text(SPAWNED, encoding="utf-8")
    ended = python(tmp_path / "script.py", start, max_epochs, cwd=tmp_path, check=False)
    assert "ranked 23" in ended.stdout, ended.stderr


HOOKS = [
    *("setup", "on_fit_start", "on_train_start", "on_train_batch_start", "on_before_optimizer_step"),
    *("on_validation_end", "on_train_epoch_end", "on_fit_end", "teardown"),
]


class Copier(pl.Callback):
    """Tries at every hook what can be copied of the Trainer and its parts, and notes what could."""

    def __init__(self):
        self.done = []

    def look(self, hook, trainer):
        parts = {
            "trainer": trainer,
            "strategy": trainer.strategy,
            "module": trainer.lightning_module,
            "loader": trainer.train_dataloader,
            "optimizers": trainer.optimizers,
            "callbacks": trainer.callbacks,
        }
        for name, part in parts.items():
            for make in (pickle.dumps, copy.deepcopy):
                try:
                    made = make(part)
                except Exception as error:
                    self.done.append((hook, name, make.__name__, type(error).__name__))
                else:
                    self.done.append((hook, name, make.__name__, "done"))
                    if make is pickle.dumps:
                        pickle.loads(made)

    def __getattribute__(self, name):
        if name not in HOOKS:
            return super().__getattribute__(name)
        return lambda trainer, *_, **__: self.look(name, trainer)


def copied_at_every_hook(callbacks):
    pl.seed_everything(1, verbose=False)
    copier = Copier()
    module = Plain()
    trainer = quiet_trainer([copier, *callbacks], max_epochs=1, num_sanity_val_steps=1, limit_train_batches=2)
    trainer.fit(module, *loaders())
    copier.look("after", trainer)
    return copier.done, module


def test_whatever_pickles_and_copies_without_the_callback_does_with_it_at_every_hook():
    callback = SGDInfluence(epochs="all", verify=0)
    found, module = copied_at_every_hook([callback])
    plain, twin = copied_at_every_hook([])
    assert found == plain
    assert {("after", "trainer", "dumps", "done"), ("on_train_start", "callbacks", "dumps", "done")} <= {*plain}
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), twin.parameters(), strict=True))
    assert len(callback.ranking)


def value_of_plain(module, batch):
    return module.loss(batch)


def test_a_copy_of_the_callback_has_its_options_and_ranking_but_not_its_fit():
    callback = SGDInfluence(epochs="all", objective=value_of_plain, verify=0)
    quiet_trainer([callback], max_epochs=1).fit(Plain(), *loaders())
    for twin in (pickle.loads(pickle.dumps(callback)), copy.deepcopy(callback), copy.copy(callback)):
        assert twin.objective is value_of_plain
        assert twin.epochs == "all"
        assert twin.ranking.sample_id.tolist() == callback.ranking.sample_id.tolist()
        assert (twin.run_dir, twin.summary, twin.state_key) == (callback.run_dir, callback.summary, callback.state_key)
        assert twin._recording is twin._loaders is None
        twin.teardown(None, None, "fit")
    again = pickle.loads(pickle.dumps(callback))
    quiet_trainer([again], max_epochs=1).fit(Plain(), *loaders())
    assert len(again.ranking) == 23


def test_an_option_that_cannot_be_pickled_stays_behind_and_is_missed_by_name():
    callback = SGDInfluence(sample_ids=lambda batch: batch[2], verify=0)
    assert copy.deepcopy(callback).sample_ids is callback.sample_ids
    twin = pickle.loads(pickle.dumps(callback))
    with pytest.raises(ValueError, match="sample_ids= was left behind when this callback was pickled"):
        quiet_trainer([twin], max_epochs=1).fit(Plain(), *loaders())


def test_an_option_that_leads_back_to_the_callback_does_not_go_in_circles():
    class_names, callback = {0: "a"}, SGDInfluence(class_names={0: "a"}, objective=Circular())
    callback.options.objective.callback = callback
    twin = pickle.loads(pickle.dumps(callback))
    assert twin.class_names == class_names
    assert twin.objective.callback.monitor == "val_loss"
    assert copy.deepcopy(callback).objective.callback.options.objective is not callback.objective


class Circular:
    def __call__(self, module, batch):
        return module.loss(batch)


def test_a_copy_of_a_watched_loader_has_the_users_own_sampler():
    loader = DataLoader(TRAIN, 5, shuffle=True)
    noting = note_samples(loader)
    iter(noting)
    for twin in (copy.deepcopy(loader), pickle.loads(pickle.dumps(loader))):
        assert type(twin.batch_sampler) is type(noting.inner)
        assert [len(batch[0]) for batch in twin] == [5, 5, 5, 5, 3]
    assert isinstance(loader.batch_sampler, NotingSampler)


def test_a_strategy_whose_hook_somebody_else_replaced_gets_that_back():
    seen = []

    def process(loader):
        seen.append(loader)
        return loader

    trainer = quiet_trainer([SGDInfluence(verify=0)], max_epochs=1)
    trainer.strategy.process_dataloader = process
    trainer.fit(Plain(), *loaders())
    assert trainer.strategy.process_dataloader is process
    assert len(seen) == 2
    assert VAL is seen[0].dataset or VAL is seen[1].dataset
