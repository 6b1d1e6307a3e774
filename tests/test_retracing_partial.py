# SPDX-License-Identifier: Apache-2.0
"""A run whose fit did not come to its end is ranked by its recorded steps, and never without a word."""

import re
import resource
import signal

import numpy as np
import pytest
import pytorch_lightning as pl
from torch.utils.data import DataLoader

from cases import TRAIN, VAL, Plain, adam, quiet_trainer
from lightning_sgdclean import Ranking, SGDInfluence, counterfactual, retrace
from lightning_sgdclean.base.errors import RunDirectoryError, SGDInfluenceWarning
from processes import forked
from resuming import ByEpoch, Kill, train

SAID = r"The fit of .*run did not come to its end.* end with step {}, {} epoch {}\. .*go on from a checkpoint"


class FullDisk(pl.Callback):
    """From the fourth epoch on no file grows beyond 4,000 bytes: writing fails as it does on a full disk."""

    def on_train_epoch_start(self, trainer, *_):
        if trainer.current_epoch == 3:
            resource.setrlimit(resource.RLIMIT_FSIZE, (4000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


class Fails(pl.Callback):
    def on_train_batch_start(self, trainer, *_):
        if trainer.global_step == 12:
            raise ArithmeticError("not ours")


def later(folder, use=retrace, **options):
    train_loader, val_loader = DataLoader(TRAIN, batch_size=5, sampler=ByEpoch()), DataLoader(VAL, batch_size=4)
    options = {"epochs": "all", "train_dataloaders": train_loader, "val_dataloaders": val_loader, **options}
    return use(folder / "run", Plain(adam, norm=True), **options)


def killed(folder):
    done = forked(lambda: train(folder, 4, [Kill(12)]))
    assert done.returncode == -signal.SIGKILL, done.stderr
    return 12


def on_a_full_disk(folder):
    """Without checkpoints, which a full disk stops as well."""

    def fit():
        pl.seed_everything(1, verbose=False)
        callback = SGDInfluence(epochs="all", dirpath=folder / "run")
        loader = DataLoader(TRAIN, batch_size=5, sampler=ByEpoch())
        trainer = quiet_trainer([callback, FullDisk()], max_epochs=5, precision="32-true")
        try:
            trainer.fit(Plain(adam, norm=True), loader, DataLoader(VAL, batch_size=4))
        except RunDirectoryError as error:
            return 3 if "could not be written any more" in str(error) else 4

    done = forked(fit)
    assert done.returncode == 3, done.stderr
    return 20


def ended_by_an_exception(folder):
    with pytest.raises(ArithmeticError):
        train(folder, 4, [Fails()])
    return 12


@pytest.mark.parametrize("breaks", [killed, on_a_full_disk, ended_by_an_exception])
def test_a_run_that_is_not_whole_is_said_to_be_partial_and_ranked_as_the_shorter_run(tmp_path, breaks):
    most = breaks(tmp_path)
    with pytest.warns(SGDInfluenceWarning, match="did not come to its end") as caught:
        ranking = later(tmp_path)
    window = ranking.summary["window"]
    end = window["last_step"] + 1
    assert 0 < end <= most
    epoch, is_last = (end - 1) // 5, end % 5 == 0
    said = [str(warning.message) for warning in caught if warning.category is SGDInfluenceWarning]
    assert len(said) == 1
    assert re.match(SAID.format(end - 1, "the last of" if is_last else "inside of", epoch), said[0])
    assert window["partial"] is True
    assert window["words"].endswith("; the fit did not come to its end")
    shorter = train(tmp_path / "shorter", 4, max_epochs=end // 5) if is_last else None
    if shorter is not None:
        assert np.array_equal(shorter.ranking.influence, ranking.influence)
        assert shorter.summary["window"]["partial"] is False
    with pytest.warns(SGDInfluenceWarning, match="did not come to its end"):
        found = later(tmp_path, counterfactual, without=[0])
    assert found.partial is True


def test_of_a_whole_run_nothing_is_said_and_what_is_found_tells_window_and_trust_as_the_callback_does(tmp_path):
    callback = train(tmp_path, 4, verify=3)
    ranking = later(tmp_path, verify=3)
    told = {name: value for name, value in callback.summary.items() if name in ranking.summary}
    assert {"window", "trust", "replay", "objective", "engine", "end_point", "precision", "optimizer"} <= told.keys()
    for summary in (told, ranking.summary):
        summary["trust"].pop("seconds")
    assert ranking.summary == told
    assert ranking.summary["window"]["partial"] is False
    assert callback.ranking.summary is callback.summary
    assert later(tmp_path, counterfactual, without=[0]).partial is False


def test_a_ranking_from_elsewhere_has_no_summary(tmp_path):
    ranking = Ranking.from_influence([1], [0.5], [1])
    assert ranking.summary is None
    assert Ranking.load(ranking.save(tmp_path / "x.csv")).summary is None
