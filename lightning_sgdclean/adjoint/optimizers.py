# SPDX-License-Identifier: Apache-2.0
"""Which optimizer class has which update, why others have none, and clipping before it."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_sgdclean.adjoint.closed_forms import ASGD, SGD, Adadelta, Adagrad, Adam, Adamax, NAdam, RAdam, RMSprop
from lightning_sgdclean.adjoint.updates import Forward, Function, Proved, Update
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
_REASONS = {
    "Rprop": "its step knows only the gradient's sign, so that no sample has an influence to first order",
    "LBFGS": "its step evaluates the loss as often as it needs to",
    "SparseAdam": "its gradients are sparse",
    "Adafactor": "it bounds its step by the root mean square of the whole, which is not written here yet",
    "Muon": "its Newton-Schulz iteration is rounded to bfloat16, so that the step's own derivative says nothing",
}


def register_update(optimizer_class: type[Optimizer], update: Update | Forward | type[Optimizer]) -> None:
    """Follow a class of optimizers that is not followed by itself; docs/optimizers.md has examples.

    Every retrace holds the forward against the recorded steps, and the transpose against differences.

    Args:
        optimizer_class: The class; its subclasses are not meant.
        update: Its step on one parameter: a function as :meth:`Update.forward` is one, or an :class:`Update` where the
            step rounds, where more than the counter ``step`` is no function of gradients, or with a transpose of your
            own; or one of torch's classes that are followed, if the step is that of this class.

    Raises:
        TypeError: If either is something else.
    """
    if not (isinstance(optimizer_class, type) and issubclass(optimizer_class, Optimizer)):
        raise TypeError(f"optimizer_class must be a class derived from torch.optim.Optimizer, got {optimizer_class!r}.")
    if isinstance(update, type) and update in _UPDATES:
        update = _UPDATES[update]
    if isinstance(update, type) or not (isinstance(update, Update) or callable(update)):
        raise TypeError(
            f"update must be an Update, a function (param, grad, state, group) or a followed class, got {update!r}."
        )
    _REGISTERED[optimizer_class] = update if isinstance(update, Update) else Function(update)


def update_of(optimizer: Optimizer) -> Update:
    """The update of an optimizer.

    Raises:
        UnsupportedTrainingError: If there is none for its class (a subclass may step differently), if a parameter is
            complex, or if a registered update might need an option that is not recorded.
    """
    kind = type(optimizer)
    name = f"{kind.__module__}.{kind.__qualname__}"
    for number, group in enumerate(optimizer.param_groups):
        for param in group["params"]:
            if param.is_complex():
                raise UnsupportedTrainingError(
                    f"Group {number} of the optimizer holds a complex parameter of shape {tuple(param.shape)}; only "
                    "real ones can be followed. Keep a real one and look at it through torch.view_as_complex."
                )
        strange = [key for key, value in group.items() if key != "params" and not is_plain(value)]
        if strange and kind in _REGISTERED:
            raise UnsupportedTrainingError(
                f"The option {strange[0]!r} of {name} is a {type(group[strange[0]]).__name__}, which is not recorded: "
                "only numbers, strings and tensors of one element are. Keep it outside param_groups."
            )
    if kind in _REGISTERED:
        return Proved(_REGISTERED[kind], name)
    if kind not in _UPDATES:
        reason = f": {_REASONS[kind.__name__]}" if _is_torchs(kind) and kind.__name__ in _REASONS else ""
        known = ", ".join(known.__name__ for known in _UPDATES)
        raise UnsupportedTrainingError(
            f"The optimizer {name} cannot be followed backwards{reason}. Train with one of torch.optim's {known}, or "
            "write its step as a function and pass it to lightning_sgdclean.register_update."
        )
    return _UPDATES[kind]


def is_elementwise(optimizer: Optimizer) -> bool:
    """Whether each number is stepped by itself, so that runs may lie side by side in one tensor."""
    return type(optimizer) in _UPDATES and type(optimizer) not in _REGISTERED


def _is_torchs(kind: type) -> bool:
    return getattr(torch.optim, kind.__name__, None) is kind


Clip = tuple[str, float] | None


def clip(grads: dict[str, Tensor], how: Clip) -> dict[str, Tensor]:
    """Gradients as ``clip_grad_norm_`` or ``clip_grad_value_`` leaves them."""
    if how is None or not grads:
        return grads
    algorithm, value = how
    if algorithm == "value":
        return {name: grad.clamp(-value, value) for name, grad in grads.items()}
    factor = min(1.0, value / (_norm(grads) + 1e-6))
    return {name: grad * factor for name, grad in grads.items()}


def clip_transpose(grads: dict[str, Tensor], cotangents: dict[str, Tensor], how: Clip) -> dict[str, Tensor]:
    """Cotangents of the gradients before clipping from those after it."""
    if how is None or not grads:
        return cotangents
    algorithm, value = how
    if algorithm == "value":
        return {n: torch.where(grads[n].abs() <= value, c, 0) for n, c in cotangents.items()}
    norm = _norm(grads)
    if value / (norm + 1e-6) >= 1:
        return cotangents
    factor = value / (norm + 1e-6)
    dot = sum(float((cotangents[n].double() * grads[n].double()).sum()) for n in grads)
    pull = -value / (norm + 1e-6) ** 2 / norm * dot
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
