# SPDX-License-Identifier: Apache-2.0
"""torchdata's StatefulDataLoader, whose order continues where a checkpoint was taken in the middle of an epoch."""

import pytest
import pytorch_lightning as pl
import torch
from torchdata.stateful_dataloader import StatefulDataLoader

from cases import TRAIN, Remembering, loaders, quiet_trainer
from lightning_sgdclean import SGDInfluence
from lightning_sgdclean.base.errors import SGDInfluenceWarning
from lightning_sgdclean.trajectory.store import Trajectory


class Saving(pl.Callback):
    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == 7:
            trainer.save_checkpoint("middle.ckpt")


class Backwards:
    """A batch sampler without a state: torchdata draws from it again what was drawn before the checkpoint."""

    def __iter__(self):
        return iter([list(range(start, start - 5, -1)) for start in (20, 15, 10, 5)])

    def __len__(self):
        return 4


def fit(workers, callbacks, batches=None, **options):
    pl.seed_everything(3, verbose=False)
    module = Remembering()
    how = {"batch_size": 5, "shuffle": True} if batches is None else {"batch_sampler": batches}
    train = StatefulDataLoader(TRAIN, num_workers=workers, **how)
    quiet_trainer(callbacks, enable_checkpointing=True).fit(module, train, loaders()[1], **options)
    return module


def recorded(callback):
    return [step.micro[0].ids for step in Trajectory(callback.run_dir / "trajectory").steps]


@pytest.mark.filterwarnings(
    "ignore:What was kept of the run begins with step 7",
    "ignore:.set_vital",
    "ignore:.*checkpoint",
    "ignore:.*weights_only",
)
@pytest.mark.parametrize("batches", [None, Backwards()])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_stateful_loader_is_followed_and_its_order_left_alone_also_when_it_resumes_within_an_epoch(workers, batches):
    plain = fit(workers, [Saving()], batches)
    callback = SGDInfluence("val_loss", epochs="all")
    watched = fit(workers, [callback], batches)
    assert recorded(callback) == watched.order == plain.order
    assert all(torch.equal(a, b) for a, b in zip(watched.parameters(), plain.parameters(), strict=True))
    resumed = SGDInfluence("val_loss", epochs="all")
    with pytest.warns(SGDInfluenceWarning, match="goes on from step 7"):
        continued = fit(workers, [resumed], batches, ckpt_path="middle.ckpt")
    assert recorded(resumed) == continued.order == plain.order[7:]
