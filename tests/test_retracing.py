# SPDX-License-Identifier: Apache-2.0
"""What was recorded is retraced later, elsewhere, without the Trainer of then, to the same result."""

import json
import math
import resource
import shutil
import signal
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader

from cases import CASES, TRAIN, VAL, Case, Plain, adam, fit, loaders, quiet_trainer
from datasets import noisy_collate
from lightning_sgdclean import Ranking, SGDInfluence, retrace, retracing
from lightning_sgdclean.adjoint import backward
from lightning_sgdclean.adjoint import walk as bookmark
from lightning_sgdclean.base.errors import (
    ObjectiveError,
    ReplayMismatchError,
    RunDirectoryError,
    SGDInfluenceWarning,
    UnsupportedTrainingError,
)
from processes import python
from reference import ranked

MODEL = {"make_optimizer": adam, "norm": True, "dropout": 0.2}
CASE = Case("later", MODEL)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    callback = SGDInfluence("val_loss", epochs="all", snapshots=4, dirpath=tmp_path_factory.mktemp("later") / "run")
    fit(CASE, callback)
    return callback


def later(run, model=None, **options):
    train, val = loaders()
    options = {"train_dataloaders": train, "val_dataloaders": val, "epochs": "all", **options}
    return retrace(run.run_dir, model or Plain(**MODEL), **options)


def assert_same(one, other):
    assert np.array_equal(one.sample_id, other.sample_id)
    assert np.array_equal(one.influence, other.influence)
    assert np.array_equal(one.visits, other.visits)


@pytest.mark.parametrize("name", ["sgd", "batchnorm", "warm-up from zero", "accumulate 2", "clip norm"])
def test_retraced_later_it_is_the_same_ranking_to_the_last_bit(recorded, name):
    callback, case = recorded(name, snapshots="sqrt"), CASES[name]
    train, val = loaders(**case.loader)
    model = Plain(**case.module)
    with torch.no_grad():
        for param in model.parameters():
            param.add_(1.0)  # the weights that it comes with do not matter
    again = retrace(callback.run_dir, model, train_dataloaders=train, val_dataloaders=val, epochs="all")
    assert_same(again, callback.ranking)


class Parts(NamedTuple):
    columns: Any
    names: Any


class Unpacking(Plain):
    def training_step(self, batch, batch_idx):
        return super().training_step(batch.columns, batch_idx)


def noisy_parts(items):
    columns = noisy_collate(items)
    return Parts(columns, [str(i) for i in columns[2].tolist()])


def test_kept_batches_of_the_users_own_classes_are_put_together_again_later():
    case = Case("parts", MODEL, {}, {"collate_fn": noisy_parts}, make=Unpacking)
    callback = ranked(case, keep_batches=True, snapshots=3)
    options = {"val_dataloaders": loaders()[1], "epochs": "all"}
    train = loaders(collate_fn=noisy_parts)[0]
    again = retrace(callback.run_dir, Unpacking(**MODEL), train_dataloaders=train, **options)
    assert_same(again, callback.ranking)
    with pytest.raises(
        RunDirectoryError, match=r"holds a test_retracing\.Parts, which no batch of this process is made of"
    ):
        retrace(callback.run_dir, Unpacking(**MODEL), train_dataloaders=loaders()[0], **options)


ELSEWHERE = """
import os, signal, sys
from pathlib import Path
from types import SimpleNamespace

import torch

import test_retracing as t

torch.set_num_threads(1)  # as in the tests: threads change the order of sums
run = SimpleNamespace(run_dir=Path(sys.argv[1]))
print(t.own_key(t.losses_with(t.two_objectives, 3)), flush=True)
t.later(run).save(sys.argv[2])
t.bookmark._SECONDS = 0.0
t.bookmark._SHARE = float("inf")
original, walked = t.backward.retrace_step, []

def dying(*args):
    walked.append(args[0])
    if len(walked) == 8:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(*args)

t.backward.retrace_step = dying
t.later(run)
"""


@pytest.fixture(scope="module")
def elsewhere(run, tmp_path_factory):
    """A new process retraces a copy of the run, then once more, and is killed in the middle of that walk."""
    folder = tmp_path_factory.mktemp("elsewhere")
    copy = shutil.copytree(run.run_dir, folder / "run")
    ended = python("-c", ELSEWHERE, copy, folder / "later.csv", check=False)
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    return SimpleNamespace(run_dir=copy, ranking=Ranking.load(folder / "later.csv"), said=ended.stdout)


def test_another_process_gives_the_same_ranking(run, elsewhere):
    assert_same(elsewhere.ranking, run.ranking)


