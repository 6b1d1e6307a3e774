# SPDX-License-Identifier: Apache-2.0
"""What stands for kernels that torch cannot differentiate twice: the same values, the same first derivatives, and
second derivatives that are those of differences."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from cases import Case, Plain
from lightning_sgdclean.losses.kernels import twice_differentiable_kernels
from reference import assert_influence_is_the_derivative

X, BAGS, LABELS = (6, 5), torch.tensor([[0, 2, 2], [1, 4, 5]]), torch.tensor([0, 1, 2, 3, 4, 1])
FLAT, OFFSETS = BAGS.reshape(-1), torch.tensor([0, 2, 2])
LISTED = torch.tensor([[0, 2, -1, 1, 1]] * 3 + [[-1, 0, 0, 0, 0]] + [[4, 3, 2, 1, 0]] * 2)
OTHER, EACH, BY_CLASS = (torch.linspace(low, 1.0, 30).double().sin() for low in (-9.0, 0.3, 0.5))


def distances(**options):
    return lambda x: torch.cdist(x, OTHER.reshape(6, 5), **options)


def bags(input=BAGS, **options):
    return lambda x: F.embedding_bag(input, x, **options)


OPERATIONS = {
    "hardsigmoid": F.hardsigmoid,
    "hardsigmoid, in place": lambda x: F.hardsigmoid(x * 1.0, inplace=True),
    "Hardsigmoid": nn.Hardsigmoid(),
    "hardsigmoid, a kernel": torch._C._nn.hardsigmoid,
    "hardswish": F.hardswish,
    "Hardswish, in place": lambda x: nn.Hardswish(inplace=True)(x * 1.0),
    "cdist": distances(),
    "cdist of batches": lambda x: torch.cdist(x.reshape(2, 3, 5), OTHER.reshape(1, 6, 5)),
    "cdist by keywords": distances(p=2.0, compute_mode="donot_use_mm_for_euclid_dist"),
    "cdist of many": lambda x: torch.cdist(x.repeat(5, 1), OTHER.reshape(6, 5)),
    "cdist, 1": distances(p=1.0),
    "cdist, 3": distances(p=3.0),
    "cdist, largest": distances(p=float("inf")),
    "cdist to itself": lambda x: torch.cdist(x, x),
    "pdist": F.pdist,
    "pdist, 3": lambda x: torch.pdist(x, 3.0),
    "multi_margin_loss": lambda x: F.multi_margin_loss(x, LABELS),
    "multi_margin_loss with all options": lambda x: F.multi_margin_loss(
        x, LABELS, p=2, margin=3.0, weight=BY_CLASS[:5], reduction="none"
    ),
    "multi_margin_loss of one": lambda x: F.multi_margin_loss(x[0], LABELS[0], reduction="sum"),
    "MultiMarginLoss": lambda x: nn.MultiMarginLoss(p=2)(x, LABELS),
    "multilabel_margin_loss": lambda x: F.multilabel_margin_loss(x, LISTED),
    "multilabel_margin_loss, rows": lambda x: F.multilabel_margin_loss(x, LISTED, reduction="none"),
    "multilabel_margin_loss of one": lambda x: F.multilabel_margin_loss(x[0], LISTED[0]),
    "embedding_bag": bags(),
    "embedding_bag, sum": bags(mode="sum", padding_idx=-2),
    "embedding_bag, max": bags(mode="max", padding_idx=2),
    "embedding_bag with weights": lambda x: F.embedding_bag(
        BAGS, x, mode="sum", per_sample_weights=EACH[:6].reshape(2, 3)
    ),
    "embedding_bag, by weights": lambda x: F.embedding_bag(
        BAGS, OTHER.reshape(6, 5), mode="sum", per_sample_weights=x.reshape(-1)[:6].reshape(2, 3)
    ),
    "embedding_bag, offsets and an empty bag": bags(FLAT, offsets=OFFSETS, mode="mean"),
    "embedding_bag, last offset": bags(FLAT, offsets=torch.tensor([0, 2, 6]), include_last_offset=True, mode="max"),
}


def gradient(function, x, create_graph=False):
    """Of a loss that bends what the function gives."""
    value = function(x)
    shares = torch.linspace(0.4, 1.0, value.numel()).double().reshape(value.shape)
    (found,) = torch.autograd.grad((shares * (value + 0.3 * value**2)).sum(), x, create_graph=create_graph)
    return found, value.detach()


@pytest.mark.parametrize("name", OPERATIONS)
def test_values_and_both_derivatives_are_those_of_torch_and_of_differences(name):
    function = OPERATIONS[name]
    torch.manual_seed(2)
    point = 2 * torch.randn(X, dtype=torch.float64)
    x, direction = point.clone().requires_grad_(), torch.randn(X, dtype=torch.float64)
    first, value = gradient(function, point.clone().requires_grad_())
    with twice_differentiable_kernels():
        found, same = gradient(function, x, create_graph=True)
        (second,) = torch.autograd.grad((found * direction).sum(), x)
    assert same.equal(value)
    torch.testing.assert_close(found.detach(), first, rtol=1e-13, atol=1e-13)
    ahead, behind = (gradient(function, (point + s * 1e-6 * direction).requires_grad_())[0] for s in (1, -1))
    torch.testing.assert_close(second, (ahead - behind) / 2e-6, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_values_are_torchs_to_the_last_bit_in_fewer_bits_too_also_at_kinks_and_without_end(dtype):
    x = torch.cat([torch.linspace(-4, 4, 999), torch.tensor([-3.0, 3.0, float("inf"), -float("inf")])]).to(dtype)
    leaf = x.clone().requires_grad_()
    with twice_differentiable_kernels():
        value = F.hardsigmoid(leaf)
        (slope,) = torch.autograd.grad(value.sum(), leaf)
    assert value.equal(F.hardsigmoid(x))
    twin = x.clone().requires_grad_()
    assert slope.equal(torch.autograd.grad(F.hardsigmoid(twin).sum(), twin)[0])


def test_in_place_means_the_same_tensor():
    x = torch.randn(4, requires_grad=True) * 1.0
    with twice_differentiable_kernels():
        assert F.hardsigmoid(x, inplace=True) is x


@pytest.mark.parametrize(
    "call",
    [
        lambda x: torch.cdist(x, OTHER.reshape(6, 5), p=1.5),
        lambda x: F.pdist(x, 1.5),
        lambda x: F.embedding_bag(BAGS, x, scale_grad_by_freq=True),
    ],
)
def test_what_is_not_written_stays_torchs_own_and_refuses_itself(call):
    x = torch.randn(X, dtype=torch.float64, requires_grad=True)
    with twice_differentiable_kernels():
        found, _ = gradient(call, x, create_graph=True)
        with pytest.raises((RuntimeError, NotImplementedError), match="not implemented"):
            torch.autograd.grad(found.sum(), x)


class Bags(nn.Module):
    """A bag of words."""

    def __init__(self):
        super().__init__()
        self.bags, self.last = nn.EmbeddingBag(9, 5), nn.Linear(5, 3)

    def forward(self, x):
        return self.last(self.bags((x.abs() * 3).long().clamp(max=8)).tanh())


class Distances(nn.Module):
    """Scores by distances from prototypes."""

    def __init__(self):
        super().__init__()
        self.first, self.prototypes = nn.Linear(5, 4), nn.Parameter(torch.randn(3, 4))

    def forward(self, x):
        return -torch.cdist(self.first(x).tanh(), self.prototypes)


class Margin(Plain):
    def loss(self, batch, reduction="mean"):
        x, y, _ = batch
        return F.multi_margin_loss(self.net(x), y, p=2, margin=5.0, reduction=reduction)


def through(layer):
    return lambda: nn.Sequential(nn.Linear(5, 8), layer(inplace=True), nn.Linear(8, 3), nn.Tanh(), nn.Linear(3, 3))


FITS = {
    "hardsigmoid": ({"net": through(nn.Hardsigmoid)}, Plain),
    "hardswish": ({"net": through(nn.Hardswish)}, Plain),
    "bags": ({"net": Bags}, Plain),
    "distances": ({"net": Distances}, Plain),
    "margin": ({}, Margin),
}


@pytest.mark.parametrize("name", FITS)
def test_influence_is_the_derivative_of_the_whole_fit(name):
    module, make = FITS[name]
    callback = assert_influence_is_the_derivative(Case(name, module, make=make))
    replay = callback.summary["replay"]
    assert replay["batches"] == replay["batches_bit_for_bit"]
