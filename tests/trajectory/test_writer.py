# SPDX-License-Identifier: Apache-2.0
"""Writing happens beside the training: in order, from few buffers, and its errors cost the recording only."""

import errno
import math
import os
import re
import resource
import shutil
import threading
from functools import partial
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch

from cases import Case, Plain, fit, loaders, quiet_trainer
from lightning_sgdclean import SGDInfluence
from lightning_sgdclean.base import files
from lightning_sgdclean.base.errors import RunDirectoryError, SGDInfluenceWarning
from lightning_sgdclean.trajectory import flat_state, writer
from lightning_sgdclean.trajectory.flat_state import StateRows
from lightning_sgdclean.trajectory.store import Trajectory
from lightning_sgdclean.trajectory.writer import Background, TrajectoryWriter
from processes import forked
from reference import influences
from small_steps import state, step


def test_jobs_run_in_order_on_another_thread_and_stop_at_the_first_error():
    background, done = Background(), []

    def fail():
        raise OSError("no")

    background.submit(lambda: done.append(threading.current_thread()))
    background.submit(fail)
    background.submit(lambda: done.append("after an error"))
    with pytest.raises(OSError, match="no"):
        background.wait()
    background.wait()
    assert len(done) == 1
    assert done[0] is not threading.main_thread()


def test_jobs_do_not_pile_up():
    background, gate, begun = Background(), threading.Event(), []

    def wait():
        begun.append(1)
        gate.wait(10)

    for _ in range(2):
        background.submit(wait)
    hand_over = threading.Thread(target=background.submit, args=[wait])
    hand_over.start()
    hand_over.join(0.2)
    assert hand_over.is_alive()  # two are waiting: the third has to
    gate.set()
    hand_over.join(10)
    background.wait()
    assert len(begun) == 3


def test_a_job_that_never_ends_is_waited_for_with_a_warning_and_then_given_up_by_name(monkeypatch):
    monkeypatch.setattr(writer, "_TELLS_AFTER", 0.05)
    monkeypatch.setattr(writer, "_GIVES_UP_AFTER", 0.1)
    background, gate, written = Background(), threading.Event(), []
    background.submit(lambda: gate.wait(10))
    background.submit(lambda: written.append(1))
    with (
        pytest.warns(SGDInfluenceWarning, match="waits for the trajectory"),
        pytest.raises(RunDirectoryError, match=r"not written within .* Choose another dirpath="),
    ):
        background.wait()
    background.wait()  # at once
    gate.set()
    background.submit(lambda: written.append(2))
    background.wait()
    assert written == []


def test_a_job_that_raises_a_timeout_of_its_own_is_not_taken_for_one_that_never_ends():
    background = Background()

    def fail():
        raise TimeoutError("the drive")

    background.submit(fail)
    with pytest.raises(TimeoutError, match="the drive"):
        background.wait()


class Harm(pl.Callback):
    """Before the second epoch the files can no longer be written."""

    def __init__(self, harm):
        self.harm = harm

    def on_train_epoch_start(self, trainer, *_):
        if trainer.current_epoch == 1:
            self.harm()