def test_other_objectives_windows_and_engines_are_those_of_a_run_that_had_them(run):
    def second(module, batch):
        return F.cross_entropy(module.net(batch[0]), batch[1]) ** 2

    for options in ({"objective": second}, {"epochs": 1}, {"curvature": "finite"}, {"mode": "max"}):
        then = SGDInfluence("val_loss", **{"epochs": "all", "snapshots": "every", **options})
        fit(CASE, then)
        assert_same(later(run, **options), then.ranking)


def test_weights_random_states_and_files_stay_as_they_are(run):
    model = Plain(**MODEL)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    files = {path: path.read_bytes() for path in run.run_dir.rglob("*") if path.is_file()}
    randomness = torch.get_rng_state()
    later(run, model)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, weights[name].to(tensor.dtype)), name
    assert torch.equal(torch.get_rng_state(), randomness)
    assert {path: path.read_bytes() for path in run.run_dir.rglob("*") if path.is_file()} == files


def test_datamodule_serves_as_well(run):
    class Data(pl.LightningDataModule):
        def train_dataloader(self):
            return DataLoader(TRAIN, batch_size=5)

        def val_dataloader(self):
            return DataLoader(VAL, batch_size=4)

    assert_same(retrace(run.run_dir, Plain(**MODEL), datamodule=Data(), epochs="all"), run.ranking)


class InDict(Plain):
    def training_step(self, batch, batch_idx):
        return super().training_step(batch["a"], batch_idx)


@pytest.mark.parametrize("keep_batches", [True, False])
def test_a_loader_may_lie_in_a_dict(tmp_path, keep_batches):
    callback = SGDInfluence("val_loss", epochs="all", dirpath=tmp_path / "run", keep_batches=keep_batches)
    train, val = loaders()
    quiet_trainer([callback]).fit(InDict(**MODEL), {"a": train}, val)
    assert_same(later(callback, InDict(**MODEL), train_dataloaders={"a": train}), callback.ranking)


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (
            lambda: Plain(norm=True),
            r"was trained by torch.optim.adam.Adam, but configure_optimizers of this model gives torch",
        ),
        (lambda: Plain(adam), r"of another model: the trained parameter 'net.0.bias' has shape none"),
        (lambda: Plain(adam, norm=True, two_groups=True), r"parameters in other groups"),
    ],
)
def test_another_model_is_refused_by_name(run, model, words):
    with pytest.raises(RunDirectoryError, match=words):
        later(run, model())


def test_other_data_or_another_network_of_the_same_parameters_are_refused(run):
    shuffled = torch.utils.data.Subset(TRAIN, range(22, -1, -1))
    with pytest.raises(ReplayMismatchError, match="hold other data"):
        later(run, train_dataloaders=DataLoader(shuffled, batch_size=5))
    with pytest.raises(ReplayMismatchError, match=r"loss .* instead of"):
        later(run, Plain(**MODEL | {"dropout": 0.4}))


def test_without_validation_data_it_is_refused_at_once(run):
    with pytest.raises(ObjectiveError, match="Give val_dataloaders= or a datamodule="):
        retrace(run.run_dir, Plain(**MODEL), train_dataloaders=loaders()[0])


def test_directory_without_a_trajectory_is_refused(tmp_path):
    with pytest.raises(RunDirectoryError, match="holds no readable trajectory"):
        retrace(tmp_path, Plain(**MODEL), train_dataloaders=loaders()[0], val_dataloaders=loaders()[1])


def test_error_after_fit_gives_the_call_that_finishes_the_job(tmp_path):
    def fails(module, batch):
        loss = F.cross_entropy(module.net(batch[0]), batch[1])
        return loss * float("nan")

    asked = {"objective": {"mine": fails}, "epochs": "all", "tolerance": 1e-4, "columns": ["loss"]}
    callback = SGDInfluence(**asked, dirpath=tmp_path / "run")
    with pytest.raises(Exception, match="finite") as caught:
        quiet_trainer([callback]).fit(Plain(), *loaders())
    note = " ".join(caught.value.__notes__)
    assert note.endswith(
        f"lightning_sgdclean.retrace({str(tmp_path / 'run')!r}, model, train_dataloaders=..., val_dataloaders=..., "
        "objective={'mine': ...}, epochs='all', tolerance=0.0001, columns=('loss',))"
    )
    train, val = loaders()
    given = {"train_dataloaders": train, "val_dataloaders": val}
    with pytest.raises(ValueError, match=r"had objective=, which is code.*Give objective= again, or monitor="):
        retrace(tmp_path / "run", Plain(), **given)
    ranking = retrace(tmp_path / "run", Plain(), **given, objective=None)
    assert len(ranking) == 23


class Interrupted(Exception):
    """Stands for a kill in the middle of the walk."""


