# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of one run that other fits have gone on from since, or that say nothing, or too much, of their run."""

import pytest
import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader

from cases import TRAIN, VAL, Plain, quiet_trainer
from lightning_sgdclean import SGDInfluence
from lightning_sgdclean.base.errors import RunDirectoryError, SGDInfluenceWarning
from lightning_sgdclean.trajectory.store import Trajectory


class Stop(pl.Callback):
    """A power cut before a batch."""

    def __init__(self, step):
        self.step = step

    def on_train_batch_start(self, trainer, *_):
        if trainer.global_step == self.step:
            raise OSError("power cut")


def train(folder, seed, ckpt_path=None, callbacks=(), **options):
    """Shuffled by the seed, with a checkpoint every five steps, which is one epoch."""
    pl.seed_everything(seed, verbose=False)
    callback = SGDInfluence("val_loss", epochs="all", **{"dirpath": folder / "run", **options})
    saving = pl.callbacks.ModelCheckpoint(folder, filename=f"{{step}}-{seed}", every_n_train_steps=5, save_top_k=-1)
    trainer = quiet_trainer(
        [callback, saving, *callbacks], max_epochs=4, precision="32-true", enable_checkpointing=True
    )
    loader = DataLoader(TRAIN, batch_size=5, shuffle=True)
    trainer.fit(Plain(), loader, DataLoader(VAL, batch_size=4), ckpt_path=ckpt_path)
    return callback


def cut_short(folder, seed, step, ckpt_path=None, **options):
    with pytest.raises(OSError, match="power cut"):
        train(folder, seed, ckpt_path, [Stop(step)], **options)


def ids(folder):
    return [step.micro[0].ids for step in Trajectory(folder / "trajectory").steps]


@pytest.fixture
def two_branches(tmp_path):
    """A fit with checkpoints at 5, 10 and 15, and one that went on from its first in another order."""
    options = {"curvature": "finite", "snapshots": "every"}
    cut_short(tmp_path, 1, 17, **options)
    first = ids(tmp_path / "run")
    cut_short(tmp_path, 2, 17, tmp_path / "step=5-1.ckpt", **options)
    assert first[:5] == ids(tmp_path / "run")[:5]
    assert first[5:15] != ids(tmp_path / "run")[5:15]
    return tmp_path, options


def test_a_checkpoint_does_not_join_the_steps_of_another_branch(two_branches):
    folder, options = two_branches
    with (
        pytest.warns(SGDInfluenceWarning, match="another fit has gone on from an earlier checkpoint since"),
        pytest.warns(SGDInfluenceWarning, match="begins with step 15"),
    ):
        callback = train(folder, 3, folder / "step=15-1.ckpt", overwrite=True, **options)
    assert callback.summary["window"]["words"] == "steps 15 to 19: epoch 3"


def test_where_a_run_lies_in_the_way_the_other_branch_is_left_alone(two_branches):
    folder, options = two_branches
    before = {path: path.read_bytes() for path in (folder / "run").rglob("*") if path.is_file()}
    with (
        pytest.warns(SGDInfluenceWarning, match="cannot be joined"),
        pytest.raises(RunDirectoryError, match="already holds a run"),
    ):
        train(folder, 3, folder / "step=15-1.ckpt", **options)
    assert {path: path.read_bytes() for path in (folder / "run").rglob("*") if path.is_file()} == before


def test_a_checkpoint_of_the_branch_that_is_there_is_joined_and_so_is_one_of_their_common_past(two_branches):
    folder, options = two_branches
    past = ids(folder / "run")
    assert train(folder, 3, folder / "step=15-2.ckpt", **options).summary["window"]["first_step"] == 0
    assert ids(folder / "run")[:15] == past[:15]
    again = train(folder, 4, folder / "step=5-1.ckpt", overwrite=True, **options)
    assert ids(again.run_dir)[:5] == past[:5]
    assert again.summary["window"]["words"] == "steps 0 to 19: epochs 0 to 3"


def test_two_fits_that_go_on_at_once_in_one_directory_end_in_refusal(tmp_path):
    """The other one starts, and ends, while this one trains."""

    class Another(pl.Callback):
        def on_train_batch_start(self, trainer, *_):
            if trainer.global_step == 17:
                train(tmp_path, 5, tmp_path / "step=10-1.ckpt")

    cut_short(tmp_path, 1, 12)
    with pytest.raises(RunDirectoryError, match=r"another fit|is damaged, or belongs|cut short or grown|is missing"):
        train(tmp_path, 3, tmp_path / "step=10-1.ckpt", [Another()])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda state: state | {"flavour": 1}, "'flavour'"),
        (lambda state: {key: value for key, value in state.items() if key != "fit"}, "'fit'"),
    ],
)
def test_what_another_version_says_in_a_checkpoint_is_refused_by_name_and_training_goes_on(tmp_path, change, words):
    cut_short(tmp_path, 1, 12)
    checkpoint = torch.load(tmp_path / "step=10-1.ckpt", weights_only=True)
    (key,) = (key for key in checkpoint["callbacks"] if "SGDInfluence" in key)
    checkpoint["callbacks"][key] = change(checkpoint["callbacks"][key])
    torch.save(checkpoint, tmp_path / "other.ckpt")
    with (
        pytest.warns(SGDInfluenceWarning, match=f"written by another version of this package: {words}"),
        pytest.warns(SGDInfluenceWarning, match="begins with step 10"),
    ):
        callback = train(tmp_path, 2, tmp_path / "other.ckpt", overwrite=True)
    assert callback.summary["window"]["words"] == "steps 10 to 19: epochs 2 to 3"
