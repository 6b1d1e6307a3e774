# SPDX-License-Identifier: Apache-2.0
"""Which optimizer class has which update, why others have none, and clipping before it."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_sgdclean.adjoint.closed_forms import ASGD, SGD, Adadelta, Adagrad, Adam, Adamax, NAdam, RAdam, RMSprop
from lightning_sgdclean.adjoint.packaged_updates import PACKAGED, REASONS, UNFOLLOWED
from lightning_sgdclean.adjoint.updates import Clip, Forward, Function, Proved, Update
from lightning_sgdclean.base.errors import UnsupportedTrainingError
from lightning_sgdclean.trajectory.live_state import is_plain

_UPDATES: dict[type[Optimizer], Update] = {
    torch.optim.SGD: SGD(),
    torch.optim.Adam: Adam(decoupled=False),
    torch.optim.AdamW: Adam(decoupled=True),
    torch.optim.Adadelta: Adadelta(),
    torch.optim.Adagrad: Adagrad(),
    torch.optim.Adamax: Adamax(),
    torch.optim.ASGD: ASGD(),
    torch.optim.NAdam: NAdam(),
    torch.optim.RAdam: RAdam(),
    torch.optim.RMSprop: RMSprop(),
}
_REGISTERED: dict[type[Optimizer], Update] = {}


def register_update(optimizer_class: type[Optimizer], update: Update | Forward | type[Optimizer]) -> None:
    """Follow a class of optimizers that is not followed by itself; docs/optimizers.md has examples.

    Every retrace holds the forward against the recorded steps, and the transpose against differences.

    Args:
        optimizer_class: The class; its subclasses are not meant.
        update: Its step on one parameter: a function as :meth:`Update.forward` is one, or an :class:`Update` where the
            step rounds, where more than the counter ``step`` is no function of gradients, or with a transpose of your
            own; or a class that is followed by itself, if the step is that of this class.

    Raises:
        TypeError: If either is something else.
    """
    if not (isinstance(optimizer_class, type) and issubclass(optimizer_class, Optimizer)):
        raise TypeError(f"optimizer_class must be a class derived from torch.optim.Optimizer, got {optimizer_class!r}.")
    if isinstance(update, type):
        update = _UPDATES.get(update) or PACKAGED.get(_place_of(update)) or update
    if isinstance(update, type) or not (isinstance(update, Update) or callable(update)):
        raise TypeError(
            f"update must be an Update, a function (param, grad, state, group) or a followed class, got {update!r}."
        )
    _REGISTERED[optimizer_class] = update if isinstance(update, Update) else Function(update)


def update_of(optimizer: Optimizer) -> Update:
    """The update of an optimizer.

    Raises:
        UnsupportedTrainingError: If there is none for its class (a subclass may step differently) or for one of its
            options, if a parameter is complex, or if an update might need an option that is not recorded.
    """
    kind = type(optimizer)
    name = f"{kind.__module__}.{kind.__qualname__}"
    outside = _REGISTERED.get(kind) or (None if kind in _UPDATES else PACKAGED.get(_place_of(kind)))
    unfollowed = {} if kind in _REGISTERED else UNFOLLOWED.get(_place_of(kind), {})
    for number, group in enumerate(optimizer.param_groups):
        for param in group["params"]:
            if param.is_complex():
                raise UnsupportedTrainingError(
                    f"Group {number} of the optimizer holds a complex parameter of shape {tuple(param.shape)}; only "
                    "real ones can be followed. Keep a real one and look at it through torch.view_as_complex."
                )
        strange = [key for key, value in group.items() if key != "params" and not is_plain(value)]
        if strange and outside is not None:
            raise UnsupportedTrainingError(
                f"The option {strange[0]!r} of {name} is a {type(group[strange[0]]).__name__}, which is not recorded: "
                "only numbers, strings and tensors of one element are. Keep it outside param_groups."
            )
        for option, reason in unfollowed.items():
            if group.get(option):
                raise UnsupportedTrainingError(
                    f"The option {option}={group[option]!r} of {name} cannot be followed backwards: {reason}. "
                    "Train without it."
                )
    if outside is not None:
        return Proved(outside, name)
    if kind not in _UPDATES:
        why = REASONS.get(_place_of(kind)) or REASONS.get(kind.__name__)
        known = ", ".join(known.__name__ for known in _UPDATES)
        raise UnsupportedTrainingError(
            f"The optimizer {name} cannot be followed backwards{f': {why}' if why else ''}. Train with one of "
            f"torch.optim's {known}, Adafactor or Muon, or write its step as a function and pass it to "
            "lightning_sgdclean.register_update."
        )
    return _UPDATES[kind]


def is_elementwise(optimizer: Optimizer) -> bool:
    """Whether each number is stepped by itself, so that runs may lie side by side in one tensor."""
    return type(optimizer) in _UPDATES and type(optimizer) not in _REGISTERED


def _place_of(kind: type) -> str:
    """Where a class is defined; for torch's, where it is public, since its own files move from version to version."""
    if getattr(torch.optim, kind.__name__, None) is kind:
        return f"torch.optim.{kind.__name__}"
    return f"{kind.__module__}.{kind.__qualname__}"