def interrupt(monkeypatch, run, after, **options):
    """Retrace so many steps, each of them marked, and no further."""
    monkeypatch.setattr(bookmark, "_SECONDS", 0.0)
    monkeypatch.setattr(bookmark, "_SHARE", math.inf)
    passed = bookmark.Bookmark.pass_by

    def pass_by(self, done, progress):
        passed(self, done, progress)
        if done == after:
            raise Interrupted

    with monkeypatch.context() as patched:
        patched.setattr(bookmark.Bookmark, "pass_by", pass_by)
        with pytest.raises(Interrupted):
            later(run, **options)


def steps_walked(monkeypatch, retracing):
    walked, original = [], backward.retrace_step
    with monkeypatch.context() as patched:
        patched.setattr(backward, "retrace_step", lambda *args: walked.append(args[0].index) or original(*args))
        return retracing(), walked


def two_objectives(module, batch):
    return module.net(batch[0]).pow(2).mean()


SEVERAL = {"objective": {"a": Plain.loss, "b": two_objectives}, "columns": ("by_epoch",)}


@pytest.mark.parametrize(
    ("options", "after"),
    [(SEVERAL, 1), (SEVERAL, 6), (SEVERAL, 14), ({}, 6), ({"curvature": "finite"}, 6)],
    ids=["several, at once", "several", "several, at last", "one", "finite"],
)
def test_interrupted_it_goes_on_where_it_was_to_the_same_bits(monkeypatch, run, after, options):
    norms, sizes_of = [], retracing.sizes_of
    monkeypatch.setattr(retracing, "sizes_of", lambda *args: norms.append(args[2]) or sizes_of(*args))
    whole, all_steps = steps_walked(monkeypatch, lambda: later(run, **options))
    interrupt(monkeypatch, run, after, **options)
    again, remaining = steps_walked(monkeypatch, lambda: later(run, **options))
    assert remaining == all_steps[after:]
    assert again == whole
    assert norms[0] == norms[1]
    assert len(norms[0]) == 3
    assert not list(run.run_dir.rglob("*retracing*"))


def test_a_mark_of_another_walk_is_not_taken_and_stays(monkeypatch, run):
    interrupt(monkeypatch, run, 6)
    strict = {"tolerance": 1e-13}, {"on_mismatch": "warn"}
    for options in ({"curvature": "none"}, {"mode": "max"}, {"epochs": 1}, *strict):
        _, walked = steps_walked(monkeypatch, lambda options=options: later(run, **options))
        assert walked[0] == 14
    _, walked = steps_walked(monkeypatch, lambda: later(run))
    assert walked[0] == 8


class Elsewhere(Plain):
    """Another network than the recorded one in the first epoch only, so that a walk is refused on the way."""

    def loss(self, batch, reduction="mean"):
        early = self.training and self.current_epoch == 0
        return super().loss(batch, reduction) * (1.1 if early else 1.0)


def test_a_refused_walk_leaves_no_mark_to_go_on_from(monkeypatch, run):
    """An interrupted one does, and what it left before is gone as well: its part may be as wrong."""
    interrupt(monkeypatch, run, 6)
    assert list(run.run_dir.rglob("*retracing*"))
    with pytest.raises(ReplayMismatchError):
        later(run, Elsewhere(**MODEL))
    assert not list(run.run_dir.rglob("*retracing*"))
    ranking, walked = steps_walked(monkeypatch, lambda: later(run))
    assert walked[0] == 14
    assert_same(ranking, run.ranking)


@pytest.mark.parametrize("kind", ["json", "safetensors"])
def test_a_damaged_mark_is_no_mark(monkeypatch, run, kind):
    interrupt(monkeypatch, run, 6)
    (path,) = (run.run_dir / "trajectory").glob(f"retracing-*.{kind}")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    ranking, walked = steps_walked(monkeypatch, lambda: later(run))
    assert len(walked) == 15
    assert_same(ranking, run.ranking)


def losses_with(function, power):
    def losses(module, batch):
        return math.prod([function(module, batch) for _ in range(power)])

    return losses


def own_key(function):
    return bookmark.key_of("run", [0, 1], {"sample_losses": function}, [])


def test_losses_of_the_users_are_told_apart_by_their_code_and_what_they_hold():
    def ones(module, batch):
        return torch.ones(len(batch))

    def zeros(module, batch):
        return torch.zeros(len(batch))

    functions = [ones, zeros, *(losses_with(f, n) for f in (ones, zeros) for n in (1, 2)), partial(ones, batch=1)]
    functions += [losses_with(torch.tensor([value]), 1) for value in (1.0, 2.0)]
    assert len({own_key(function) for function in functions}) == len(functions)
    assert own_key(losses_with(ones, 2)) == own_key(losses_with(ones, 2))


def test_losses_of_the_users_are_named_alike_in_every_process(elsewhere):
    assert elsewhere.said == f"{own_key(losses_with(two_objectives, 3))}\n"


