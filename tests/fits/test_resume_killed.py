# SPDX-License-Identifier: Apache-2.0
"""``kill -9`` at random moments of the fit and of the retrace: the ranking is that of a run never killed."""

import math
import os
import random
import signal
import time

import numpy as np
import pytest
import pytorch_lightning as pl
from torch.utils.data import DataLoader

from cases import TRAIN, VAL, Plain, adam
from lightning_sgdclean import callback, retrace
from lightning_sgdclean.adjoint import walk as bookmark
from lightning_sgdclean.trajectory.store import Trajectory
from resuming import ByEpoch, train

NUM_KILLS = int(os.environ.get("SGDCLEAN_KILLS", "4"))
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning"),
    # Killed after the last step, but before the file that says that the fit ended was written.
    pytest.mark.filterwarnings("ignore:The fit of .* did not come to its end"),
]


class Slow(pl.Callback):
    """A moment a step, so that a kill can come between any two things; tells when training begins and ends."""

    def __init__(self, pipe):
        self.pipe = pipe

    def on_train_start(self, *_):
        os.write(self.pipe, b"s")

    def on_train_batch_end(self, *_):
        time.sleep(0.01)

    def on_train_end(self, *_):
        os.write(self.pipe, b"e")


def killed_after(folder, seconds, when):
    """Train in a forked process and kill it so long after training began (``b"s"``) or ended (``b"e"``)."""
    heard, said = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            train(folder, 4, [Slow(said)])
        finally:
            os._exit(0)
    os.close(said)
    while os.read(heard, 1) not in (when, b""):
        pass
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    os.close(heard)


def latest_checkpoint(folder):
    found = sorted(folder.glob("*.ckpt"), key=lambda path: int(path.stem.partition("=")[2]))
    return found[-1] if found else None


def killed_fit(folder, chance):
    """Kill a fit, resume it from the last checkpoint (or start it again): the ranking."""
    killed_after(folder, chance.uniform(0, 0.5), b"s")
    options = {} if latest_checkpoint(folder) else {"overwrite": True}
    return train(folder, 4, ckpt_path=latest_checkpoint(folder), **options).ranking


def killed_retrace(folder, chance):
    """Kill the retrace after a fit, and retrace later: the ranking."""
    killed_after(folder, chance.uniform(0, 0.1), b"e")
    assert len(Trajectory(folder / "run" / "trajectory").steps) == 20
    loader = DataLoader(TRAIN, batch_size=5, sampler=ByEpoch())
    options = {"train_dataloaders": loader, "val_dataloaders": DataLoader(VAL, batch_size=4), "epochs": "all"}
    return retrace(folder / "run", Plain(adam, norm=True), **options)


@pytest.mark.parametrize("kill", [killed_fit, killed_retrace])
def test_killed_at_random_moments_the_ranking_is_that_of_a_run_never_killed(tmp_path, monkeypatch, kill):
    monkeypatch.setattr(bookmark, "_SECONDS", 0.0)  # a mark at every step of the walk, so that kills meet their writing
    monkeypatch.setattr(bookmark, "_SHARE", math.inf)
    whole = train(tmp_path / "whole", 4).ranking
    chance = random.Random(kill.__name__)
    for number in range(NUM_KILLS):
        ranking = kill(tmp_path / str(number), chance)
        assert np.array_equal(ranking.sample_id, whole.sample_id)
        assert np.array_equal(ranking.influence, whole.influence)


def test_killed_between_the_last_step_and_the_ranking_a_fit_goes_on_in_the_directory_that_it_is_told(
    tmp_path, monkeypatch
):
    whole = train(tmp_path / "whole", 4).ranking
    with monkeypatch.context() as patch:
        patch.setattr(callback, "rank", _interrupted)
        with pytest.raises(SystemExit):  # what Lightning makes of Ctrl-C
            train(tmp_path / "cut", 4)
    again = train(tmp_path / "cut", 4, ckpt_path=latest_checkpoint(tmp_path / "cut"))
    assert again.run_dir == tmp_path / "cut" / "run"
    assert np.array_equal(again.ranking.influence, whole.influence)


def _interrupted(*_, **__):
    raise KeyboardInterrupt
