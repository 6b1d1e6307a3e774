# SPDX-License-Identifier: Apache-2.0
"""Optimizers from elsewhere: registered steps are followed exactly, and wrong ones are found out."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn

from cases import Case, Plain, fit, loaders, perceptron, quiet_trainer
from lightning_sgdclean import SGDInfluence, Update, register_update
from lightning_sgdclean.base.errors import ReplayMismatchError, UnsupportedTrainingError
from reference import assert_influence_is_the_derivative, ranked

PAGE = Path(__file__).resolve().parents[2] / "docs" / "optimizers.md"


@pytest.fixture
def page():
    """What the documentation's examples define and register."""
    namespace = {}
    for code in re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL):
        exec(code, namespace)
    return namespace


class Counting(torch.optim.Optimizer):
    """Keeps a Python number of its own naming, and divides by the root of a sum of squares."""

    def __init__(self, params, lr=0.05, eps=1e-3, **more):
        super().__init__(params, {"lr": lr, "eps": eps, **more})

    @torch.no_grad()
    def step(self, closure=None):
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            for param in group["params"]:
                state = self.state[param]
                state["count"] = state.get("count", 0) + 1
                total = state.setdefault("total", torch.zeros_like(param)).addcmul_(param.grad, param.grad)
                rate = group["lr"] / state["count"] ** 0.5
                param.sub_(rate * param.grad / (total.sqrt() + group["eps"]))
        return loss


class Counted(Update):
    constants = frozenset({"count"})

    def forward(self, param, grad, state, group):
        count = float(state.get("count", 0)) + 1
        total = state.get("total", torch.zeros_like(param)) + grad * grad
        root = torch.where(total > 0, torch.where(total > 0, total, 1).sqrt(), 0)
        moved = param - group["lr"] / count**0.5 * grad / (root + group["eps"])
        return moved, {"count": torch.tensor(count), "total": total}


class WithTable(nn.Module):
    """A row of its table is never used."""

    def __init__(self):
        super().__init__()
        self.net, self.table = perceptron(), nn.Embedding(3, 5)

    def forward(self, x):
        return self.net(x + self.table((x[:, 0] > 0).long()))


def test_registered_function_of_the_documentation_is_followed_exactly(page):
    assert_influence_is_the_derivative(Case("lars", {"make_optimizer": page["Lars"]}))


def test_registered_update_with_a_counter_of_its_own_is_followed_exactly():
    register_update(Counting, Counted())
    assert_influence_is_the_derivative(Case("counting", {"make_optimizer": Counting, "net": WithTable}))


class Logged(torch.optim.AdamW):
    """A subclass that steps as its base does."""


def test_subclass_registered_to_step_as_its_base_is_followed_exactly():
    register_update(Logged, torch.optim.AdamW)
    assert_influence_is_the_derivative(Case("logged", {"make_optimizer": Logged, "options": {"eps": 1e-3}}))


class UnroundedMuon(torch.optim.Muon):
    """Muon's iteration on singular values, in the type of the parameters."""

    @torch.no_grad()
    def step(self, closure=None):
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            a, b, c = group["ns_coefficients"]
            for param in group["params"]:
                velocity = self.state[param].setdefault("momentum_buffer", torch.zeros_like(param))
                velocity.mul_(group["momentum"]).add_(param.grad, alpha=1 - group["momentum"])
                direction = (1 - group["momentum"]) * param.grad + group["momentum"] * velocity
                left, values, right = torch.linalg.svd(direction / direction.norm(), full_matrices=False)
                for _ in range(group["ns_steps"]):
                    values = a * values + b * values**3 + c * values**5
                rows, columns = param.shape
                param.mul_(1 - group["lr"] * group["weight_decay"])
                param.sub_(group["lr"] * max(1, rows / columns) ** 0.5 * (left * values) @ right)
        return loss


def matrices():
    return nn.Sequential(nn.Linear(5, 8, bias=False), nn.Tanh(), nn.Linear(8, 3, bias=False))


def test_muon_of_the_documentation_differentiates_the_unrounded_iteration(page):
    register_update(UnroundedMuon, page["Muon"]().unrounded)
    options = {"lr": 0.02, "weight_decay": 0.1}
    case = Case("muon", {"make_optimizer": UnroundedMuon, "options": options, "net": matrices})
    assert_influence_is_the_derivative(case)


