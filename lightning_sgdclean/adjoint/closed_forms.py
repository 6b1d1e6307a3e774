# SPDX-License-Identifier: Apache-2.0
"""SGD, Adam and AdamW with transposes written out: cheap, and defined where autograd's would be NaN.

All are elementwise. The learning rate may be zero, the state absent (the first step) and the second moment zero.
"""

import math
from typing import Any

import torch
from torch import Tensor

from lightning_sgdclean.adjoint.updates import Entries, Group, Update, next_step, uphill


class SGD(Update):
    """torch's SGD; linear, as its transpose never reads the gradient."""

    is_linear = True

    def forward(self, param: Tensor, grad: Tensor, state: Entries, group: Group) -> tuple[Tensor, Entries]:
        """See the base class."""
        d = uphill(grad, group) + group["weight_decay"] * param
        momentum = group["momentum"]
        if not momentum:  # a buffer left from steps with momentum stays as it is
            return param - group["lr"] * d, dict(state)
        before = state.get("momentum_buffer")
        buffer = d if before is None else momentum * before + (1 - group["dampening"]) * d
        direction = d + momentum * buffer if group["nesterov"] else buffer
        return param - group["lr"] * direction, {"momentum_buffer": buffer}

    def transpose(
        self, param: Tensor, grad: Tensor, state: Entries, group: Group, adjoint: Tensor, state_adjoint: Entries
    ) -> tuple[Tensor, Tensor, Entries]:
        """See the base class."""
        direction = -group["lr"] * adjoint
        momentum, before = group["momentum"], {}
        if not momentum:
            d, before = direction, dict(state_adjoint)
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
        return uphill(d, group), adjoint + group["weight_decay"] * d, before


class Adam(Update):
    """torch's Adam, or with ``decoupled`` AdamW, where the group does not say which."""

    def __init__(self, decoupled: bool) -> None:
        self._decoupled = decoupled

    def forward(self, param: Tensor, grad: Tensor, state: Entries, group: Group) -> tuple[Tensor, Entries]:
        """See the base class."""
        _, after = self._moments(param, grad, state, group)
        size, correction = _scales(state, group)
        kept = 1 - _rate(group) * group["weight_decay"] if self._is_decoupled(group) else 1.0
        second = after["max_exp_avg_sq" if group["amsgrad"] else "exp_avg_sq"]
        moved = kept * param - size * after["exp_avg"] / (second.sqrt() / correction + group["eps"])
        return moved, {**state, **after, "step": next_step(state)}

    def transpose(
        self, param: Tensor, grad: Tensor, state: Entries, group: Group, adjoint: Tensor, state_adjoint: Entries
    ) -> tuple[Tensor, Tensor, Entries]:
        """See the base class."""
        beta1, beta2 = group["betas"]
        d, after = self._moments(param, grad, state, group)
        size, correction = _scales(state, group)
        zero = torch.zeros_like(param)
        root = after["max_exp_avg_sq" if group["amsgrad"] else "exp_avg_sq"].sqrt()
        denominator = root / correction + group["eps"]
        first_bar = state_adjoint.get("exp_avg", zero) - size * adjoint / denominator
        # A second moment of zero means that every gradient so far was zero, and the first moment too: the
        # quotient's derivative through the root is zero times infinity, whose limit is zero.
        slope = torch.where(root > 0, 0.5 / (correction * torch.where(root > 0, root, 1)), 0)
        used_bar = size * adjoint * after["exp_avg"] / denominator**2 * slope
        second_bar = state_adjoint.get("exp_avg_sq", zero)
        before = {key: bar for key, bar in state_adjoint.items() if key not in after}
        if group["amsgrad"]:
            most_bar = state_adjoint.get("max_exp_avg_sq", zero) + used_bar
            is_new = after["exp_avg_sq"] >= state.get("max_exp_avg_sq", zero)
            second_bar = second_bar + torch.where(is_new, most_bar, 0)
            before["max_exp_avg_sq"] = torch.where(is_new, 0, most_bar)
        else:
            second_bar = second_bar + used_bar
        before |= {"exp_avg": beta1 * first_bar, "exp_avg_sq": beta2 * second_bar}
        d_bar = (1 - beta1) * first_bar + 2 * (1 - beta2) * d * second_bar
        decay = group["weight_decay"]
        lam = (1 - _rate(group) * decay) * adjoint if self._is_decoupled(group) else adjoint + decay * d_bar
        return uphill(d_bar, group), lam, {key: bar for key, bar in before.items() if key in state}

    def _is_decoupled(self, group: Group) -> bool:
        return bool(group.get("decoupled_weight_decay", self._decoupled))

    def _moments(self, param: Tensor, grad: Tensor, state: Entries, group: Group) -> tuple[Tensor, Entries]:
        beta1, beta2 = group["betas"]
        d = uphill(grad, group)
        if not self._is_decoupled(group):
            d = d + group["weight_decay"] * param
        zero = torch.zeros_like(param)
        after = {
            "exp_avg": beta1 * state.get("exp_avg", zero) + (1 - beta1) * d,
            "exp_avg_sq": beta2 * state.get("exp_avg_sq", zero) + (1 - beta2) * d * d,
        }
        if group["amsgrad"]:
            after["max_exp_avg_sq"] = torch.maximum(state.get("max_exp_avg_sq", zero), after["exp_avg_sq"])
        return d, after


def _rate(group: Group) -> Any:
    """The learning rate; where it is a tensor, torch rounds to its type, but in the fused kernels."""
    return float(group["lr"]) if group.get("fused") else group["lr"]


def _scales(state: Entries, group: Group) -> tuple[Any, float]:
    """Step size over the first correction, and the root of the second."""
    beta1, beta2 = group["betas"]
    number = float(next_step(state))
    return _rate(group) / (1 - beta1**number), math.sqrt(1 - beta2**number)
