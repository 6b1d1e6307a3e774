# SPDX-License-Identifier: Apache-2.0
"""Gradients that are not the derivative of the loss: followed exactly, or refused by the line that makes them so."""

import warnings
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from cases import NUM_TRAIN, Case, Plain, adam, loaders, quiet_trainer
from lightning_sgdclean import SGDInfluence
from lightning_sgdclean.adjoint.gradcheck import DerivativeChecks
from lightning_sgdclean.base.errors import UnsupportedOperationError
from lightning_sgdclean.trajectory.records import Step
from reference import assert_influence_is_the_derivative


class Hooked(Plain):
    """``edit`` hangs hooks on the network once it is made."""

    edit = staticmethod(lambda net: None)

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.edit(self.net)


class Scaled(Hooked):
    edit = staticmethod(lambda net: net[-1].weight.register_hook(lambda grad: grad * 10))


class Clamped(Hooked):
    edit = staticmethod(lambda net: net[-1].weight.register_hook(lambda grad: grad.clamp(-0.02, 0.02)))


class Normed(Hooked):
    edit = staticmethod(lambda net: net[0].weight.register_hook(lambda grad: grad / (grad.norm() + 0.01)))


class OfAModule(Hooked):
    edit = staticmethod(lambda net: net[2].register_full_backward_hook(lambda part, given, got: (given[0] * 4,)))


class BeforeAModule(Hooked):
    edit = staticmethod(lambda net: net[2].register_full_backward_pre_hook(lambda part, got: (got[0] * 4,)))


class Reversed(Plain):
    """An adversary's gradient, turned round by a hook of the activation."""

    def loss(self, batch, reduction="mean"):
        hidden = self.net[:3](batch[0])
        if hidden.requires_grad:
            hidden.register_hook(lambda grad: -grad)
        return F.cross_entropy(self.net[3:](hidden), batch[1], reduction=reduction)


class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return 2 * x * grad


class RightFunction(Plain):
    def loss(self, batch, reduction="mean"):
        return F.cross_entropy(self.net[3:](Square.apply(self.net[:3](batch[0]))), batch[1], reduction=reduction)


FOLLOWED = [Scaled, Clamped, Normed, OfAModule, BeforeAModule, Reversed, RightFunction]


@pytest.mark.parametrize("module", FOLLOWED, ids=lambda kind: kind.__name__)
def test_hooks_that_edit_gradients_are_followed_exactly(module):
    assert_influence_is_the_derivative(Case(module.__name__, make=module))


def test_so_they_are_beside_running_statistics_and_with_adam():
    case = Case("scaled", make=lambda: Scaled(adam, norm=True))
    assert_influence_is_the_derivative(case, 1e-6)


