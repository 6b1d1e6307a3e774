# SPDX-License-Identifier: Apache-2.0
"""What a trajectory will take is said before the first step, and is what it takes."""

import math
import time
from dataclasses import replace

import numpy as np
import pytest
import pytorch_lightning as pl
import torch

from cases import Plain, adam, adamw, loaders, quiet_trainer, sgd
from lightning_sgdclean import SGDInfluence, retrace
from lightning_sgdclean.base.errors import BudgetError, RunDirectoryError, SGDInfluenceWarning
from lightning_sgdclean.record.budget import Needs, budget_for, expected_state_bytes, window_length
from lightning_sgdclean.trajectory.live_state import current_state, trained_parameters
from lightning_sgdclean.trajectory.schedule import reversal, revolve
from lightning_sgdclean.trajectory.store import Trajectory

MB = 10**6
NEEDS = Needs(num_steps=1000, batches_a_step=1, state_bytes=MB, slots=10**6, max_bytes=math.inf)


def test_auto_keeps_every_state_of_a_small_model_and_few_of_a_large_one():
    assert budget_for("auto", NEEDS).interval == 1
    assert budget_for("auto", replace(NEEDS, state_bytes=2 * MB)).interval == 32
    assert budget_for("auto", replace(NEEDS, num_steps=None)).interval is None
    assert budget_for("every", replace(NEEDS, state_bytes=1000 * MB)).interval == 1
    assert budget_for(7, replace(NEEDS, state_bytes=1000 * MB)).interval == 7


def test_auto_keeps_as_many_as_fit():
    large = replace(NEEDS, state_bytes=100 * MB)
    records = 1000 * 8192
    assert budget_for("auto", replace(large, max_bytes=33 * 100 * MB + records)).interval == 32
    assert budget_for("auto", replace(large, max_bytes=11 * 100 * MB + records)).interval == 100
    assert budget_for("auto", replace(large, max_bytes=2 * 100 * MB + records)).interval == 1000
    for allowed in range(2, 40):
        budget = budget_for("auto", replace(large, max_bytes=allowed * 100 * MB + records))
        assert budget.nbytes <= allowed * 100 * MB + records


@pytest.mark.parametrize("policy", ["auto", "every", "sqrt", 5])
def test_what_does_not_fit_is_refused_with_the_numbers(policy):
    with pytest.raises(BudgetError, match=r"would take about .* snapshots of 100 MB .* of 150 MB that it may take"):
        budget_for(policy, replace(NEEDS, state_bytes=100 * MB, max_bytes=150 * MB))


def test_estimate_in_words_counts_snapshots_and_repeated_steps():
    text = budget_for("sqrt", replace(NEEDS, num_steps=100, slots=3)).text
    assert text.startswith("Trajectory: about 11.8 MB (11 snapshots of 1 MB and 819 kB of records).")
    steps = sum(word in ("step", "check") for word, _ in reversal(range(0, 101, 10), 0, 100, revolve(3)))
    assert f"Retrace: about {2.7 + steps / 100:.1f} times the training of at most 100 steps." in text


def test_length_of_the_window_before_training():
    assert window_length(100, 3, 10, -1, "all") == 340
    assert window_length(100, 1, 10, -1, 1) == 200  # the last whole epoch, and one that was started
    assert window_length(100, 1, 1, -1, 1) == 100
    assert window_length(100, 1, None, 50, "all") == 50
    assert window_length(100, 1, None, -1, "all") is None
    assert window_length(math.inf, 1, 10, -1, "all") is None
    assert window_length(math.inf, 1, 10, 70, 1) == 70
    assert window_length(100, 1, 10, -1, 1, num_windows=2) == 400
    assert window_length(100, 1, 3, -1, 1, num_windows=2) == 300


