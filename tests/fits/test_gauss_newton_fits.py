# SPDX-License-Identifier: Apache-2.0
"""Whole fits with ``curvature="gauss-newton"`` against a recursion written out here, with a dense ``J^T H_L J``."""

from functools import partial

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from cases import NUM_TRAIN, VAL, Case, Plain, adam
from lightning_sgdclean.base.errors import UnsupportedOperationError
from reference import influences, ranked

PENALTY = 0.05


class Watching(pl.Callback):
    """Notes parameters and batch before each ``training_step``."""

    def __init__(self):
        self.seen = []

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self.seen.append(({k: v.detach().clone() for k, v in module.named_parameters()}, batch))


class Ridge(Plain):
    """Linear in its parameters, with a penalty."""

    def __init__(self, **options):
        super().__init__(net=lambda: nn.Linear(5, 3), **options)

    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) + PENALTY * self.net.weight.square().sum()


MOMENTUM = {"options": {"momentum": 0.9}}
LINEAR = {
    "momentum": (MOMENTUM, {}),
    "adam": ({"make_optimizer": adam}, {}),
    "accumulated, clipped": (MOMENTUM, {"accumulate_grad_batches": 2, "gradient_clip_val": 0.3}),
}


@pytest.mark.parametrize("name", LINEAR)
def test_for_models_linear_in_their_parameters_it_is_the_exact_derivative(name):
    module, trainer = LINEAR[name]
    case = Case(name, module, trainer, make=Ridge)
    one, other = (influences(ranked(case, curvature=curvature)) for curvature in ("gauss-newton", "exact"))
    np.testing.assert_allclose(one, other, rtol=0, atol=1e-10 * abs(other).max())


def output(params, stats, x):
    """The network, and the batch statistics that it moves the running ones towards."""
    hidden = x @ params["net.0.weight"].T
    mean, var = hidden.mean(0), hidden.var(0, correction=0)
    if stats is not None:
        used_mean, used_var = stats
    else:
        used_mean, used_var = mean, var
    hidden = (hidden - used_mean) / (used_var + 1e-5).sqrt() * params["net.1.weight"] + params["net.1.bias"]
    return hidden.tanh() @ params["net.4.weight"].T + params["net.4.bias"], mean, var * len(x) / (len(x) - 1)


def tied(params, flat):
    """Parameters by name, of one vector."""
    sizes = [param.numel() for param in params.values()]
    return {k: part.view_as(p) for (k, p), part in zip(params.items(), flat.split(sizes), strict=True)}


def flat_of(params):
    return torch.cat([param.reshape(-1) for param in params.values()])


def gradients(params, batch):
    """``(B, P)`` gradients of the samples' losses, and the dense product's matrix of their mean."""
    x, y, _ = batch
    at = flat_of(params).requires_grad_()
    z = output(tied(params, at), None, x)[0]
    jac = torch.stack([torch.autograd.grad(one, at, retain_graph=True)[0] for one in z.flatten()])
    p = z.detach().softmax(1)
    residual = p - F.one_hot(y, p.shape[1])
    blocks = torch.block_diag(*(torch.diag(one) - torch.outer(one, one) for one in p))
    by_sample = (residual.flatten()[:, None] * jac).view(len(x), p.shape[1], -1).sum(1)
    return by_sample, jac.T @ blocks @ jac / len(x)


