# SPDX-License-Identifier: Apache-2.0
"""Hold the user's own loss with weights on its samples against the training, on one batch.

At weights of 1 it has to be the training loss, and its gradient that of the training loss. The weights have to reach
the gradient, which has to be finite where one of them is zero. And weight ``i`` has to be that of sample ``i``: where
the training loss does not mind the order of its samples, they are moved on by one place and the weights with them; and
some samples are replaced by others, to see that what a weight multiplies moves with the weight's own sample, and that
zero takes no other out. What else the weight of a sample should do is the user's to say.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lightning_sgdclean.base.errors import LossSplitError, SGDInfluenceError
from lightning_sgdclean.base.randomness import untouched_randomness
from lightning_sgdclean.data.batches import Variant, is_by_row, leaves_of
from lightning_sgdclean.data.parts import neighbour_variant
from lightning_sgdclean.losses.evaluate import RecordedBatch
from lightning_sgdclean.losses.kernels import gradient, length_of
from lightning_sgdclean.losses.loss_functions import replacement_masks
from lightning_sgdclean.losses.module_state import untouched_module
from lightning_sgdclean.losses.precision import widened
from lightning_sgdclean.losses.surroundings import Surroundings
from lightning_sgdclean.losses.verified import VerifiedSplit, shake
from lightning_sgdclean.losses.weighting import SplitPlan


def prove_loss(batch: RecordedBatch, split: VerifiedSplit, on_mismatch: str) -> SplitPlan | None:
    """On a run's first batch: check the loss that the user gives, or find out which part of it is whose.

    Args:
        batch: The batch.
        split: Takes in what was found.
        on_mismatch: Whether another loss than the training's is an error (``"raise"``).

    Returns:
        Whose the rows of the loss calls are; None where the user says it.

    Raises:
        LossSplitError: If the user's loss is not the training's, or none can be found.
    """
    if batch.own_loss is None:
        return split.prove(batch)
    check_own_loss(batch, on_mismatch)
    return None


def check_own_loss(batch: RecordedBatch, on_mismatch: str) -> None:
    """Check ``weighted_loss=``, where it is given, on a batch; module and random state stay as they are.

    Args:
        batch: The batch.
        on_mismatch: ``"warn"`` leaves the values to the comparison of every step.

    Raises:
        LossSplitError: What was found, what was expected, and what to do.
    """
    if batch.weighted_loss is None:
        return
    with _asking(batch) as asked:
        ones = asked.weights()
        own = asked.gradients(ones)
        if on_mismatch == "raise":
            asked.compare_with_training(own)
        asked.check_weights_count(own)
        asked.check_zero()
        if not asked.check_order():
            asked.check_removed()
        asked.check_owners()


_TRIED = 16  # samples
_ZERO = (
    "A root, a logarithm or a quotient at zero is the likely cause, also where zero multiplies it afterwards: keep "
    "what goes in away from zero, by clamp(min=1e-12) say."
)
_TOGETHER = "weights[i] is that of sample i of the batch: sort, shuffle or pick weights with what they belong to."


@contextmanager
def _asking(batch: RecordedBatch) -> Iterator["_Asked"]:
    module, around = batch.module, batch.surroundings
    with (
        untouched_randomness(around.device),
        untouched_module(module, checks=True) as restore,
        around.as_stage("train"),
        torch.enable_grad(),
        widened(module, around) as wide,
    ):
        shake(batch.params)
        yield _Asked(replace(batch, restore=restore, split=None), wide)


@dataclass
class _Found:
    """A loss, its derivatives by the samples' weights, ``(B,)`` (None: there are none), and those by parameters."""

    loss: float
    by_weights: Tensor | None
    by_params: list[Tensor]


