# SPDX-License-Identifier: Apache-2.0
"""Trainings whose derivative is right, so that whatever the check says of them is a false alarm.

Most are those that the tests hold against central differences of whole fits. The others look as if something were
wrong: kinks, numbers of very different sizes, gradients that hardly are, and values that leave the graph in vain.
"""

import random
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from itertools import product

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

import among_tests  # noqa: F401
from cases import CASES, NUM_CLASSES, Case, Plain, adam
from split_losses import LOSSES, STEPS, class_loss
from split_losses import case as loss_case

PRECISIONS, ENGINES = ("64-true", "32-true", "bf16-mixed"), ("exact", "finite")
EXACT64, FINITE64, EXACT32, FINITE32, EXACT16, FINITE16 = SETTINGS = list(product(PRECISIONS, ENGINES))


@dataclass(frozen=True)
class Right:
    """One training."""

    group: str
    case: Case
    precision: str
    curvature: str

    @property
    def trained(self) -> Case:
        """The case in its precision."""
        return replace(self.case, trainer={**self.case.trainer, "precision": self.precision})


class By(Plain):
    """Has the loss of a function ``(module, batch, reduction)``."""

    def __init__(self, how=None, **options):
        super().__init__(**options)
        self.how = how

    def loss(self, batch, reduction="mean"):
        return self.how(self, batch, reduction)


def by(how, name=None, **module):
    return Case(name or how.__name__.replace("_", " "), {"how": how, "options": {"momentum": 0.9}, **module}, make=By)


# Values that leave the graph in vain ------------------------------------------------------------------------------


def detached_maximum(m, b, how):
    scores = m.net(b[0])
    return F.cross_entropy(scores - scores.max(-1, keepdim=True).values.detach(), b[1], reduction=how)


def maximum_as_a_number(m, b, how):
    scores = m.net(b[0])
    return F.cross_entropy(scores - scores.max().item(), b[1], reduction=how)


def logged_items(m, b, how):
    loss = F.cross_entropy(m.net(b[0]), b[1], reduction=how)
    m.seen = loss.detach().mean().item(), m.net[0].weight.norm().tolist(), m.net[-1].bias.detach().numpy(force=True)
    return loss


def mask_of_detached_scores(m, b, how):
    scores = m.net(b[0])
    sure = scores.detach().softmax(-1).max(-1).values > 0.4
    return F.cross_entropy(scores * torch.where(sure, 1.0, 0.5)[:, None], b[1], reduction=how)


def branch_on_an_item(m, b, how):
    scores = m.net(b[0])
    return F.cross_entropy(scores * (0.5 if scores.abs().max().item() > 1 else 1.0), b[1], reduction=how)


def pseudo_labels(m, b, how):
    with torch.no_grad():
        guessed = m.net(b[0] + 0.1).argmax(-1)
    scores = m.net(b[0])
    return F.cross_entropy(scores, b[1], reduction=how) + 0.3 * F.cross_entropy(scores, guessed, reduction=how)


def gradient_norm_for_the_log(m, b, how):
    loss = F.cross_entropy(m.net(b[0]), b[1], reduction=how)
    if loss.requires_grad:
        m.norm = torch.autograd.grad(loss.mean(), m.net[0].weight, retain_graph=True)[0].norm().item()
    return loss


def hook_that_only_looks(m, b, how):
    hidden = m.net[:3](b[0])
    if hidden.requires_grad:
        hidden.register_hook(lambda grad: m.__dict__.update(size=float(grad.norm())))
    return F.cross_entropy(m.net[3:](hidden), b[1], reduction=how)


def share_of_errors(m, b, how):
    """A term that is constant but where it jumps."""
    scores = m.net(b[0])
    return F.cross_entropy(scores, b[1], reduction=how) + 0.1 * (scores.argmax(-1) != b[1]).double().mean().item()


def number_of_its_own(m, b, how):
    return F.cross_entropy(m.net(b[0] / torch.linspace(1, 2, 5).norm().item()), b[1], reduction=how)