OPTIMIZERS = {
    "sgd": sgd,
    "momentum": lambda params: sgd(params, momentum=0.9),
    "adam": adam,
    "adamw amsgrad fused": lambda params: adamw(params, amsgrad=True, fused=True),
    "rmsprop": lambda params: torch.optim.RMSprop(params, momentum=0.9, centered=True),
    "adagrad": torch.optim.Adagrad,
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_expected_bytes_of_a_state_are_those_after_a_step(name):
    module = Plain(norm=True)
    optimizer = OPTIMIZERS[name](module.parameters())
    params = trained_parameters(module, optimizer)
    expected = expected_state_bytes(current_state(module, params, optimizer), optimizer)
    for param in params.values():
        param.grad = torch.ones_like(param)
    optimizer.step()
    found = current_state(module, params, optimizer).nbytes
    assert abs(found - expected) <= 16 * len(params)  # the counters


class Wide(Plain):
    """States of 1.7 MB, beside which the records are small."""

    def __init__(self):
        super().__init__(adam)
        self.net[0], self.net[4] = torch.nn.Linear(5, 8000), torch.nn.Linear(8000, 3)


def test_minutes_at_a_pace():
    budget = budget_for("every", NEEDS)
    assert budget.summary(6.0)["minutes"] == pytest.approx(2.7 * 1000 * 0.1)
    assert budget.summary(None)["minutes"] is None
    assert budget.at_pace(0.1, 5000) == (
        "At the pace of the first batches: training about 8.3 min, retrace about 4.5 min."
    )
    unknown = budget_for("every", replace(NEEDS, num_steps=None))
    assert unknown.summary(6.0)["minutes"] is None
    assert unknown.at_pace(1.0, None) == "At the pace of the first batches: retrace of a step about 3.7 s."


def test_time_is_told_once_and_about_right(capsys):
    pause = pl.callbacks.LambdaCallback(
        on_train_batch_end=lambda *_: time.sleep(0.1)
    )  # beside which load hardly counts
    callback = SGDInfluence("val_loss", epochs="all")
    trainer = quiet_trainer([callback, pause], enable_progress_bar=True, max_epochs=4)
    trainer.fit(Plain(), *loaders())
    said = [line for line in capsys.readouterr().out.splitlines() if "At the pace" in line]
    assert len(said) == 1
    planned = callback.summary["budget"]
    assert planned["minutes"] == pytest.approx(2.7 * 20 * 0.1 / 60, rel=0.5)
    assert planned["snapshots"] == 21
    assert planned["bytes"] == callback._recording.outlook.budget.nbytes


@pytest.mark.parametrize("snapshots", ["every", "sqrt"])
def test_bytes_announced_are_about_those_written(snapshots, capsys):
    callback = SGDInfluence("val_loss", epochs="all", snapshots=snapshots)
    trainer = quiet_trainer([callback], enable_progress_bar=True, max_epochs=8)
    trainer.fit(Wide(), *loaders())
    said = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("Trajectory: about"))
    value, unit = said.split()[2:4]
    assert float(value) * {"kB": 1e3, "MB": 1e6}[unit] == pytest.approx(callback.summary["trajectory_bytes"], rel=0.15)


class BestInSecond(Wide):
    """Says that it was best after its second epoch."""

    def on_validation_epoch_end(self):
        self.log("distance", float(abs(self.current_epoch - 1)))


def best_run(folder, callbacks=(), max_epochs=8, max_bytes=None, **options):
    """A run with one window far behind the other, and the ModelCheckpoint that saved its best model."""
    pl.seed_everything(1, verbose=False)
    options = {"epochs": 1, "at": "best", "snapshots": "every", "dirpath": folder / "run"} | options
    callback = SGDInfluence("val_loss", max_bytes=max_bytes, **options)
    saving = pl.callbacks.ModelCheckpoint(folder, filename="best", monitor="distance")
    settings = {"enable_checkpointing": True, "precision": "32-true"}
    trainer = quiet_trainer([callback, saving, *callbacks], max_epochs=max_epochs, **settings)
    trainer.fit(BestInSecond(), *loaders())
    return callback


