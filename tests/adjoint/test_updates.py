# SPDX-License-Identifier: Apache-2.0
"""Updates against the steps that torch makes: the same values, and the derivatives of those very steps."""

import pytest
import torch
from torch import optim

from lightning_sgdclean.adjoint.optimizers import update_of
from lightning_sgdclean.adjoint.updates import Update
from lightning_sgdclean.base.errors import UnsupportedTrainingError

SHAPE = (3, 2)
OPTIONS = [
    (optim.SGD, {"lr": 0.1}),
    (optim.SGD, {"lr": 0.1, "momentum": 0.9}),
    (optim.SGD, {"lr": 0.1, "momentum": 0.9, "dampening": 0.4, "weight_decay": 0.1}),
    (optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1, "maximize": True}),
    (optim.SGD, {"lr": 0.0, "momentum": 0.9}),
    (optim.Adam, {"lr": 0.1}),
    (optim.Adam, {"lr": 0.1, "weight_decay": 0.1, "amsgrad": True, "betas": (0.7, 0.8)}),
    (optim.Adam, {"lr": 0.0, "maximize": True}),
    (optim.Adam, {"lr": 0.1, "weight_decay": 0.1, "decoupled_weight_decay": True}),
    (optim.AdamW, {"lr": 0.1, "weight_decay": 0.1, "amsgrad": True}),
    (optim.AdamW, {"lr": 0.1, "eps": 1e-3}),
    (optim.Adadelta, {}),
    (optim.Adadelta, {"lr": 0.3, "rho": 0.7, "eps": 1e-3, "weight_decay": 0.1, "maximize": True}),
    (optim.Adadelta, {"lr": 0.0}),
    (optim.Adagrad, {}),
    (optim.Adagrad, {"lr": 0.1, "lr_decay": 0.2, "weight_decay": 0.1, "initial_accumulator_value": 0.3, "eps": 1e-3}),
    (optim.Adagrad, {"lr": 0.0, "maximize": True}),
    (optim.Adamax, {}),
    (optim.Adamax, {"lr": 0.1, "betas": (0.7, 0.8), "eps": 1e-2, "weight_decay": 0.1, "maximize": True}),
    (optim.Adamax, {"lr": 0.0}),
    (optim.ASGD, {}),
    (optim.ASGD, {"lr": 0.1, "lambd": 0.2, "alpha": 0.5, "t0": 1, "weight_decay": 0.1, "maximize": True}),
    (optim.ASGD, {"lr": 0.0}),
    (optim.NAdam, {}),
    (optim.NAdam, {"lr": 0.1, "betas": (0.7, 0.8), "momentum_decay": 0.3, "weight_decay": 0.1, "maximize": True}),
    (optim.NAdam, {"lr": 0.1, "eps": 1e-3, "weight_decay": 0.1, "decoupled_weight_decay": True}),
    (optim.NAdam, {"lr": 0.0}),
    (optim.RAdam, {}),
    (optim.RAdam, {"lr": 0.1, "betas": (0.7, 0.9), "weight_decay": 0.1, "maximize": True}),
    (optim.RAdam, {"lr": 0.1, "eps": 1e-3, "weight_decay": 0.1, "decoupled_weight_decay": True}),
    (optim.RAdam, {"lr": 0.0}),
    (optim.RMSprop, {}),
    (optim.RMSprop, {"lr": 0.1, "alpha": 0.8, "eps": 1e-3, "weight_decay": 0.1, "maximize": True}),
    (optim.RMSprop, {"lr": 0.1, "centered": True, "momentum": 0.9}),
    (optim.RMSprop, {"lr": 0.0, "centered": True}),
]
DIVIDES_BY_A_ROOT = [optim.Adam, optim.AdamW, optim.Adagrad, optim.NAdam, optim.RAdam, optim.RMSprop]


