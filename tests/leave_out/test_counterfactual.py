# SPDX-License-Identifier: Apache-2.0
"""A window run again without samples is a training with weight zero on them: whole fits are the judge."""

import json
import shutil

import numpy as np
import pytest
import torch
from pytorch_lightning.callbacks import LambdaCallback, ModelCheckpoint
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

import split_losses
import token_losses
from cases import CASES, TRAIN, VAL, Case, Plain, adam, fit, loaders, objective
from datasets import Augmented, Hooked
from left_out import ByHand, again, by_hand, weights_without, without
from lightning_sgdclean import Counterfactual, Ranking, SGDInfluence, counterfactual
from lightning_sgdclean.base.errors import LossSplitError, ReplayMismatchError, RunDirectoryError, SGDInfluenceWarning
from lightning_sgdclean.leave_out import leave_out as runs
from reference import ranked

IDS = [0, 7, 22]
GROUPS = {"few": [3, 4], "many": [*range(1, 23, 2)], "all": [*range(23)]}
MOMENTUM = {"options": {"momentum": 0.9}}


def assert_is_the_fit_without(case, groups, callback=None, **options):
    """To the last digits: the twin sums weighted losses in another order than torch's mean."""
    callback = callback or ranked(case, snapshots=3)
    found = again(callback, case, without=groups, **options)
    assert found.is_bitwise
    assert found.whole == callback.summary["objective"]["recomputed"]
    assert found.values == pytest.approx([without(case, group) for group in found.without], rel=1e-12)
    return found


# Of the other cases tests/leave_out/test_stacked.py compares these runs with whole fits.
@pytest.mark.parametrize(
    "name", ["sgd", "momentum", "adam decay", "adamw", "warm-up from zero", "mid-epoch end", "limited", "workers"]
)
def test_values_are_those_of_whole_fits_with_weight_zero(recorded, name):
    found = assert_is_the_fit_without(CASES[name], IDS, recorded(name, snapshots="sqrt"))
    assert found.names == IDS
    assert found.without == [[i] for i in IDS]
    assert np.array_equal(found.differences, found.values - found.whole)
    assert (found.differences != 0).all()


@pytest.mark.parametrize("name", ["batchnorm", "accumulate 3 adam"])
def test_groups_are_left_out_together(recorded, name):
    found = assert_is_the_fit_without(CASES[name], GROUPS, recorded(name, snapshots="sqrt"))
    assert found.names == ["few", "many", "all"]


@pytest.mark.parametrize("name", ["focal through the rows", "class weights", "bce with logits, weight and pos_weight"])
def test_losses_of_every_form_are_left_out(name):
    assert_is_the_fit_without(split_losses.case(name, *split_losses.class_loss(*split_losses.LOSSES[name])), IDS)


@pytest.mark.parametrize("name", ["two views side by side", "terms with factors", "focal and a penalty"])
def test_views_terms_and_penalties_are_left_out(name):
    assert_is_the_fit_without(split_losses.case(name, *split_losses.STEPS[name]), IDS)


@pytest.mark.parametrize("name", ["time first", "mean of each sequence's mean"])
def test_whole_sequences_are_left_out(name):
    plain, module = token_losses.LOSSES[name]
    assert_is_the_fit_without(token_losses.case(name, plain, **module), [0, 5, 12])


def test_losses_that_the_user_splits_are_left_out():
    case = Case("by hand", {"norm": True, "dropout": 0.2, **MOMENTUM}, make=ByHand)
    callback = ranked(case, sample_losses=by_hand)
    assert_is_the_fit_without(case, IDS, callback, sample_losses=by_hand)
    with pytest.raises(ReplayMismatchError, match=r"loss .* instead of"):
        again(callback, case, without=IDS, sample_losses=lambda m, b: 2 * by_hand(m, b))


@pytest.mark.filterwarnings("ignore:.*are kept")
@pytest.mark.parametrize("options", [{"train": Augmented()}, {"make": Hooked}], ids=["dataset", "hook"])
def test_randomly_augmented_batches_are_those_of_the_run(options):
    case = Case("augmented", {"dropout": 0.2, **MOMENTUM}, **options)
    assert_is_the_fit_without(case, IDS, ranked(case, keep_batches=True))


