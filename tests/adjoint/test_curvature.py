# SPDX-License-Identifier: Apache-2.0
"""Engines on one batch, against a Hessian and per-sample gradients made entry by entry."""

from functools import partial

import pytest
import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from cases import NUM_CLASSES, Case, Plain, loaders, quiet_trainer
from lightning_sgdclean import SGDInfluence
from lightning_sgdclean.adjoint.curvature import Exact, Finite
from lightning_sgdclean.base.errors import UnsupportedOperationError
from lightning_sgdclean.losses.kernels import twice_differentiable_kernels
from lightning_sgdclean.losses.weighting import Evaluated
from reference import assert_influence_is_the_derivative


class TwoUnits:
    """A unit that is alive for all samples, and one that is dead for all of them but nearly alive for the first."""

    def __init__(self, gap):
        torch.manual_seed(2)
        self.live = torch.nn.Parameter(torch.tensor([0.5, -0.3, 0.8], dtype=torch.float64))
        self.dead = torch.nn.Parameter(torch.tensor([-1.0, 0.0, 0.0], dtype=torch.float64))
        self.x, self.y = torch.randn(6, 3, dtype=torch.float64), torch.randn(6, dtype=torch.float64)
        self.x[:, 0] = self.x[:, 0].abs() + 0.5
        self.x[0, 0] = gap  # the dead unit's input is minus that
        self.params = [self.live, self.dead]

    def problem(self, weights):
        hidden = F.softplus(self.x @ self.live) + F.relu(self.x @ self.dead)
        return Evaluated((weights * (hidden - self.y).square()).mean(), [], [])

    def pulled(self, engine, cotangent):
        weights = torch.ones(6, dtype=torch.float64, requires_grad=True)
        return engine.open(self.problem, self.params, weights, True).pull_back(cotangent, {})


def along(live, dead):
    return [torch.full((3,), value, dtype=torch.float64) for value in (live, dead)]