def term_for_the_log(m, b, how):
    scores = m.net(b[0])
    with torch.no_grad():
        m.entropy = -(scores.softmax(-1) * scores.log_softmax(-1)).sum(-1).mean()
    return F.cross_entropy(scores, b[1], reduction=how)


class Taught(By):
    """The targets come from a network that is not trained."""

    def __init__(self, **options):
        super().__init__(**options)
        self.teacher = nn.Linear(5, NUM_CLASSES)

    def loss(self, batch, reduction="mean"):
        with torch.no_grad():
            target = self.teacher(batch[0]).softmax(-1)
        return F.cross_entropy(self.net(batch[0]), target, reduction=reduction)

    def configure_optimizers(self):
        return self.make_optimizer(self.net.parameters(), **self.options)


IN_VAIN = [
    *map(by, (detached_maximum, maximum_as_a_number, logged_items, mask_of_detached_scores, branch_on_an_item)),
    *map(by, (pseudo_labels, gradient_norm_for_the_log, hook_that_only_looks, share_of_errors)),
    *map(by, (number_of_its_own, term_for_the_log)),
    Case("frozen teacher", {"options": {"momentum": 0.9}}, make=Taught),
]


# Kinks ------------------------------------------------------------------------------------------------------------


class Pooled(nn.Module):
    """Convolutions over the five inputs, and a pooling of two of their values each."""

    def __init__(self, activation, pool):
        super().__init__()
        self.first, self.second = nn.Conv1d(1, 8, 2), nn.Conv1d(8, 8, 1)
        self.activation, self.pool, self.last = activation(), pool, nn.Linear(16, NUM_CLASSES)

    def forward(self, x):
        hidden = self.activation(self.first(x[:, None]))
        return self.last(self.activation(self.second(self.pool(hidden))).flatten(1))


def deep(activation, depth=3, width=32):
    layers = [nn.Linear(5, width), activation()]
    for _ in range(depth - 1):
        layers += [nn.Linear(width, width), activation()]
    return nn.Sequential(*layers, nn.Linear(width, NUM_CLASSES))


def network(name, net, **module):
    return Case(name, {"net": net, "options": {"momentum": 0.9}, **module})


def hinge(m, b, how):
    rows = (1 + m.net(b[0]) - m.net(b[0]).gather(1, b[1][:, None])).clamp(min=0)
    return F.mse_loss(rows.sum(-1), torch.zeros_like(rows[:, 0]), reduction=how)


def chosen_scores(m, b, how):
    scores = m.net(b[0])
    chosen = scores.sort(-1).values + scores.topk(2).values.sum(-1, keepdim=True)
    return F.cross_entropy(scores + chosen, b[1], reduction=how)


KINKED = [
    network("ReLU", partial(deep, nn.ReLU)),
    network("LeakyReLU, Adam", partial(deep, nn.LeakyReLU), make_optimizer=adam, options={}),
    network("Hardswish", partial(deep, nn.Hardswish)),
    network("GELU", partial(deep, nn.GELU)),
    network("tanh", partial(deep, nn.Tanh)),
    network("ReLU, max-pooling", partial(Pooled, nn.ReLU, nn.MaxPool1d(2))),
    network("GELU, max-pooling, Adam", partial(Pooled, nn.GELU, nn.MaxPool1d(2)), make_optimizer=adam, options={}),
    by(hinge),
    by(chosen_scores),
]


# Numbers of very different sizes ----------------------------------------------------------------------------------


def tiny_loss(m, b, how):
    return 1e-8 * F.cross_entropy(m.net(b[0]), b[1], reduction=how)


def huge_loss(m, b, how):
    return 1e8 * F.cross_entropy(m.net(b[0]), b[1], reduction=how)


def saturated_softmax(m, b, how):
    return F.cross_entropy(30 * m.net(b[0]), b[1], reduction=how)


def root_near_zero(m, b, how):
    error = m.net(b[0]).sum(-1)
    return F.mse_loss((error.square() + 1e-10).sqrt(), torch.zeros_like(error), reduction=how)


def steep_threshold(m, b, how):
    return F.cross_entropy((50 * m.net(b[0])).sigmoid(), b[1], reduction=how)