class BytesOnDisk(pl.Callback):
    """What lies there at the end of each epoch, before anything of it is let go; put in front of the callback."""

    def __init__(self, folder):
        self.folder, self.found = folder / "run" / "trajectory", []

    def on_train_epoch_end(self, trainer, module):
        callback = next(one for one in trainer.callbacks if isinstance(one, SGDInfluence))
        callback._recording.flush(trainer)
        self.found.append(sum(path.stat().st_size for path in self.folder.glob("segment-*")))


@pytest.mark.parametrize("snapshots", ["every", 2])
def test_two_windows_are_kept_where_the_best_model_may_lie_far_back(tmp_path, snapshots):
    disk = BytesOnDisk(tmp_path)
    callback = best_run(tmp_path, [disk], snapshots=snapshots)
    budget = callback._recording.outlook.budget
    assert "in two windows, the best model's and the latest" in budget.text
    assert len(disk.found) == 8
    assert max(disk.found) <= budget.nbytes
    assert callback.summary["window"]["last_step"] == 9
    again = best_run(tmp_path / "bounded", max_bytes=budget.nbytes, snapshots=snapshots)
    assert again.ranking == callback.ranking


def test_both_windows_can_be_retraced_later_and_none_reaches_over_what_was_let_go(tmp_path):
    callback = best_run(tmp_path)
    folder, best = callback.run_dir / "trajectory", callback.summary["window"]["last_step"] + 1
    early, late = Trajectory(folder, best), Trajectory(folder)
    assert early.steps[-1].index < late.steps[0].index - 1
    assert best in [early.steps[0].index + position for position in early.kept]

    def later(**options):
        train, val = loaders()
        return retrace(callback.run_dir, BestInSecond(), train_dataloaders=train, val_dataloaders=val, **options)

    assert np.array_equal(later(at="best").influence, callback.ranking.influence)
    at_last = best_run(tmp_path / "last", at="last")
    assert np.array_equal(later(at="last").influence, at_last.ranking.influence)
    for epochs in (3, "all"):
        with pytest.raises(RunDirectoryError, match=r"the window of epochs=.* would begin with epoch"):
            later(at="last", epochs=epochs)


def test_a_best_model_whose_steps_were_let_go_is_refused(tmp_path):
    folder = best_run(tmp_path).run_dir / "trajectory"
    gone = Trajectory(folder).steps[0].index - 1
    with pytest.raises(RunDirectoryError, match=rf"lead to step {gone}: they were let go"):
        Trajectory(folder, gone)


def test_max_bytes_chooses_the_policy(tmp_path):
    for max_bytes, kept in ((None, 16), (12 * MB, 5), (8 * MB, 4)):
        callback = SGDInfluence("val_loss", epochs="all", max_bytes=max_bytes, dirpath=tmp_path / str(max_bytes))
        quiet_trainer([callback]).fit(Wide(), *loaders())
        assert len(Trajectory(callback.run_dir / "trajectory").kept) == kept
        assert callback.summary["trajectory_bytes"] <= (max_bytes or math.inf)


def test_run_that_would_not_fit_is_refused_before_its_first_step():
    class Count(pl.Callback):
        steps = 0

        def on_train_batch_start(self, *_):
            self.steps += 1

    count = Count()
    trainer = quiet_trainer([SGDInfluence("val_loss", epochs="all", max_bytes=1000), count])
    with pytest.raises(BudgetError, match="of 1 kB that it may take"):
        trainer.fit(Plain(), *loaders())
    assert count.steps == 0


def test_run_that_outgrows_its_bytes_stops_recording_and_goes_on_training():
    """A loader without a length: nothing could be planned."""

    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter([train.dataset[i] for i in range(len(train.dataset))])

    train, val = loaders()
    callback = SGDInfluence("val_loss", epochs="all", max_bytes=15_000, sample_ids=lambda batch: batch[2])
    trainer = quiet_trainer([callback], max_epochs=4)
    stream = torch.utils.data.DataLoader(Stream(), batch_size=5)
    with (
        pytest.warns(SGDInfluenceWarning, match="Recording stopped at step .*would now take"),
        pytest.raises(BudgetError, match=r"of 15 kB that it may take"),
    ):
        trainer.fit(Plain(), stream, val)
    assert trainer.global_step == 20
