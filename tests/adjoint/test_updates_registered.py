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
from reference import assert_influence_is_the_derivative

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