class Reversal(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return -2 * grad


class ReversedByFunction(Plain):
    def loss(self, batch, reduction="mean"):
        return F.cross_entropy(self.net[3:](Reversal.apply(self.net[:3](batch[0]))), batch[1], reduction=reduction)


class Cosine(Plain):
    """Targets of the same network, behind detach: their length is one, so a common factor does not move them."""

    def loss(self, batch, reduction="mean"):
        scores, target = self.net(batch[0]), self.net(batch[0] + 0.1).detach()
        return F.cosine_embedding_loss(scores, target, torch.ones(len(scores)).to(scores), reduction=reduction)


class Ratio(Plain):
    """Two terms balanced by the ratio of their values."""

    def training_step(self, batch, batch_idx):
        loss, penalty = super().training_step(batch, batch_idx), self.net[0].weight.square().sum()
        return loss + 0.3 * (loss.detach() / penalty.detach()) * penalty


class OverLength(Plain):
    """Divides by the length of its weights, which leaves torch by ``self.way``."""

    def loss(self, batch, reduction="mean"):
        return F.cross_entropy(self.net(batch[0]) / self.way(self.net[0].weight.norm()), batch[1], reduction=reduction)


def inferred(length):
    with torch.inference_mode():
        return float(length)


def retensored(length):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.tensor(length)


WAYS = {
    "tolist": lambda length: length.tolist(),
    "numpy": lambda length: float(length.numpy(force=True)),
    "single numpy": lambda length: float(length.numpy(force=True).astype("float32")),
    "tensor": retensored,
    "inference_mode": inferred,
    "data": lambda length: length.data,
}


def leaving_by(way):
    return type("Leaving", (OverLength,), {"way": staticmethod(way)})


class ByGradients(Plain):
    """A weight of two terms from the lengths of their gradients."""

    def training_step(self, batch, batch_idx):
        loss, penalty = super().training_step(batch, batch_idx), self.net[0].weight.square().sum()
        lengths = [torch.autograd.grad(one, self.net[0].weight, retain_graph=True)[0].norm() for one in (loss, penalty)]
        return loss + 0.1 * (lengths[0] / lengths[1]) * penalty


class DetachingHook(Hooked):
    edit = staticmethod(lambda net: net[0].weight.register_hook(lambda grad: grad / (grad.detach().norm() + 0.01)))


REFUSED = {
    "ReversedByFunction": (
        ReversedByFunction,
        r"not the derivative of its loss \(torch.autograd.Function 'Reversal'\)",
    ),
    "Cosine": (Cosine, r"stops gradients \(detach at test_gradcheck.py:\d+\)"),
    "Ratio": (Ratio, r"stops gradients \(detach at test_gradcheck.py:\d+\)"),
    "ByGradients": (ByGradients, r"stops gradients \(grad at test_gradcheck.py:\d+\)"),
    "DetachingHook": (DetachingHook, r"\(a hook of the parameter 'net.0.weight'\)"),
} | {name: (leaving_by(way), r"stops gradients \(\w+ at test_gradcheck.py:\d+\)") for name, way in WAYS.items()}


@pytest.mark.parametrize("curvature", ["exact", "gauss-newton", "finite"])
@pytest.mark.parametrize("name", REFUSED)
def test_what_no_derivative_of_the_loss_shows_is_refused_within_two_steps_and_named(name, curvature):
    module, words = REFUSED[name]
    if curvature == "gauss-newton" and module is ByGradients:
        words = r"differentiates a loss \(torch.autograd.grad\)"
    trainer = quiet_trainer([SGDInfluence("val_loss", curvature=curvature)])
    with pytest.raises(UnsupportedOperationError, match=words):
        trainer.fit(module(), *loaders())
    assert trainer.global_step <= 2


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_so_it_is_in_fewer_bits(precision):
    with pytest.raises(UnsupportedOperationError, match=r"stops gradients \(detach"):
        quiet_trainer([SGDInfluence("val_loss")], precision=precision).fit(Cosine(), *loaders())


class Late(Plain):
    """Its loss is multiplied by its own value, from ``self.begins`` on."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return loss * loss.item() if self.begins(batch_idx) else loss


class FromAnEpochOn(Late):
    def begins(self, batch_idx):
        return self.current_epoch >= 1


class InOneBatch(Late):
    def begins(self, batch_idx):
        return self.current_epoch == 1 and batch_idx == 1


class LateFactor(Plain):
    """A term that is always there, with a factor of zero in the first epoch."""

    def training_step(self, batch, batch_idx):
        weight = self.net[0].weight
        factor = 0.5 if self.current_epoch else 0.0
        return super().training_step(batch, batch_idx) + factor * (weight.detach() * weight.square()).sum()


class LateHook(Plain):
    """In one batch a hook edits gradients, where autograd does not look."""

    def loss(self, batch, reduction="mean"):
        hidden = self.net[:3](batch[0])
        if hidden.requires_grad and self.current_epoch == 1 and self.trainer.fit_loop.batch_idx == 1:
            hidden.register_hook(lambda grad: grad.detach().clamp(-0.01, 0.01))
        return F.cross_entropy(self.net[3:](hidden), batch[1], reduction=reduction)


@pytest.mark.parametrize("module", [FromAnEpochOn, InOneBatch, LateFactor], ids=lambda kind: kind.__name__)
def test_what_begins_late_is_found_when_it_is_retraced(module):
    trainer = quiet_trainer([SGDInfluence("val_loss", epochs="all")])
    with pytest.raises(UnsupportedOperationError, match=r"stops gradients \((item|detach) at test_gradcheck.py"):
        trainer.fit(module(), *loaders())
    assert trainer.global_step == trainer.max_epochs * trainer.num_training_batches  # the training is complete


@pytest.mark.parametrize("module", [Scaled, Reversed, OfAModule], ids=lambda kind: kind.__name__)
def test_finite_cannot_follow_hooks_and_says_which_engine_does(module):
    trainer = quiet_trainer([SGDInfluence("val_loss", curvature="finite")])
    with pytest.raises(UnsupportedOperationError, match='curvature="exact", which follows hooks'):
        trainer.fit(module(), *loaders())


@pytest.mark.parametrize("module", [Scaled, Reversed, OfAModule], ids=lambda kind: kind.__name__)
def test_neither_can_gauss_newton(module):
    trainer = quiet_trainer([SGDInfluence("val_loss", curvature="gauss-newton")])
    with pytest.raises(
        UnsupportedOperationError, match=r'hooks rest, is off by.*curvature="exact", which follows hooks'
    ):
        trainer.fit(module(), *loaders())


class OnlySingle(torch.autograd.Function):
    """An operation that there is in float32 only, as in many a kernel of somebody's own."""

    @staticmethod
    def forward(ctx, x):
        if x.dtype is not torch.float32:
            raise TypeError("float32 only")
        return x * 2

    @staticmethod
    def backward(ctx, grad):
        return grad * 2


class Single(Plain):
    def loss(self, batch, reduction="mean"):
        return F.cross_entropy(self.net[3:](OnlySingle.apply(self.net[:3](batch[0]))), batch[1], reduction=reduction)


def test_what_cannot_be_had_in_float64_is_ranked_and_said_to_be_unchecked():
    callback = SGDInfluence("val_loss")
    with pytest.warns(match="could not be told: in float64 .*float32 only"):
        quiet_trainer([callback], precision="32-true").fit(Single(), *loaders())
    assert len(callback.ranking) == NUM_TRAIN
    assert callback.summary["derivative"]["unknown"] == callback.summary["derivative"]["steps"] > 0


class CastsDown(Plain):
    """Wants float32 in each way that modules do, also for constants of its own."""

    def __init__(self):
        super().__init__()
        self.scale = torch.tensor([1.0, 2.0, 3.0])

    def loss(self, batch, reduction="mean"):
        scores = self.net(batch[0]).float() * self.scale
        scores = scores.to(torch.float32) + torch.zeros(3, dtype=torch.float32).type_as(scores)
        return F.cross_entropy(scores.log_softmax(-1, dtype=torch.float32), batch[1], reduction=reduction)


def test_a_module_that_casts_to_float32_is_checked_in_float64_all_the_same():
    callback = SGDInfluence("val_loss")
    quiet_trainer([callback], precision="32-true").fit(CastsDown(), *loaders())
    found = callback.summary["derivative"]
    assert found["unknown"] == 0
    assert 0 < found["largest"] < 1e-5


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
def test_kinks_give_no_false_alarm(precision):
    def net():
        return nn.Sequential(nn.Linear(5, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 3))

    callback = SGDInfluence("val_loss", epochs="all", retrace_precision="float32")
    quiet_trainer([callback], precision=precision).fit(Plain(net=net), *loaders())
    assert callback.summary["derivative"]["largest"] < 1e-5


def test_the_first_and_the_last_step_of_each_epoch_are_checked_as_far_as_the_share_allows():
    alike = SimpleNamespace(manner="of the first")  # a batch that is made as all others are

    def due(num_epochs, num_steps):
        numbers = [(epoch, i) for epoch in range(num_epochs) for i in range(num_steps)]
        steps = [Step(epoch * num_steps + i, epoch, False, [{}], None, 1, [], []) for epoch, i in numbers]
        checks = DerivativeChecks(steps)
        return [step.index for step in steps if checks.is_due(step, alike)]

    assert due(2, 10) == [0, 10, 19]
    assert due(1, 10) == [0, 9]
    assert len(due(6, 10)) == 3
    assert {0, 59} <= {*due(6, 10)}
    assert len(due(32, 128)) == 3 + 4