def large_inputs(m, b, how):
    return F.cross_entropy(m.net(1e3 * b[0]), b[1], reduction=how)


def logarithm_of_almost_nothing(m, b, how):
    return F.nll_loss((m.net(b[0]).softmax(-1) + 1e-12).log(), b[1], reduction=how)


def random_depth(m, b, how):
    hidden = m.net[:3](b[0])
    if m.training and random.random() < 0.5:
        hidden = hidden + 0.1 * hidden.square() * torch.rand(1).to(hidden)
    return F.cross_entropy(m.net[3:](hidden), b[1], reduction=how)


class Filled(nn.Sequential):
    """A perceptron whose first or last layer is filled with one number."""

    def __init__(self, layer, weight, bias, activation=nn.ReLU):
        super().__init__(nn.Linear(5, 8), activation(), nn.Linear(8, 8), activation(), nn.Linear(8, NUM_CLASSES))
        nn.init.constant_(self[layer].weight, weight)
        nn.init.constant_(self[layer].bias, bias)


class Unequal(nn.Module):
    """Weights a million times as large as others, which do as much."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(5, 8), nn.Linear(8, NUM_CLASSES)
        with torch.no_grad():
            self.first.weight.mul_(1e3)
            self.last.weight.mul_(1e-3)

    def forward(self, x):
        return 1e3 * self.last((self.first(x) * 1e-3).tanh())


def slow(case, lr):
    return replace(case, module={**case.module, "options": {"lr": lr, "momentum": 0.9}})


EXTREME = [
    slow(by(tiny_loss), 1e7),
    slow(by(huge_loss), 1e-9),
    slow(by(saturated_softmax), 1e-3),
    by(root_near_zero),
    slow(by(steep_threshold), 1e-3),
    slow(by(large_inputs), 1e-3),
    by(logarithm_of_almost_nothing),
    by(random_depth),
    network("last layer of zeros", partial(Filled, -1, 0.0, 0.0, nn.Tanh)),
    network("dead units", partial(Filled, 0, 0.01, -9.0)),
    network("weights of unequal size", Unequal),
    network("twenty layers", partial(deep, nn.Tanh, 20, 8)),
    Case("batches of one", {"options": {"lr": 0.01}}, {"max_epochs": 1}, {"batch_size": 1}),
]

# Operations and constants that may not be there in float64, or go another way ----------------------------------------


class Numbers(nn.Module):
    """Constants in float32 that are no buffers."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(5, 8), nn.Linear(8, NUM_CLASSES)
        self.constants = [torch.from_numpy(np.linspace(0.5, 1.5, 8, dtype=np.float32)), torch.full((8,), 0.1)]

    def forward(self, x):
        hidden = self.first(x).tanh() * self.constants[0].to(x) + self.constants[1].to(x.dtype)
        edges = torch.eye(8, dtype=hidden.dtype).roll(1, 0).to_sparse()
        hidden = torch.sparse.mm(edges, hidden.T).T
        filled = torch.zeros(len(x), 8, dtype=hidden.dtype)
        filled[:, ::2] = hidden[:, ::2]
        return self.last(filled.index_add(1, torch.tensor([1, 3]), hidden[:, :2]))


