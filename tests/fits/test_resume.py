# SPDX-License-Identifier: Apache-2.0
"""A fit that was killed and goes on from a checkpoint is ranked as one that was not."""

import signal
from dataclasses import asdict

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader

from cases import TRAIN, VAL, Case, Plain, adam, fit, quiet_trainer
from lightning_sgdclean import SGDInfluence
from lightning_sgdclean.base.errors import SGDInfluenceWarning
from lightning_sgdclean.trajectory import joining
from lightning_sgdclean.trajectory.joining import CheckpointMark, cut_off, join
from lightning_sgdclean.trajectory.store import Trajectory
from processes import forked
from resuming import ByEpoch, Kill, train


@pytest.mark.parametrize(("snapshots", "step"), [("every", 13), (4, 18)])
def test_killed_and_resumed_run_is_ranked_as_an_uninterrupted_one_to_the_last_bit(tmp_path, snapshots, step):
    ended = forked(lambda: train(tmp_path / "killed", snapshots, [Kill(step)]))
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    checkpoint = tmp_path / "killed" / f"step={step // 5 * 5}.ckpt"
    resumed = train(tmp_path / "killed", snapshots, ckpt_path=checkpoint)
    whole = train(tmp_path / "whole", snapshots)
    assert resumed.summary["window"]["words"] == "steps 0 to 19: epochs 0 to 3"
    assert np.array_equal(resumed.ranking.sample_id, whole.ranking.sample_id)
    assert np.array_equal(resumed.ranking.influence, whole.ranking.influence)
    assert resumed.summary["replay"]["segments"] == resumed.summary["replay"]["segments_bit_for_bit"]


def test_a_best_model_of_before_the_checkpoint_is_known_when_the_fit_goes_on(tmp_path):
    def run(folder, max_epochs, ckpt_path=None):
        pl.seed_everything(1, verbose=False)
        callback = SGDInfluence("val_loss", at="best", dirpath=folder / "run", overwrite=True)
        best = pl.callbacks.ModelCheckpoint(folder, filename="best", monitor="val_loss")
        every = pl.callbacks.ModelCheckpoint(folder, filename="{step}", every_n_epochs=1, save_top_k=-1)
        settings = {"max_epochs": max_epochs, "precision": "32-true", "enable_checkpointing": True}
        trainer = quiet_trainer([callback, best, every], **settings)
        loader = DataLoader(TRAIN, batch_size=5, sampler=ByEpoch())
        model = Plain(adam, {"lr": 0.3})  # which does harm from the second epoch on
        trainer.fit(model, loader, DataLoader(VAL, batch_size=4), ckpt_path=ckpt_path)
        return callback

    whole = run(tmp_path / "whole", 4)
    assert whole.summary["window"]["last_step"] < 10
    run(tmp_path / "parts", 3)
    later = run(tmp_path / "parts", 4, tmp_path / "parts" / "step=15.ckpt")
    assert later.summary["window"] == whole.summary["window"]
    assert later.ranking == whole.ranking


def interrupted(folder, step, snapshots=4):
    class Stop(pl.Callback):
        def on_train_batch_start(self, trainer, *_):
            if trainer.global_step == step:
                raise OSError("power cut")

    with pytest.raises(OSError, match="power cut"):
        train(folder, snapshots, [Stop()])


@pytest.mark.parametrize("checkpoint", [5, 10])
def test_steps_after_the_checkpoint_are_cut_off(tmp_path, checkpoint):
    interrupted(tmp_path, 14)
    before = Trajectory(tmp_path / "run" / "trajectory")
    assert [step.index for step in before.steps] == list(range(14))
    resumed = train(tmp_path, 4, ckpt_path=tmp_path / f"step={checkpoint}.ckpt")
    after = Trajectory(resumed.run_dir / "trajectory")
    assert resumed.run_dir == tmp_path / "run"
    assert after.run == before.run
    assert [step.index for step in after.steps] == list(range(20))
    assert checkpoint in after.kept  # what the fit went on from is held against the steps before it


def test_checkpoint_stays_small_and_loads_with_weights_only(tmp_path):
    interrupted(tmp_path, 12)
    states = torch.load(tmp_path / "step=10.ckpt", weights_only=True)["callbacks"]
    ours = next(state for key, state in states.items() if "SGDInfluence" in key)
    trajectory = Trajectory(tmp_path / "run" / "trajectory")
    assert ours == {
        "run": trajectory.run,
        "fit": trajectory.fits[0][1],
        "step": 10,
        "folder": str(tmp_path / "run"),
        "is_between_steps": True,
        "best": None,
        "evidence": "",
    }


