# SPDX-License-Identifier: Apache-2.0
"""However few states are kept, the influences are the same to the last bit."""

import weakref

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.plugins import MixedPrecision
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from cases import CASES, Case, Plain, adam, fit, loaders, quiet_trainer, sgd
from lightning_sgdclean import SGDInfluence, retrace
from lightning_sgdclean.base.errors import ReplayMismatchError, RunDirectoryError
from lightning_sgdclean.replay import forward as states
from lightning_sgdclean.replay.forward import RecomputedStates
from lightning_sgdclean.trajectory.store import Trajectory
from lightning_sgdclean.trajectory.writer import TrajectoryWriter
from reference import ranked

ONE_AT_A_TIME = 1  # a state held in memory, while a segment has more


def assert_same(one, other):
    assert np.array_equal(one.ranking.sample_id, other.ranking.sample_id)
    assert np.array_equal(one.ranking.influence, other.ranking.influence)  # to the last bit


def assert_repeated_bit_for_bit(callback):
    replay = callback.summary["replay"]
    assert replay["segments"] == replay["segments_bit_for_bit"] > 0


@pytest.fixture
def little_memory(monkeypatch):
    """As if the machine had room for one state beside those that are needed anyway."""
    monkeypatch.setattr(states, "slots_for", lambda *_: ONE_AT_A_TIME)


@pytest.mark.parametrize("name", CASES)
def test_every_policy_gives_the_same_influences_to_the_last_bit(recorded, name):
    every, other = recorded(name), recorded(name, snapshots="sqrt")
    assert_same(every, other)
    assert_repeated_bit_for_bit(other)
    assert every.summary["replay"]["segments"] == 0  # of so small a model every state is kept
    assert other.summary["trajectory_bytes"] < every.summary["trajectory_bytes"]


@pytest.mark.usefixtures("little_memory")
@pytest.mark.parametrize("name", ["batchnorm", "adamw", "accumulate 2"])
def test_segments_that_do_not_fit_in_memory_are_subdivided_to_the_same_influences(recorded, name):
    assert_same(recorded(name), ranked(CASES[name], snapshots=100))


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
def test_other_precisions_are_repeated_bit_for_bit(precision):
    case = Case(precision, {"dropout": 0.2, "make_optimizer": adam}, {"precision": precision})
    other = ranked(case, snapshots=4)
    assert_repeated_bit_for_bit(other)
    assert_same(ranked(case, snapshots="every"), other)


def scaled_fit(make_optimizer, snapshots, clip=None):
    callback = SGDInfluence("val_loss", epochs="all", snapshots=snapshots, tolerance=1e-2)
    pl.seed_everything(1, verbose=False)
    # So large a scale that the first steps are skipped, and more where it grows again.
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, growth_interval=3, backoff_factor=2.0**-8)
    plugin = MixedPrecision("16-mixed", "cpu", scaler)
    trainer = quiet_trainer([callback], precision=None, plugins=[plugin], gradient_clip_val=clip)
    trainer.fit(Plain(make_optimizer, norm=True), *loaders())
    return callback


@pytest.mark.parametrize(("make_optimizer", "clip"), [(sgd, 0.3), (adam, None)], ids=["sgd clipped", "adam"])
def test_scaled_and_skipped_steps_are_repeated_bit_for_bit(make_optimizer, clip):
    every, other = (scaled_fit(make_optimizer, snapshots, clip) for snapshots in ("every", 4))
    assert every.summary["window"]["num_without_update"] > 0
    assert_repeated_bit_for_bit(other)
    assert_same(every, other)


def test_window_begins_with_a_snapshot_of_its_own_and_needs_nothing_before_it():
    case = Case("window", {"norm": True, "options": {"momentum": 0.9}}, {"max_epochs": 4})
    rankings = []
    for snapshots in ("every", 4, 7):
        callback = SGDInfluence("val_loss", epochs=1, snapshots=snapshots)
        fit(case, callback)
        rankings.append(callback)
        assert callback.summary["window"]["first_step"] == 15
    assert_same(rankings[0], rankings[1])
    assert_same(rankings[0], rankings[2])
    trajectory = Trajectory(rankings[1].run_dir / "trajectory")
    assert [step.index for step in trajectory.steps] == [15, 16, 17, 18, 19]
    assert [15 + position for position in trajectory.kept] == [15, 16, 20]


