# SPDX-License-Identifier: Apache-2.0
"""Sample weights, and other labels, inside the loss of an unmodified `training_step`."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import _reduction, functional
from torch.overrides import TorchFunctionMode

from lightning_sgdclean.data.batches import cloned, leaves_of
from lightning_sgdclean.losses.loss_functions import SIGNATURES, OwnerRule, lost_weight, owners_by, rows_of
from lightning_sgdclean.losses.running_statistics import BatchStatistic
from lightning_sgdclean.losses.stopped_values import TeachersOutputs


def unit_weights(num: int, params: list[nn.Parameter]) -> Tensor:
    """``(B,)`` of ones that require a gradient, in float64 for a float64 module and in float32 for all others."""
    dtype = torch.float64 if params[0].dtype is torch.float64 else torch.float32
    return torch.ones(num, dtype=dtype, device=params[0].device, requires_grad=True)


@dataclass(frozen=True)
class RowOwners:
    """What is known of the n-th loss call of a ``training_step``.

    Attributes:
        call: Function, reduction and number of dimensions of its rows.
        rules: Rules of who owns which row; none if the rows are no sample's, as those of a penalty.
        is_linear: Whether the training loss is linear in the rows.
    """

    call: tuple[str, str, int]
    rules: frozenset[OwnerRule]
    is_linear: bool = True


SplitPlan = tuple[RowOwners, ...]


@dataclass
class LossCall:
    """One loss call as it happened.

    Attributes:
        call: As in :class:`RowOwners`.
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
        calls: The loss calls, in order.
    """

    def __init__(
        self, weights: Tensor, plan: SplitPlan | None = None, references: dict[int, Tensor] | None = None
    ) -> None:
        super().__init__()
        self._weights, self._plan = weights, plan
        self._references = {} if references is None else references
        self.calls: list[LossCall] = []

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
        self.calls.append(LossCall(call, rows.detach(), entering, owners, len(self._weights)))
        if value is None:
            return entering
        off = (value - _reduced(rows, divisor)).detach()  # rounding only: torch's own sum takes another order
        return _reduced(entering, divisor) + off

    def _known(self, call: tuple[str, str, int]) -> RowOwners | None:
        number = len(self.calls)
        if self._plan is None or number >= len(self._plan) or self._plan[number].call != call:
            return None
        return self._plan[number]

    def _owners(self, known: RowOwners | None, rows: Tensor) -> Tensor | None:
        num = len(self._weights)
        if known is not None:
            owners = owners_by(known.rules, rows.shape, num) if known.rules else None
        elif self._plan is None and (num == 1 or (rows.ndim and rows.shape[0] == num)):
            owners = owners_by(frozenset([OwnerRule(0, outer=1)]), rows.shape, num)
        else:
            owners = None
        return None if owners is None else owners.to(rows.device)

    def _enter(self, rows: Tensor, owners: Tensor, known: RowOwners | None) -> Tensor:
        weights = self._weights.to(rows.dtype)[owners]
        if known is None or known.is_linear:
            return rows * weights
        reference = self._references.setdefault(len(self.calls), rows.detach())
        return rows + (weights - 1) * (rows - reference)  # at weight 1 the rows themselves, to the last bit


def _reduced(rows: Tensor, divisor: Tensor | int) -> Tensor:
    return rows.sum() / divisor if isinstance(divisor, int) or not divisor.ndim else (rows / divisor).sum()


_CLASSES = (functional.cross_entropy, functional.nll_loss)
_SIDES = (functional.binary_cross_entropy, functional.binary_cross_entropy_with_logits)


@dataclass
class OtherLabels:
    """Labels that the samples of a batch could have had.

    Attributes:
        labels: Numbers of classes ``(B,)``, -1 where there is none.
        amounts: ``(B,)``, all zero: how much of each label is changed.
        targets: What the losses were called with, by number of the call, and what with the labels changed.
        rows: Their losses with the labels changed, without graph, by number of the call.
        is_whole: Whether all rows that samples own were made of a label that could be changed.
    """

    labels: Tensor
    amounts: Tensor
    targets: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    rows: dict[int, Tensor] = field(default_factory=dict)
    is_whole: bool = True


class LabelledWeights(SampleWeights):
    """Besides a weight ``w``, a sample's rows get an amount ``a`` of those that another label would give.

    ``r`` becomes ``w r + a (r' - r)``, which at ``a = 0`` is ``w r`` to the last bit. The derivative by ``a`` is that
    of a label which is changed by and by, divisors fixed; the module is evaluated no more often for it.

    Args:
        weights: As for the class that this one extends.
        plan: See there.
        references: See there.
        others: The labels; what becomes of them is noted there.
    """

    def __init__(
        self, weights: Tensor, plan: SplitPlan | None, references: dict[int, Tensor] | None, others: OtherLabels
    ) -> None:
        super().__init__(weights, plan, references)
        self._others = others
        self._call: tuple[Callable[..., Any], dict[str, Any]] | None = None
        others.targets.clear()
        others.rows.clear()
        others.is_whole = True

    def _weighted(self, func: Callable[..., Any], options: dict[str, Any]) -> Tensor:
        self._call = func, dict(options)
        return super()._weighted(func, options)

    def _enter(self, rows: Tensor, owners: Tensor, known: RowOwners | None) -> Tensor:
        entering = super()._enter(rows, owners, known)
        changed = self._changed(rows, owners)
        if changed is None or (known is not None and not known.is_linear):
            self._others.is_whole = False
            return entering
        self._others.rows[len(self.calls)] = changed.detach()
        return entering + self._others.amounts.to(rows.dtype)[owners] * (changed - rows)

    def _changed(self, rows: Tensor, owners: Tensor) -> Tensor | None:
        """The rows with the labels changed; None where the call has no such label for each sample."""
        assert self._call is not None
        func, options = self._call
        target = options.get("target")
        is_class = func in _CLASSES and target is not None and not target.is_floating_point()
        if (
            not (is_class or func in _SIDES)
            or target is None
            or not target.numel() == owners.numel() == len(self._weights)
        ):
            return None
        labels = self._others.labels.to(target.device)[owners.reshape(-1)].reshape(target.shape)
        keeps = labels < 0
        keeps |= target == options["ignore_index"] if is_class else (target != 0) & (target != 1)
        changed = torch.where(keeps, target, labels.to(target.dtype))
        self._others.targets[len(self.calls)] = target, changed
        return rows_of(func, {**options, "target": changed})[0].expand(rows.shape)


def relabelled(batch: Any, others: OtherLabels) -> Any | None:
    """A copy of a batch with the labels changed where the loss's targets stand in it; None if they do not."""
    copy, found = cloned(batch), False
    for target, changed in others.targets.values():
        for leaf in leaves_of(copy):
            if isinstance(leaf, Tensor) and leaf.shape == target.shape and torch.equal(leaf.double(), target.double()):
                leaf.copy_(changed.to(leaf.dtype))
                found = True
    return copy if found else None


def plan_key(plan: SplitPlan) -> tuple[Any, ...]:
    """What is called under a plan, in order."""
    return tuple(call.call for call in plan)


def is_planned(calls: list[LossCall], plan: SplitPlan) -> bool:
    """Whether loss calls are those of a plan, and have the owners that it promises."""
    if calls_of(calls) != plan_key(plan):
        return False
    pairs: list[tuple[RowOwners, LossCall]] = list(zip(plan, calls, strict=True))
    return all(term.owners is not None for call, term in pairs if call.rules)


def calls_of(calls: list[LossCall]) -> tuple[Any, ...]:
    """What was called, in order."""
    return tuple(term.call for term in calls)


@dataclass
class Evaluated:
    """One training loss with its graph; running statistics that it moved, and read; loss calls; teachers."""

    loss: Tensor
    updates: list[BatchStatistic]
    calls: list[LossCall]
    leaves: dict[str, Tensor] = field(default_factory=dict)
    stopped: TeachersOutputs | None = None
