# SPDX-License-Identifier: Apache-2.0
"""Gauss-Newton's product against a dense ``J^T H_L J``, entry by entry, and whole walks against one written out."""

from functools import partial

import pytest
import torch
from torch import nn
from torch.func import functional_call, jacrev
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm
from torch.utils.checkpoint import checkpoint

from lightning_sgdclean.adjoint.curvature import Exact
from lightning_sgdclean.adjoint.gauss_newton import GaussNewton
from lightning_sgdclean.adjoint.optimizers import update_of
from lightning_sgdclean.base.errors import UnsupportedOperationError
from lightning_sgdclean.losses.loss_functions import SIGNATURES
from lightning_sgdclean.losses.weighting import Evaluated, SampleWeights

NUM, WIDE = 6, 4


def network():
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3 * WIDE)).double()


X = torch.randn(NUM, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
Y = torch.randn(NUM, WIDE, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
CLASSES = torch.tensor([0, 3, 1, 2, 2, 1])
SIGNS = torch.where(Y > 0, 1.0, -1.0).double()
ONE_LABEL = torch.cat([CLASSES[:, None], torch.full((NUM, WIDE - 1), -1)], 1)
WEIGHT = torch.tensor([0.5, 1.0, 2.0, 1.5], dtype=torch.float64)


def first(z):
    return z[:, :WIDE]


def second(z):
    return z[:, WIDE : 2 * WIDE]


def parts(z):
    return z.split(WIDE, dim=1)


LOSSES = {
    "cross_entropy": lambda z, **o: F.cross_entropy(first(z), CLASSES, **o),
    "cross_entropy, weighted": lambda z, **o: F.cross_entropy(
        first(z), CLASSES, weight=WEIGHT, ignore_index=2, label_smoothing=0.1, **o
    ),
    "cross_entropy, soft": lambda z, **o: F.cross_entropy(first(z), Y.softmax(1), **o),
    "nll_loss": lambda z, **o: F.nll_loss(F.log_softmax(first(z), dim=1), CLASSES, **o),
    "nll_loss, of a view": lambda z, **o: F.nll_loss(
        first(z).unflatten(1, (2, 2)).log_softmax(2).transpose(1, 2), CLASSES.remainder(2)[:, None].expand(NUM, 2), **o
    ),
    "binary_cross_entropy": lambda z, **o: F.binary_cross_entropy(first(z).sigmoid(), Y.sigmoid(), **o),
    "binary_cross_entropy_with_logits": lambda z, **o: F.binary_cross_entropy_with_logits(
        first(z), Y.sigmoid(), pos_weight=WEIGHT, **o
    ),
    "mse_loss": lambda z, **o: F.mse_loss(first(z), Y, **o),
    "l1_loss": lambda z, **o: F.l1_loss(first(z), Y, **o),
    "smooth_l1_loss": lambda z, **o: F.smooth_l1_loss(first(z), Y, **o),
    "huber_loss": lambda z, **o: F.huber_loss(first(z), Y, delta=0.5, **o),
    "kl_div": lambda z, **o: F.kl_div(F.log_softmax(first(z), dim=1), Y.softmax(1), **o),
    "kl_div, both": lambda z, **o: F.kl_div(
        torch.log_softmax(first(z), 1), torch.log_softmax(second(z), 1), log_target=True, **o
    ),
    "gaussian_nll_loss": lambda z, **o: F.gaussian_nll_loss(first(z), Y, second(z).exp(), **o),
    "poisson_nll_loss": lambda z, **o: F.poisson_nll_loss(first(z), Y.exp(), **o),
    "soft_margin_loss": lambda z, **o: F.soft_margin_loss(first(z), SIGNS, **o),
    "multilabel_soft_margin_loss": lambda z, **o: F.multilabel_soft_margin_loss(first(z), (SIGNS + 1) / 2, **o),
    "hinge_embedding_loss": lambda z, **o: F.hinge_embedding_loss(first(z), SIGNS, **o),
    "margin_ranking_loss": lambda z, **o: F.margin_ranking_loss(first(z), second(z), SIGNS, **o),
    "cosine_embedding_loss": lambda z, **o: F.cosine_embedding_loss(*parts(z)[:2], SIGNS[:, 0], **o),
    "triplet_margin_loss": lambda z, **o: F.triplet_margin_loss(*parts(z), margin=3.0, **o),
    "triplet_margin_with_distance_loss": lambda z, **o: F.triplet_margin_with_distance_loss(
        *parts(z), distance_function=lambda a, b: (a - b).square().sum(1), margin=9.0, **o
    ),
    "multi_margin_loss": lambda z, **o: F.multi_margin_loss(first(z), CLASSES, p=2, margin=3.0, **o),
    "multilabel_margin_loss": lambda z, **o: F.multilabel_margin_loss(first(z), ONE_LABEL, **o),
}


def test_every_loss_is_asked_for():
    assert {name.partition(",")[0] for name in LOSSES} | {"ctc_loss"} == {loss.__name__ for loss in SIGNATURES}


def problem_of(net, loss):
    """As :meth:`RecordedBatch.evaluate` does it."""

    def problem(weights, inputs=None):
        with SampleWeights(weights) as weighing:
            if inputs is None:
                return Evaluated(loss(net), [], weighing.calls)
            with inputs:
                return Evaluated(loss(net), [], weighing.calls)

    return problem


def pulled(engine, net, loss, cotangent):
    weights = torch.ones(NUM, dtype=torch.float64, requires_grad=True)
    return engine.open(problem_of(net, loss), list(net.parameters()), weights, False).pull_back(cotangent, {})


def directions(net, seed=5):
    source = torch.Generator().manual_seed(seed)
    return [torch.randn(p.shape, dtype=p.dtype, generator=source) for p in net.parameters()]


def flat(tensors):
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


def dense_product(net, enter, loss_at, cotangent):
    """``J^T H_L J c`` where ``loss_at(enter(network's output))`` is the loss."""
    params = {name: param.detach() for name, param in net.named_parameters()}

    def entering(*values):
        return enter(functional_call(net, dict(zip(params, values, strict=True)), (X,)))

    jacobian = jacrev(entering, argnums=tuple(range(len(params))))(*params.values())
    z = entering(*params.values())
    jac = torch.cat([part.reshape(z.numel(), -1) for part in jacobian], dim=1)
    curvature = jacrev(jacrev(loss_at))(z).reshape(z.numel(), z.numel())
    return jac.T @ curvature @ jac @ flat(cotangent)


def hinges(z, power, margin, reduction):
    """Torch's own have no second derivative."""
    short = (margin - z.gather(1, CLASSES[:, None]) + z).clamp(min=0) ** power
    rows = short.scatter(1, CLASSES[:, None], 0.0).mean(1)
    return rows if reduction == "none" else rows.mean()


BETWEEN = {  # what enters, and what the loss makes of it, where it is not the network's output that enters
    "binary_cross_entropy": (
        lambda z: first(z).sigmoid(),
        lambda p, **o: F.binary_cross_entropy(p, Y.sigmoid(), **o),
    ),
    "gaussian_nll_loss": (
        lambda z: torch.cat([first(z), second(z).exp()], 1),
        lambda p, **o: F.gaussian_nll_loss(first(p), Y, second(p), **o),
    ),
    "multi_margin_loss": (first, lambda z, reduction: hinges(z, 2, 3.0, reduction)),
    "multilabel_margin_loss": (first, lambda z, reduction: hinges(z, 1, 1.0, reduction)),
}


@pytest.mark.filterwarnings("ignore:reduction. 'mean' divides:UserWarning", "ignore:There is a performance drop")
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("name", LOSSES)
def test_the_product_is_that_of_a_dense_matrix(name, reduction):
    """With the rows given, what comes after them is not linear in them."""
    net, loss = network(), LOSSES[name]
    cotangent, total = directions(net), torch.mean if reduction == "mean" else squared
    enter, loss_at = BETWEEN.get(name, (lambda z: z, loss))
    found = pulled(GaussNewton(), net, lambda n: total(loss(n(X), reduction=reduction)), cotangent)
    truth = dense_product(net, enter, lambda z: total(loss_at(z, reduction=reduction)), cotangent)
    torch.testing.assert_close(flat(found.adjoint), truth, rtol=1e-10, atol=1e-12 * float(truth.abs().max() + 1))


def squared(rows):
    return rows.square().mean()


@pytest.mark.parametrize("name", LOSSES)
def test_the_scores_are_those_of_the_exact_engine(name):
    net = network()

    def loss(net):
        rows = LOSSES[name](net(X), reduction="none")
        return (rows.flatten(1).mean(1) if rows.ndim > 1 else rows).mean()

    one, other = (pulled(engine, net, loss, directions(net)) for engine in (GaussNewton(), Exact()))
    torch.testing.assert_close(one.scores, other.scores, rtol=1e-10, atol=1e-14)
    assert one.scores.any()


def test_a_loss_without_a_second_derivative_is_refused_by_name():
    net = network()

    def loss(net):
        return F.ctc_loss(net(X).view(NUM, 3, WIDE).transpose(0, 1).log_softmax(2), *ALIGNED)

    with pytest.raises(UnsupportedOperationError, match=r"_ctc_loss'.*curvature=\"finite\""):
        pulled(GaussNewton(), net, loss, directions(net))


ALIGNED = CLASSES[:, None].clamp(min=1), torch.full((NUM,), 3), torch.ones(NUM, dtype=torch.long)


def test_no_loss_call_is_refused_and_so_are_log_probabilities_of_unknown_make():
    net = network()
    with pytest.raises(UnsupportedOperationError, match="found no loss call"):
        pulled(GaussNewton(), net, lambda net: net(X).square().mean(), directions(net))
    with pytest.raises(UnsupportedOperationError, match=r"nll_loss is linear in what enters it.*log_softmax"):
        pulled(GaussNewton(), net, lambda net: F.nll_loss(first(net(X)).softmax(1).log(), CLASSES), directions(net))


def test_what_enters_beside_the_loss_calls_has_its_exact_second_derivative():
    """A penalty, a learned factor, and a loss call that another one's loss enters."""
    net = network()
    factor = nn.Parameter(torch.tensor(0.3, dtype=torch.float64))
    net.register_parameter("factor", factor)

    def after(z, w, factor):
        one, other = F.mse_loss(first(z), Y), F.cross_entropy(second(z), CLASSES)
        chained = F.smooth_l1_loss(one, torch.tensor(2.0, dtype=torch.float64))
        return one * (-factor).exp() + factor + other + chained + 0.1 * (w.tanh() ** 2).sum() + F.mse_loss(3 * w, w)

    def loss(net):
        return after(net(X), net[0].weight, net.factor)

    cotangent = directions(net)
    names = [name for name, _ in net.named_parameters()]
    point = dict(net.named_parameters())

    def outer(*values):  # z and all parameters, z = J moved to first order: the second derivative is that of the loss
        by_name = dict(zip(names, values, strict=True))
        moved = [by_name[name] - point[name].detach() for name in names]
        z = at.detach() + sum(
            (j * m).flatten(2).sum(2) if m.ndim else j * m for j, m in zip(jacobian, moved, strict=True)
        )
        return after(z, by_name["0.weight"], by_name["factor"])

    at = net(X)
    jacobian = torch.autograd.functional.jacobian(
        lambda *values: functional_call(net, dict(zip(names, values, strict=True)), (X,)), tuple(point.values())
    )
    truth = torch.autograd.functional.hvp(outer, tuple(p.detach() for p in point.values()), tuple(cotangent))[1]
    found = pulled(GaussNewton(), net, loss, cotangent)
    torch.testing.assert_close(flat(found.adjoint), flat(truth), rtol=1e-10, atol=1e-12)


def test_for_convex_losses_the_product_is_positive_semi_definite_where_the_hessian_is_not():
    net = network()

    def bends(engine):
        seeds = range(20)
        found = [
            (c, pulled(engine, net, lambda net: F.cross_entropy(net(X), CLASSES), c))
            for c in map(partial(directions, net), seeds)
        ]
        return [float(flat(c) @ flat(one.adjoint)) for c, one in found]

    assert min(bends(GaussNewton())) > 0 > min(bends(Exact()))


class Forward(torch.autograd.Function):
    """Has a second derivative and no forward mode."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.saved_tensors[0].cos()


def test_without_forward_mode_two_backward_passes_give_the_same():
    net, cotangent, engine = network(), directions(network()), GaussNewton()
    with_it = pulled(GaussNewton(), net, lambda net: F.mse_loss(first(net(X).sin()), Y), cotangent)
    without = pulled(engine, net, lambda net: F.mse_loss(first(Forward.apply(net(X))), Y), cotangent)
    assert not engine.has_forward_mode
    torch.testing.assert_close(flat(with_it.adjoint), flat(without.adjoint), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(with_it.scores, without.scores, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    "kind", ["LSTM", "GRU", "LayerNorm", "Embedding", "attention", "weight_norm", "tied", "checkpoint"]
)
def test_kinds_of_layers(kind):
    """Forward and backward mode are held against each other: the dense truth is made of backward passes only."""
    net = LAYERS[kind]().double()
    x = torch.randint(0, 9, (NUM, 4), generator=torch.Generator().manual_seed(4)) if kind == "Embedding" else X
    cotangent, engine = directions(net), GaussNewton()
    found = pulled(engine, net, lambda net: F.cross_entropy(net(x)[:, :WIDE], CLASSES), cotangent)
    params = list(net.parameters())
    z = net(x)
    jac = torch.stack([flat(torch.autograd.grad(one, params, retain_graph=True)) for one in z.flatten()])
    curvature = jacrev(jacrev(lambda z: F.cross_entropy(z[:, :WIDE], CLASSES)))(z.detach()).reshape(z.numel(), -1)
    truth = jac.T @ curvature @ jac @ flat(cotangent)
    torch.testing.assert_close(flat(found.adjoint), truth, rtol=1e-9, atol=1e-11)
    assert engine.has_forward_mode == (kind not in {"checkpoint"})


class Recurrent(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.layer, self.last = kind(1, 4, batch_first=True), nn.Linear(4, WIDE)

    def forward(self, x):
        return self.last(self.layer(x[..., None])[0][:, -1])


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(1, 4), nn.Linear(4, WIDE)
        self.layer = nn.TransformerEncoderLayer(4, 2, 6, dropout=0.0, batch_first=True, activation="gelu")

    def forward(self, x):
        return self.last(self.layer(self.first(x[..., None])).mean(1))


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.one = nn.Linear(5, 5)
        self.other, self.held = nn.Linear(5, 5), [self.one.weight]
        self.other.weight = self.one.weight

    def forward(self, x):
        return self.other(self.one(x).tanh()) @ self.held[0]


class Checkpointed(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.last = nn.Sequential(nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 5)), nn.Linear(5, WIDE)

    def forward(self, x):
        return self.last(checkpoint(self.inner, x, use_reentrant=False))


LAYERS = {
    "LSTM": lambda: Recurrent(nn.LSTM),
    "GRU": lambda: Recurrent(nn.GRU),
    "LayerNorm": lambda: nn.Sequential(
        nn.Linear(5, 6), nn.LayerNorm(6), nn.ELU(), nn.GroupNorm(2, 6), nn.Linear(6, WIDE)
    ),
    "Embedding": lambda: nn.Sequential(nn.Embedding(9, 3), nn.Flatten(), nn.Tanh(), nn.Linear(12, WIDE)),
    "attention": Attention,
    "weight_norm": lambda: nn.Sequential(weight_norm(nn.Linear(5, 6)), nn.Tanh(), nn.Linear(6, WIDE)),
    "tied": Tied,
    "checkpoint": Checkpointed,
}


@pytest.mark.parametrize("optimizer", [torch.optim.Adam, torch.optim.AdamW, partial(torch.optim.SGD, momentum=0.9)])
@pytest.mark.parametrize("options", [{}, {"weight_decay": 0.1}, {"maximize": True}])
@pytest.mark.parametrize("amsgrad", [False, True])
def test_the_transpose_is_the_same_with_the_gradient_from_the_record(optimizer, options, amsgrad):
    source = torch.Generator().manual_seed(1)
    param = nn.Parameter(torch.randn(7, generator=source))
    more = {"amsgrad": amsgrad} if optimizer in (torch.optim.Adam, torch.optim.AdamW) else {}
    torchs = optimizer([param], lr=0.01, **options, **more)
    update, group = update_of(torchs), {k: v for k, v in torchs.param_groups[0].items() if k != "params"}
    for size in (1.0, 1e-3, 10.0):  # the last step after larger and smaller ones
        before = param.detach().clone(), {k: v.clone() for k, v in torchs.state[param].items() if v is not None}
        param.grad = size * torch.randn(7, generator=source)
        torchs.step()
        found = update.recovered(*before, torchs.state[param], group)
        bars = torch.randn(7, generator=source), {}
        one, other = (update.transpose(before[0], g, before[1], group, *bars)[:2] for g in (param.grad, found))
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-7 / size)  # what cancels is of size lr / g
    low = {key: value.bfloat16() for key, value in torchs.state[param].items() if value is not None}
    assert (update.recovered(*before, low, group) is None) == bool(more)