def test_window_that_begins_between_snapshots_is_recomputed_from_the_one_before(monkeypatch):
    case = Case("window", {"norm": True, "options": {"momentum": 0.9}}, {"max_epochs": 4})
    every = SGDInfluence("val_loss", epochs=1, snapshots="every")
    fit(case, every)
    never = property(lambda self: False, lambda self, value: None)
    monkeypatch.setattr(TrajectoryWriter, "keeps_epochs", never, raising=False)
    other = SGDInfluence("val_loss", epochs=1, snapshots=4)
    fit(case, other)
    assert_same(every, other)
    trajectory = Trajectory(other.run_dir / "trajectory")
    assert trajectory.steps[0].index == 10  # the epoch that holds the snapshot before step 12: older ones are gone
    assert [10 + position for position in trajectory.kept] == [12, 16, 20]


def test_end_that_nobody_could_foresee_is_recomputed_too():
    class Stop(pl.Callback):
        def on_train_batch_end(self, trainer, *_):
            trainer.should_stop = trainer.global_step == 8

    rankings = []
    for snapshots in ("every", 3):
        callback = SGDInfluence("val_loss", epochs="all", snapshots=snapshots)
        pl.seed_everything(1, verbose=False)
        quiet_trainer([callback, Stop()], min_epochs=0).fit(Plain(norm=True), *loaders())
        rankings.append(callback)
    assert rankings[1].summary["window"]["last_step"] == 7
    assert max(Trajectory(rankings[1].run_dir / "trajectory").kept) == 6
    assert_same(*rankings)


def test_loader_of_unknown_length_gets_gaps_that_grow():
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter([train.dataset[i] for i in range(len(train.dataset))])

    train, val = loaders()
    rankings = []
    for snapshots in ("every", "sqrt"):
        options = {"sample_ids": lambda batch: batch[2]}
        callback = SGDInfluence("val_loss", epochs="all", snapshots=snapshots, **options)
        stream = torch.utils.data.DataLoader(Stream(), batch_size=5)
        quiet_trainer([callback], max_epochs=4).fit(Plain(norm=True), stream, val)
        rankings.append(callback)
    assert_same(*rankings)
    assert Trajectory(rankings[1].run_dir / "trajectory").kept == [0, 1, 2, 4, 6, 9, 12, 16, 20]


class EditGradient(pl.Callback):
    """From step 6 on, when the rehearsal is over."""

    def on_before_optimizer_step(self, trainer, module, optimizer):
        if trainer.global_step >= 6:
            module.net[0].weight.grad.mul_(1.01)


class MoveWeights(pl.Callback):
    def on_train_batch_end(self, trainer, module, *_):
        if trainer.global_step == 7:
            with torch.no_grad():
                module.net[0].bias.add_(1e-3)


@pytest.mark.parametrize("meddler", [EditGradient, MoveWeights])
@pytest.mark.parametrize("snapshots", [4, 100])
def test_steps_that_miss_their_snapshot_are_refused_by_name(meddler, snapshots):
    callback = SGDInfluence("val_loss", epochs="all", snapshots=snapshots)
    trainer = quiet_trainer([callback, meddler()], max_epochs=2)
    with pytest.raises(ReplayMismatchError, match=r"Step \d+ \(epoch 1\), run again, is not what was recorded") as info:
        trainer.fit(Plain(adam), *loaders())
    assert "Likely causes" in str(info.value)


def test_last_step_edited_shows_only_in_the_snapshot_and_names_the_segment():
    class EditLast(pl.Callback):
        def on_before_optimizer_step(self, trainer, module, optimizer):
            if trainer.global_step == 9:
                module.net[0].weight.grad.mul_(1.01)

    callback = SGDInfluence("val_loss", epochs="all", snapshots=8)
    with pytest.raises(ReplayMismatchError, match=r"Step 9 .* the steps from 8 on, repeated from the snapshot") as info:
        quiet_trainer([callback, EditLast()], max_epochs=2).fit(Plain(), *loaders())
    assert "EditLast.on_before_optimizer_step" in str(info.value)


class Halved(torch.nn.Linear):
    """Adds in another order than its base class, as another machine would."""

    def forward(self, x):
        half = self.in_features // 2
        first, second = self.weight[:, :half], self.weight[:, half:]
        return torch.nn.functional.linear(x[:, :half], first) + torch.nn.functional.linear(
            x[:, half:], second, self.bias
        )


