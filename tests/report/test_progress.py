# SPDX-License-Identifier: Apache-2.0
"""The retrace's bar: in the style of the Trainer's, true in its numbers, quiet where the Trainer is."""

import importlib
import re

import pytest
import pytorch_lightning as pl
import torch

from cases import Plain, loaders, quiet_trainer
from lightning_sgdclean import SGDInfluence
from lightning_sgdclean.report import words as progress
from lightning_sgdclean.report.words import harm_of, retrace_bar

INFLUENCE = torch.tensor([-0.5, 0.25, 0.0, -0.125], dtype=torch.float64)


def fit(tmp_path, bar, package=pl, **options):
    callback = SGDInfluence("val_loss", epochs="all", dirpath=tmp_path / "run")
    trainer = quiet_trainer([callback, *bar], package, max_epochs=2, enable_progress_bar=True, **options)
    trainer.fit(Plain(), *loaders())
    return callback.ranking


def last_line(text, start):
    """The bar as it looked at its end."""
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)
    return [line for line in re.split(r"[\r\n]+", plain) if line.startswith(start)][-1]


def test_harm_is_the_sum_of_the_negative_influences():
    assert harm_of(INFLUENCE) == -0.625
    assert harm_of(torch.zeros(3)) == 0.0


def test_after_a_tqdm_bar_the_retrace_has_one(tmp_path, capsys):
    ranking = fit(tmp_path, [pl.callbacks.TQDMProgressBar()])
    out = capsys.readouterr().out  # where Lightning's own bars go
    harm = ranking.influence[ranking.influence < 0].sum()
    assert "10/10 [00:00<00:00" in last_line(out, "Retracing")
    assert f"harm so far {harm:.3g}]" in last_line(out, "Retracing")
    assert out.index("Trajectory: about") < out.index("Epoch 0")  # the plan comes first


@pytest.mark.parametrize("name", ["pytorch_lightning", "lightning.pytorch"])
def test_rich_bars_of_both_packages_are_known(capsys, name):
    pytest.importorskip(name)
    package = importlib.import_module(name)
    style = type("Mine", (package.callbacks.RichProgressBar,), {})()
    style.setup(quiet_trainer(package=package), None, "fit")
    with retrace_bar(style, 1) as advance:
        advance(INFLUENCE)
    assert "━" in last_line(capsys.readouterr().out, "Retracing")


def test_after_a_rich_bar_the_retrace_has_one(tmp_path, capsys):
    terminal = {"force_terminal": True, "width": 150}
    ranking = fit(tmp_path, [pl.callbacks.RichProgressBar(console_kwargs=terminal)])
    out = capsys.readouterr().out
    harm = ranking.influence[ranking.influence < 0].sum()
    assert "10/10" in last_line(out, "Retracing")
    assert last_line(out, "Retracing").rstrip().endswith(f"harm so far {harm:.3g}")
    assert out.index("Trajectory: about") < out.index("Epoch 0")


def test_a_rich_bar_goes_on_in_the_next_fit(tmp_path, capsys):
    trainer = quiet_trainer(
        [SGDInfluence("val_loss", dirpath=tmp_path / "run", overwrite=True), pl.callbacks.RichProgressBar()],
        max_epochs=1,
        enable_progress_bar=True,
    )
    trainer.fit(Plain(), *loaders())
    capsys.readouterr()
    trainer.fit_loop.max_epochs = 2
    trainer.fit(Plain(), *loaders())
    out = capsys.readouterr().out
    assert "Epoch 1/1" in out
    assert "Retracing" in out


@pytest.mark.parametrize("refresh_rate", [None, 0])
def test_a_quiet_trainer_stays_quiet(tmp_path, capsys, refresh_rate):
    bar = [] if refresh_rate is None else [pl.callbacks.RichProgressBar(refresh_rate=0)]
    callback = SGDInfluence("val_loss", dirpath=tmp_path / "run")
    quiet_trainer([callback, *bar], max_epochs=1, enable_progress_bar=bool(bar)).fit(Plain(), *loaders())
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "Retracing" not in captured.err


def test_a_bar_of_another_kind_is_followed_by_a_tqdm_one(capsys):
    with retrace_bar(object(), 2) as advance:
        advance(INFLUENCE)
        advance(INFLUENCE)
    assert re.search(r"Retracing: 100%.* 2/2 .*harm so far -0.625", last_line(capsys.readouterr().out, "Retracing"))


def test_the_harm_is_summed_a_few_times_a_second_only(monkeypatch):
    now, sums = [0.0], []
    monkeypatch.setattr(progress, "monotonic", lambda: now[0])
    advance = progress._now_and_then(sums.append, 1000, lambda: now.__setitem__(0, now[0] + 0.001))
    for _ in range(1000):
        advance(INFLUENCE)
    assert 10 <= len(sums) <= 12  # of one second, the last step's included


def test_an_error_in_the_walk_closes_the_bar(capsys):
    with pytest.raises(KeyError), retrace_bar(pl.callbacks.TQDMProgressBar(), 3):
        raise KeyError
    with retrace_bar(pl.callbacks.TQDMProgressBar(), 3) as advance:
        advance(INFLUENCE)
    assert "\n\n\n" not in capsys.readouterr().out
