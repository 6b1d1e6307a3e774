# SPDX-License-Identifier: Apache-2.0
"""The steps of torch's optimizers, those of SGD and Adam with their transposes written out.

The transposes of SGD's and Adam's steps are cheap, and defined where autograd's would be NaN: the learning rate may be
zero, the state absent (the first step) and the second moment zero. The other steps are functions that autograd can
differentiate. Torch's own steps write in place; with ``differentiable=True`` they round Adam-like corrections to
float32, give NaN where a second moment is zero, and refuse the flags that users train with. Numbers that no gradient
moves are computed in the type in which torch keeps them, rounding included.
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

    def recovered(self, param: Tensor, state: Entries, after: Entries, group: Group) -> Tensor | None:
        """From the first moments, which lose some bits; not in 16 bits, which have none to lose."""
        now = after.get("exp_avg")
        if now is None or now.dtype not in (torch.float32, torch.float64):
            return None
        beta1, _ = group["betas"]
        was = state.get("exp_avg", torch.zeros_like(param))
        d = (now.to(param.device) - beta1 * was) / (1 - beta1)
        return uphill(d if self._is_decoupled(group) else d - group["weight_decay"] * param, group)

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


class Adadelta(Update):
    """M. D. Zeiler, arXiv:1212.5701."""

    def forward(self, param: Tensor, grad: Tensor, state: Entries, group: Group) -> tuple[Tensor, Entries]:
        """See the base class."""
        rho, eps = group["rho"], group["eps"]
        d = uphill(grad, group) + group["weight_decay"] * param
        zero = torch.zeros_like(param)
        square, moved = state.get("square_avg", zero), state.get("acc_delta", zero)
        square = rho * square + (1 - rho) * d * d
        delta = root(moved + eps) / root(square + eps) * d
        moved = rho * moved + (1 - rho) * delta * delta
        return param - group["lr"] * delta, {"square_avg": square, "acc_delta": moved, "step": next_step(state)}


class Adagrad(Update):
    """J. Duchi, E. Hazan, Y. Singer, JMLR 12, 2011."""

    def forward(self, param: Tensor, grad: Tensor, state: Entries, group: Group) -> tuple[Tensor, Entries]:
        """See the base class."""
        step = next_step(state)
        d = uphill(grad, group) + group["weight_decay"] * param
        total = state["sum"] if "sum" in state else torch.full_like(param, group["initial_accumulator_value"])
        total = total + d * d
        rate = group["lr"] / (1 + (float(step) - 1) * group["lr_decay"])
        return param - rate * d / (root(total) + group["eps"]), {"sum": total, "step": step}


class Adamax(Update):
    """D. P. Kingma, J. Ba, ICLR 2015, section 7.1."""

    def forward(self, param: Tensor, grad: Tensor, state: Entries, group: Group) -> tuple[Tensor, Entries]:
        """See the base class."""
        beta1, beta2 = group["betas"]
        step, zero = next_step(state), torch.zeros_like(param)
        d = uphill(grad, group) + group["weight_decay"] * param
        first = beta1 * state.get("exp_avg", zero) + (1 - beta1) * d
        largest = torch.maximum(beta2 * state.get("exp_inf", zero), d.abs() + group["eps"])
        rate = group["lr"] / (1 - beta1 ** float(step))
        return param - rate * first / largest, {"exp_avg": first, "exp_inf": largest, "step": step}


class ASGD(Update):
    """B. T. Polyak, A. B. Juditsky, SIAM J. Control Optim. 30(4), 1992. The average ``ax`` is kept, and not used."""

    constants = frozenset({"step", "eta", "mu"})

    def forward(self, param: Tensor, grad: Tensor, state: Entries, group: Group) -> tuple[Tensor, Entries]:
        """See the base class."""
        step, lr, lambd = next_step(state), group["lr"], group["lambd"]
        one = torch.tensor(1.0)
        eta, mu = state.get("eta", one * float(lr)), state.get("mu", one)
        d = uphill(grad, group) + group["weight_decay"] * param
        param = param * (1 - lambd * float(eta)) - float(eta) * d
        mean = state.get("ax", torch.zeros_like(param))
        mean = mean + float(mu) * (param - mean) if float(mu) != 1 else param
        return param, {
            "ax": mean,
            "eta": torch.as_tensor(lr / (1 + lambd * lr * float(step)) ** group["alpha"], dtype=eta.dtype),
            "mu": torch.tensor(1 / max(1, float(step) - group["t0"]), dtype=mu.dtype),
            "step": step,
        }


class NAdam(Update):
    """T. Dozat, ICLR workshop, 2016."""

    constants = frozenset({"step", "mu_product"})

    def forward(self, param: Tensor, grad: Tensor, state: Entries, group: Group) -> tuple[Tensor, Entries]:
        """See the base class."""
        step, lr, beta1 = next_step(state), group["lr"], group["betas"][0]
        number, decay = float(step), group["momentum_decay"]
        d, kept, first, second = decayed_moments(param, grad, state, group)
        mu = beta1 * (1 - 0.5 * 0.96 ** (number * decay))
        mu_next = beta1 * (1 - 0.5 * 0.96 ** ((number + 1) * decay))
        product = state.get("mu_product", torch.tensor(1.0)) * mu
        so_far = float(product)
        direction = lr * (1 - mu) / (1 - so_far) * d + lr * mu_next / (1 - so_far * mu_next) * first
        moved = kept - direction / (root(second / (1 - group["betas"][1] ** number)) + group["eps"])
        return moved, {"exp_avg": first, "exp_avg_sq": second, "mu_product": product, "step": step}


class RAdam(Update):
    """L. Liu and others, ICLR 2020."""

    def forward(self, param: Tensor, grad: Tensor, state: Entries, group: Group) -> tuple[Tensor, Entries]:
        """See the base class."""
        beta1, beta2 = group["betas"]
        step = next_step(state)
        number = float(step)
        _, kept, first, second = decayed_moments(param, grad, state, group)
        direction = first / (1 - beta1**number)
        correction = 1 - beta2**number
        longest = 2 / (1 - beta2) - 1
        length = longest - 2 * number * beta2**number / correction
        if length > 5:  # enough gradients for their variance to mean something
            square = (length - 4) * (length - 2) * longest / ((longest - 4) * (longest - 2) * length)
            direction = direction * square**0.5 * correction**0.5 / (root(second) + group["eps"])
        return kept - group["lr"] * direction, {"exp_avg": first, "exp_avg_sq": second, "step": step}


class RMSprop(Update):
    """T. Tieleman, G. Hinton, Coursera lecture 6.5, 2012; centred: A. Graves, arXiv:1308.0850."""

    def forward(self, param: Tensor, grad: Tensor, state: Entries, group: Group) -> tuple[Tensor, Entries]:
        """See the base class."""
        alpha, momentum, zero = group["alpha"], group["momentum"], torch.zeros_like(param)
        d = uphill(grad, group) + group["weight_decay"] * param
        square = alpha * state.get("square_avg", zero) + (1 - alpha) * d * d
        after = {**state, "square_avg": square, "step": next_step(state)}
        if group["centered"]:
            after["grad_avg"] = alpha * state.get("grad_avg", zero) + (1 - alpha) * d
            square = square - after["grad_avg"] * after["grad_avg"]
        direction = d / (root(square) + group["eps"])
        if momentum > 0:
            direction = momentum * state.get("momentum_buffer", zero) + direction
            after["momentum_buffer"] = direction
        return param - group["lr"] * direction, after


def decayed_moments(param: Tensor, grad: Tensor, state: Entries, group: Group) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradient with coupled decay, parameter after decoupled decay, first and second moment."""
    (beta1, beta2), decay, zero = group["betas"], group["weight_decay"], torch.zeros_like(param)
    d, kept = uphill(grad, group), param
    if group["decoupled_weight_decay"]:
        kept = (1 - group["lr"] * decay) * param
    else:
        d = d + decay * param
    first = beta1 * state.get("exp_avg", zero) + (1 - beta1) * d
    second = beta2 * state.get("exp_avg_sq", zero) + (1 - beta2) * d * d
    return d, kept, first, second


def root(square: Tensor) -> Tensor:
    """Square root whose derivative at zero is zero.

    A second moment is zero where every gradient so far was, and then whatever is divided by its root is zero, too: the
    derivative through the root is zero times infinity, whose limit for gradients that tend to zero is zero.
    """
    is_zero = square == 0
    return torch.where(is_zero, 0, torch.where(is_zero, 1, square).sqrt())
