# SPDX-License-Identifier: Apache-2.0
"""Steps of torch's optimizers that couple a tensor's entries: its own values, and the derivatives of its own steps."""

import pytest
import torch
from torch import nn, optim

from cases import Case, perceptron
from lightning_sgdclean import register_update
from lightning_sgdclean.adjoint.optimizers import clip, clip_transpose, update_of
from lightning_sgdclean.base.errors import SGDInfluenceWarning, UnsupportedTrainingError
from optimizer_steps import (
    KINDS,
    SHAPES,
    Situation,
    assert_derivatives_are_finite,
    assert_forward_is_the_step,
    assert_transpose_is_the_difference,
)
from reference import assert_influence_is_the_derivative, influences, ranked

ADAFACTOR = [
    {},
    {"lr": 0.3, "beta2_decay": -0.5, "eps": (1e-3, 1e-2), "d": 1.5, "weight_decay": 0.1, "maximize": True},
    {"lr": 0.0, "weight_decay": 0.1},
    {"lr": torch.tensor(0.1), "foreach": True, "weight_decay": 0.1},
    {"eps": (None, 10.0)},
]


@pytest.mark.parametrize("num_before", [0, 1, 4])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("options", ADAFACTOR, ids=str)
def test_adafactors_step_and_derivatives_are_torchs(options, shape, num_before):
    situation = Situation(optim.Adafactor, options, shape, num_before)
    if torch.is_tensor(options.get("lr")):  # torch computes the rate in its type
        assert_forward_is_the_step(situation, tolerance=1e-7)
        return
    assert_forward_is_the_step(situation)
    assert_transpose_is_the_difference(situation)


@pytest.mark.parametrize("what", KINDS[1:])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_adafactors_derivatives_are_finite_where_weights_or_gradients_are_zero(shape, what):
    for num_before in (0, 2):
        situation = Situation(optim.Adafactor, {"weight_decay": 0.1}, shape, num_before, what)
        assert_forward_is_the_step(situation)
        assert_derivatives_are_finite(situation)


def test_influence_through_adafactor_is_the_derivative_of_the_whole_fit():
    options = {"lr": 0.3, "eps": (1e-3, 1e-3), "weight_decay": 0.1}
    case = Case("adafactor", {"make_optimizer": optim.Adafactor, "options": options, "warmup": True})
    callback = assert_influence_is_the_derivative(case, snapshots=3)
    assert callback.summary["replay"]["update_error"] < 1e-12


def test_subclass_of_a_packaged_class_is_followed_once_it_is_said_to_step_alike():
    class Mine(optim.Adafactor):
        pass

    optimizer = Mine([nn.Parameter(torch.ones(2, 2))])
    with pytest.raises(UnsupportedTrainingError, match="Mine cannot be followed backwards"):
        update_of(optimizer)
    register_update(Mine, optim.Adafactor)
    update_of(optimizer)


MUON = [
    {},
    {"lr": 0.02, "adjust_lr_fn": "match_rms_adamw", "weight_decay": 0.0, "nesterov": False, "momentum": 0.5},
    {"lr": torch.tensor(0.1), "adjust_lr_fn": "original", "ns_steps": 2, "ns_coefficients": (2.0, -1.5, 0.5)},
    {"lr": 0.0},
]


@pytest.mark.parametrize("num_before", [0, 1, 4])
@pytest.mark.parametrize("shape", [(3, 2), (2, 3), (1, 1)], ids=str)
@pytest.mark.parametrize("options", MUON, ids=str)
def test_muons_step_is_torchs_to_the_last_bit(options, shape, num_before):
    assert_forward_is_the_step(Situation(optim.Muon, options, shape, num_before), tolerance=0.0)


class UnroundedMuon(optim.Muon):
    """Muon's iteration on singular values, in the type of the parameters."""

    @torch.no_grad()
    def step(self, closure=None):
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            a, b, c = group["ns_coefficients"]
            for param in group["params"]:
                velocity = self.state[param].setdefault("momentum_buffer", torch.zeros_like(param))
                velocity.mul_(group["momentum"]).add_(param.grad, alpha=1 - group["momentum"])
                direction = velocity
                if group["nesterov"]:
                    direction = (1 - group["momentum"]) * param.grad + group["momentum"] * velocity
                left, values, right = torch.linalg.svd(direction / direction.norm(), full_matrices=False)
                for _ in range(group["ns_steps"]):
                    values = a * values + b * values**3 + c * values**5
                rows, columns = param.shape
                ratio = max(1, rows / columns) ** 0.5
                if group["adjust_lr_fn"] == "match_rms_adamw":
                    ratio = 0.2 * max(rows, columns) ** 0.5
                lr = group["lr"]
                param.mul_(1 - lr * group["weight_decay"]).sub_(lr * ratio * (left * values) @ right)
        return loss