class Transformed(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(5, 8), nn.Linear(5, NUM_CLASSES)

    def forward(self, x):
        return self.last(torch.fft.rfft(self.first(x).tanh()).abs())


class Solved(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(5, 9), nn.Linear(3, NUM_CLASSES)

    def forward(self, x):
        matrices = self.first(x).view(-1, 3, 3) + 3 * torch.eye(3).to(x)
        return self.last(torch.linalg.solve(matrices, x[:, :3, None])[..., 0])


def orthogonal():
    layer = nn.utils.parametrizations.orthogonal(nn.Linear(5, 5))
    return nn.Sequential(layer, nn.Tanh(), nn.Linear(5, NUM_CLASSES))


def functional_call(m, b, how):
    scores = torch.func.functional_call(m.net, dict(m.net.named_parameters()), (b[0],))
    return F.cross_entropy(scores, b[1], reduction=how)


def vectorised_map(m, b, how):
    return F.cross_entropy(torch.vmap(m.net)(b[0]), b[1], reduction=how)


def gradient_penalty(m, b, how):
    """On the inputs' gradients, which keep their graph."""
    with torch.enable_grad():
        x = b[0].clone().requires_grad_()
        scores = m.net(x)
        (grads,) = torch.autograd.grad(scores.square().sum(), x, create_graph=True)
    return F.cross_entropy(scores, b[1], reduction=how) + 0.1 * F.mse_loss(
        grads.norm(dim=1), torch.ones(len(x)).to(x), reduction=how
    )


UNUSUAL = [
    network("constants in float32", Numbers),
    network("Fourier transform", Transformed),
    network("linear equations", Solved),
    network("orthogonal weights", orthogonal),
    *map(by, (functional_call, vectorised_map, gradient_penalty)),
]

NARROW = (
    "cross entropy",
    "label smoothing",
    "none, then a mean",
    "focal through the rows",
    "nll",
    "mse",
    "l1",
    "huber",
)
NARROW += ("smooth l1", "kl", "gaussian", "poisson")  # losses whose tests are not written for 64 bits only


def narrowed(case):
    """Without the check of the twin, which is made in 64 bits."""

    def make(**options):
        module = case.make(**options)
        module.on_train_start = lambda: None
        return module

    return replace(case, make=make)


def zoo():
    """Models of transformers, peft and torch_geometric, and in the style of the tutorials."""
    transformers, graphs = import_module("test_transformers"), import_module("test_torch_geometric")
    yield transformers.RESNET
    yield from transformers.SMOOTH
    yield Case(
        "GPT-2, its own loss",
        {"net": partial(transformers.Logits, transformers.gpt2), "make_optimizer": adam},
        make=transformers.OwnLoss,
        **transformers.SENTENCES,
    )
    yield replace(import_module("test_peft").CASE, name="LoRA")
    yield from map(graphs.case, graphs.CONVOLUTIONS)
    yield from import_module("test_tutorials").CASES


def modules():
    tests = import_module("test_modules")
    return [*tests.NORMS, *tests.DROPOUTS, *tests.SEQUENCES, *tests.OTHERS]


def hooks():
    """Hooks that the exact engine follows."""
    return [Case(kind.__name__, make=kind) for kind in import_module("test_gradcheck").FOLLOWED]


def in_turn(cases, settings, num):
    """Each case in so many of the settings, one after the other."""
    for number, case in enumerate(cases):
        for i in range(num):
            yield case, settings[(number * num + i) % len(settings)]


def trainings() -> list[Right]:
    """Those that are tried."""
    losses = [loss_case(name, *class_loss(*LOSSES[name])) for name in LOSSES]
    losses += [loss_case(name, *STEPS[name]) for name in STEPS]
    narrow = [narrowed(loss_case(name, *class_loss(*LOSSES[name]))) for name in NARROW]
    loops = [case for case in CASES.values() if not case.loader]
    groups = {
        "the zoo": product(zoo(), (EXACT64, EXACT32, FINITE32, EXACT16)),
        "loops and optimizers": product(loops, (EXACT64, FINITE32)),
        "modules": in_turn(modules(), (EXACT64, EXACT32, EXACT16, FINITE64, FINITE32), 1),
        "losses": [*in_turn(losses, (EXACT64, FINITE64), 1), *in_turn(narrow, (EXACT32, FINITE32, EXACT16), 1)],
        "hooks": product(hooks(), (EXACT64, EXACT32, EXACT16)),
        "values that leave the graph in vain": product(IN_VAIN, (EXACT64, FINITE64, EXACT32, EXACT16)),
        "kinks": product(KINKED, (EXACT64, FINITE64, EXACT32, FINITE32, EXACT16)),
        "unusual operations": product(UNUSUAL, (EXACT64, EXACT32, FINITE32)),
        "numbers of very different sizes": product(EXTREME, (EXACT64, EXACT32, FINITE32, EXACT16)),
    }
    return [Right(group, case, *setting) for group, pairs in groups.items() for case, setting in pairs]