@pytest.mark.parametrize("precision", ["64-true", "32-true"])
@pytest.mark.parametrize("adjust", ["original", "match_rms_adamw"])
def test_muon_of_the_documentation_makes_torchs_step_to_the_last_bit(page, precision, adjust):
    options = {"lr": 0.02, "adjust_lr_fn": adjust}
    case = Case("muon", {"make_optimizer": torch.optim.Muon, "options": options, "net": matrices})
    case.trainer["precision"] = precision
    assert ranked(case).summary["replay"]["update_error"] == 0.0


def detached(param, grad, state, group):
    after = {"count": state.get("count", torch.tensor(0.0)) + 1, "total": state.get("total", 0) + grad * grad}
    moved = group["lr"] / float(after["count"]) ** 0.5 * grad / (after["total"].detach().sqrt() + group["eps"])
    return param - moved, after


def naive_root(param, grad, state, group):
    count = state.get("count", torch.tensor(0.0)) + 1
    total = state.get("total", 0) + grad * grad
    return param - group["lr"] / float(count) ** 0.5 * grad / (total.sqrt() + group["eps"]), {
        "count": count,
        "total": total,
    }


class Forgetful(Counted):
    def forward(self, param, grad, state, group):
        moved, after = super().forward(param, grad, state, group)
        return moved, {"count": after["count"]}


def asking(param, grad, state, group):
    return param - group["rate"] * grad, {}


class WrongTranspose(Counted):
    def transpose(self, param, grad, state, group, adjoint, state_adjoint):
        c, lam, mu = super().transpose(param, grad, state, group, adjoint, state_adjoint)
        return 1.001 * c, lam, mu


class FalselyLinear(Counted):
    is_linear = True


class RoundsFarAway(Counted):
    def unrounded(self, param, grad, state, group):
        return super().forward(param, grad, state, {**group, "lr": -group["lr"]})


class NamesNoCounter(Counted):
    constants = frozenset()

    def forward(self, param, grad, state, group):
        return super().forward(param, grad, {key: value.detach() for key, value in state.items()}, group)


@pytest.mark.parametrize(
    ("update", "words"),
    [
        (detached, "gives a derivative of .* by grad"),
        (naive_root, "gives a derivative of nan by"),
        (asking, "reads 'rate', which is not there"),
        (WrongTranspose(), "by grad"),
        (FalselyLinear(), "another gradient"),
        (RoundsFarAway(), "forward and unrounded lead to places .* apart"),
    ],
    ids=lambda value: getattr(value, "__name__", type(value).__name__),
)
def test_registered_step_with_a_wrong_derivative_is_refused_at_the_start(update, words):
    register_update(Counting, update)
    trainer = quiet_trainer([SGDInfluence("val_loss")])
    with pytest.raises(UnsupportedTrainingError, match=words):
        trainer.fit(Plain(Counting, net=WithTable), *loaders())
    assert trainer.global_step <= 3


def test_registered_step_with_a_wrong_value_is_refused():
    register_update(Counting, lambda param, grad, state, group: (param - group["lr"] * grad, {}))
    with pytest.raises(ReplayMismatchError, match="the update differs by"):
        fit(Case("wrong", {"make_optimizer": Counting}), SGDInfluence("val_loss"))


@pytest.mark.parametrize(
    ("update", "words"),
    [
        (Forgetful(), r"Forgetful returns the state entries \['count'\], and not 'total'"),
        (NamesNoCounter(), r"by state\['count'\]"),
    ],
    ids=["Forgetful", "NamesNoCounter"],
)
def test_registered_step_with_wrong_derivatives_by_its_state_is_refused(update, words):
    register_update(Counting, update)
    with pytest.raises(UnsupportedTrainingError, match=words):
        fit(Case("wrong", {"make_optimizer": Counting}), SGDInfluence("val_loss"))


def test_option_that_is_not_recorded_is_refused_before_training():
    register_update(Counting, Counted())
    trainer = quiet_trainer([SGDInfluence("val_loss")])
    with pytest.raises(
        UnsupportedTrainingError, match=r"The option 'rule' of .*Counting is a dict, which is not recorded"
    ):
        trainer.fit(Plain(Counting, {"rule": {}}), *loaders())
    assert trainer.global_step == 0


@pytest.mark.parametrize(("kind", "update"), [(Plain, detached), (Counting(nn.Linear(1, 1).parameters()), detached)])
def test_only_optimizer_classes_can_be_registered(kind, update):
    with pytest.raises(TypeError, match="optimizer_class must be a class derived from"):
        register_update(kind, update)


@pytest.mark.parametrize("update", [None, Counted, torch.optim.LBFGS])
def test_only_updates_and_functions_can_be_registered(update):
    with pytest.raises(TypeError, match="update must be an Update, a function"):
        register_update(Counting, update)
