# SPDX-License-Identifier: Apache-2.0
"""Autograd through the whole unrolled training in float64, written out without any code of the package."""

import numpy as np
import pytest
import torch
from torch.func import functional_call
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from cases import NUM_TRAIN, TRAIN, VAL, Case, Plain, adam, fit, loaders, quiet_trainer
from lightning_sgdclean import SGDInfluence
from lightning_sgdclean.trajectory.store import Trajectory


def unrolled(case, batches, step):
    """Minus the gradient of the validation loss with respect to every sample's weight."""
    module = Plain(**case.module).double()
    params = {name: param.detach().clone().requires_grad_() for name, param in module.named_parameters()}
    state = {name: {} for name in params}
    weights = torch.ones(NUM_TRAIN, dtype=torch.float64, requires_grad=True)
    x, y, _ = TRAIN.tensors
    for number, ids in enumerate(batches):
        logits = functional_call(module, {f"{n}": p for n, p in params.items()}, (x[ids].double(),))
        loss = (weights[ids] * F.cross_entropy(logits, y[ids], reduction="none")).sum() / len(ids)
        grads = torch.autograd.grad(loss, list(params.values()), create_graph=True)
        for (name, param), grad in zip(list(params.items()), grads, strict=True):
            params[name], state[name] = step(param, grad, state[name], number)
    logits = functional_call(module, params, (VAL.tensors[0].double(),))
    value = F.cross_entropy(logits, VAL.tensors[1])
    return -torch.autograd.grad(value, weights)[0].numpy()


class Net(Plain):
    def forward(self, x):
        return self.net(x)


def momentum_step(param, grad, state, number):
    grad = grad + 0.01 * param
    velocity = grad if number == 0 else 0.9 * state["v"] + 0.7 * grad
    return param - 0.1 * velocity, {"v": velocity}


def adam_step(param, grad, state, number):
    m = 0.1 * grad + (0.9 * state["m"] if number else 0)
    v = 0.001 * grad**2 + (0.999 * state["v"] if number else 0)
    m_hat, v_hat = m / (1 - 0.9 ** (number + 1)), v / (1 - 0.999 ** (number + 1))
    return param - 0.02 * m_hat / (v_hat.sqrt() + 1e-4), {"m": m, "v": v}


@pytest.mark.parametrize(
    ("case", "step"),
    [
        (Case("momentum", {"options": {"momentum": 0.9, "dampening": 0.3, "weight_decay": 0.01}}), momentum_step),
        (Case("adam", {"make_optimizer": adam}), adam_step),
    ],
)
def test_influences_equal_autograd_through_the_unrolled_run(case, step, monkeypatch):
    monkeypatch.setattr(Plain, "forward", lambda self, x: self.net(x))
    callback = SGDInfluence("val_loss", epochs="all")
    fit(case, callback)
    batches = [step.micro[0].ids for step in Trajectory(callback.run_dir / "trajectory").steps]
    truth = unrolled(case, batches, step)
    found = np.zeros(NUM_TRAIN)
    found[callback.ranking.sample_id] = callback.ranking.influence
    assert np.abs(found - truth).max() <= 1e-10 * np.abs(truth).max()


class Scalar(Dataset):
    def __init__(self, values):
        self.values = torch.tensor(values)

    def __len__(self):
        return len(self.values)

    def __getitem__(self, index):
        return self.values[index]


class Mean(Plain):
    """A parameter pulled towards the samples: half-squared losses, Hessian one."""

    def __init__(self):
        super().__init__()
        self.net = torch.nn.Linear(1, 1, bias=False)
        torch.nn.init.constant_(self.net.weight, 1.0)

    def training_step(self, batch, batch_idx):
        return F.mse_loss(self.net(torch.ones_like(batch)[:, None])[:, 0], batch) / 2

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", ((self.net(torch.ones_like(batch)[:, None])[:, 0] - batch) ** 2).mean() / 2)


def test_quadratic_agrees_with_its_closed_form():
    targets, eta, steps = [0.0, 2.0, 5.0], 0.1, 4
    module, callback = Mean(), SGDInfluence("val_loss", epochs="all")
    trainer = quiet_trainer([callback], max_epochs=steps)
    trainer.fit(module, DataLoader(Scalar(targets), batch_size=3), DataLoader(Scalar([3.0]), batch_size=1))
    theta, path = 1.0, []
    for _ in range(steps):
        path.append(theta)
        theta -= eta * (theta - sum(targets) / 3)
    # dF/dw_j = (theta_T - 3) * sum_t (1 - eta)^(T-1-t) * (-eta/3) * (theta_t - target_j)
    for sample, influence in zip(callback.ranking.sample_id, callback.ranking.influence, strict=True):
        slope = sum((1 - eta) ** (steps - 1 - t) * -eta / 3 * (at - targets[sample]) for t, at in enumerate(path))
        assert influence == pytest.approx(-(theta - 3.0) * slope, rel=1e-12)


class Drawn(torch.utils.data.Sampler):
    def __iter__(self):
        return iter([[0, 0, 1], [2, 1, 0], [4]])

    def __len__(self):
        return 3


def test_sample_drawn_twice_counts_twice_and_one_never_drawn_is_not_ranked(monkeypatch):
    monkeypatch.setattr(Plain, "forward", lambda self, x: self.net(x))
    module, callback = Plain(), SGDInfluence("val_loss", epochs="all")
    quiet_trainer([callback], max_epochs=1).fit(module, DataLoader(TRAIN, batch_sampler=Drawn()), loaders()[1])
    ranking = callback.ranking
    assert dict(zip(ranking.sample_id.tolist(), ranking.visits.tolist(), strict=True)) == {0: 3, 1: 2, 2: 1, 4: 1}
    truth = unrolled(Case("plain"), list(Drawn()), lambda p, g, s, t: (p - 0.1 * g, s))
    assert ranking.influence == pytest.approx(truth[ranking.sample_id], rel=1e-10)
