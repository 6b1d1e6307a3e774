# SPDX-License-Identifier: Apache-2.0
r"""Optimizer updates and their transposes, in closed form.

An update maps ``(theta, s, g)`` to ``(theta', s')``. Its transpose maps the adjoints of the outputs,
``(lambda, mu)``, to those of the inputs: ``c`` of the gradient, ``lambda`` of the parameter, ``mu`` of
the state. All are elementwise, one parameter at a time; the learning rate may be zero, the state
absent (the first step) and the second moment zero.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_sgdclean.errors import UnsupportedTrainingError

Entries = dict[str, Tensor]
Group = dict[str, Any]


@dataclass(frozen=True)
class Update:
    """One optimizer's rule.

    Attributes:
        forward: ``(param, grad, state, group)`` -> ``(param, state)`` after the step.
        transpose: ``(param, grad, state, group, adjoint, state_adjoint)`` -> ``(c, lambda, mu)``.
        is_linear: Whether the transpose does without the value of the gradient.
    """

    forward: Callable[[Tensor, Tensor, Entries, Group], tuple[Tensor, Entries]]
    transpose: Callable[[Tensor, Tensor, Entries, Group, Tensor, Entries], tuple[Tensor, Tensor, Entries]]
    is_linear: bool


def _signed(grad: Tensor, group: Group) -> Tensor:
    return -grad if group.get("maximize") else grad


def _sgd_forward(param: Tensor, grad: Tensor, state: Entries, group: Group) -> tuple[Tensor, Entries]:
    d = _signed(grad, group) + group["weight_decay"] * param
    momentum = group["momentum"]
    if not momentum:
        return param - group["lr"] * d, {}
    before = state.get("momentum_buffer")
    buffer = d if before is None else momentum * before + (1 - group["dampening"]) * d
    direction = d + momentum * buffer if group["nesterov"] else buffer
    return param - group["lr"] * direction, {"momentum_buffer": buffer}


def _sgd_transpose(
    param: Tensor, grad: Tensor, state: Entries, group: Group, adjoint: Tensor, state_adjoint: Entries
) -> tuple[Tensor, Tensor, Entries]:
    direction = -group["lr"] * adjoint
    momentum, before = group["momentum"], {}
    if not momentum:
        d = direction
    else:
        buffer = (momentum * direction if group["nesterov"] else direction).clone()
        if "momentum_buffer" in state_adjoint:
            buffer += state_adjoint["momentum_buffer"]
        d = direction if group["nesterov"] else torch.zeros_like(direction)
        if "momentum_buffer" in state:
            d = d + (1 - group["dampening"]) * buffer
            before["momentum_buffer"] = momentum * buffer
        else:  # torch starts the buffer with the gradient itself, whatever the dampening
            d = d + buffer
    return _signed(d, group), adjoint + group["weight_decay"] * d, before


def _adam_moments(param: Tensor, grad: Tensor, state: Entries, group: Group) -> tuple[Tensor, Entries]:
    beta1, beta2 = group["betas"]
    d = _signed(grad, group)
    if not group["decoupled_weight_decay"]:
        d = d + group["weight_decay"] * param
    zero = torch.zeros_like(param)
    after = {
        "exp_avg": beta1 * state.get("exp_avg", zero) + (1 - beta1) * d,
        "exp_avg_sq": beta2 * state.get("exp_avg_sq", zero) + (1 - beta2) * d * d,
    }
    if group["amsgrad"]:
        after["max_exp_avg_sq"] = torch.maximum(state.get("max_exp_avg_sq", zero), after["exp_avg_sq"])
    return d, after


def _adam_scales(state: Entries, group: Group) -> tuple[float, float]:
    """Step size over the first correction, and the root of the second."""
    beta1, beta2 = group["betas"]
    number = float(state["step"]) + 1 if "step" in state else 1.0
    return group["lr"] / (1 - beta1**number), math.sqrt(1 - beta2**number)


def _adam_forward(param: Tensor, grad: Tensor, state: Entries, group: Group) -> tuple[Tensor, Entries]:
    _, after = _adam_moments(param, grad, state, group)
    size, correction = _adam_scales(state, group)
    kept = 1 - group["lr"] * group["weight_decay"] if group["decoupled_weight_decay"] else 1.0
    second = after["max_exp_avg_sq" if group["amsgrad"] else "exp_avg_sq"]
    return kept * param - size * after["exp_avg"] / (second.sqrt() / correction + group["eps"]), after


def _adam_transpose(
    param: Tensor, grad: Tensor, state: Entries, group: Group, adjoint: Tensor, state_adjoint: Entries
) -> tuple[Tensor, Tensor, Entries]:
    beta1, beta2 = group["betas"]
    decay, decoupled = group["weight_decay"], group["decoupled_weight_decay"]
    d, after = _adam_moments(param, grad, state, group)
    size, correction = _adam_scales(state, group)
    zero = torch.zeros_like(param)
    second = after["max_exp_avg_sq" if group["amsgrad"] else "exp_avg_sq"]
    root = second.sqrt()
    denominator = root / correction + group["eps"]
    first_bar = state_adjoint.get("exp_avg", zero) - size * adjoint / denominator
    # A second moment of zero means that every gradient so far was zero, and the first moment too: the
    # quotient's derivative through the root is zero times infinity, whose limit is zero.
    slope = torch.where(root > 0, 0.5 / (correction * torch.where(root > 0, root, 1)), 0)
    used_bar = size * adjoint * after["exp_avg"] / denominator**2 * slope
    second_bar = state_adjoint.get("exp_avg_sq", zero)
    before: Entries = {}
    if group["amsgrad"]:
        most_bar = state_adjoint.get("max_exp_avg_sq", zero) + used_bar
        is_new = after["exp_avg_sq"] >= state.get("max_exp_avg_sq", zero)
        second_bar = second_bar + torch.where(is_new, most_bar, 0)
        before["max_exp_avg_sq"] = torch.where(is_new, 0, most_bar)
    else:
        second_bar = second_bar + used_bar
    before |= {"exp_avg": beta1 * first_bar, "exp_avg_sq": beta2 * second_bar}
    d_bar = (1 - beta1) * first_bar + 2 * (1 - beta2) * d * second_bar
    lam = (1 - group["lr"] * decay) * adjoint if decoupled else adjoint + decay * d_bar
    return _signed(d_bar, group), lam, before


_ADAM = Update(_adam_forward, _adam_transpose, is_linear=False)
UPDATES: dict[type, Update] = {
    torch.optim.SGD: Update(_sgd_forward, _sgd_transpose, is_linear=True),
    torch.optim.Adam: _ADAM,
    torch.optim.AdamW: _ADAM,
}


def update_of(optimizer: torch.optim.Optimizer) -> Update:
    """The rule of an optimizer.

    Raises:
        UnsupportedTrainingError: If its step has no transpose here; a subclass may step differently.
    """
    kind = type(optimizer)
    if kind not in UPDATES:
        known = ", ".join(known.__name__ for known in UPDATES)
        raise UnsupportedTrainingError(
            f"The optimizer {kind.__module__}.{kind.__qualname__} cannot be followed backwards; "
            f"expected one of torch.optim's {known}. Train with one of these."
        )
    return UPDATES[kind]


def full_group(group: Group, optimizer: type) -> Group:
    """A recorded group with the options that older torch versions leave out."""
    return {"decoupled_weight_decay": optimizer is torch.optim.AdamW, **group}


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