def test_finite_moves_only_what_the_gradient_knows_of():
    """As under Adam, whose second moment of a dead unit is zero, so that ``c`` is huge there."""
    units, cotangent = TwoUnits(gap=0.5), along(1.0, -1e6)
    exact, engine = units.pulled(Exact(), cotangent), Finite(1e-4)
    found = units.pulled(engine, cotangent)
    assert engine.num_replaced == 0
    for one, other in zip(found.adjoint, exact.adjoint, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(found.scores, exact.scores, rtol=1e-6, atol=1e-9)


def test_where_the_loss_is_not_what_slope_and_curvature_say_exact_takes_over():
    units, cotangent = TwoUnits(gap=0.5), along(300.0, 0.0)
    engine = Finite(10.0)  # so far that the parabola of the loss at the start says nothing
    found, exact = units.pulled(engine, cotangent), units.pulled(Exact(), cotangent)
    assert (engine.num_pulled, engine.num_replaced, engine.num_doubtful) == (1, 1, 0)
    assert torch.equal(found.scores, exact.scores)
    assert all(torch.equal(one, other) for one, other in zip(found.adjoint, exact.adjoint, strict=True))
    assert engine.complaints() == []


class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.exp()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return grad * x.exp()


def test_where_exact_cannot_take_over_it_is_said():
    units = TwoUnits(gap=0.5)
    units.problem = lambda weights: Evaluated((weights * Once.apply(units.x @ units.live)).mean(), [], [])
    engine = Finite(10.0)
    units.pulled(engine, along(300.0, 0.0))
    assert (engine.num_replaced, engine.num_doubtful) == (0, 1)
    (text,) = engine.complaints()
    assert "in 1 of 1 batches" in text
    assert "'Once' cannot be differentiated twice" in text


def setting():
    torch.manual_seed(1)
    param = torch.nn.Parameter(torch.randn(4, dtype=torch.float64))
    x, y = torch.randn(6, 4, dtype=torch.float64), torch.randn(6, dtype=torch.float64)

    def each(p):
        return F.softplus(x @ p) * y.abs() + (x @ p).tanh() * y

    def problem(weights):
        return Evaluated((weights * each(param)).mean(), [], [])

    cotangent = torch.randn(4, dtype=torch.float64)
    hessian = torch.autograd.functional.hessian(lambda p: each(p).mean(), param.detach())
    jacobian = torch.autograd.functional.jacobian(each, param.detach())
    return param, problem, cotangent, hessian @ cotangent, jacobian @ cotangent / 6


@pytest.mark.parametrize(("engine", "tolerance"), [(Exact(), 1e-12), (Finite(1e-4), 1e-6)])
def test_scores_and_hessian_product(engine, tolerance):
    param, problem, cotangent, product, scores = setting()
    weights = torch.ones(6, dtype=torch.float64, requires_grad=True)
    before = param.detach().clone()
    pulled = engine.open(problem, [param], weights, True).pull_back([cotangent], {})
    torch.testing.assert_close(pulled.scores, scores, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(pulled.adjoint[0], product, rtol=tolerance, atol=tolerance)
    assert torch.equal(param.detach(), before)


def test_none_is_exact_without_the_hessian():
    param, problem, cotangent, _, scores = setting()
    weights = torch.ones(6, dtype=torch.float64, requires_grad=True)
    pulled = Exact(with_hessian=False).open(problem, [param], weights, True).pull_back([cotangent], {})
    torch.testing.assert_close(pulled.scores, scores, rtol=1e-12, atol=0)
    assert not pulled.adjoint[0].any()


def test_finite_survives_a_cotangent_of_zero():
    param, problem, cotangent, _, _ = setting()
    weights = torch.ones(6, dtype=torch.float64, requires_grad=True)
    pulled = Finite().open(problem, [param], weights, False).pull_back([0 * cotangent], {})
    assert pulled.scores.abs().max() < 1e-9


class Cube(torch.autograd.Function):
    """Says that it cannot be differentiated twice; asked by chosen tensors, torch would take that for zero."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return 3 * ctx.saved_tensors[0] ** 2 * grad


class Detour(torch.autograd.Function):
    """Does not say so, but its backward leaves torch."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, grad):
        return torch.from_numpy(3 * ctx.saved_tensors[0].detach().numpy() ** 2 * grad.detach().numpy())


class Heads(nn.Module):
    """Flash attention, asked for by name."""

    def __init__(self):
        super().__init__()
        self.project = nn.Linear(1, 12)
        self.last = nn.Linear(4, NUM_CLASSES)

    def forward(self, x):
        query, key, value = self.project(x[..., None]).unflatten(-1, (3, 1, 4)).transpose(1, 3).unbind(2)
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return self.last(F.scaled_dot_product_attention(query, key, value).mean((1, 2)))


def through(function):
    return nn.Sequential(nn.Linear(5, 5), Calling(function), nn.Linear(5, NUM_CLASSES))


class Calling(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


class Aligned(Plain):
    """Trained by CTC over the five features as time."""

    def __init__(self):
        super().__init__(net=lambda: nn.Linear(1, 4))

    def loss(self, batch, reduction="mean"):
        x, y, _ = batch
        scores = self.net(x[..., None]).log_softmax(-1).transpose(0, 1)
        lengths = torch.full_like(y, 5), torch.ones_like(y)
        rows = F.ctc_loss(scores, y[:, None] + 1, *lengths, reduction="none")
        return rows.mean() if reduction == "mean" else rows


WITHOUT_SECOND = [
    ("_ctc_loss", {}, Aligned, lambda module, batch: module.loss(batch, "none")),
    ("_scaled_dot_product_flash_attention_for_cpu", {"net": Heads}, Plain, None),
    ("Cube", {"net": partial(through, Cube.apply)}, Plain, None),
    ("Detour", {"net": partial(through, Detour.apply)}, Plain, None),
]


@pytest.mark.parametrize(("operation", "module", "make", "losses"), WITHOUT_SECOND, ids=lambda value: str(value)[:20])
def test_exact_refuses_by_name_within_two_steps_what_finite_follows(operation, module, make, losses):
    case = Case(operation, module, make=make)
    trainer = quiet_trainer([SGDInfluence("val_loss", sample_losses=losses)])
    with pytest.raises(UnsupportedOperationError, match=rf"{operation}'.*curvature=\"finite\""):
        trainer.fit(make(**module), *loaders())
    assert trainer.global_step <= 2
    assert_influence_is_the_derivative(case, 1e-4, curvature="finite", finite_radius=1e-3, sample_losses=losses)


def test_recurrent_layers_are_evaluated_without_cudnn_and_by_the_exact_engine_only():
    seen = []

    class Looking(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            if func in (torch.lstm, torch.gru, torch.rnn_tanh):
                seen.append(torch.backends.cudnn.enabled)
            return func(*args, **kwargs or {})

    layers = [nn.LSTM(3, 4), nn.GRU(3, 4), nn.RNN(3, 4)]
    with Looking():
        for layer in layers:
            layer(torch.zeros(2, 1, 3))
            with twice_differentiable_kernels():
                layer(torch.zeros(2, 1, 3))
    assert seen == [True, False] * 3
    assert torch.backends.cudnn.enabled