def from_the_last_epoch_on(weights):
    def begin(trainer, module):
        module.sample_weights = weights if trainer.current_epoch == 2 else None

    return [LambdaCallback(on_train_epoch_start=begin)]


def test_samples_are_left_out_of_the_window_only():
    case = Case("window", {"make_optimizer": adam, "norm": True, "dropout": 0.2})
    callback = SGDInfluence("val_loss", epochs=1)
    fit(case, callback)
    found = again(callback, case, without=IDS, epochs=1)
    for i, value in zip(IDS, found.values, strict=True):
        twin = Case("twin", case.module, callbacks=lambda i=i: from_the_last_epoch_on(weights_without([i])))
        assert value == pytest.approx(objective(fit(twin)), rel=1e-12)
    assert "steps 10 to 14: epoch 2" in found.words


def test_in_float32_it_is_the_fit_to_rounding():
    case = Case("float32", {"norm": True, "dropout": 0.2, **MOMENTUM}, {"precision": "32-true"})
    found = again(ranked(case), case, without=IDS)
    assert found.values == pytest.approx([without(case, [i]) for i in IDS], rel=1e-5)


# Beside what was predicted ----------------------------------------------------------------------------


def test_predicted_is_the_sum_of_the_influences(recorded):
    case = CASES["batchnorm"]
    callback = recorded("batchnorm")
    influence = dict(zip(callback.ranking.sample_id.tolist(), callback.ranking.influence.tolist(), strict=True))
    found = again(callback, case, without=GROUPS)
    assert found.predicted == pytest.approx([sum(influence[i] for i in group) for group in GROUPS.values()])
    assert found.visits.tolist() == [6, 33, 69]
    single = again(callback, case, without=[*range(23)])
    assert np.corrcoef(single.predicted, single.differences)[0, 1] > 0.9


def squared(module, batch):
    return F.cross_entropy(module.net(batch[0]), batch[1]) ** 2


def test_what_was_predicted_of_another_objective_or_window_is_not_shown(tmp_path):
    case = CASES["momentum"]
    callback = ranked(case, dirpath=tmp_path / "run")
    assert again(callback, case, without=IDS).predicted is not None
    assert again(callback, case, without=IDS, objective=squared).predicted is None
    assert again(callback, case, without=IDS, epochs=1).predicted is None
    assert again(callback, case, without=IDS, mode="max").predicted is None
    assert again(callback, case, without=IDS, val_dataloaders=DataLoader(TRAIN, batch_size=4)).predicted is None
    table = tmp_path / "run" / "influence.csv"
    table.write_text(table.read_text().replace(",harmful,", ",helpful,", 1))
    with pytest.warns(SGDInfluenceWarning, match=r"nothing predicted to compare with: .*influence\.csv is damaged"):
        assert again(callback, case, without=IDS).predicted is None
    table.unlink()
    assert again(callback, case, without=IDS).predicted is None


def test_the_objective_may_be_another_one(recorded):
    case = CASES["sgd"]
    found = again(recorded("sgd"), case, without=IDS, objective=squared)
    for i, value in zip(IDS, found.values, strict=True):
        module = fit(case, weights=weights_without([i])).double().eval()
        parts = [(len(y), F.cross_entropy(module.net(x.double()), y).item() ** 2) for x, y, _ in loaders()[1]]
        assert value == pytest.approx(sum(num * part for num, part in parts) / len(VAL), rel=1e-12)


def accuracy(module, batch):
    return (module.net(batch[0]).argmax(1) == batch[1]).double().mean()


def test_the_objective_needs_no_derivative_here(recorded):
    case = CASES["sgd"]
    found = again(recorded("sgd"), case, without={"most": [*range(20)]}, objective=accuracy)
    module = fit(case, weights=weights_without(range(20))).double().eval()
    x, y, _ = VAL.tensors
    assert found.values == pytest.approx([accuracy(module, (x.double(), y)).item()])


