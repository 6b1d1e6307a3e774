# SPDX-License-Identifier: Apache-2.0
"""A run that is retraced later begins with the options that it was recorded with."""

import copy
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import pytorch_lightning as pl

from cases import Case, Plain, adam, fit, loaders, quiet_trainer
from lightning_sgdclean import SGDInfluence, counterfactual, retrace
from lightning_sgdclean.base.errors import RunDirectoryError

MODEL = {"make_optimizer": adam, "norm": True, "dropout": 0.2}
CASE = Case("later", MODEL)


def second(module, batch):
    return module.loss(batch) ** 2


def rows(module, batch):
    return module.loss(batch, "none")


class Named(Plain):
    def validation_step(self, batch, batch_idx):
        self.log("margin", -self.loss(batch))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run with few options as they are by default."""
    asked = {"epochs": "all", "mode": "max", "curvature": "finite", "finite_radius": 0.05, "columns": ["by_epoch"]}
    folder = tmp_path_factory.mktemp("asked") / "run"
    callback = SGDInfluence("margin", **asked, verify=2, tolerance=1e-10, dirpath=folder)
    fit(Case("later", MODEL, make=Named), callback)
    return callback


def later(run, function=retrace, model=Named, **options):
    train, val = loaders()
    return function(run.run_dir, model(**MODEL), train_dataloaders=train, val_dataloaders=val, **options)


def assert_same(one, other):
    assert np.array_equal(one.sample_id, other.sample_id)
    assert np.array_equal(one.influence, other.influence)


def test_without_arguments_it_is_the_ranking_of_the_fit(run):
    again = later(run)
    assert_same(again, run.ranking)
    assert list(again.columns) == list(run.ranking.columns)
    assert "unlike_the_run" not in again.summary
    assert again.summary["options"] == run.summary["options"]


def test_what_is_given_counts_and_is_said(run):
    again = later(run, curvature="exact", epochs=1, verify=0)
    assert again.summary["unlike_the_run"] == [
        "curvature='exact' (the run: 'finite')",
        "epochs=1 (the run: 'all')",
        "verify=0 (the run: 2)",
    ]
    assert again.summary["objective"]["mode"] == "max"
    assert again.summary["window"]["first_step"] == 10


def test_counterfactual_runs_begin_with_them_too(run):
    found = later(run, counterfactual, without=[3])
    assert found.predicted is not None
    assert "unlike the run" not in found.words
    assert found.differences == pytest.approx(-(found.values - found.whole))
    assert later(run, counterfactual, without=[3], epochs=1).words.endswith(
        "; unlike the run: epochs=1 (the run: 'all')"
    )


def test_another_objective_does_not_take_the_runs_direction_in_silence(run):
    for given in ({"objective": second}, {"monitor": "margin_epoch"}):
        with pytest.raises(ValueError, match=r"The run had mode='max', and (objective|monitor)= asks for another"):
            later(run, **given)
    assert later(run, objective=second, mode="min").summary["objective"]["mode"] == "min"
    assert_same(later(run, monitor="margin"), run.ranking)


def test_code_that_the_run_had_is_asked_for_by_name(tmp_path):
    callback = SGDInfluence(objective=second, sample_losses=rows, epochs="all", dirpath=tmp_path / "run")
    fit(CASE, callback)
    with pytest.raises(ValueError, match=r"had objective=, which is code and was not written down\. Give objective="):
        later(callback, model=Plain)
    with pytest.raises(ValueError, match=r"had sample_losses=, which is code and was not written down"):
        later(callback, model=Plain, objective=second)
    assert_same(later(callback, model=Plain, objective=second, sample_losses=rows), callback.ranking)
    by_logged = later(callback, model=Plain, monitor="val_loss", sample_losses=None)
    assert not np.array_equal(by_logged.influence, callback.ranking.influence)
    with pytest.raises(ValueError, match="had objective="):
        later(callback, counterfactual, Plain, without=[3], sample_losses=rows)


def test_the_best_model_stays_the_end_point(tmp_path):
    saving = pl.callbacks.ModelCheckpoint(tmp_path, monitor="val_loss")
    callback = SGDInfluence("val_loss", epochs="all", at="best", dirpath=tmp_path / "run")
    trainer = {"enable_checkpointing": True}
    fit(Case("best", MODEL | {"options": {"lr": 0.3}}, trainer, callbacks=lambda: [saving]), callback)
    assert_same(later(callback, model=Plain), callback.ranking)


def test_a_run_of_a_version_that_wrote_no_options_has_the_callbacks_defaults(run, tmp_path):
    older = SimpleNamespace(run_dir=shutil.copytree(run.run_dir, tmp_path / "run"))
    (older.run_dir / "trajectory" / "options.json").unlink()
    again = later(older, monitor="margin")
    assert again.summary["engine"] == "exact"
    assert again.summary["options"]["epochs"] == 1
    assert "unlike_the_run" not in again.summary


def test_damaged_options_are_refused(run, tmp_path):
    damaged = SimpleNamespace(run_dir=shutil.copytree(run.run_dir, tmp_path / "run"))
    path = damaged.run_dir / "trajectory" / "options.json"
    path.write_text(path.read_text().replace("finite", "exact "))
    with pytest.raises(RunDirectoryError, match=r"options\.json is damaged"):
        later(damaged)


# Trainers that copy their callbacks ----------------------------------------------------------------


def test_what_a_copy_of_the_callback_found_is_seen_in_the_callback(tmp_path):
    callback = SGDInfluence("val_loss", dirpath=tmp_path / "run")
    assert (callback.ranking, callback.run_dir, callback.summary) == (None, None, {})
    (copied,) = copy.deepcopy([callback])
    quiet_trainer([copied]).fit(Plain(**MODEL), *loaders())
    assert callback.ranking == copied.ranking
    assert len(callback.ranking) == 23
    assert callback.run_dir == tmp_path / "run"
    assert callback.summary == copied.summary


def test_copies_that_were_fitted_keep_their_own(tmp_path):
    first = SGDInfluence("val_loss", epochs="all")
    second = copy.deepcopy(first)
    for callback, model in ((first, Plain(**MODEL)), (second, Plain())):
        quiet_trainer([callback], default_root_dir=tmp_path).fit(model, *loaders())
    assert first.run_dir != second.run_dir
    assert first.ranking != second.ranking