def test_in_float64_policies_agree_to_1e_12_where_the_bits_are_others(tmp_path):
    found = []
    for snapshots in ("every", 4):
        pl.seed_everything(1, verbose=False)
        callback = SGDInfluence("val_loss", epochs="all", snapshots=snapshots, dirpath=tmp_path / str(snapshots))
        quiet_trainer([callback], max_epochs=2).fit(Plain(adam), *loaders())
        model, (train, val) = Plain(adam), loaders()
        model.net[4].__class__ = Halved
        found.append(
            retrace(callback.run_dir, model, train_dataloaders=train, val_dataloaders=val, epochs="all").influence
        )
    wanted = callback.ranking.influence
    for influence in found:
        assert 0 < np.abs(influence - wanted).max() <= 1e-12 * np.abs(wanted).max()


class Peak(TorchDispatchMode):
    """The most bytes that lie in tensors made, or looked at, while it is on."""

    def __init__(self):
        super().__init__()
        self.bytes = self._now = 0
        self._seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        tree_map_only(torch.Tensor, lambda tensor: self._note(tensor.untyped_storage()), made)
        self.bytes = max(self.bytes, self._now)
        return made

    def _note(self, storage):
        if storage._cdata not in self._seen:
            self._seen.add(storage._cdata)
            self._now += storage.nbytes()
            weakref.finalize(storage, self._forget, storage._cdata, storage.nbytes())

    def _forget(self, number, nbytes):
        self._seen.remove(number)
        self._now -= nbytes


class Wide(Plain):
    def __init__(self):
        super().__init__(adam)
        self.net[0], self.net[4] = torch.nn.Linear(5, 4000), torch.nn.Linear(4000, 3)


def test_peak_memory_is_a_constant_number_of_states_and_one_segment(tmp_path, monkeypatch):
    """The constant has the model with its optimizer, the adjoint, gradients and the check of the derivative in it."""

    def peak_states(snapshots, slots=10**6):
        monkeypatch.setattr(states, "slots_for", lambda *_: slots)
        train, val = loaders()
        options = {"train_dataloaders": train, "val_dataloaders": val, "epochs": "all"}
        with Peak() as peak:
            retrace(tmp_path / str(snapshots), Wide(), **options)
        return peak.bytes / Trajectory(tmp_path / str(snapshots) / "trajectory").state_bytes

    for snapshots in ("every", 10):
        callback = SGDInfluence("val_loss", epochs="all", snapshots=snapshots, dirpath=tmp_path / str(snapshots))
        quiet_trainer([callback], max_epochs=2).fit(Wide(), *loaders())
    assert peak_states("every") <= 12
    assert peak_states(10) <= 8 + 13  # a segment has eight between its first and its last
    assert peak_states(10, slots=2) <= 2 + 13


def test_states_are_had_in_any_order_though_cheapest_last_first(monkeypatch):
    seen, original = {}, RecomputedStates.state

    def state(self, index):
        if not seen:
            for i in (3, 4, 9, 0, 10, 5):
                seen[i] = {name: tensor.clone() for name, tensor in original(self, i).params.items()}
        found = original(self, index)
        for name, tensor in seen.get(index, {}).items():
            assert torch.equal(tensor, found.params[name])
        return found

    monkeypatch.setattr(RecomputedStates, "state", state)
    callback = ranked(Case("any order", {}, {"max_epochs": 2}), snapshots=4)
    assert len(seen) == 6
    monkeypatch.undo()
    assert_same(ranked(Case("in order", {}, {"max_epochs": 2}), snapshots="every"), callback)


def test_window_that_no_snapshot_reaches_is_refused(tmp_path):
    callback = SGDInfluence("val_loss", epochs="all", snapshots=100, dirpath=tmp_path / "run")
    fit(Case("all"), callback)
    trajectory = Trajectory(tmp_path / "run" / "trajectory")
    trajectory.kept = [15]
    states = RecomputedStates(trajectory, None, None)
    with pytest.raises(RunDirectoryError, match="no state from which the window could be recomputed"):
        states.state(3)


@pytest.mark.parametrize("given", [0, -3, "often", 2.0, True])
def test_policy_that_is_none_is_refused_at_once(given):
    with pytest.raises(ValueError, match="snapshots must be"):
        SGDInfluence("val_loss", snapshots=given)