def test_at_best_the_runs_end_at_the_best_model(tmp_path):
    def best():
        return [ModelCheckpoint(tmp_path, monitor="val_loss", save_top_k=1)]

    case = Case("best", {"options": {"lr": 1.5}}, {"max_epochs": 4, "enable_checkpointing": True}, callbacks=best)
    callback = ranked(case, at="best")
    last = callback.summary["window"]["last_step"]
    assert last < 19
    found = again(callback, case, without=IDS, at="best")
    shorter = Case("shorter", case.module, {"max_steps": last + 1, "max_epochs": 4})
    assert found.values == pytest.approx([without(shorter, [i]) for i in IDS], rel=1e-12)
    assert found.predicted is not None


def test_a_value_that_should_be_high_has_differences_of_the_other_sign():
    case = CASES["sgd"]
    callback = ranked(case, mode="max")
    found = again(callback, case, without=[*range(23)], mode="max")
    assert np.array_equal(found.differences, found.whole - found.values)
    assert np.corrcoef(found.predicted, found.differences)[0, 1] > 0.95


# What is asked for --------------------------------------------------------------------------------------


def test_ids_of_numpy_and_torch_and_groups_of_every_kind_are_taken(recorded):
    case = CASES["sgd"]
    callback = recorded("sgd")
    expected = again(callback, case, without=[3, 4]).values
    for ids in (np.array([3, 4]), torch.tensor([3, 4]), (3, 4)):
        found = again(callback, case, without=ids)
        assert np.array_equal(found.values, expected)
        assert found.names == [3, 4]
    lists = again(callback, case, without=[[3], (4, 4)])
    assert (lists.names, lists.without) == ([0, 1], [[3], [4]])
    assert np.array_equal(lists.values, expected)


def test_samples_that_were_never_drawn_change_nothing_and_are_warned_of(recorded):
    callback = recorded("sgd")
    with pytest.warns(SGDInfluenceWarning, match=r"2 of the 3 ids in without= were never drawn .*first: 99\)"):
        found = again(callback, CASES["sgd"], without=[99, 3, -1])
    assert found.differences[0] == found.differences[2] == 0
    assert found.differences[1] != 0
    assert found.visits.tolist() == [0, 3, 0]
    nobody = again(callback, CASES["sgd"], without=[])
    assert len(nobody.values) == 0


def test_ids_of_another_type_than_the_recorded_ones_are_refused_by_name(recorded):
    with pytest.raises(TypeError, match=r"holds '7' of type str \(2 of 3 ids .* of type int, such as \d+\."):
        again(recorded("sgd"), CASES["sgd"], without=[3, "7", "8"])
    callback = ranked(CASES["sgd"], sample_ids=lambda batch: [f"sample {i}" for i in batch[2].tolist()])
    with pytest.raises(TypeError, match=r"holds 3 of type int \(1 of 1 ids .* of type str, such as 'sample \d+'\."):
        again(callback, CASES["sgd"], without={"one": [3]})
    assert again(callback, CASES["sgd"], without=["sample 3"]).differences != 0


MASK = np.arange(23) % 7 == 3


@pytest.mark.parametrize(
    "mask", [MASK, torch.tensor(MASK), MASK.tolist(), [MASK], {"some": MASK}, [3, True], [[3, np.True_]]], ids=repr
)
def test_a_mask_is_not_taken_for_ids(mask):
    with pytest.raises(TypeError, match=r"without= holds True or False.*np.flatnonzero\(mask\)"):
        counterfactual("nowhere", Plain(), without=mask)


@pytest.mark.parametrize("asked", ["abc", 3, [3, [4]], {"a": 3}, [[3.5]], [None]])
def test_anything_else_is_refused(asked):
    with pytest.raises(TypeError, match=r"without"):
        counterfactual("nowhere", Plain(), without=asked)


def test_runs_that_do_not_fit_in_memory_together_come_to_the_same(recorded, monkeypatch):
    case = CASES["batchnorm"]
    callback = recorded("batchnorm")
    together = again(callback, case, without=IDS)
    for slots in (0, 2):
        monkeypatch.setattr(runs, "slots_for", lambda *_, slots=slots: slots)
        assert np.array_equal(again(callback, case, without=IDS).values, together.values)


class Drifting(Dataset):
    """Validation data that weigh more each time they are gone through, as random augmentation might do."""

    def __init__(self):
        self.times = 0

    def __len__(self):
        return len(VAL)

    def __getitem__(self, i):
        self.times += i == 0
        return *VAL[i], torch.tensor(self.times)


