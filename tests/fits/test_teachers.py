# SPDX-License-Identifier: Apache-2.0
"""Teachers that follow the trained weights: what samples do through them is part of their influence."""

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from cases import Case, Plain, fit, objective
from lightning_sgdclean import SGDInfluence
from lightning_sgdclean.adjoint.gradcheck import DerivativeChecks
from lightning_sgdclean.base.errors import ReplayMismatchError, UnsupportedOperationError, UnsupportedTrainingError
from lightning_sgdclean.losses.stopped_values import TeacherRead
from reference import assert_influence_is_the_derivative, influences, one_hot, ranked


class Byol(Plain):
    """Classifies, and predicts what a momentum teacher makes of another view."""

    def __init__(self, where="on_train_batch_end", how="lerp", norm=False, validates=False):
        super().__init__(norm=norm)
        self.predictor = nn.Linear(3, 3)
        self.teacher = copy.deepcopy(self.net).requires_grad_(False)
        self.where, self.how, self.validates = where, how, validates

    def follow(self):
        share = 0.3 / (1 + self.global_step // 4)
        for theirs, ours in zip(self.teacher.parameters(), self.net.parameters(), strict=True):
            if self.how == "lerp":
                with torch.no_grad():
                    theirs.lerp_(ours, share)
            elif self.how == "data":
                theirs.data = theirs.data * (1 - share) + ours.data * share
            elif self.how == "mul":
                theirs.data.mul_(1 - share).add_(ours.data, alpha=share)
            else:
                theirs.data.mul_(1 - share).add_(ours.data**2, alpha=share)

    def rows(self, batch):
        x, y, _ = batch
        output = self.net(x)
        with torch.no_grad():
            target = F.normalize(self.teacher(x.flip(1)), dim=-1)
        far = F.mse_loss(F.normalize(self.predictor(output), dim=-1), target, reduction="none")
        return F.cross_entropy(output, y, reduction="none"), far.sum(-1)

    def loss(self, batch):
        x, y, _ = batch
        return F.cross_entropy((self.teacher if self.validates else self.net)(x), y)

    def training_step(self, batch, batch_idx):
        if self.where == "before":
            self.follow()
        weights = 1.0 if self.sample_weights is None else self.sample_weights[batch[-1]]
        label, far = self.rows(batch)
        loss = 0.3 * (weights * label).mean() + 2.0 * (weights * far).mean()
        if self.where == "behind":
            self.follow()
        return loss

    def on_train_batch_end(self, outputs, batch, batch_idx):
        if self.where == "on_train_batch_end":
            self.follow()

    def on_train_batch_start(self, batch, batch_idx):
        if self.where == "on_train_batch_start":
            self.follow()

    def on_before_zero_grad(self, optimizer):
        if self.where == "on_before_zero_grad":
            self.follow()

    def optimizer_step(self, *arguments):
        super().optimizer_step(*arguments)
        if self.where == "optimizer_step":
            self.follow()

    def configure_optimizers(self):
        return torch.optim.SGD([*self.net.parameters(), *self.predictor.parameters()], lr=0.1, momentum=0.5)


def case(trainer=None, make=Byol, **options):
    return Case("byol", options, {"max_epochs": 2, **(trainer or {})}, make=make)


PLACES = [
    {"where": "on_train_batch_end"},
    {"where": "on_train_batch_start", "how": "mul"},
    {"where": "on_before_zero_grad", "how": "data"},
    {"where": "optimizer_step"},
    {"where": "before", "how": "mul"},
    {"where": "behind", "how": "data"},
    {"where": "before", "norm": True},
    {"where": "on_train_batch_end", "validates": True},
    {"where": "behind", "validates": True},
    {"where": "before", "trainer": {"accumulate_grad_batches": 2}},
]


@pytest.mark.parametrize("options", PLACES, ids=str)
def test_influence_through_a_teacher_is_the_derivative_of_the_whole_fit(options):
    assert_influence_is_the_derivative(case(**options))


class Frozen(Byol):
    """Its teacher's norm is in evaluation mode: it reads running statistics, which stay as they were."""

    def on_train_epoch_start(self):
        self.teacher.eval()


@pytest.mark.parametrize("where", ["on_train_batch_end", "before"])
def test_a_teacher_in_evaluation_mode_is_followed(where):
    assert_influence_is_the_derivative(case(make=Frozen, where=where, norm=True))


class Copying(Byol):
    """Copies the running statistics, too."""

    def follow(self):
        super().follow()
        for theirs, ours in zip(self.teacher.buffers(), self.net.buffers(), strict=True):
            theirs.copy_(ours)


def test_running_statistics_that_are_copied_are_refused_by_name():
    with pytest.raises(UnsupportedTrainingError, match="running statistics 'teacher"):
        ranked(case(make=Copying, where="behind", norm=True))


class Base(Plain):
    """A frozen layer like a trained one, which validation reads behind no_grad; it never moves."""

    def __init__(self):
        super().__init__()
        self.base = nn.Linear(5, 8).requires_grad_(False)

    def loss(self, batch, reduction="mean"):
        x, y, _ = batch
        with torch.no_grad():
            x = x + self.base(x)[:, :5]
        return F.cross_entropy(self.net(x), y, reduction=reduction)


def test_a_frozen_layer_that_is_like_a_trained_one_is_a_constant():
    assert_influence_is_the_derivative(Case("frozen", {}, {"max_epochs": 1, "num_sanity_val_steps": 1}, make=Base))


class WarmUp(Byol):
    """Copies the weights in the first epoch, and is an average every second step from then on; a callback does it."""

    def follow(self):
        if self.current_epoch == 0:
            for theirs, ours in zip(self.teacher.parameters(), self.net.parameters(), strict=True):
                theirs.data.copy_(ours.data)
        elif self.global_step % 2:
            super().follow()


@pytest.mark.parametrize("where", ["on_train_batch_end", "behind"])
def test_copies_and_averages_now_and_then_are_followed(where):
    assert_influence_is_the_derivative(case(make=WarmUp, where=where))


def test_finite_differences_follow_a_teacher_to_second_order():
    assert_influence_is_the_derivative(case(where="behind"), 1e-4, curvature="finite", finite_radius=3e-4)
    with pytest.raises(UnsupportedOperationError, match=r"moves 'teacher.*curvature=\"exact\""):
        ranked(case(where="before"), curvature="finite")


def test_a_teacher_that_training_step_moves_is_followed_between_snapshots():
    each, some = (influences(ranked(case(where="before"), snapshots=snapshots)) for snapshots in ("every", 4))
    assert np.array_equal(each, some)


def test_without_the_teachers_part_influences_are_off_and_the_check_of_the_derivative_says_so(monkeypatch):
    right = influences(ranked(case()))
    monkeypatch.setattr(TeacherRead, "add_to", lambda *_: None)
    with pytest.raises(UnsupportedOperationError, match="change with the parameters"):
        ranked(case(where="before"))
    monkeypatch.setattr(DerivativeChecks, "is_due", lambda *_: False)
    wrong = influences(ranked(case()))
    assert np.abs(wrong - right).max() > 0.02 * np.abs(right).max()


@pytest.mark.parametrize("where", ["before", "on_train_batch_end"])
def test_a_teacher_that_is_no_average_is_refused_by_name(where):
    with pytest.raises(UnsupportedTrainingError, match=r"parameter 'teacher\.\d\.\w+' moved.*no sum of multiples"):
        ranked(case(where=where, how="squares"))


class Twice(Byol):
    """Is moved in training_step, and by a hook."""

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.follow()


def test_a_teacher_that_is_moved_in_two_places_is_refused_by_name():
    with pytest.raises((UnsupportedTrainingError, ReplayMismatchError), match="teacher"):
        ranked(case(make=Twice, where="behind"))


def test_a_teacher_that_a_hook_moves_within_an_accumulation_is_refused_by_name():
    with pytest.raises(UnsupportedTrainingError, match=r"parameter 'teacher.*no sum of multiples"):
        ranked(case({"accumulate_grad_batches": 2}))


def test_a_teacher_that_a_hook_moves_is_refused_between_snapshots_in_the_second_step():
    with pytest.raises(UnsupportedTrainingError, match='snapshots="every"'):
        ranked(case(), snapshots=4)


class InTheOptimizer(Byol):
    """Its teacher could be trained, but has no gradient."""

    def __init__(self, **options):
        super().__init__(**options)
        self.teacher.requires_grad_(True)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.parametrize("where", ["before", "on_train_batch_end"])
def test_a_teacher_in_the_optimizer_is_refused(where):
    with pytest.raises((UnsupportedOperationError, ReplayMismatchError)):
        ranked(case(make=InTheOptimizer, where=where))


@pytest.mark.parametrize("where", ["before", "on_train_batch_end"])
def test_samples_are_left_out_as_training_would_be_without_them(where):
    callback = ranked(case(where=where), verify=2)
    table = callback.ranking
    rows = [i for i, value in enumerate(table.columns["real"]) if value is not None and np.isfinite(value)]
    whole = objective(fit(case(where=where)))
    for i in rows:
        without = objective(fit(case(where=where), weights=1 - one_hot(table.sample_id[i])))
        assert table.columns["real"][i] == pytest.approx(without - whole, rel=1e-6)
    assert rows


@pytest.mark.parametrize("where", ["before", "on_train_batch_end"])
def test_training_stays_as_it_is(where):
    plain, followed = fit(case(where=where)), fit(case(where=where), SGDInfluence("val_loss", verify=0))
    for one, other in zip(plain.state_dict().values(), followed.state_dict().values(), strict=True):
        assert torch.equal(one, other)
