# SPDX-License-Identifier: Apache-2.0
"""What was recorded is retraced later, elsewhere, without the Trainer of then, to the same result."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader

from cases import CASES, TRAIN, VAL, Case, Plain, adam, fit, loaders, quiet_trainer
from datasets import noisy_collate
from lightning_sgdclean import Ranking, SGDInfluence, retrace
from lightning_sgdclean.errors import ObjectiveError, ReplayMismatchError, RunDirectoryError
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


@pytest.mark.parametrize("case", [CASES[0], CASES[3], CASES[9], CASES[11], CASES[13]], ids=str)
def test_retraced_later_it_is_the_same_ranking_to_the_last_bit(case):
    callback = ranked(case, snapshots=3)
    assert_same(retrace_again(callback, case), callback.ranking)


def retrace_again(callback, case):
    train, val = loaders(**case.loader)
    model = Plain(**case.module)
    with torch.no_grad():
        for param in model.parameters():
            param.add_(1.0)  # the weights that it comes with do not matter
    return retrace(callback.run_dir, model, train_dataloaders=train, val_dataloaders=val, epochs="all")


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
        RunDirectoryError, match=r"holds a test_later\.Parts, which no batch of this process is made of"
    ):
        retrace(callback.run_dir, Unpacking(**MODEL), train_dataloaders=loaders()[0], **options)


def test_another_process_gives_the_same_ranking(run, tmp_path):
    code = (
        "import torch; torch.set_num_threads(1)\n"  # as in the tests: threads change the order of sums
        "import test_later as t\nfrom types import SimpleNamespace\n"
        f"t.later(SimpleNamespace(run_dir={str(run.run_dir)!r})).save({str(tmp_path / 'later.csv')!r})\n"
    )
    path = {"PYTHONPATH": ":".join([str(Path(__file__).parent), *sys.path])}
    subprocess.run([sys.executable, "-c", code], env=path, check=True, capture_output=True, timeout=120)
    assert_same(Ranking.load(tmp_path / "later.csv"), run.ranking)


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

    callback = SGDInfluence(objective=fails, epochs="all", dirpath=tmp_path / "run")
    with pytest.raises(Exception, match="finite") as caught:
        quiet_trainer([callback]).fit(Plain(), *loaders())
    note = " ".join(caught.value.__notes__)
    assert f"lightning_sgdclean.retrace({str(tmp_path / 'run')!r}, model," in note
    train, val = loaders()
    ranking = retrace(tmp_path / "run", Plain(), train_dataloaders=train, val_dataloaders=val, epochs="all")
    assert len(ranking) == 23


def test_manifest_tells_what_the_run_was_trained_with(run):
    trained = json.loads((run.run_dir / "trajectory" / "manifest.json").read_text())["trained"]
    assert trained == {"precision": "64-true", "device": "cpu", "optimizer": "torch.optim.adam.Adam"}