@pytest.fixture
def unrounded():
    """The packaged update, of which only what is differentiated is used."""
    update = update_of(optim.Muon([nn.Parameter(torch.ones(2, 2))]))._update
    register_update(UnroundedMuon, update.unrounded)


@pytest.mark.usefixtures("unrounded")
@pytest.mark.parametrize("num_before", [0, 1, 4])
@pytest.mark.parametrize("shape", [(3, 2), (2, 3), (1, 1)], ids=str)
@pytest.mark.parametrize("options", MUON, ids=str)
def test_muons_derivatives_are_those_of_the_same_step_without_rounding(options, shape, num_before):
    situation = Situation(UnroundedMuon, options, shape, num_before)
    assert_forward_is_the_step(situation, tolerance=1e-9)  # the iteration enlarges rounding up to five hundred times
    assert_transpose_is_the_difference(situation, tolerance=1e-5)


def matrices():
    return nn.Sequential(nn.Linear(5, 8, bias=False), nn.Tanh(), nn.Linear(8, 3, bias=False))


@pytest.mark.usefixtures("unrounded")
def test_influence_through_muon_is_the_derivative_of_a_whole_fit_without_rounding():
    options = {"lr": 0.02, "weight_decay": 0.1}
    assert_influence_is_the_derivative(
        Case("muon", {"make_optimizer": UnroundedMuon, "options": options, "net": matrices})
    )


@pytest.mark.parametrize("precision", ["64-true", "32-true"])
def test_muon_is_replayed_to_the_last_bit_and_its_rounding_is_warned_of(precision):
    options = {"lr": 0.02, "adjust_lr_fn": "match_rms_adamw"}
    case = Case("muon", {"make_optimizer": optim.Muon, "options": options, "net": matrices})
    case.trainer["precision"] = precision
    with pytest.warns(SGDInfluenceWarning, match="Muon rounds its step to bfloat16"):
        callback = ranked(case, snapshots=3)
    assert callback.summary["replay"]["update_error"] == 0.0


def test_a_step_that_clips_by_itself_divides_by_the_norm_alone():
    grads = {"a": torch.tensor([3.0]).double(), "b": torch.tensor([4.0, 0.0]).double()}
    for most in (2.0, 7.0):
        norm = sum((grad**2).sum() for grad in grads.values()).sqrt()
        for name, grad in clip(grads, ("norm_exactly", most)).items():
            torch.testing.assert_close(grad, grads[name] / (norm / most).clamp(min=1.0), rtol=1e-15, atol=0)
        leaves = {name: grad.clone().requires_grad_() for name, grad in grads.items()}
        length = torch.cat(list(leaves.values())).norm()
        bars = {"a": torch.tensor([0.3]).double(), "b": torch.tensor([-0.2, 0.7]).double()}
        sum((leaf / (length / most).clamp(min=1.0) * bars[name]).sum() for name, leaf in leaves.items()).backward()
        for name, found in clip_transpose(grads, bars, ("norm_exactly", most)).items():
            torch.testing.assert_close(found, leaves[name].grad, rtol=1e-14, atol=0)
    nothing = {"a": torch.zeros(2)}
    assert not clip(nothing, ("norm_exactly", 1.0))["a"].any()
    assert clip_transpose(nothing, {"a": torch.ones(2)}, ("norm_exactly", 1.0))["a"].equal(torch.ones(2))


class Signed(optim.SGD):
    """A step of one length, in the gradient's direction by sign."""

    @torch.no_grad()
    def step(self, closure=None):
        loss = None if closure is None else torch.enable_grad()(closure)()
        for param in self.param_groups[0]["params"]:
            param.sub_(self.param_groups[0]["lr"] * param.grad.sign())
        return loss


def test_influences_that_are_all_zero_are_warned_of():
    register_update(Signed, lambda param, grad, state, group: (param - group["lr"] * grad.sign(), {}))
    case = Case("signed", {"make_optimizer": Signed, "options": {"lr": 0.01}, "net": perceptron})
    with pytest.warns(SGDInfluenceWarning, match="Every influence is exactly zero"):
        assert not influences(ranked(case)).any()


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (optim.Rprop, "Rprop cannot be followed backwards: its step knows only the gradient's sign"),
        (optim.LBFGS, "LBFGS cannot be followed backwards: its step evaluates the loss as often as it needs to"),
        (type("SAM", (optim.SGD,), {}), "SAM cannot be followed backwards: its step evaluates the loss a second time"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_refusals_name_the_reason(kind, words):
    with pytest.raises(UnsupportedTrainingError, match=words):
        update_of(kind([nn.Parameter(torch.ones(2, 2))], lr=0.1))
