# SPDX-License-Identifier: Apache-2.0
"""Sample weights inside the loss of an unmodified `training_step`."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import _reduction
from torch.overrides import TorchFunctionMode

from lightning_sgdclean.base.errors import LossSplitError
from lightning_sgdclean.losses.loss_functions import SIGNATURES, OwnerRule, Picked, lost_weight, owners_by, rows_of

if TYPE_CHECKING:
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
        opened: Where the rows are found in the loss's graph
            (:class:`~lightning_sgdclean.losses.own_rows.OwnRows`), below what to look for them; the same for all.
    """

    call: tuple[str, str, int]
    rules: frozenset[OwnerRule]
    is_linear: bool = True
    opened: frozenset[str] | None = None

    @property
    def name(self) -> str:
        """Loss function, or operation that gave the rows."""
        return operation_in(self.call[0])


def operation_in(path: str) -> str:
    """The operation at the end of a way through a graph."""
    return path.rpartition("/")[2].partition("|")[0]


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

    @property
    def likeness(self) -> tuple[Any, ...]:
        """What must not change as samples are replaced."""
        return self.call, self.rows.shape

    def __str__(self) -> str:
        """For messages."""
        return f"{self.call[0]} made {tuple(self.rows.shape)} losses of a batch of {self.num} samples"


@dataclass
class Part(LossCall):
    """A part of the loss, as if a loss function had made it.

    Attributes:
        openings: What to add to :attr:`RowOwners.opened` to look for rows below this part, the best first.
        needs_owners: Whether it was added to rows of samples, entry by entry, and so is theirs, too.
        is_factor: Whether it is what another part is multiplied with or divided by, and must not follow the samples.
        picked: Owners of its rows ``(n,)``, by the picks that gave as many.
        members: Of parts that are alike and so stand together, how many rows each has, and whether it was made of the
            batch.
        joins: Whether the module has put it together of several tensors.
    """

    openings: tuple[str, ...] = ()
    needs_owners: bool = False
    is_factor: bool = False
    picked: dict[Picked, Tensor] = field(default_factory=dict)
    members: list[tuple[int, bool]] = field(default_factory=list)
    joins: bool = False

    @property
    def likeness(self) -> tuple[Any, ...]:
        """What must not change as samples are replaced; how many rows are picked may."""
        return self.call, None if self.picked else self.rows.shape

    def __str__(self) -> str:
        """For messages."""
        return f"the loss is made of {name_of(self.call)}, of shape {tuple(self.rows.shape)}, in a batch of {self.num}"


def name_of(call: tuple[str, str, int]) -> str:
    """What a part is, in words."""
    name = operation_in(call[0])
    return "what was compiled by torch.jit" if name.startswith("torch::jit") else f"what {name!r} gives"


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
        sizes: How many samples are of each of several loaders, in order; empty where there is one.

    Attributes:
        calls: The loss calls, in order.
    """

    def __init__(
        self,
        weights: Tensor,
        plan: SplitPlan | None = None,
        references: dict[int, Tensor] | None = None,
        sizes: Sequence[int] = (),
    ) -> None:
        super().__init__()
        self._weights, self._plan, self._sizes = weights, plan, sizes
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

    def begin(self, batch: Any) -> None:
        """Told of the batch that ``training_step`` is about to get."""

    def weighted(self, loss: Tensor) -> Tensor:
        """The loss that was computed within this mode, as a function of the weights: here, itself."""
        return loss

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
            owners = owners_by(known.rules, rows.shape, num, self._sizes) if known.rules else None
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
    updates: "list[BatchStatistic]"
    calls: list[LossCall]
    leaves: dict[str, Tensor] = field(default_factory=dict)
    stopped: "TeachersOutputs | None" = None


def check_parts(evaluated: Evaluated, sizes: Sequence[int]) -> None:
    """Does the loss depend on samples of each of several loaders?

    Raises:
        LossSplitError: If not: a part that cannot be replaced looks like one that does not count.
    """
    owned = {owner for call in evaluated.calls if call.owners is not None for owner in call.owners.flatten().tolist()}
    firsts = [sum(sizes[:part]) for part in range(len(sizes))]
    for part, (first, size) in enumerate(zip(firsts, sizes, strict=True)):
        if size and owned.isdisjoint(range(first, first + size)):
            raise LossSplitError(
                f"Nothing of the training loss was found to depend on the samples of loader {part} (counted from 0): "
                "either it is not used, then leave it out, or it gave one sample alone, which no other can replace, or "
                "its batches hold no row for each sample."
            )


def scalar_of(loss: Any) -> Tensor:
    """What ``weighted_loss=`` gave, if it may be a loss."""
    if isinstance(loss, Tensor) and loss.numel() == 1 and loss.is_floating_point():
        return loss.reshape(())
    found = f"a tensor of shape {tuple(loss.shape)} ({loss.dtype})" if isinstance(loss, Tensor) else type(loss).__name__
    raise LossSplitError(
        f"weighted_loss= gave {found}; expected a scalar: the training loss with the weights on its samples. A "
        "callable to one loss a sample, whose mean is the training loss, is sample_losses=."
    )