class _Asked:
    """The user's loss of a batch, at parameters that were moved a little, so that samples differ."""

    def __init__(self, batch: RecordedBatch, wide: Surroundings) -> None:
        self._batch, self._wide, self._num = batch, wide, len(batch)
        self._variant: Variant = neighbour_variant(batch.content, batch.micro.sizes)
        is_double = batch.params[0].dtype is torch.float64
        self._tolerance = 1e-9 if is_double else 1e-4
        # Far below it: of a mixup that hardly mixes, both values below differ by little, and neither by nothing.
        self._rounding = 64 * torch.finfo(torch.float64 if is_double else torch.float32).eps
        self._nobody = torch.zeros(self._num, dtype=torch.bool)
        self._tried = sorted({*torch.linspace(0, self._num - 1, _TRIED).long().tolist()})

    def weights(self) -> Tensor:
        """Ones, to differentiate by."""
        return self._batch.weights()

    def gradients(self, weights: Tensor) -> _Found:
        """The user's loss at weights, with its derivatives.

        Raises:
            LossSplitError: If it has no graph.
        """
        loss = self._batch.evaluate_under(None, weights, surroundings=self._wide).loss
        if loss.grad_fn is None:
            raise LossSplitError(
                "weighted_loss= gave a loss without a graph: it was computed under torch.no_grad(), or detached. It "
                "has to be differentiable by the parameters and by the weights."
            )
        (by_weights,) = torch.autograd.grad([loss], [weights], retain_graph=True, allow_unused=True)
        return _Found(float(loss.detach()), by_weights, gradient([loss], list(self._batch.params)))

    def compare_with_training(self, own: _Found) -> None:
        """Has the user's loss, at weights of 1, the value and the gradient of the training's?"""
        trained = replace(self._batch, weighted_loss=None)
        loss = trained.evaluate_under(None, trained.weights(), surroundings=self._wide).loss
        value = float(loss.detach())
        if not self._is_close(own.loss, value, abs(value)):
            raise LossSplitError(
                f"weighted_loss= gives {own.loss!r} for batch {self._batch.micro.batch_idx} of epoch "
                f"{self._batch.micro.epoch} with all weights 1, and training_step {value!r}. They have to be the same. "
                "Let training_step call the same function with weights of 1, and draw random numbers in the same order."
            )
        theirs = gradient([loss], list(self._batch.params))
        off = length_of([one - other for one, other in zip(own.by_params, theirs, strict=True)])
        if not off <= 10 * self._tolerance * length_of(theirs):
            raise LossSplitError(
                f"weighted_loss= gives the training loss with all weights 1, {value!r}, but its gradient differs by "
                f"{off / (length_of(theirs) or 1.0):.1%} from that of training_step. Something is detached in one of "
                "them and not in the other. Let training_step call the same function with weights of 1."
            )

    def check_weights_count(self, own: _Found) -> None:
        """Do the weights reach the loss and its gradient, through the graph?"""
        by_weights = own.by_weights
        if by_weights is not None and not bool(torch.isfinite(by_weights).all()):
            rows = (~torch.isfinite(by_weights)).nonzero().flatten().tolist()
            raise LossSplitError(
                f"The derivative of weighted_loss= by the weights is not finite at weights of 1 (samples {rows[:5]} of "
                f"the batch, by position). {_ZERO}"
            )
        other = self.gradients(self._some_weights())
        value_stays = self._is_close(other.loss, own.loss, abs(own.loss))
        off = length_of([one - two for one, two in zip(other.by_params, own.by_params, strict=True)])
        gradient_stays = off <= 10 * self._tolerance * length_of(own.by_params)
        if by_weights is not None and bool(by_weights.any()) and not gradient_stays:
            return
        if value_stays and gradient_stays:
            found = "does not use its weights: with weights between 0.5 and 1.5 it and its gradient stay the same"
        elif gradient_stays:
            found = "has a gradient by the parameters that does not change with the weights"
        else:
            found = (
                "uses its weights outside of the graph (detach, item, tolist, numpy, no_grad, or a comparison), so "
                "that it has no derivative by them"
            )
        raise LossSplitError(
            f"weighted_loss= {found}. Multiply what each sample adds to the loss by its entry of weights, a tensor "
            "of shape (B,)."
        )

    def check_zero(self) -> None:
        """Is the loss finite, and its gradient, where a sample is left out by weight zero?"""
        singles = torch.arange(self._num)
        suspects = [mask for mask in replacement_masks(self._num) if not self._is_finite_without(mask)]
        for sample in singles[torch.stack(suspects).any(0)].tolist() if suspects else singles.tolist()[:1]:
            if not self._is_finite_without(singles == sample):
                raise LossSplitError(
                    f"weighted_loss=, or its gradient, is not finite where weights[{sample}] is zero, as it is where "
                    f"that sample is left out (verify=, counterfactual). {_ZERO}"
                )

    def _is_finite_without(self, gone: Tensor) -> bool:
        weights = self.weights().detach()
        weights[gone.to(weights.device)] = 0.0
        found = self.gradients(weights.requires_grad_())
        return math.isfinite(found.loss) and all(bool(torch.isfinite(grad).all()) for grad in found.by_params)

    def check_order(self) -> bool:
        """Where the training loss is the same for its samples in another order, does the user's follow with weights?

        Returns:
            Whether that could be told: not of mixup, say, which minds the order.
        """
        everyone = torch.ones(self._num, dtype=torch.bool)
        weights, ones = self._some_weights(), self.weights()
        here, there = self._losses(None, ones, weights), self._losses(everyone, ones, weights.roll(1).detach())
        if here is None or there is None or abs(here[0] - there[0]) > self._rounding * abs(here[0]):
            return False
        if not self._is_close(here[1], there[1], 10 * (abs(here[0]) + abs(here[1]))):
            raise LossSplitError(
                "weighted_loss= gives some weights to other samples than theirs: with the samples in another order, "
                f"and the weights in the same order as they, it is {there[1]!r} instead of {here[1]!r}, though with "
                "all weights 1 it stays the same. " + _TOGETHER
            )

        return True

    def check_removed(self) -> None:
        """If a weight of zero takes a sample out of the loss altogether, is it the weight's own sample?

        Told by the gradient that the samples' numbers get: it is exactly zero for one that is out. Replacing samples
        would not do, since a loss that sorts them might take out another one then. One weight alone says nothing: the
        only triplet that a sample is in, say, may go with another's weight.
        """
        whole, astray = self._pulls(self.weights()), list[tuple[int, int]]()
        for i in self._tried if whole is not None else []:
            weights = self.weights().detach()
            weights[i] = 0.0
            found = self._pulls(weights.requires_grad_())
            if found is None or whole is None or not bool((found[i] != 0) & (whole[i] != 0)):
                continue
            out = ((found == 0) & (whole != 0)).nonzero().flatten().tolist()
            astray += [(i, out[0])] if out else []
        if len(astray) > len(self._tried) // 2:
            i, j = astray[0]
            raise LossSplitError(
                f"weights[{i}] of zero takes sample {j} of the batch out of weighted_loss=, and not sample {i}. "
                f"{_TOGETHER}"
            )

    def _pulls(self, weights: Tensor) -> Tensor | None:
        """How large the gradient by each sample's numbers is, ``(B,)``; None where that cannot be had."""
        weighted, leaves = self._batch.weighted_loss, list[Tensor]()
        assert weighted is not None

        def noting(module: Any, batch: Any, given: Tensor) -> Any:
            held = (leaf for leaf in leaves_of(batch) if isinstance(leaf, Tensor) and leaf.is_floating_point())
            leaves.extend(leaf.requires_grad_() for leaf in held if is_by_row(leaf, self._num))
            return weighted(module, batch, given)

        asked = replace(self._batch, weighted_loss=noting, content=self._variant(self._nobody))
        try:
            loss = asked.evaluate_under(None, weights, surroundings=self._wide, independent=True).loss
            found = torch.autograd.grad([loss], leaves, allow_unused=True)
        except Exception:  # theirs: it writes into its batch, say
            self._batch.restore()
            return None
        sizes = [grad.abs().reshape(self._num, -1).sum(1) for grad in found if grad is not None]
        return torch.stack(sizes).sum(0) if sizes else None

    def check_owners(self) -> None:
        """Does what a weight multiplies move with its own sample, if it moves with any?"""
        before, singles = self._terms(self._nobody), torch.arange(self._num)
        if before is None:
            return
        found = {i: terms for i in self._tried if (terms := self._terms(singles == i)) is not None}
        for i, terms in found.items():
            if bool(self._moved(terms, before)[i]) or not bool(self._moved(terms, before, 100.0).any()):
                continue  # where nothing moves, the sample was replaced by one that is the same, say
            if any(bool(self._moved(others, before)[i]) for others in found.values()):
                raise LossSplitError(
                    f"weighted_loss= multiplies by weights[{i}] what depends on other samples of the batch and not on "
                    f"sample {i}. {_TOGETHER}"
                )

    def _terms(self, replaced: Tensor) -> Tensor | None:
        """Derivatives by the weights with samples replaced, norms and dropout fixed; None where they cannot be had."""
        weights = self.weights()
        loss = self._evaluated(replaced, weights)
        if loss is None or loss.grad_fn is None:
            return None
        (found,) = torch.autograd.grad([loss], [weights], allow_unused=True)
        return found if found is not None and bool(torch.isfinite(found).all()) else None

    def _losses(self, replaced: Tensor | None, *weights: Tensor) -> list[float] | None:
        mask = self._nobody if replaced is None else replaced
        with torch.no_grad():
            found = [self._evaluated(mask, each) for each in weights]
        values = [float(loss) for loss in found if loss is not None]
        return values if len(values) == len(weights) else None

    def _evaluated(self, replaced: Tensor, weights: Tensor) -> Tensor | None:
        try:
            self._batch.content = self._variant(replaced)
            return self._batch.evaluate_under(None, weights, surroundings=self._wide, independent=True).loss
        except SGDInfluenceError:
            raise
        except Exception:  # theirs: a batch that is not made for it, say
            self._batch.restore()
            return None

    def _some_weights(self) -> Tensor:
        source = torch.Generator().manual_seed(self._num)
        found = self.weights().detach()
        return (found * (0.5 + torch.rand(found.shape, generator=source)).to(found)).requires_grad_()

    def _moved(self, now: Tensor, before: Tensor, clearly: float = 1.0) -> Tensor:
        """On the CPU."""
        scale = float(torch.maximum(now.abs(), before.abs()).max())
        return ((now - before).abs() > clearly * self._tolerance * scale).cpu()

    def _is_close(self, one: float, other: float, scale: float) -> bool:
        return abs(one - other) <= self._tolerance * scale