_ADDED = {"norm": 1e-6, "norm_exactly": 0.0}  # to the norm that is divided by


def clip(grads: dict[str, Tensor], how: Clip) -> dict[str, Tensor]:
    """Gradients as ``clip_grad_norm_`` or ``clip_grad_value_`` leaves them, or a step that clips by itself."""
    if how is None or not grads:
        return grads
    algorithm, value = how
    if algorithm == "value":
        return {name: grad.clamp(-value, value) for name, grad in grads.items()}
    divisor = _norm(grads) + _ADDED[algorithm]
    if value >= divisor:
        return grads
    factor = value / divisor
    return {name: grad * factor for name, grad in grads.items()}


def clip_transpose(grads: dict[str, Tensor], cotangents: dict[str, Tensor], how: Clip) -> dict[str, Tensor]:
    """Cotangents of the gradients before clipping from those after it."""
    if how is None or not grads:
        return cotangents
    algorithm, value = how
    if algorithm == "value":
        return {n: torch.where(grads[n].abs() <= value, c, 0) for n, c in cotangents.items()}
    norm = _norm(grads)
    divisor = norm + _ADDED[algorithm]
    if value >= divisor:
        return cotangents
    factor = value / divisor
    dot = sum(float((cotangents[n].double() * grads[n].double()).sum()) for n in grads)
    pull = -value / divisor**2 / norm * dot
    return {n: factor * c + pull * grads[n] for n, c in cotangents.items()}


def _norm(grads: dict[str, Tensor]) -> float:
    return math.sqrt(sum(float(grad.double().pow(2).sum()) for grad in grads.values()))


Gradients = Mapping[str, Tensor | None]


def clipped(gradients: Gradients, how: Clip) -> Gradients:
    """Each run's gradients as ``clip_grad_norm_`` or ``clip_grad_value_`` leaves them.

    Args:
        gradients: By parameter, each ``(K, ...)``, or None.
        how: As recorded.
    """
    given = {name: gradient for name, gradient in gradients.items() if gradient is not None}
    if how is None or not given:
        return gradients
    algorithm, value = how
    if algorithm == "value":
        return dict(gradients) | {name: gradient.clamp(-value, value) for name, gradient in given.items()}
    norms = torch.stack([torch.linalg.vector_norm(g.reshape(len(g), -1), dim=1) for g in given.values()])
    factor = (value / (torch.linalg.vector_norm(norms, dim=0) + 1e-6)).clamp(max=1.0)
    return dict(gradients) | {name: g * factor.view(-1, *[1] * (g.ndim - 1)) for name, g in given.items()}