def mark_at(step, run_dir):
    trajectory = Trajectory(run_dir / "trajectory")
    return CheckpointMark(trajectory.run, step, str(run_dir), True, trajectory.fits[0][1])


def test_finished_run_is_left_alone_and_what_goes_on_gets_its_own_directory(tmp_path):
    train(tmp_path, 4, max_epochs=3)
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    mark = mark_at(10, tmp_path / "run")
    folder = join(asdict(mark), None, tmp_path, False)
    assert folder == tmp_path / "sgd_influence"
    assert [step.index for step in Trajectory(folder / "trajectory").steps] == list(range(10))
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before


def test_kill_while_cutting_off_leaves_one_trajectory_or_the_other(tmp_path, monkeypatch):
    interrupted(tmp_path, 14)
    folder = tmp_path / "run" / "trajectory"
    mark = mark_at(8, tmp_path / "run")

    def die(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(joining, "write_manifest", die)
    with pytest.raises(KeyboardInterrupt):
        cut_off(folder, mark)
    monkeypatch.undo()
    assert len(Trajectory(folder).steps) == 14
    (folder / ".segment-000009.safetensors.1.tmp").write_bytes(b"half a file")
    cut_off(folder, mark)
    assert len(Trajectory(folder).steps) == 8
    assert {path.name for path in folder.iterdir()} == {"manifest.json", "options.json", *Trajectory(folder)._files}


@pytest.mark.parametrize("harm", ["gone", "flipped", "another run"])
def test_trajectory_that_cannot_be_joined_is_named_and_training_goes_on(tmp_path, harm):
    interrupted(tmp_path, 12)
    manifest = tmp_path / "run" / "trajectory" / "manifest.json"
    if harm == "gone":
        manifest.unlink()
    elif harm == "flipped":
        segment = next(iter(sorted(manifest.parent.glob("segment-*"))))
        content = segment.read_bytes()
        segment.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    else:
        other = fit_elsewhere(tmp_path)
        manifest.write_bytes((other / "trajectory" / "manifest.json").read_bytes())
    with (
        pytest.warns(SGDInfluenceWarning, match="cannot be joined, so only steps from here on"),
        pytest.warns(SGDInfluenceWarning, match="begins with step 10, at the start of epoch 2;"),
    ):
        callback = train(tmp_path, 4, ckpt_path=tmp_path / "step=10.ckpt", overwrite=True)
    assert callback.summary["window"]["words"] == "steps 10 to 19: epochs 2 to 3"


def fit_elsewhere(folder):
    callback = SGDInfluence("val_loss", epochs="all", dirpath=folder / "other")
    fit(Case("other"), callback)
    return callback.run_dir


def test_shuffled_order_is_retraced_as_it_was_really_drawn(tmp_path):
    """The usual loader: what comes after the resume is in another order than without, but it is what was trained on."""

    def go_on(ckpt_path, callbacks):
        pl.seed_everything(2, verbose=False)
        module = Plain(norm=True)
        trainer = quiet_trainer(callbacks, max_epochs=4, enable_checkpointing=True)
        train = DataLoader(TRAIN, batch_size=5, shuffle=True)
        trainer.fit(module, train, DataLoader(VAL, batch_size=4), ckpt_path=ckpt_path)

    class Stop(pl.Callback):
        def on_train_epoch_start(self, trainer, *_):
            if trainer.current_epoch == 2:
                raise OSError("power cut")

    saving = pl.callbacks.ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    first = SGDInfluence("val_loss", epochs="all", dirpath=tmp_path / "run", snapshots=4)
    with pytest.raises(OSError, match="power cut"):
        go_on(None, [first, saving, Stop()])
    second = SGDInfluence("val_loss", epochs="all", dirpath=tmp_path / "run", snapshots=4)
    go_on(tmp_path / "epoch=1.ckpt", [second, saving])
    assert second.summary["window"]["words"] == "steps 0 to 19: epochs 0 to 3"
    assert second.ranking.visits.sum() == 4 * len(TRAIN)
    assert second.summary["replay"]["batches"] == second.summary["replay"]["batches_bit_for_bit"] == 20