def real_step(kind, options, param, grad, state, number_of_steps=1):
    """What torch makes of a parameter and its state (None: that of a fresh optimizer)."""
    param = torch.nn.Parameter(param.clone())
    optimizer = kind([param], **options)
    if state is not None:
        optimizer.state[param] = {key: value.clone() for key, value in state.items()}
    param.grad = grad.clone()
    optimizer.step()
    after = {key: value for key, value in optimizer.state[param].items() if value is not None}
    group = {key: value for key, value in optimizer.param_groups[0].items() if key != "params"}
    return param.detach(), after, group


def situation(kind, options, num_before):
    """A parameter after some real steps, its next gradient, its state and its group."""
    torch.manual_seed(4)
    param, state = torch.randn(SHAPE, dtype=torch.float64), None
    for _ in range(num_before):
        param, state, _ = real_step(kind, options, param, torch.randn(SHAPE, dtype=torch.float64), state)
    optimizer = kind([torch.nn.Parameter(param.clone())], **options)
    if state is None:  # Adagrad has one from the start
        state = {key: value for entries in optimizer.state.values() for key, value in entries.items()}
    group = {key: value for key, value in optimizer.param_groups[0].items() if key != "params"}
    return update_of(optimizer), param, torch.randn(SHAPE, dtype=torch.float64), state, group


def moved_by_the_real_step(kind, options, leaves, state, adjoints):
    """The pairing of what comes out of torch's step with its adjoints."""
    given = {**state, **{key: value for key, value in leaves.items() if key not in ("param", "grad")}}
    param, after, _ = real_step(kind, options, leaves["param"], leaves["grad"], given or None)
    return sum((value * adjoints[key]).sum() for key, value in {**after, "param": param}.items() if key in adjoints)