def fill_the_disk(run_dir):
    """No file grows beyond 4,000 bytes: writing fails as it does on a full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (4000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def make_a_file_of_it(run_dir):
    shutil.rmtree(run_dir)
    run_dir.touch()


def assert_harm_costs_the_recording_only(tmp_path, harm):
    module, plain = Plain(norm=True), Plain(norm=True)
    callback = SGDInfluence("val_loss", epochs="all", dirpath=tmp_path / "run")
    pl.seed_everything(0, verbose=False)
    trainer = quiet_trainer([callback, Harm(lambda: harm(tmp_path / "run"))], max_epochs=4)
    with (
        pytest.warns(SGDInfluenceWarning, match=r"Recording stopped at step \d+, training goes on") as caught,
        pytest.raises(RunDirectoryError, match=r"cannot be written|No such file|Not a directory"),
    ):
        trainer.fit(module, *loaders())
    said = next(str(warning.message) for warning in caught if warning.category is SGDInfluenceWarning)
    assert int(said.split("step ")[1].split(",")[0]) < 15  # of 20: not only at the end
    pl.seed_everything(0, verbose=False)
    quiet_trainer(max_epochs=4).fit(plain, *loaders())
    for name, tensor in plain.state_dict().items():
        assert torch.equal(module.state_dict()[name], tensor), name


@pytest.mark.parametrize("harm", [shutil.rmtree, make_a_file_of_it], ids=["directory gone", "directory a file"])
def test_error_of_the_writer_is_a_warning_at_once_and_training_goes_on(tmp_path, harm):
    assert_harm_costs_the_recording_only(tmp_path, harm)


def test_full_disk_costs_the_recording_only(tmp_path):
    """In a process of its own, since the limit would meet what pytest writes, too."""
    done = forked(lambda: assert_harm_costs_the_recording_only(tmp_path, fill_the_disk))
    assert done.returncode == 0, done.stderr


def test_buffers_are_used_again(tmp_path, monkeypatch):
    monkeypatch.setattr(writer, "_SEGMENT_STEPS", 4)
    callback = SGDInfluence("val_loss", epochs="all", dirpath=tmp_path / "run", snapshots="every")
    monkeypatch.setattr(flat_state, "_PIECE_ROWS", 2)
    free, give_back = [], StateRows.give_back

    def counting(self, flat):
        give_back(self, flat)
        free.append(len(self))

    monkeypatch.setattr(StateRows, "give_back", counting)
    fit(Case("long", {}, {"max_epochs": 20}), callback)
    assert len(Trajectory(tmp_path / "run" / "trajectory").kept) == 101
    assert 0 < max(free) < 30
    assert len(callback._recording.writer._rows) == 0  # while the run is retraced, and later


def test_random_states_that_did_not_change_are_written_once(tmp_path):
    sizes = {}
    for dropout in (0.0, 0.5):
        callback = SGDInfluence("val_loss", epochs="all", dirpath=tmp_path / str(dropout), snapshots=100)
        fit(Case("random", {"dropout": dropout}, {"max_epochs": 8}), callback)
        sizes[dropout] = callback.summary["trajectory_bytes"] / 40
        assert callback.summary["replay"]["batches"] == callback.summary["replay"]["batches_bit_for_bit"] == 40
    assert sizes[0.0] < 5000 < sizes[0.5] < 9000  # torch's state is 5 kB, and three of them are 15 kB


def test_influences_do_not_depend_on_when_segments_are_written(tmp_path, monkeypatch):
    whole = SGDInfluence("val_loss", epochs="all", snapshots=3)
    fit(Case("one segment", {"norm": True}), whole)
    monkeypatch.setattr(writer, "_SEGMENT_STEPS", 2)
    pieces = SGDInfluence("val_loss", epochs="all", snapshots=3, dirpath=tmp_path / "run")
    fit(Case("many segments", {"norm": True}), pieces)
    assert (influences(whole) == influences(pieces)).all()
    assert len(list((tmp_path / "run" / "trajectory").glob("segment-*"))) > 7


def test_what_waits_is_written_before_a_trajectory_is_closed(tmp_path, monkeypatch):
    slow, original = threading.Event(), TrajectoryWriter._write

    def write(self, *args):
        slow.wait(0.1)
        original(self, *args)

    monkeypatch.setattr(TrajectoryWriter, "_write", write)
    fit(Case("slow"), SGDInfluence("val_loss", epochs="all", dirpath=tmp_path / "run"))
    assert len(Trajectory(tmp_path / "run" / "trajectory").steps) == 15


class Killed(BaseException):
    """The process is gone at this operation on files."""


@pytest.mark.parametrize("snapshots", [1, 3])
def test_killed_at_any_operation_a_whole_trajectory_is_left(tmp_path, monkeypatch, snapshots):
    """Each rename and each removal in turn is the first that does not happen, and so are all after it."""
    monkeypatch.setattr(writer, "_SEGMENT_STEPS", 2)
    original = {"replace": os.replace, "unlink": Path.unlink}
    budget = {"left": 0}

    def until_killed(name):
        def operate(*args, **options):
            budget["left"] -= 1
            if budget["left"] < 0:
                raise Killed
            return original[name](*args, **options)

        return operate

    monkeypatch.setattr(os, "replace", until_killed("replace"))
    monkeypatch.setattr(Path, "unlink", until_killed("unlink"))
    seen = set()
    for number in range(100):
        folder, budget["left"] = tmp_path / str(number), number
        try:
            record(folder, snapshots)
            survived = True
        except Killed:
            survived = False
        monkeypatch.setitem(budget, "left", 10**9)
        if number == 0:
            with pytest.raises(RunDirectoryError, match="no readable trajectory"):
                Trajectory(folder)
            continue
        steps = [step.index for step in Trajectory(folder).steps]
        assert steps == list(range(steps[0], steps[-1] + 1)) if steps else True
        seen.add(tuple(steps))
        if survived:
            break
    assert survived
    assert {(), (0, 1), (0, 1, 2, 3)} < seen
    assert max(seen, key=lambda steps: steps[-1] if steps else -1)[-1] == 9


def record(folder, interval):
    """Ten steps of five epochs, of which the last two stay."""
    writer = TrajectoryWriter(folder, interval)
    writer.keeps_epochs = True
    writer.begin(state(0.0, False))
    for index in range(10):
        writer.append(step(index, index // 2, index % 2 == 1), partial(state, float(index + 1), True))
        if index % 2 == 1:
            writer.keep_only((index // 2 - 1, math.inf))
    writer.close()


def test_what_a_manifest_names_is_on_disk_before_it_and_so_is_all_of_it_once_flushed(tmp_path, monkeypatch):
    done, replace = [], os.replace
    for module in (files, writer):
        monkeypatch.setattr(module, "put_on_disk", lambda path: done.append(("sync", path.name)))
    monkeypatch.setattr(os, "replace", lambda source, to: [done.append(("rename", to.name)), replace(source, to)])
    record(tmp_path / "run", 3)
    renamed = [number for number, (what, _) in enumerate(done) if what == "rename"]
    for number in renamed:
        what, name = done[number - 1]
        assert what == "sync"
        assert re.fullmatch(rf"\.{re.escape(done[number][1])}\.[0-9a-f]{{16}}\.tmp", name)
    segments = [name for what, name in done if what == "rename" and name.startswith("segment")]
    assert [done[done.index(("rename", name)) + 2] for name in segments] == [("rename", "manifest.json")] * 5
    assert done[-1] == ("sync", "run")


def test_a_disk_that_cannot_hold_what_was_written_is_noticed_before_the_file_gets_its_name(tmp_path, monkeypatch):
    def fail(_):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="Input/output error"):
        record(tmp_path, 1)
    assert list(tmp_path.iterdir()) == []
