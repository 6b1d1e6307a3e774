# SPDX-License-Identifier: Apache-2.0
"""The steps of optimizers that couple the entries of a tensor, of torch and of other packages.

Nothing is imported for them: an optimizer's class is looked up by where it is defined. Other versions of a package may
step differently, so each of these steps is held against the record and its transpose against differences, in every
retrace, as those from ``register_update`` are.
"""

import math
from typing import Any

import torch
from torch import Tensor

from lightning_sgdclean.adjoint.closed_forms import SGD, root
from lightning_sgdclean.adjoint.updates import Clip, Entries, Group, Update, next_step, uphill


class Adafactor(Update):
    """torch's. N. Shazeer, M. Stern, ICML 2018: the second moments of a matrix are the product of two vectors."""

    def forward(self, param: Tensor, grad: Tensor, state: Entries, group: Group) -> tuple[Tensor, Entries]:
        """See the base class."""
        step, lr, d = next_step(state), float(group["lr"]), uphill(grad, group)
        number, (smallest, least_size) = float(step), group["eps"]
        smallest = torch.finfo(param.dtype).eps if smallest is None else smallest
        square, newest = d * d, float(number ** group["beta2_decay"])
        rate = rms(param).clamp(min=least_size) * min(lr, 1 / math.sqrt(number))

        def averaged(name: str, now: Tensor) -> Tensor:
            return state.get(name, torch.zeros_like(now)).lerp(now, newest)

        if d.ndim > 1:
            row = averaged("row_var", square.mean(dim=-1, keepdim=True))
            column = averaged("col_var", square.mean(dim=-2, keepdim=True))
            second = row @ column / row.mean(dim=-2, keepdim=True).clamp(min=smallest)
            after = {"row_var": row, "col_var": column}
        else:
            second = averaged("variance", square)
            after = {"variance": second}
        direction = d * second.clamp(min=smallest**2).rsqrt()
        direction = direction / (rms(direction) / group["d"]).clamp(min=1.0)
        return (1 - lr * group["weight_decay"]) * param - rate * direction, {**after, "step": step}


class TransformersAdafactor(Update):
    """``transformers.optimization.Adafactor``: the same idea, and a first moment of steps instead of gradients."""

    def forward(self, param: Tensor, grad: Tensor, state: Entries, group: Group) -> tuple[Tensor, Entries]:
        """See the base class."""
        step, size, (smallest, least_size) = next_step(state), rms(param), group["eps"]
        number = float(step)
        kept: float = 1 - number ** group["decay_rate"]
        rate: Any = group["lr"]
        if group["relative_step"]:
            rate = min(1e-6 * number if group["warmup_init"] else 1e-2, 1 / math.sqrt(number))
        if group["scale_parameter"]:
            rate = size.clamp(min=least_size) * rate

        def averaged(name: str, now: Tensor) -> Tensor:
            return (1 - kept) * now + kept * state.get(name, torch.zeros_like(now))

        square = grad * grad + smallest
        if grad.ndim > 1:
            row = averaged("exp_avg_sq_row", square.mean(dim=-1))
            column = averaged("exp_avg_sq_col", square.mean(dim=-2))
            direction = (row / row.mean(dim=-1, keepdim=True)).rsqrt().unsqueeze(-1) * column.unsqueeze(-2).rsqrt()
            after = {"exp_avg_sq_row": row, "exp_avg_sq_col": column}
        else:
            after = {"exp_avg_sq": averaged("exp_avg_sq", square)}
            direction = after["exp_avg_sq"].rsqrt()
        direction = direction * grad
        direction = rate * direction / (rms(direction) / group["clip_threshold"]).clamp(min=1.0)
        if group["beta1"] is not None:
            before = state.get("exp_avg", torch.zeros_like(grad))
            after["exp_avg"] = direction = group["beta1"] * before + (1 - group["beta1"]) * direction
        moved = param - group["weight_decay"] * rate * param - direction
        return moved, {**after, "step": step, "RMS": size}


