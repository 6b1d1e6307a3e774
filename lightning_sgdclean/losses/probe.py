# SPDX-License-Identifier: Apache-2.0
"""A training loss that can be asked again and again, with some samples of its batch replaced by others."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lightning_sgdclean.base.errors import LossSplitError, ReplayMismatchError
from lightning_sgdclean.data.variants import Variant
from lightning_sgdclean.losses.evaluate import Evaluated
from lightning_sgdclean.losses.weighting import Plan, Term


class Probe:
    """A training loss at parameters where samples do differ.

    Args:
        evaluate: ``(batch, plan, weights)`` -> the loss with its graph; deterministic, no sample feeling another.
        variant: Mask ``(B,)`` -> the batch with the marked samples replaced.
        num: ``B``.
        params: The trained parameters.
        tolerance: Relative difference that counts as none.

    Attributes:
        fixed: Samples that are never replaced, ``(B,)``: those without which the losses have other shapes, as
            the longest of a batch that ``training_step`` cuts to its longest. Found while asking.
    """

    def __init__(
        self,
        evaluate: Callable[[Any, Plan | None, Tensor], Evaluated],
        variant: Variant,
        num: int,
        params: list[Any],
        tolerance: float,
    ) -> None:
        self._evaluate, self._variant = evaluate, variant
        self.num, self.params, self.tolerance = num, params, tolerance
        self.fixed = torch.zeros(num, dtype=torch.bool)

    def ask(self, replaced: Tensor | None = None, plan: Plan | None = None, weight: float = 1.0) -> Evaluated:
        """Evaluate with these samples replaced and all weights alike.

        Raises:
            LossSplitError: If ``training_step`` cannot do with such a batch.
        """
        mask = torch.zeros(self.num, dtype=torch.bool) if replaced is None else replaced
        dtype = torch.float64 if self.params[0].dtype is torch.float64 else torch.float32
        weights = torch.full((self.num,), weight, dtype=dtype, device=self.params[0].device, requires_grad=True)
        try:
            return self._evaluate(self._variant(mask), plan, weights)
        except LossSplitError:
            raise
        except Exception as error:  # theirs: of any kind
            if not bool(mask.any()):
                raise
            raise LossSplitError(
                f"training_step failed on a batch in which some samples were replaced by others, which was to show "
                f"the owner of each row of the loss: {type(error).__name__}: {error}."
            ) from error

    def check_repeatable(self) -> None:
        """The same batch, from the same random state: the same loss?

        Raises:
            ReplayMismatchError: If not, since then no step can be run again.
        """
        first, second = (float(self.ask().loss.detach()) for _ in range(2))
        if math.isfinite(first) and not math.isclose(first, second, rel_tol=10 * self.tolerance):
            raise ReplayMismatchError(
                f"The training loss of a batch, computed twice from one random state, is {first!r} and {second!r}. "
                "Likely causes: randomness that is not torch's, NumPy's or Python's, such as a torch.Generator of the "
                "module's own, or state that training_step keeps outside the module. Use the global generators, or "
                "keep the state in attributes of the module."
            )

    def ask_alike(self, replaced: Tensor, base: Evaluated, plan: Plan | None = None) -> tuple[Tensor, Evaluated]:
        """Evaluate with as many of these samples replaced as leave the losses' shapes what they are in ``base``.

        Returns:
            Which were replaced, and what came of it.

        Raises:
            LossSplitError: If the shapes are others whichever sample is replaced.
        """
        mask = replaced & ~self.fixed
        found = self._alike(mask, base, plan)
        for sample in [] if found is not None else mask.nonzero().flatten().tolist():
            alone = torch.zeros_like(mask)
            alone[sample] = True
            if self._alike(alone, base, plan) is None:
                self.fixed[sample], mask[sample] = True, False
        found = found or self._alike(mask, base, plan)
        for sample in [] if found is not None else mask.nonzero().flatten().tolist():  # several longest, all replaced
            self.fixed[sample], mask[sample] = True, False
            found = self._alike(mask, base, plan)
            if found is not None:
                break
        if found is None or bool(self.fixed.all()):
            raise LossSplitError(self._why_unlike(replaced, base, plan))
        return mask, found

    def _alike(self, mask: Tensor, base: Evaluated, plan: Plan | None) -> Evaluated | None:
        try:
            found = self.ask(mask, plan)
        except LossSplitError:
            return None
        return found if _shapes(found) == _shapes(base) else None

    def _why_unlike(self, replaced: Tensor, base: Evaluated, plan: Plan | None) -> str:
        other = self.ask(replaced, plan)
        pairs = zip(base.terms, other.terms, strict=False)
        unlike = next(((one, two) for one, two in pairs if one.rows.shape != two.rows.shape), None)
        what = f"{len(base.terms)} loss calls on the batch, {len(other.terms)} with samples replaced by others."
        if unlike is not None:
            what = (
                f"{unlike[0]}, and {tuple(unlike[1].rows.shape)} with some of them replaced by others. Rows picked "
                "by a mask cannot be followed; ignore_index, or a weight of zero, can."
            )
        return f"Which losses are computed depends on the samples: {what}"


def calls_of(terms: list[Term]) -> tuple[Any, ...]:
    """What was called, in order."""
    return tuple(term.call for term in terms)


def _shapes(evaluated: Evaluated) -> list[tuple[Any, ...]]:
    return [(term.call, term.rows.shape) for term in evaluated.terms]


def without_graph(evaluated: Evaluated) -> Evaluated:
    """The same, for comparison only; its graph can go."""
    terms = [replace(term, entering=term.entering.detach()) for term in evaluated.terms]
    return Evaluated(evaluated.loss.detach(), [], terms)


def moved(rows: Tensor, before: Tensor, tolerance: float) -> Tensor:
    """Which entries differ by more than rounding, on the CPU."""
    scale = float(before.nan_to_num(0, 0, 0).abs().max()) if before.numel() else 0.0
    same = torch.isclose(rows, before, rtol=0, atol=tolerance * max(scale, 1e-30), equal_nan=True)
    return (~same).cpu()
