# SPDX-License-Identifier: Apache-2.0
"""Other labels that samples could have had, inside the loss of an unmodified `training_step`."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from lightning_sgdclean.data.batches import cloned, leaves_of
from lightning_sgdclean.losses.loss_functions import rows_of
from lightning_sgdclean.losses.weighting import RowOwners, SampleWeights, SplitPlan

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
        sizes: As for the class that this one extends.
    """

    def __init__(
        self,
        weights: Tensor,
        plan: SplitPlan | None,
        references: dict[int, Tensor] | None,
        others: OtherLabels,
        sizes: Sequence[int] = (),
    ) -> None:
        super().__init__(weights, plan, references, sizes)
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