class Muon(Update):
    """torch's. K. Jordan and others, 2024; what is differentiated is its iteration without rounding to bfloat16."""

    caveat = (
        "Muon rounds its step to bfloat16, and what is rounded has no derivative that says anything. So the influences "
        "are those of the same step without rounding, at the weights that training went through. They may be off by "
        "tens of percent: see what leaving samples out says (verify=), and docs/optimizers.md."
    )

    def forward(self, param: Tensor, grad: Tensor, state: Entries, group: Group) -> tuple[Tensor, Entries]:
        """See the base class."""
        return self._step(param, grad, state, group, torch.bfloat16)

    def unrounded(self, param: Tensor, grad: Tensor, state: Entries, group: Group) -> tuple[Tensor, Entries]:
        """See the base class."""
        return self._step(param, grad, state, group, param.dtype)

    def _step(
        self, param: Tensor, grad: Tensor, state: Entries, group: Group, dtype: torch.dtype
    ) -> tuple[Tensor, Entries]:
        lr, momentum = group["lr"], group["momentum"]
        velocity = torch.lerp(state.get("momentum_buffer", torch.zeros_like(grad)), grad, 1 - momentum)
        direction = torch.lerp(grad, velocity, momentum) if group["nesterov"] else velocity
        rows, columns = param.shape
        ratio = math.sqrt(max(1, rows / columns))
        if group["adjust_lr_fn"] == "match_rms_adamw":
            ratio = 0.2 * math.sqrt(max(rows, columns))
        moved = (1 - lr * group["weight_decay"]) * param - lr * ratio * _orthogonal(direction, group, dtype)
        return moved, {"momentum_buffer": velocity}


def _orthogonal(direction: Tensor, group: Group, dtype: torch.dtype) -> Tensor:
    """Newton-Schulz, which takes every singular value near to one."""
    a, b, c = group["ns_coefficients"]
    is_tall = direction.shape[0] > direction.shape[1]
    x = direction.to(dtype)
    x = x.T if is_tall else x
    x = x / x.norm().clamp(min=group["eps"])
    for _ in range(group["ns_steps"]):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.T if is_tall else x).to(direction.dtype)


class LightlyLars(Update):
    """``lightly.utils.lars.LARS``. Y. You and others, arXiv:1708.03888, on top of torch's SGD."""

    def forward(self, param: Tensor, grad: Tensor, state: Entries, group: Group) -> tuple[Tensor, Entries]:
        """See the base class."""
        decay, d = group["weight_decay"], grad
        if decay:
            size, steepness = param.norm(), grad.norm()
            is_adapted = (size > 0) & (steepness > 0)
            ratio = _ratio(size, steepness + size * decay + group["eps"], is_adapted)
            d = torch.where(is_adapted, group["trust_coefficient"] * ratio * (grad + decay * param), grad)
        return _SGD.forward(param, d, state, {**group, "weight_decay": 0.0})


class TimmLars(Update):
    """``timm.optim.Lars``: parameters without a norm are still decayed."""

    def forward(self, param: Tensor, grad: Tensor, state: Entries, group: Group) -> tuple[Tensor, Entries]:
        """See the base class."""
        decay, lr, d = group["weight_decay"], float(group["lr"]), grad
        if decay or group["always_adapt"]:
            size, steepness = param.norm(), grad.norm()
            is_adapted = (size > 0) & (steepness > 0)
            divisor = steepness + size * decay + group["eps"]
            trust = torch.where(is_adapted, group["trust_coeff"] * _ratio(size, divisor, is_adapted), 1.0)
            if group["trust_clip"]:
                trust = (trust / lr).clamp(max=1.0) if lr else torch.ones_like(trust)
            d = trust * (grad + decay * param)
        return _SGD.forward(param, d, state, {**group, "weight_decay": 0.0})


class TimmLamb(Update):
    """``timm.optim.Lamb``. Y. You and others, ICLR 2020; it clips the gradient of all parameters by itself."""

    def clipping(self, groups: list[Group]) -> Clip:
        """See the base class."""
        most = groups[0]["max_grad_norm"] if groups else None
        return None if most is None else ("norm_exactly", float(most))

    def forward(self, param: Tensor, grad: Tensor, state: Entries, group: Group) -> tuple[Tensor, Entries]:
        """See the base class."""
        (beta1, beta2), number, decay = group["betas"], float(group["step"]) + 1, group["weight_decay"]
        lr, zero = float(group["lr"]), torch.zeros_like(param)
        correction1, correction2 = (1 - beta1**number, 1 - beta2**number) if group["bias_correction"] else (1.0, 1.0)
        newest = 1 - beta1 if group["grad_averaging"] else 1.0
        first = beta1 * state.get("exp_avg", zero) + newest * grad
        second = beta2 * state.get("exp_avg_sq", zero) + (1 - beta2) * grad * grad
        direction = first / correction1 / (root(second) / math.sqrt(correction2) + group["eps"])
        kept = param
        if decay and group["decoupled_decay"]:
            share = lr**2 / group["max_lr_snapshot"] if group["corrected_weight_decay"] else lr
            kept = (1 - share * decay) * param
        elif decay:
            direction = direction + decay * param
        if decay or group["always_adapt"]:
            size, length = kept.norm(), direction.norm()
            trust = _ratio(size, length, (size > 0) & (length > 0))
            direction = direction * (trust.clamp(max=1.0) if group["trust_clip"] else trust)
        return kept - lr * direction, {"exp_avg": first, "exp_avg_sq": second}