def unrolled(watching, case, update, accumulated=1, clip=None):
    """Minus the derivative of the objective, if each gradient changed with the parameters as Gauss-Newton says."""
    weights = torch.ones(NUM_TRAIN, dtype=torch.float64, requires_grad=True)
    theta, state, index = flat_of(watching.seen[0][0]), {}, 0
    theta.requires_grad_()
    mean = torch.zeros(8, dtype=torch.float64), torch.ones(8, dtype=torch.float64)
    num = -(-NUM_TRAIN // 5)
    grad, pending = 0.0, 0
    for number, (params, batch) in enumerate(watching.seen):
        by_sample, product = gradients(params, batch)
        _, *now = output(tied(params, theta), None, batch[0])
        mean = tuple(0.9 * old + 0.1 * new for old, new in zip(mean, now, strict=True))
        moved = theta - flat_of(params)
        grad = grad + ((weights[batch[2]] @ by_sample) / len(batch[0]) + product @ moved) / accumulated
        pending += 1
        if pending == accumulated or (number + 1) % num == 0:
            if clip is not None:
                grad = grad * torch.clamp(clip / (grad.norm() + 1e-6), max=1.0)
            index += 1
            theta, state = update(theta, grad, state, index)
            grad, pending = 0.0, 0
    x, y, _ = VAL.tensors
    loss = F.cross_entropy(output(tied(watching.seen[0][0], theta), mean, x.double())[0], y)
    return -torch.autograd.grad(loss, weights)[0].numpy()


def momentum_step(theta, grad, state, index):
    buffer = 0.9 * state["buffer"] + grad if state else grad
    return theta - 0.1 * buffer, {"buffer": buffer}


def adam_step(theta, grad, state, index):
    m = 0.9 * state.get("m", 0.0) + 0.1 * grad
    v = 0.999 * state.get("v", 0.0) + 0.001 * grad**2
    moved = 0.02 * (m / (1 - 0.9**index)) / ((v / (1 - 0.999**index)).sqrt() + 1e-4)
    return theta - moved, {"m": m, "v": v}


DEEP = {
    "momentum": (MOMENTUM, {}, momentum_step, {}),
    "adam": ({"make_optimizer": adam}, {}, adam_step, {}),
    "accumulated, clipped": (
        MOMENTUM,
        {"accumulate_grad_batches": 2, "gradient_clip_val": 0.3},
        momentum_step,
        {"accumulated": 2, "clip": 0.3},
    ),
}


@pytest.mark.parametrize("name", DEEP)
def test_a_deep_network_with_running_statistics_is_retraced_with_the_product_of_a_dense_matrix(name):
    module, trainer, update, how = DEEP[name]
    watching = Watching()
    case = Case(name, {**module, "norm": True}, trainer, callbacks=lambda: [watching])
    callback = ranked(case, curvature="gauss-newton")
    found, truth = influences(callback), unrolled(watching, case, update, **how)
    np.testing.assert_allclose(found, truth, rtol=0, atol=1e-10 * abs(truth).max())
    exact = influences(ranked(Case(name, {**module, "norm": True}, trainer)))
    assert abs(found - exact).max() > 0.02 * abs(exact).max()
    assert callback.summary["engine"] == "gauss-newton"


class NoSecondDerivative(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        ctx.save_for_forward(x)
        return x.tanh()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return grad * (1 - ctx.saved_tensors[0].tanh() ** 2)

    @staticmethod
    def jvp(ctx, tangent):
        return tangent * (1 - ctx.saved_tensors[0].tanh() ** 2)


class NoForwardMode(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.tanh()

    @staticmethod
    def backward(ctx, grad):
        return grad * (1 - ctx.saved_tensors[0].tanh() ** 2)


class Calling(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def perceptron(activation):
    return nn.Sequential(nn.Linear(5, 8), Calling(activation), nn.Linear(8, 3))


@pytest.mark.parametrize("function", [NoForwardMode, NoSecondDerivative])
def test_an_operation_that_has_forward_mode_or_a_second_derivative_gives_the_same(function):
    case, plain = (Case("", {"net": partial(perceptron, activation)}) for activation in (function.apply, torch.tanh))
    callback = ranked(case, curvature="gauss-newton")
    truth = influences(ranked(plain, curvature="gauss-newton"))
    np.testing.assert_allclose(influences(callback), truth, rtol=0, atol=1e-10 * abs(truth).max())
    assert callback.summary["derivative"]["steps"] > 0 == callback.summary["derivative"]["unknown"]
    if function is NoSecondDerivative:
        with pytest.raises(UnsupportedOperationError, match="cannot be differentiated twice"):
            ranked(case)


class GradientPenalty(Plain):
    """Of the network, by its input."""

    def training_step(self, batch, batch_idx):
        x = batch[0].clone().requires_grad_()
        (slope,) = torch.autograd.grad(self.net(x).logsumexp(1).sum(), x, create_graph=True)
        return super().training_step(batch, batch_idx) + F.mse_loss(slope, torch.zeros_like(slope))


def test_what_is_differentiated_before_a_loss_begins_enters_it():
    """One more loss call, whose input is a derivative; two backward passes stand in for forward mode there."""
    callback = ranked(Case("", make=GradientPenalty), curvature="gauss-newton")
    assert callback.summary["derivative"]["steps"] > 0


def test_columns_and_several_objectives_have_what_they_have_alone():
    case = Case("", {"norm": True, "options": {"momentum": 0.9}})
    objectives = {"loss": lambda m, batch: m.loss(batch), "length": lambda m, batch: m.net(batch[0]).square().mean()}
    options = {"curvature": "gauss-newton", "epochs": "all"}
    both = ranked(case, objective=objectives, columns=("by_epoch", "relabel"), **options).ranking
    alone = ranked(case, objective=objectives["length"], **options)
    order = np.argsort(both.sample_id)
    np.testing.assert_allclose(both.columns["influence:length"][order], influences(alone), rtol=1e-12, atol=1e-15)
    by_epoch = sum(both.columns[f"by_epoch:{epoch}"] for epoch in range(3))
    np.testing.assert_allclose(by_epoch, both.influence, rtol=0, atol=1e-12)
    assert np.isfinite(np.asarray(both.columns["relabel"], dtype=float)).all()


@pytest.mark.parametrize(
    ("precision", "retraced_in"), [("32-true", "auto"), ("bf16-mixed", "float32"), ("bf16-mixed", "run")]
)
def test_in_fewer_bits_it_is_about_the_same(precision, retraced_in):
    module = {"norm": True, "make_optimizer": adam}
    found = [
        influences(ranked(Case(p, module, {"precision": p}), curvature="gauss-newton", retrace_precision=r))
        for p, r in (("64-true", "auto"), (precision, retraced_in))
    ]
    assert np.corrcoef(*found)[0, 1] > (0.95 if precision == "bf16-mixed" else 0.999)


class Median(Plain):
    def loss(self, batch, reduction="mean"):
        x, y, _ = batch
        return F.l1_loss(self.net(x), F.one_hot(y, 3).to(x), reduction=reduction)


def test_a_loss_without_curvature_warns():
    with pytest.warns(UserWarning, match=r"found no curvature in any batch.*l1_loss"):
        found = influences(ranked(Case("", make=Median), curvature="gauss-newton"))
    np.testing.assert_allclose(found, influences(ranked(Case("", make=Median), curvature="none")), rtol=1e-12)