def test_where_no_mark_can_be_written_the_walk_goes_on(monkeypatch, run):
    monkeypatch.setattr(bookmark, "_SECONDS", 0.0)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
        ranking = later(run)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert_same(ranking, run.ranking)


def test_killed_in_the_middle_of_the_walk_it_goes_on_from_there(monkeypatch, run, elsewhere):
    ranking, walked = steps_walked(monkeypatch, lambda: later(elsewhere))
    assert len(walked) == 8
    assert_same(ranking, run.ranking)


def test_the_end_point_can_be_the_best_model(tmp_path):
    saving = pl.callbacks.ModelCheckpoint(tmp_path, monitor="val_loss")
    callback = SGDInfluence("val_loss", epochs="all", at="best", dirpath=tmp_path / "run")
    case = Case("best", MODEL | {"options": {"lr": 0.3}}, {"enable_checkpointing": True}, callbacks=lambda: [saving])
    fit(case, callback)
    best = callback.summary["window"]["last_step"]
    assert best < 14  # else it would be the last one
    assert_same(later(callback, at="best"), callback.ranking)
    assert not np.array_equal(later(callback, at="last").influence, callback.ranking.influence)


def test_the_best_model_of_a_run_that_watched_none_is_refused(run):
    with pytest.raises(UnsupportedTrainingError, match=r"none was watched.*Use at=\"last\""):
        later(run, at="best")


def test_as_many_validation_batches_count_as_the_fit_took(tmp_path):
    callback = SGDInfluence("val_loss", epochs="all", dirpath=tmp_path / "run")
    fit(Case("limited", MODEL, {"limit_val_batches": 2}), callback)
    assert_same(later(callback), callback.ranking)
    assert_same(later(callback, limit_val_batches=2), callback.ranking)
    assert_same(later(callback, limit_val_batches=0.7), callback.ranking)  # of three
    with pytest.warns(SGDInfluenceWarning, match="other validation data than the fit had"):
        whole = later(callback, limit_val_batches=1.0)
    assert not np.array_equal(whole.influence, callback.ranking.influence)
    for wrong in (0, 1.5, -1):
        with pytest.raises(ValueError, match="limit_val_batches must be a positive int, or a share"):
            later(callback, limit_val_batches=wrong)


def test_of_other_loaders_as_many_batches_count_as_they_have_unless_the_fit_was_limited(run):
    whole = later(run, objective=two_objectives)
    by_twos = later(run, objective=two_objectives, val_dataloaders=DataLoader(VAL, batch_size=2))
    assert by_twos.influence == pytest.approx(whole.influence, rel=1e-9)


def test_a_window_of_which_not_all_was_kept_is_refused(tmp_path):
    callback = SGDInfluence("val_loss", epochs=1, dirpath=tmp_path / "run")
    fit(CASE, callback)
    assert_same(later(callback, epochs=1), callback.ranking)
    with pytest.raises(RunDirectoryError, match=r"begins with step 10, at the start of epoch 2; .* with epoch 0"):
        later(callback)


def test_other_validation_data_are_ranked_by_with_a_warning(run):
    val = DataLoader(torch.utils.data.Subset(VAL, range(5)), batch_size=4)
    with pytest.warns(SGDInfluenceWarning, match="recomputed on the final weights"):
        later(run, val_dataloaders=val)


def test_a_trainer_of_the_users_is_lent_and_comes_back_as_it_was(run):
    class Noticing(pl.Callback):
        def setup(self, *_, **__):
            raise AssertionError("the user's callbacks have no part in it")

    trainer = quiet_trainer([Noticing()], num_sanity_val_steps=2, max_epochs=7)
    before = trainer.callbacks, trainer.loggers, trainer.num_sanity_val_steps, trainer.max_epochs
    assert_same(later(run, trainer=trainer), run.ranking)
    assert (trainer.callbacks, trainer.loggers, trainer.num_sanity_val_steps, trainer.max_epochs) == before


@pytest.mark.parametrize("change", ["flip", "swap"])
def test_a_damaged_or_foreign_ending_is_refused(run, recorded, tmp_path, change):
    copy = SimpleNamespace(run_dir=shutil.copytree(run.run_dir, tmp_path / "run"))
    ending = copy.run_dir / "trajectory" / "ending.json"
    if change == "swap":
        shutil.copy(recorded("batchnorm adam").run_dir / "trajectory" / "ending.json", ending)
    else:
        ending.write_text(ending.read_text().replace("val_loss", "val_lost"))
    with pytest.raises(RunDirectoryError, match=r"ending\.json (belongs to another run|is damaged)"):
        later(copy)


def test_manifest_tells_what_the_run_was_trained_with(run):
    trained = json.loads((run.run_dir / "trajectory" / "manifest.json").read_text())["trained"]
    expected = {"precision": "64-true", "device": "cpu", "optimizer": "torch.optim.adam.Adam", "averaging": ""}
    assert trained == expected