def drifting(module, batch):
    return F.cross_entropy(module.net(batch[0]), batch[1]) + batch[-1].double().mean()


def test_each_pass_over_the_window_is_compared_with_its_own_whole_run(recorded, monkeypatch):
    case = CASES["batchnorm"]
    callback = recorded("batchnorm")
    expected = again(callback, case, without=IDS).differences
    monkeypatch.setattr(runs, "slots_for", lambda *_: 1)
    val = DataLoader(Drifting(), batch_size=len(VAL))
    found = again(callback, case, without=IDS, objective=drifting, val_dataloaders=val, batched=False)
    assert np.ptp(found.values) > 1
    assert found.differences == pytest.approx(expected, rel=1e-6)


# Never wrong in silence -----------------------------------------------------------------------------------


def test_weights_random_states_and_files_stay_as_they_are(recorded):
    case = CASES["batchnorm"]
    callback = recorded("batchnorm")
    model = case.make(**case.module)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    files = {path: path.read_bytes() for path in callback.run_dir.rglob("*") if path.is_file()}
    randomness = torch.get_rng_state()
    again(callback, case, model, without=IDS)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, weights[name].to(tensor.dtype)), name
    assert torch.equal(torch.get_rng_state(), randomness)
    assert {path: path.read_bytes() for path in callback.run_dir.rglob("*") if path.is_file()} == files


def test_other_data_and_a_run_without_a_trajectory_are_refused(tmp_path):
    callback = ranked(CASES["sgd"], dirpath=tmp_path / "run")
    other = torch.utils.data.Subset(TRAIN, range(22, -1, -1))
    with pytest.raises(ReplayMismatchError, match="hold other data"):
        again(callback, CASES["sgd"], without=IDS, train_dataloaders=DataLoader(other, batch_size=5))
    shutil.rmtree(tmp_path / "run" / "trajectory")
    with pytest.raises(RunDirectoryError, match="holds no readable trajectory"):
        again(callback, CASES["sgd"], without=IDS)


def test_an_end_that_is_missed_is_refused_or_warned_about():

    callback = ranked(Case("plain"))
    edited = Case("edited", {}, make=Edited)
    with pytest.raises(ReplayMismatchError, match="miss the one after it"):
        again(callback, edited, without=IDS)
    with pytest.warns(SGDInfluenceWarning, match="miss the one after it"):
        found = again(callback, edited, without=IDS, on_mismatch="warn")
    assert not found.is_bitwise


class Edited(Plain):
    """Another gradient at the same loss, in the last step."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        if self.global_step < 14:
            return loss
        extra = 0.1 * self.net[4].bias.sum()
        return loss + extra - extra.detach()


class Fickle(Plain):
    """Turns to another loss as soon as its weights are beside those of the run; probes move them further."""

    known = None

    def training_step(self, batch, batch_idx):
        if self.known is not None:
            off = (self.net[0].weight - self.known[self.global_step]).abs().max()
            if 0 < off < 0.01:
                return F.mse_loss(self.net(batch[0]), F.one_hot(batch[1], 3).to(batch[0]))
        return super().training_step(batch, batch_idx)


def test_a_loss_that_is_made_otherwise_without_the_samples_is_refused():
    seen = []
    note = LambdaCallback(on_train_batch_start=lambda t, module, *_: seen.append(module.net[0].weight.detach().clone()))
    callback = ranked(Case("noted", {"options": {"lr": 0.01}}, callbacks=lambda: [note]))
    model = Fickle(options={"lr": 0.01})
    model.known = seen
    with pytest.raises(LossSplitError, match=r"made by other loss calls once samples are left out.*sample_losses="):
        again(callback, Case("again"), model, without=[*range(5)])


def test_the_result_names_what_was_run(recorded):
    callback = recorded("sgd")
    found = again(callback, CASES["sgd"], without=IDS)
    assert isinstance(found, Counterfactual)
    assert found.words == "3 runs over steps 0 to 14: epochs 0 to 2, one after another: there are few of them"
    assert json.loads((callback.run_dir / "summary.json").read_text())["objective"]["recomputed"] == found.whole
    assert Ranking.load(callback.run_dir) == callback.ranking
