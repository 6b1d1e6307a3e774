# SPDX-License-Identifier: Apache-2.0
"""Sample weights inside the loss of an unmodified ``training_step``, by watching torch's loss functions."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import _reduction
from torch.overrides import TorchFunctionMode

from lightning_sgdclean.losses.loss_functions import SIGNATURES, lost_weight, rows_of
from lightning_sgdclean.losses.ownership import Layout, owners_by


def unit_weights(num: int, params: list[nn.Parameter]) -> Tensor:
    """``(B,)`` of ones that require a gradient, in float64 for a float64 module and in float32 for all others."""
    dtype = torch.float64 if params[0].dtype is torch.float64 else torch.float32
    return torch.ones(num, dtype=dtype, device=params[0].device, requires_grad=True)


@dataclass(frozen=True)
class CallPlan:
    """What is known of the n-th loss call of a ``training_step``.

    Attributes:
        call: Function, reduction and number of dimensions of its rows.
        layouts: Rules of who owns which row; none if the rows are no sample's, as those of a penalty.
        is_linear: Whether the training loss is linear in the rows.
    """

    call: tuple[str, str, int]
    layouts: frozenset[Layout]
    is_linear: bool = True


Plan = tuple[CallPlan, ...]


@dataclass
class Term:
    """One loss call as it happened.

    Attributes:
        call: As in :class:`CallPlan`.
        rows: The losses before any reduction, without graph.
        entering: The same, weighted, as they enter the reduction.
        owners: Sample of each row, to be broadcast to ``rows``; None where the call was left alone.
        num: ``B``.
    """

    call: tuple[str, str, int]
    rows: Tensor
    entering: Tensor
    owners: Tensor | None
    num: int

    def sums(self, values: Tensor) -> Tensor:
        """Sum over each sample's rows, ``(B,)`` in float64."""
        total = torch.zeros(self.num, dtype=torch.float64, device=values.device)
        if self.owners is None:
            return total
        owners = self.owners.to(values.device).expand(values.shape)
        return total.index_add_(0, owners.reshape(-1), values.reshape(-1).double())

    def __str__(self) -> str:
        """For messages."""
        return f"{self.call[0]} made {tuple(self.rows.shape)} losses of a batch of {self.num} samples"


class SampleWeights(TorchFunctionMode):
    """Gives every row of every torch loss its sample's weight; divisors stay as they were.

    The loss keeps its value to the last bit; only its derivatives learn of the weights. Where the
    training loss is linear in a call's rows ``r``, they become ``w r``; elsewhere ``r + (w - 1) (r - r0)``, with
    ``r0`` the value of ``r`` in the replayed step, whose derivatives by ``w`` and by the parameters are
    those of a weight outside, whatever function of a sample's own rows comes after.

    Args:
        weights: ``(B,)``, all one, requiring a gradient.
        plan: What is known of the step's loss calls; without one, a call with ``B`` rows has one a sample.
        references: Values ``r0`` by number of the call, kept over the evaluations of one batch; filled as needed.

    Attributes:
        terms: The loss calls, in order.
    """

    def __init__(self, weights: Tensor, plan: Plan | None = None, references: dict[int, Tensor] | None = None) -> None:
        super().__init__()
        self._weights, self._plan = weights, plan
        self._references = {} if references is None else references
        self.terms: list[Term] = []

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Pass everything on but the losses."""
        kwargs = kwargs or {}
        if func not in SIGNATURES:
            return func(*args, **kwargs)
        call = SIGNATURES[func].bind(*args, **kwargs)
        call.apply_defaults()
        options = call.arguments
        if func is torch.nn.functional.l1_loss:
            options["weight"] = lost_weight()
        averaged, reduced = options.pop("size_average", None), options.pop("reduce", None)
        if averaged is not None or reduced is not None:
            options["reduction"] = _reduction.legacy_get_string(averaged, reduced, emit_warning=False)
        return self._weighted(func, options)

    def _weighted(self, func: Callable[..., Any], options: dict[str, Any]) -> Tensor:
        rows, value, divisor = rows_of(func, options)
        call = (func.__name__, options["reduction"], rows.ndim)
        known = self._known(call)
        owners = self._owners(known, rows)
        entering = rows if owners is None else self._enter(rows, owners, known)
        self.terms.append(Term(call, rows.detach(), entering, owners, len(self._weights)))
        if value is None:
            return entering
        off = value - _reduced(rows.detach(), divisor)  # rounding only: torch's own sum takes another order
        return _reduced(entering, divisor) + off

    def _known(self, call: tuple[str, str, int]) -> CallPlan | None:
        number = len(self.terms)
        if self._plan is None or number >= len(self._plan) or self._plan[number].call != call:
            return None
        return self._plan[number]

    def _owners(self, known: CallPlan | None, rows: Tensor) -> Tensor | None:
        num = len(self._weights)
        if known is not None:
            owners = owners_by(known.layouts, rows.shape, num) if known.layouts else None
        elif self._plan is None and (num == 1 or (rows.ndim and rows.shape[0] == num)):
            owners = owners_by(frozenset([Layout(0, outer=1)]), rows.shape, num)
        else:
            owners = None
        return None if owners is None else owners.to(rows.device)

    def _enter(self, rows: Tensor, owners: Tensor, known: CallPlan | None) -> Tensor:
        weights = self._weights.to(rows.dtype)[owners]
        if known is None or known.is_linear:
            return rows * weights
        reference = self._references.setdefault(len(self.terms), rows.detach())
        return rows + (weights - 1) * (rows - reference)  # at weight 1 the rows themselves, to the last bit


def _reduced(rows: Tensor, divisor: Tensor | int) -> Tensor:
    return rows.sum() / divisor if isinstance(divisor, int) or not divisor.ndim else (rows / divisor).sum()
