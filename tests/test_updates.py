# SPDX-License-Identifier: Apache-2.0
"""Closed-form updates: the forward is torch's own step, the transpose is autograd of the forward."""

import pytest
import torch

from lightning_sgdclean.errors import UnsupportedTrainingError
from lightning_sgdclean.updates import UPDATES, clip, clip_transpose, full_group, update_of

OPTIONS = [
    (torch.optim.SGD, {"lr": 0.1}),
    (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}),
    (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "dampening": 0.4, "weight_decay": 0.1}),
    (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1, "maximize": True}),
    (torch.optim.SGD, {"lr": 0.0, "momentum": 0.9}),
    (torch.optim.Adam, {"lr": 0.1}),
    (torch.optim.Adam, {"lr": 0.1, "weight_decay": 0.1, "amsgrad": True, "betas": (0.7, 0.8)}),
    (torch.optim.Adam, {"lr": 0.0, "maximize": True}),
    (torch.optim.AdamW, {"lr": 0.1, "weight_decay": 0.1, "amsgrad": True}),
    (torch.optim.AdamW, {"lr": 0.1, "eps": 1e-3}),
]


def run(kind, options, num_before):
    """A parameter after some real steps, its state, and a next gradient."""
    torch.manual_seed(4)
    param = torch.nn.Parameter(torch.randn(6, dtype=torch.float64))
    optimizer = kind([param], **options)
    for _ in range(num_before):
        param.grad = torch.randn(6, dtype=torch.float64)
        optimizer.step()
    state = {k: v.clone() for k, v in optimizer.state[param].items() if isinstance(v, torch.Tensor)}
    group = full_group({k: v for k, v in optimizer.param_groups[0].items() if k != "params"}, kind)
    return param, optimizer, state, group, torch.randn(6, dtype=torch.float64)


@pytest.mark.parametrize("num_before", [0, 1, 3])
@pytest.mark.parametrize(("kind", "options"), OPTIONS, ids=str)
def test_forward_is_the_step_that_torch_makes(kind, options, num_before):
    param, optimizer, state, group, grad = run(kind, options, num_before)
    now, after = UPDATES[kind].forward(param.detach().clone(), grad, state, group)
    param.grad = grad.clone()
    optimizer.step()
    torch.testing.assert_close(now, param.detach(), rtol=1e-12, atol=1e-12)
    for name, value in after.items():
        torch.testing.assert_close(value, optimizer.state[param][name], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("num_before", [0, 1, 3])
@pytest.mark.parametrize(("kind", "options"), OPTIONS, ids=str)
def test_transpose_is_the_adjoint_of_the_forward(kind, options, num_before):
    param, _, state, group, grad = run(kind, options, num_before)
    leaves = {"param": param.detach().clone(), "grad": grad} | {k: v for k, v in state.items() if k != "step"}
    leaves = {name: leaf.clone().requires_grad_() for name, leaf in leaves.items()}
    inner = {k: v for k, v in leaves.items() if k not in ("param", "grad")} | {
        k: v for k, v in state.items() if k == "step"
    }
    now, after = UPDATES[kind].forward(leaves["param"], leaves["grad"], inner, group)
    adjoint = torch.randn(6, dtype=torch.float64)
    state_adjoint = {name: torch.randn(6, dtype=torch.float64) for name in after}
    outputs = [now, *(after[name] for name in state_adjoint)]
    truth = torch.autograd.grad(outputs, list(leaves.values()), [adjoint, *state_adjoint.values()], allow_unused=True)
    truth = {n: torch.zeros(6, dtype=torch.float64) if t is None else t for n, t in zip(leaves, truth, strict=True)}
    c, lam, mu = UPDATES[kind].transpose(param.detach(), grad, state, group, adjoint, state_adjoint)
    torch.testing.assert_close(c, truth["grad"], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(lam, truth["param"], rtol=1e-10, atol=1e-12)
    for name in inner:
        if name != "step":
            torch.testing.assert_close(mu[name], truth[name], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW])
def test_zero_second_moment_has_the_derivative_that_small_gradients_show(kind):
    group = full_group({"lr": 0.1, "betas": (0.9, 0.999), "eps": 1e-3, "weight_decay": 0.0, "amsgrad": False}, kind)
    zero, one = torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    c, lam, _ = UPDATES[kind].transpose(one, zero, {}, group, one, {})
    step = 1e-9
    ahead = (
        UPDATES[kind].forward(one, zero + step, {}, group)[0] - UPDATES[kind].forward(one, zero - step, {}, group)[0]
    )
    assert c.item() == pytest.approx(ahead.item() / (2 * step), rel=1e-5)
    assert lam.item() == 1.0


@pytest.mark.parametrize("how", [("norm", 0.5), ("norm", 50.0), ("value", 0.3)])
def test_clipping_is_torchs_and_its_transpose_the_adjoint(how):
    grads = {"a": torch.randn(4, dtype=torch.float64), "b": torch.randn(2, 2, dtype=torch.float64)}
    params = {name: torch.nn.Parameter(torch.zeros_like(grad)) for name, grad in grads.items()}
    for name, param in params.items():
        param.grad = grads[name].clone()
    if how[0] == "norm":
        torch.nn.utils.clip_grad_norm_(params.values(), how[1])
    else:
        torch.nn.utils.clip_grad_value_(params.values(), how[1])
    for name, clipped in clip(grads, how).items():
        torch.testing.assert_close(clipped, params[name].grad, rtol=1e-12, atol=0)
    pull = {name: torch.randn_like(grad) for name, grad in grads.items()}
    found, step = clip_transpose(grads, pull, how), 1e-6
    tangent = {name: torch.randn_like(grad) for name, grad in grads.items()}
    ahead, behind = (clip({n: g + s * tangent[n] for n, g in grads.items()}, how) for s in (step, -step))
    moved = sum(((ahead[n] - behind[n]) / (2 * step) * pull[n]).sum() for n in grads)
    assert sum((found[n] * tangent[n]).sum() for n in grads).item() == pytest.approx(moved.item(), rel=1e-7)


def test_unknown_optimizers_are_refused_by_name():
    class Mine(torch.optim.SGD):
        pass

    weight = [torch.nn.Parameter(torch.zeros(1))]
    for optimizer in (torch.optim.LBFGS(weight), torch.optim.Adadelta(weight), Mine(weight, lr=0.1)):
        with pytest.raises(UnsupportedTrainingError, match=f"{type(optimizer).__qualname__} cannot be followed"):
            update_of(optimizer)
