# SPDX-License-Identifier: Apache-2.0
"""Trainings that use another gradient than the derivative of their loss, each as strongly as is wished.

A fault of strength ``s`` is that part of a value which is kept from the gradient, or of a gradient which is edited: at
``s = 0`` the training is right, at 1 the fault is as people write it. It begins at once, or where nobody looks for it.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

import among_tests  # noqa: F401
from cases import NUM_CLASSES, VAL, Case, Plain, adam


def wide():
    return nn.Sequential(nn.Linear(5, 8), nn.Linear(8, 4096), nn.Tanh(), nn.Linear(4096, 8), nn.Linear(8, NUM_CLASSES))


NETWORKS = {
    "SGD": {"options": {"momentum": 0.9}},
    "Adam, BatchNorm": {"make_optimizer": adam, "norm": True},
    "Adam, 70,000 weights": {"make_optimizer": partial(adam, lr=1e-3, eps=1e-8), "net": wide},
    "Adam": {"make_optimizer": partial(adam, eps=1e-12)},
}
SGD, NORM, WIDE, ADAM = NETWORKS
AT_ONCE = "at once"
BEGINS = {  # epoch and number of the batch, of 3 epochs of 5 batches: is it there?
    AT_ONCE: lambda epoch, number: True,
    "from epoch 1 on": lambda epoch, number: epoch >= 1,
    "in one batch": lambda epoch, number: (epoch, number) == (1, 2),
    "in odd micro-batches": lambda epoch, number: number % 2 == 1,
}
ACCUMULATED = {"accumulate_grad_batches": 2, "max_epochs": 2}, {"batch_size": 6}  # so that each step is checked
HIDDEN = ", by the same operations"  # elsewhere its strength is zero; without this, its operations are not there


def when(begins: str, epoch: int, number: int, strength: float) -> float | None:
    """How strong a fault is in a batch; None: nothing of it is there."""
    elsewhere = 0.0 if begins.endswith(HIDDEN) else None
    return strength if BEGINS[begins.removesuffix(HIDDEN)](epoch, number) else elsewhere


class Faulty(Plain):
    """A classifier that trains by ``fault.loss(module, batch, s)`` and is validated by ``fault.objective``."""

    def __init__(self, fault, strength, begins=AT_ONCE, **options):
        super().__init__(**options)
        self.fault, self.strength, self.begins = fault, strength, begins
        fault.hang(self, strength)

    def mean_loss(self, scores, batch):
        """Cross entropy; with weights on the samples, if there are any."""
        if self.sample_weights is None:
            return F.cross_entropy(scores, batch[1])
        return self.mean(F.cross_entropy(scores, batch[1], reduction="none"), batch)

    def mean(self, rows, batch):
        return rows.mean() if self.sample_weights is None else (rows * self.sample_weights[batch[-1]]).mean()

    def training_step(self, batch, batch_idx):
        return self.fault.loss(self, batch, when(self.begins, self.current_epoch, batch_idx, self.strength))

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.fault.objective(self, batch, self.strength))


def objective_of(module):
    """The objective of a trained module, over the batches that it is validated on."""
    module.eval()
    with torch.no_grad():
        return sum(
            len(batch[0]) * float(module.fault.objective(module, [batch[0].double(), *batch[1:]], module.strength))
            for batch in DataLoader(VAL, batch_size=4)
        ) / len(VAL)


def plainly(module, batch, strength):
    return module.mean_loss(module.net(batch[0]), batch)


def validated(module, batch, strength):
    return F.cross_entropy(module.net(batch[0]), batch[1])


@dataclass(frozen=True)
class Fault:
    """What is done to the gradient.

    Attributes:
        loss: ``(module, batch, s)`` to the training loss; ``s`` is None in batches without the fault.
        objective: The same for validation, with the strength itself.
        hang: Hangs hooks on the network once it is made.
        options: For the callback.
        followed: Engines that follow it exactly, so that it is none.
    """

    loss: Callable[..., Any] = plainly
    objective: Callable[..., Any] = validated
    hang: Callable[..., Any] = lambda module, strength: None
    options: dict[str, Any] = field(default_factory=dict)
    followed: tuple[str, ...] = ()


# Ways in which a value is kept from the gradient: from what computes it to the value ------------------------------


def _inferred(compute):
    with torch.inference_mode():
        found = compute()
    return found.clone()


def _without_grad(compute):
    with torch.no_grad():
        return compute()


def _retensored(compute):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.tensor(compute())


WAYS = {
    "detach": lambda compute: compute().detach(),
    "data": lambda compute: compute().data,
    "no_grad": _without_grad,
    "inference_mode": _inferred,
    "torch.tensor": _retensored,
    "item": lambda compute: compute().item(),
    "tolist": lambda compute: compute().tolist(),
    "float": lambda compute: float(compute()),
    "numpy": lambda compute: float(compute().numpy(force=True)),
    "numpy in float32": lambda compute: float(compute().numpy(force=True).astype("float32")),
    "detached numpy in float32": lambda compute: float(compute().detach().numpy().astype("float32")),
    "item under no_grad in float32": lambda compute: float(np.float32(_without_grad(compute).item())),
    "item of four digits": lambda compute: round(compute().item(), 3),
}
IN_FULL = {  # what rounds hides the small moves of the twin that tells the truth: it gets the number in full
    "numpy in float32": "numpy",
    "detached numpy in float32": "detach",
    "item under no_grad in float32": "no_grad",
    "item of four digits": "item",
}


def stopped(compute, strength, way):
    """A value of which that share is kept from the gradient; the value itself stays what it is."""
    if strength is None:
        return compute()
    return (1 - strength) * compute() + strength * WAYS[way](compute)


# Losses -----------------------------------------------------------------------------------------------------------


def over_length(way):
    def loss(module, batch, strength):
        own = way if module.sample_weights is None else IN_FULL.get(way, way)
        length = stopped(module.net[0].weight.norm, strength, own)
        return module.mean_loss(module.net(batch[0]) / length, batch)

    return loss


def ratio_of_terms(way):
    def loss(module, batch, strength):
        first, second = plainly(module, batch, strength), module.net[0].weight.square().sum()
        return first + 0.3 * stopped(lambda: first / second, strength, way) * second

    return loss


def cosine_targets(module, batch, strength):
    target = stopped(lambda: module.net(batch[0] + 0.1), strength, "detach")
    how = "mean" if module.sample_weights is None else "none"
    rows = F.cosine_embedding_loss(module.net(batch[0]), target, torch.ones(len(target)).to(target), reduction=how)
    return plainly(module, batch, strength) + (rows if how == "mean" else module.mean(rows, batch))


def focal(module, batch, strength):
    rows = F.cross_entropy(module.net(batch[0]), batch[1], reduction="none")
    return module.mean(rows * stopped(lambda: 1 - (-rows).exp(), strength, "detach"), batch)


def balanced_rows(module, batch, strength):
    rows = F.cross_entropy(module.net(batch[0]), batch[1], reduction="none")
    return rows / stopped(rows.mean, strength, "item")


def distilled_rows(module, batch):
    target = stopped(lambda: (module.net(batch[0]) / 2).softmax(-1), module.strength, "no_grad")
    rows = -(target * module.net(batch[0]).log_softmax(-1)).sum(-1)
    return rows + F.cross_entropy(module.net(batch[0]), batch[1], reduction="none")


def beside_a_term(factor):
    """The fault is in a term beside one of other parameters, so many times as large; Adam moves both alike."""

    def loss(module, batch, strength):
        scores = module.net(batch[0]) / stopped(module.net[0].weight.norm, strength, "detach")
        other = F.mse_loss(module.beside(batch[0]), batch[0].flip(1), reduction="none").mean(1)
        return module.mean_loss(scores, batch) + factor * module.mean(other, batch)

    return loss


def with_another_part(module, strength):
    module.beside = nn.Linear(5, 5)


def temperature(module, batch, strength):
    scores = module.net(batch[0])
    return module.mean_loss(scores / stopped(lambda: 1 + scores.norm(dim=1, keepdim=True), strength, "detach"), batch)


def adaptive_decay(module, batch, strength):
    weight = module.net[0].weight
    return plainly(module, batch, strength) + 0.5 * (stopped(weight.abs, strength, "detach") * weight.square()).sum()


def by_gradients(module, batch, strength):
    """A weight of two terms from the lengths of their gradients."""
    first, second = plainly(module, batch, strength), module.net[0].weight.square().sum()
    if strength is None:
        return first
    lengths = [torch.autograd.grad(one, module.net[0].weight, retain_graph=True)[0].norm() for one in (first, second)]
    return first + 0.1 * strength * (lengths[0] / lengths[1]) * second


def through(change):
    """The loss with the hidden values changed by ``change(hidden, s)``."""

    def loss(module, batch, strength):
        hidden = module.net[:3](batch[0])
        return module.mean_loss(module.net[3:](hidden if strength is None else change(hidden, strength)), batch)

    return loss


def straight_through(hidden, strength):
    return hidden + strength * (hidden.round(decimals=1).sin() - hidden).detach()


class Identity(torch.autograd.Function):
    """Changes nothing on the way forward."""

    @staticmethod
    def forward(ctx, x, strength):
        ctx.strength = strength
        return x.view_as(x)


class Reversal(Identity):
    @staticmethod
    def backward(ctx, grad):
        return (1 - 3 * ctx.strength) * grad, None


class Rounding(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, strength):
        return x + strength * (x.round(decimals=1) - x)

    @staticmethod
    def backward(ctx, grad):
        return grad, None


class ClampedBackward(Identity):
    @staticmethod
    def backward(ctx, grad):
        return grad + ctx.strength * (grad.clamp(-0.02, 0.02) - grad), None


class Kept(torch.autograd.Function):
    """Its backward uses what forward kept beside save_for_backward, which counts as a constant."""

    @staticmethod
    def forward(ctx, x, strength):
        ctx.strength, ctx.kept = strength, x.detach().clone()
        return x + strength * x * x

    @staticmethod
    def backward(ctx, grad):
        return grad * (1 + 2 * ctx.strength * ctx.kept), None


# Hooks ------------------------------------------------------------------------------------------------------------


def hooked(edit):
    """A hook of the hidden values, which gives ``edit`` in place of that share of the gradient."""

    def change(hidden, strength):
        if hidden.requires_grad:
            hidden.register_hook(lambda grad: grad + strength * (edit(grad) - grad))
        return hidden

    return through(change)


def hooked_parameter(edit):
    def hang(module, strength):
        module.net[0].weight.register_hook(lambda grad: grad + strength * (edit(grad) - grad))

    return hang


def hooked_module(edit):
    def hang(module, strength):
        module.net[2].register_full_backward_hook(
            lambda part, given, got: (given[0] + strength * (edit(given[0]) - given[0]),)
        )

    return hang


def hooked_when_accumulated(edit):
    def hang(module, strength):
        def hook(param):
            param.grad.add_(edit(param.grad) - param.grad, alpha=strength)

        module.net[-1].weight.register_post_accumulate_grad_hook(hook)

    return hang


def own_backward(module, strength):
    usual = module.backward

    def backward(loss, *args, **kwargs):
        usual(loss, *args, **kwargs)
        module.net[0].weight.grad.mul_(1 + 3 * strength)

    module.backward = backward


def by_detached_length(grad):
    return grad / (grad.detach().norm() + 0.01)


# Objectives -------------------------------------------------------------------------------------------------------


def with_a_factor(way):
    def objective(module, batch, strength):
        scores, size = module.net(batch[0]), stopped(module.net[0].weight.norm, strength, way)
        return F.cross_entropy(scores, batch[1]) + 0.2 * size * scores.square().mean()

    return objective


def with_a_number(module, batch, strength):
    scores = module.net(batch[0])
    return F.cross_entropy(scores, batch[1]) * (1 + stopped(scores.std, strength, "item"))


def with_a_term(module, batch, strength):
    return validated(module, batch, strength) + 0.1 * stopped(
        lambda: module.net[0].weight.square().sum(), strength, "no_grad"
    )


FAULTS = {f"{way} of a length": Fault(over_length(way)) for way in WAYS} | {
    "detached ratio of terms": Fault(ratio_of_terms("detach")),
    "item of a ratio of terms": Fault(ratio_of_terms("item")),
    "detached cosine targets": Fault(cosine_targets),
    "self-distillation under no_grad": Fault(
        lambda module, batch, strength: module.mean(distilled_rows(module, batch), batch),
        options={"sample_losses": distilled_rows},
    ),
    "detached focal weights": Fault(focal),
    "rows over their mean's item": Fault(
        lambda module, batch, strength: module.mean(balanced_rows(module, batch, strength), batch),
        options={"sample_losses": lambda module, batch: balanced_rows(module, batch, module.strength)},
    ),
    "detached temperature": Fault(temperature),
    "detached adaptive decay": Fault(adaptive_decay),
    "weights from gradient norms": Fault(by_gradients),
    "straight-through by detach": Fault(through(straight_through)),
    "Function, reversal": Fault(through(Reversal.apply)),
    "Function, straight-through": Fault(through(Rounding.apply)),
    "Function, clamped backward": Fault(through(ClampedBackward.apply)),
    "Function, values kept beside": Fault(through(Kept.apply), followed=("finite",)),
    "hook of a tensor that detaches": Fault(hooked(by_detached_length)),
    "hook of a parameter that detaches": Fault(hang=hooked_parameter(by_detached_length)),
    "hook of a module that detaches": Fault(hang=hooked_module(lambda grad: grad.detach().clamp(-0.01, 0.01))),
    "hook of a tensor": Fault(hooked(lambda grad: -2 * grad), followed=("exact",)),
    "hook of a parameter": Fault(hang=hooked_parameter(lambda grad: grad.clamp(-0.02, 0.02)), followed=("exact",)),
    "hook of a module": Fault(hang=hooked_module(lambda grad: 4 * grad), followed=("exact",)),
    "post-accumulate hook": Fault(hang=hooked_when_accumulated(lambda grad: 4 * grad)),
    "post-accumulate hook that clamps": Fault(hang=hooked_when_accumulated(lambda grad: grad.clamp(-0.02, 0.02))),
    "backward of its own": Fault(hang=own_backward),
    "objective, detached factor": Fault(objective=with_a_factor("detach")),
    "objective, item of a factor": Fault(objective=with_a_number),
    "objective, term under no_grad": Fault(objective=with_a_term),
}


def behind_two_batches(module, batch, strength):
    """Validation samples from the eighth on come in the third batch."""
    return with_a_factor("detach")(module, batch, strength if int(batch[-1][0]) >= 8 else 0.0)


UNSEEN = {"objective, detached factor behind two batches": Fault(objective=behind_two_batches)}
BESIDE = {
    f"detach in a term beside one {factor:,.0f} times as large": Fault(beside_a_term(factor), hang=with_another_part)
    for factor in (1, 1e2, 1e4, 1e6)
}


@dataclass(frozen=True)
class Trial:
    """One training with a fault."""

    fault: str
    strength: float
    begins: str = AT_ONCE
    curvature: str = "exact"
    network: str = SGD
    precision: str = "64-true"

    @property
    def is_right(self) -> bool:
        """Whether the engine follows it exactly."""
        return self.curvature in self.what.followed

    @property
    def what(self) -> Fault:
        return (FAULTS | BESIDE | UNSEEN)[self.fault]

    @property
    def case(self) -> Case:
        module = {"fault": self.what, "strength": self.strength, "begins": self.begins} | NETWORKS[self.network]
        trainer, loader = ACCUMULATED if "micro" in self.begins else ({}, {})
        return Case(self.fault, module, {"precision": self.precision, **trainer}, loader, make=Faulty)

    @property
    def twin(self) -> "Trial":
        """The same training in 64 bits, whose truth can be had."""
        return replace(self, precision="64-true")


SOME = (
    "detach of a length",
    "item of a length",
    "detached ratio of terms",
    "detached focal weights",
    "Function, reversal",
    "hook of a tensor that detaches",
)


def trials() -> list[Trial]:
    """Those that are measured."""
    by_strength = ((1, SGD), (0.1, NORM), (1e-2, SGD), (1e-3, NORM), (1e-4, SGD))
    late = [begins + hidden for begins in ("from epoch 1 on", "in one batch") for hidden in ("", HIDDEN)]
    return [
        *(Trial(name, strength, network=network) for name in FAULTS for strength, network in by_strength),
        *(Trial(name, *how) for name in FAULTS for how in ((1, AT_ONCE, "finite", NORM), (1e-2, AT_ONCE, "finite"))),
        *(Trial(name, strength, begins) for name in SOME for begins in late for strength in (1, 1e-2)),
        *(Trial(name, strength, "in odd micro-batches") for name in SOME for strength in (1, 1e-2)),
        *(Trial(name, strength) for name in UNSEEN for strength in (1, 1e-2)),
        *(Trial(name, strength, network=ADAM) for name in BESIDE for strength in (1, 1e-2)),
        *(Trial(name, strength, network=WIDE) for name in SOME for strength in (1, 1e-2)),
        *(Trial(name, 1, precision="32-true") for name in FAULTS),
        *(Trial(name, 1, precision="bf16-mixed") for name in SOME),
    ]
