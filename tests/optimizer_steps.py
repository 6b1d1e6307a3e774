# SPDX-License-Identifier: Apache-2.0
"""Steps of real optimizers, and their derivatives by differences, beside what an update says of them."""

import copy
import warnings

import torch

from lightning_sgdclean.adjoint.optimizers import clip, clip_transpose, update_of
from lightning_sgdclean.trajectory.live_state import hyper_parameters

SHAPES = [(3, 2), (2, 3, 2), (4,), (1,)]
KINDS = ["random", "no gradient", "no weight", "nothing"]


class Situation:
    """One parameter in float64 after some real steps, its next gradient, its state and its options."""

    def __init__(self, kind, options, shape=(3, 2), num_before=3, what="random"):
        torch.manual_seed(4)

        def draw(name):
            return torch.zeros(shape, dtype=torch.float64) if what in (name, "nothing") else torch.randn(shape).double()

        param = torch.nn.Parameter(draw("no weight"))
        self._optimizer = kind([param], **options)
        for _ in range(num_before):
            param.grad = draw("no gradient")
            self._optimizer.step()
        if what == "no weight":
            param.data.zero_()
        self.update = update_of(self._optimizer)
        self.param, self.grad, self.state = param.detach().clone(), draw("no gradient"), _tensors(self._optimizer)
        self.after, self.group = self._stepped({})
        self.clipping = self.update.clipping([self.group])

    @property
    def leaves(self):
        """What the step is differentiated by."""
        followed = {key: value for key, value in self.state.items() if self.update.is_followed(key, value)}
        return {"param": self.param, "grad": self.grad, **followed}

    def _stepped(self, values):
        optimizer = copy.deepcopy(self._optimizer)
        (param,) = optimizer.param_groups[0]["params"]
        given = {"param": self.param, "grad": self.grad, **values}
        param.data, param.grad = given.pop("param").clone(), given.pop("grad").clone()
        for key, value in given.items():
            optimizer.state[param][key] = value.clone()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            optimizer.step()
        return {"param": param.detach().clone(), **_tensors(optimizer)}, hyper_parameters(optimizer, {"": param})[0]

    def forward(self):
        """Parameter and state after the step, by the update."""
        grad = clip({"": self.grad}, self.clipping)[""]
        moved, entries = self.update.forward(self.param, grad, self.state, self.group)
        return {"param": moved, **entries}

    def transpose(self, bars):
        """The derivatives by :attr:`leaves` of the products with ``bars``, by the update."""
        grads = clip({"": self.grad}, self.clipping)
        rest = {key: bar for key, bar in bars.items() if key != "param"}
        c, lam, mu = self.update.transpose(self.param, grads[""], self.state, self.group, bars["param"], rest)
        return {"param": lam, "grad": clip_transpose({"": self.grad}, {"": c}, self.clipping)[""], **mu}

    def bars(self):
        """Random tensors, one for what the step leaves behind."""
        after = {key: value for key, value in self.after.items() if value.is_floating_point()}
        return {
            key: torch.randn_like(value)
            for key, value in after.items()
            if key == "param" or self.update.is_followed(key, value)
        }

    def difference(self, name, tangent, bars, step):
        """The derivative in a direction, by differences of the optimizer's own steps; their error is ``step**4``."""

        def product(amount):
            after, _ = self._stepped({name: self.leaves[name] + amount * step * tangent})
            return float(sum((after[key] * bar).sum() for key, bar in bars.items()))

        return (8 * (product(1) - product(-1)) - (product(2) - product(-2))) / (12 * step)


def _tensors(optimizer):
    """The state of the only parameter, numbers as tensors, as it is recorded."""
    (param,) = optimizer.param_groups[0]["params"]
    return {
        key: value.detach().clone() if isinstance(value, torch.Tensor) else torch.tensor(value, dtype=torch.float64)
        for key, value in optimizer.state.get(param, {}).items()
        if value is not None
    }


def assert_forward_is_the_step(situation, tolerance=1e-13):
    found = situation.forward()
    assert found.keys() == situation.after.keys()
    for key, value in situation.after.items():
        torch.testing.assert_close(found[key].to(value.dtype), value, rtol=tolerance, atol=tolerance)


def assert_transpose_is_the_difference(situation, tolerance=1e-7):
    bars = situation.bars()
    found = situation.transpose(bars)
    assert found.keys() == situation.leaves.keys()
    for name, leaf in situation.leaves.items():
        if not leaf.any():
            continue
        tangent, step = torch.rand_like(leaf), 1e-4 * float(leaf.abs().min())  # no second moment turns negative
        truth, claimed = situation.difference(name, tangent, bars, step), float((found[name] * tangent).sum())
        size = float(sum((situation.after[key] * bar).abs().sum() for key, bar in bars.items()))
        assert abs(claimed - truth) <= tolerance * max(abs(truth), 1.0) + 3e-15 * size / step, (name, claimed, truth)


def assert_derivatives_are_finite(situation):
    for value in situation.transpose(situation.bars()).values():
        assert bool(torch.isfinite(value).all())