class TimmAdamP(Update):
    """``timm.optim.AdamP``. B. Heo and others, ICLR 2021: steps along a weight are left out where the loss has none."""

    def forward(self, param: Tensor, grad: Tensor, state: Entries, group: Group) -> tuple[Tensor, Entries]:
        """See the base class."""
        (beta1, beta2), step, zero = group["betas"], next_step(state), torch.zeros_like(param)
        number = float(step)
        first = beta1 * state.get("exp_avg", zero) + (1 - beta1) * grad
        second = beta2 * state.get("exp_avg_sq", zero) + (1 - beta2) * grad * grad
        used = beta1 * first + (1 - beta1) * grad if group["nesterov"] else first
        direction = used / (root(second) / math.sqrt(1 - beta2**number) + group["eps"])
        share = 1.0
        for rows in (param.shape[0], 1) if param.ndim > 1 else ():
            weights, slopes = param.reshape(rows, -1), grad.reshape(rows, -1)
            cosine = torch.cosine_similarity(slopes.detach(), weights.detach(), dim=1, eps=group["eps"]).abs()
            if float(cosine.max()) < group["delta"] / math.sqrt(weights.shape[1]):
                unit = weights / (weights.norm(dim=1, keepdim=True) + group["eps"])
                flat = direction.reshape(rows, -1)
                direction = (flat - unit * (unit * flat).sum(dim=1, keepdim=True)).reshape(param.shape)
                share = group["wd_ratio"]
                break
        kept = (1 - group["lr"] * group["weight_decay"] * share) * param
        moved = kept - group["lr"] / (1 - beta1**number) * direction
        return moved, {"exp_avg": first, "exp_avg_sq": second, "step": step}


_SGD = SGD()


def rms(tensor: Tensor) -> Tensor:
    """Root mean square of all entries; its derivative at zero is zero."""
    length: Tensor = torch.linalg.vector_norm(tensor)
    return length / math.sqrt(tensor.numel())


def _ratio(one: Tensor, other: Tensor, is_used: Tensor) -> Tensor:
    """The quotient, and one where it is not used, with derivatives that are never NaN."""
    return torch.where(is_used, one / torch.where(is_used, other, 1.0), 1.0)


PACKAGED: dict[str, Update] = {
    "torch.optim.Adafactor": Adafactor(),
    "torch.optim.Muon": Muon(),
    "transformers.optimization.Adafactor": TransformersAdafactor(),
    "lightly.utils.lars.LARS": LightlyLars(),
    "timm.optim.lars.Lars": TimmLars(),
    "timm.optim.lamb.Lamb": TimmLamb(),
    "timm.optim.adamp.AdamP": TimmAdamP(),
}
"""By where a class is defined, whether it is installed or not."""

_CAUTION = (
    "it leaves out the entries in which step and gradient differ in sign, so that a step jumps where a gradient "
    "changes its sign, which no derivative sees"
)
UNFOLLOWED = {
    "timm.optim.lamb.Lamb": {"caution": _CAUTION},
    "timm.optim.adamp.AdamP": {"caution": _CAUTION},
}
"""Options of packaged classes that are refused unless they are off, and why."""

_SIGN = "its step knows only the gradient's sign, so that no sample has an influence to first order"
_TWO_POINTS = (
    "it trains at one point and is evaluated at another: its train() and eval() move the weights to and fro between "
    "steps, which is not recorded"
)
REASONS = {
    "torch.optim.Rprop": _SIGN,
    "torch.optim.LBFGS": "its step evaluates the loss as often as it needs to",
    "torch.optim.SparseAdam": "its gradients are sparse",
    "timm.optim.lion.Lion": _SIGN,
    "lion_pytorch.lion_pytorch.Lion": _SIGN,
    "schedulefree.adamw_schedulefree.AdamWScheduleFree": _TWO_POINTS,
    "schedulefree.radam_schedulefree.RAdamScheduleFree": _TWO_POINTS,
    "schedulefree.sgd_schedulefree.SGDScheduleFree": _TWO_POINTS,
    "SAM": "its step evaluates the loss a second time, at weights that it moves to in between",
}
"""Why a class is refused, by where it is defined, or by its name alone."""