@pytest.mark.parametrize("num_before", [0, 1, 3, 8])
@pytest.mark.parametrize(("kind", "options"), OPTIONS, ids=str)
def test_forward_is_the_step_that_torch_makes_and_returns_all_of_its_state(kind, options, num_before):
    update, param, grad, state, group = situation(kind, options, num_before)
    now, after = update.forward(param, grad, state, group)
    truth, entries, _ = real_step(kind, options, param, grad, state or None)
    torch.testing.assert_close(now, truth, rtol=1e-13, atol=1e-13)
    assert after.keys() == entries.keys()
    for key, value in after.items():
        torch.testing.assert_close(value, entries[key], rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("flags", [{"foreach": True}, {"fused": True}, {"lr": torch.tensor(0.1)}], ids=str)
@pytest.mark.parametrize("kind", sorted({kind for kind, _ in OPTIONS}, key=str), ids=str)
def test_forward_is_also_the_step_of_foreach_of_fused_and_of_a_tensor_learning_rate(kind, flags):
    if "fused" in flags and kind not in (optim.SGD, optim.Adam, optim.AdamW, optim.Adagrad):
        with pytest.raises(TypeError):
            kind([torch.nn.Parameter(torch.zeros(1))], **flags)
        return
    for num_before in (0, 3):
        update, param, grad, state, group = situation(kind, flags, num_before)
        truth, entries, _ = real_step(kind, flags, param, grad, state or None)
        now, after = update.forward(param, grad, state, group)
        torch.testing.assert_close(now, truth, rtol=1e-13, atol=1e-13)
        for key, value in after.items():
            torch.testing.assert_close(value, entries[key], rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("num_before", [0, 1, 3, 8])
@pytest.mark.parametrize(("kind", "options"), OPTIONS, ids=str)
def test_transpose_is_that_of_central_differences_of_torchs_own_steps(kind, options, num_before):
    update, param, grad, state, group = situation(kind, options, num_before)
    leaves = {"param": param, "grad": grad, **{k: v for k, v in state.items() if v.shape == SHAPE}}
    _, after, _ = real_step(kind, options, param, grad, state or None)
    adjoints = {key: torch.randn(SHAPE, dtype=torch.float64) for key, v in after.items() if v.shape == SHAPE}
    c, lam, mu = update.transpose(param, grad, state, group, adjoint := torch.randn_like(param), adjoints)
    adjoints["param"] = adjoint
    found = {"param": lam, "grad": c, **mu}
    assert found.keys() == leaves.keys()
    for key, leaf in leaves.items():
        if not leaf.any():  # Adagrad's sum before the first step
            continue
        tangent, step = torch.rand_like(leaf), 1e-4 * float(leaf.abs().min())  # no second moment turns negative
        ahead, behind, far_ahead, far_behind = (
            moved_by_the_real_step(kind, options, {**leaves, key: leaf + amount * step * tangent}, state, adjoints)
            for amount in (1, -1, 2, -2)
        )
        truth = (8 * (ahead - behind) - (far_ahead - far_behind)) / (12 * step)
        rounding = 1e-14 / step
        assert (found[key] * tangent).sum().item() == pytest.approx(truth.item(), rel=1e-7, abs=rounding), key


@pytest.mark.parametrize("kind", DIVIDES_BY_A_ROOT, ids=str)
def test_zero_second_moment_has_the_derivative_that_small_gradients_show(kind):
    options = {"lr": 0.1, "eps": 1e-3, "weight_decay": 0.0}
    for num_before in (0, 3):
        param, zero, state = torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64), None
        for _ in range(num_before):
            param, state, _ = real_step(kind, options, param, zero, state)
        optimizer = kind([torch.nn.Parameter(param)], **options)
        group, adjoint = optimizer.param_groups[0], torch.ones(1, dtype=torch.float64)
        bars = {key: adjoint for key, v in (state or {}).items() if v.shape == (1,)}
        c, lam, _ = update_of(optimizer).transpose(param, zero, state or {}, group, adjoint, {})
        step = 1e-9
        ahead, behind = (real_step(kind, options, param, zero + amount, state)[0] for amount in (step, -step))
        assert c.item() == pytest.approx((ahead - behind).item() / (2 * step), rel=1e-5)
        assert lam.item() == 1.0
        for mu in (update_of(optimizer).transpose(param, zero, state or {}, group, adjoint, bars)[2]).values():
            assert bool(torch.isfinite(mu).all())


@pytest.mark.parametrize(("kind", "options"), [(k, o) for k, o in OPTIONS if k in (optim.SGD, optim.Adam, optim.AdamW)])
def test_written_out_transposes_are_those_of_autograd(kind, options):
    for num_before in (0, 1, 3):
        update, param, grad, state, group = situation(kind, options, num_before)
        after = update.forward(param, grad, state, group)[1]
        bars = {key: torch.randn_like(value) for key, value in after.items() if value.shape == SHAPE}
        given = (param, grad, state, group, torch.randn_like(param), bars)
        for found, truth in zip(update.transpose(*given), Update.transpose(update, *given), strict=True):
            torch.testing.assert_close(found, truth, rtol=1e-10, atol=1e-12)


def test_momentum_that_pauses_keeps_the_buffer_and_its_adjoint():
    group = {"lr": 0.1, "momentum": 0.0, "dampening": 0.0, "nesterov": False, "weight_decay": 0.1}
    given = [torch.randn(SHAPE, dtype=torch.float64) for _ in range(5)]
    param, grad, buffer, adjoint, bar = given
    update = update_of(optim.SGD([torch.nn.Parameter(param)]))
    _, after = update.forward(param, grad, {"momentum_buffer": buffer}, group)
    truth = real_step(optim.SGD, {"lr": 0.1, "weight_decay": 0.1}, param, grad, {"momentum_buffer": buffer})[1]
    assert torch.equal(after["momentum_buffer"], truth["momentum_buffer"])
    mu = update.transpose(param, grad, {"momentum_buffer": buffer}, group, adjoint, {"momentum_buffer": bar})[2]
    assert torch.equal(mu["momentum_buffer"], bar)


def test_state_entry_that_a_forward_forgets_is_refused():
    class Forgetful(Update):
        def forward(self, param, grad, state, group):
            return param - grad, {}

    one = torch.ones(1)
    with pytest.raises(UnsupportedTrainingError, match=r"returns the state entries \[\], and not 'm'"):
        Forgetful().transpose(one, one, {"m": one}, {}, one, {"m": one})
