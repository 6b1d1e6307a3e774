# SPDX-License-Identifier: Apache-2.0
"""A ranking is written as soon as it is there, and nothing that follows costs it anything."""

import warnings
from pathlib import Path

import pytest
import pytorch_lightning as pl
from torch.nn import functional as F

from cases import Plain, loaders, quiet_trainer
from lightning_sgdclean import Ranking, SGDInfluence, retracing
from lightning_sgdclean.base.errors import SGDInfluenceWarning, warn_of

FILES = {"influence.csv", "summary.json", "report.html"}
OPTIONS = {"max_epochs": 1, "precision": "32-true"}


class Unlabelled(Plain):
    """Has no label that a loss call would show."""

    def loss(self, batch, reduction="mean"):
        return F.mse_loss(self.net(batch[0]), batch[0][:, :3], reduction=reduction)


def names_in(folder):
    return {path.name for path in Path(folder).iterdir()}


def test_the_files_are_whole_when_samples_are_looked_at(tmp_path):
    seen = []

    def render(sample):
        seen.append((len(Ranking.load(tmp_path / "run")), (tmp_path / "run" / "summary.json").is_file()))
        return "text"

    callback = SGDInfluence(dirpath=tmp_path / "run", render=render)
    quiet_trainer([callback], **OPTIONS).fit(Plain(), *loaders())
    assert seen
    assert set(seen) == {(23, True)}


def test_an_interrupt_while_samples_are_looked_at_costs_their_pictures_only(tmp_path):
    def render(sample):
        raise KeyboardInterrupt

    callback = SGDInfluence(dirpath=tmp_path / "run", render=render)
    with pytest.warns(SGDInfluenceWarning, match="The page shows no samples: it was interrupted"):
        quiet_trainer([callback], **OPTIONS).fit(Plain(), *loaders())
    assert len(callback.ranking) == 23
    assert names_in(tmp_path / "run") == {*FILES, "trajectory"}


def broken(sample):
    raise ValueError("no picture")


@pytest.mark.parametrize(
    ("module", "options", "match"),
    [
        (Unlabelled, {"columns": ("label",)}, "label"),
        (Plain, {"render": broken}, "23 of 23 samples could not be shown"),
    ],
    ids=["column", "page"],
)
def test_where_warnings_are_errors_files_and_loggers_have_everything(module, options, match, tmp_path):
    callback = SGDInfluence(dirpath=tmp_path / "run", **options)
    logger = pl.loggers.CSVLogger(tmp_path / "logs")
    trainer = quiet_trainer([callback], logger=logger, **OPTIONS)
    with warnings.catch_warnings():
        warnings.simplefilter("error", SGDInfluenceWarning)
        with pytest.raises(SGDInfluenceWarning, match=match):
            trainer.fit(module(), *loaders())
    assert len(callback.ranking) == 23
    assert names_in(tmp_path / "run") == {*FILES, "trajectory"}
    assert names_in(logger.log_dir) >= FILES


def test_of_several_warnings_that_are_errors_none_is_lost():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(SGDInfluenceWarning, match=r"^first\n") as caught:
            warn_of(["first", "second", "third"])
    assert caught.value.__notes__ == ["second", "third"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_a_retrace_that_breaks_off_says_how_it_is_finished(error, tmp_path, monkeypatch, capsys):
    """As by Ctrl-C, or where memory is out."""

    def breaks(*_, **__):
        raise error("out")

    callback = SGDInfluence(dirpath=tmp_path / "run")
    monkeypatch.setattr(retracing, "retrace_steps", breaks)
    with pytest.raises((error, SystemExit)) as caught:  # Lightning makes an exit of an interrupt
        quiet_trainer([callback], **OPTIONS).fit(Plain(), *loaders())
    told = "".join(getattr(caught.value, "__notes__", [])) or capsys.readouterr().err
    assert f"lightning_sgdclean.retrace({str(tmp_path / 'run')!r}, model" in told
    assert names_in(tmp_path / "run") == {"trajectory"}
