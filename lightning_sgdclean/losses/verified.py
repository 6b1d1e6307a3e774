# SPDX-License-Identifier: Apache-2.0
"""The split of the loss over a whole run: proved on one batch, held against all others, proved anew at need."""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_sgdclean.base.errors import WEIGH_THEM, LossSplitError
from lightning_sgdclean.base.randomness import untouched_randomness
from lightning_sgdclean.data.batches import Variant, tensor_shapes
from lightning_sgdclean.losses.evaluate import RecordedBatch
from lightning_sgdclean.losses.module_state import untouched_module
from lightning_sgdclean.losses.own_proof import moves_foreign, prove_split
from lightning_sgdclean.losses.precision import widened
from lightning_sgdclean.losses.proof import Probe, check_ids, rest_depends_on_samples, rest_of
from lightning_sgdclean.losses.weighting import (
    Evaluated,
    RowOwners,
    SplitPlan,
    calls_of,
    check_parts,
    is_planned,
    plan_key,
)

_CONTRACT = "sample_losses=, a callable (pl_module, batch) -> tensor of shape (B,) whose mean is the training loss"
_MIXED = "Where the loss is no mean over samples (batch Dice, Cox, in-batch negatives): "


def advice_for(batch: RecordedBatch, names_weights: bool = False) -> str:
    """What to do about a loss that cannot be split: a line whose mean is the loss of this batch, or the contract alone.

    Where ``weighted_loss=`` was named before, it is not named again. Parameters are moved a little, so that no line
    fits only because a network starts at zero.
    """
    module, around, num = batch.module, batch.surroundings, len(batch)
    with (
        untouched_randomness(around.device),
        untouched_module(module) as restore,
        around.as_stage("train"),
        torch.no_grad(),
    ):
        shake(batch.params)
        tried = replace(batch, restore=restore, split=None)
        fitting = next((line for line in sample_lines(module, batch.content, num) if _fits_loss(tried, line)), None)
    last = _last_return(module)
    ends = f"; training_step ends with `{last}`" if last else ""
    if fitting is not None:
        return f"Give {_CONTRACT}{ends}. Here this line has that mean: sample_losses={fitting}"
    mixed = "" if names_weights else f" {_MIXED}{WEIGH_THEM}"
    return f"Give {_CONTRACT}{ends and f'{ends}: give what stood before the mean over the batch'}.{mixed}"


def _fits_loss(batch: RecordedBatch, line: str) -> bool:
    """Whether what a line gives is a loss for each sample, and their mean the training loss."""
    contents = [buffer.detach().clone() for buffer in batch.module.buffers()]

    def evaluated(function: Any = None) -> Tensor:
        with torch.no_grad():
            found = batch.call(function=function)
            for buffer, content in zip(batch.module.buffers(), contents, strict=True):
                buffer.copy_(content)
        return found

    try:
        rows, loss = evaluated(callable_in(line)), evaluated()
        is_right = rows.shape == (len(batch),) and loss.numel() == 1
        eps = torch.finfo(loss.dtype).eps
        return is_right and bool(torch.isclose(rows.mean().to(loss), loss.reshape(()), rtol=32 * eps, atol=eps))
    except Exception:  # whatever the module makes of a line that is not made for it
        batch.restore()
        return False


def callable_in(line: str) -> Callable[[Any, Any], Any]:
    """The callable ``(module, batch)`` that a line of ours says, to be tried before it is shown."""
    return eval(line, {"torch": torch, "F": nn.functional})  # type: ignore[no-any-return]


def sample_lines(module: nn.Module, batch: Any, num: int) -> list[str]:
    """Lines that may give the samples' losses, for the parts of this module and the fields of this batch.

    Args:
        module: The LightningModule.
        batch: As ``training_step`` gets it.
        num: ``B``.
    """
    fields = fields_of(batch, num)
    inputs = fields[0] if fields else "batch"
    output = f"{caller_of(module)}({inputs})"
    found = []
    for target in fields[1::-1] or [inputs]:
        for criterion in (name for name, part in module.named_children() if _is_loss(part)):
            pairs = f"for out, y in zip({output}, {target}, strict=True)"
            found.append(f"torch.stack([m.{criterion}(out[None], y[None]) {pairs}])")
        found.append(f'F.cross_entropy({output}, {target}, reduction="none")')
        for name in ("mse_loss", "binary_cross_entropy_with_logits"):
            found.append(f'F.{name}({output}, {target}, reduction="none").flatten(1).mean(1)')
            found.append(f'F.{name}({output}, {target}, reduction="none")')
    return [f"lambda m, batch: {line}" for line in found]


def fields_of(batch: Any, num: int) -> list[str]:
    """How the batch's tensors that have a row for each sample are reached."""
    if isinstance(batch, dict):
        named = [(f"batch[{key!r}]", value) for key, value in batch.items()]
    elif isinstance(batch, list | tuple):
        named = [(f"batch[{number}]", value) for number, value in enumerate(batch)]
    else:
        named = [("batch", batch)]
    return [name for name, value in named if isinstance(value, Tensor) and value.ndim and value.shape[0] == num]


def caller_of(module: nn.Module) -> str:
    """How the network is called: the module itself, or its first part where it has no forward of its own."""
    owner = next((kind for kind in type(module).__mro__ if "forward" in vars(kind)), nn.Module)
    if owner.__module__.startswith(("lightning.", "pytorch_lightning.", "torch.")):
        part = next((name for name, part in module.named_children() if not _is_loss(part)), None)
        return "m" if part is None else f"m.{part}"
    return "m"


def _is_loss(part: nn.Module) -> bool:
    name = type(part).__name__.lower()
    return "loss" in name or "entropy" in name or "criterion" in name


def _last_return(module: Any) -> str | None:
    try:
        lines = inspect.getsource(module.training_step).splitlines()
    except (OSError, TypeError):
        return None
    found = [line.strip() for line in lines if line.strip().startswith("return ")]
    return found[-1] if found else None


_RECHECK_EVERY = 8  # batches; those of a new shape, and all where a penalty stands beside the loss, besides


class VerifiedSplit:
    """Who owns which row of the loss, in every batch that is retraced.

    A batch must make the loss calls of a proved one, over rows that the same rules give owners, and the
    parts must add up to the loss. Beyond that, batches of a new shape and every eighth one have half of their
    samples replaced, to see that only the rows of those move. What does not fit is proved anew, or refused.
    """

    def __init__(self) -> None:
        self._plans: dict[tuple[Any, ...], SplitPlan] = {}
        self._with_rest: set[tuple[Any, ...]] = set()
        self._of_one: set[tuple[Any, ...]] = set()  # proved on batches of one sample only, which have no order
        self._latest: SplitPlan | None = None
        self._shapes: set[tuple[Any, ...]] = set()
        self._num_batches = 0

    @property
    def is_proved(self) -> bool:
        """Whether it was proved on a batch of two samples or more, which shows their order."""
        return self._latest is not None and plan_key(self._latest) not in self._of_one

    def plan_for(
        self, evaluate: Callable[[SplitPlan | None], Evaluated], batch: RecordedBatch
    ) -> tuple[SplitPlan, Evaluated]:
        """Evaluate a batch with its samples' weights where they belong.

        Args:
            evaluate: The batch's loss, with its graph, under a plan.
            batch: The batch.

        Raises:
            LossSplitError: If the loss of this batch cannot be split by sample.
        """
        with _advised(batch):
            if self._is_due(batch.content) and not self._recheck(batch):
                self._prove(batch)
            plan = self._latest
            assert plan is not None
            evaluated = evaluate(plan)
            known = self._known(evaluated, len(batch))
            if known is not None and known is not plan:
                self._latest = plan = known
                evaluated = evaluate(plan)
            if self._fits(evaluated, plan):
                return plan, evaluated
            plan = self._prove(batch)
            evaluated = evaluate(plan)
            if not self._fits(evaluated, plan):
                micro = batch.micro
                raise LossSplitError(
                    f"The loss of batch {micro.batch_idx} of epoch {micro.epoch} does not add up: its samples' parts "
                    "miss a part of it that was not there when they were proved."
                )
            return plan, evaluated

    def prove(self, batch: RecordedBatch) -> SplitPlan:
        """Prove the split on a batch, for the batches like it.

        Returns:
            Whose the rows of its loss calls are.

        Raises:
            LossSplitError: As :func:`lightning_sgdclean.losses.own_proof.prove_split`.
        """
        with _advised(batch):
            return self._prove(batch)

    def prove_ids(self, batch: RecordedBatch, variant: Variant) -> None:
        """Prove on a batch that rows move with the ids whose samples are replaced before collating.

        Raises:
            LossSplitError: If they move with others, or the split itself cannot be proved.
        """
        with _advised(batch):
            if not self._recheck(batch):
                self._prove(batch)
            plan = self._latest
            assert plan is not None
            with _probing(batch, variant) as probe:
                check_ids(probe, plan)

    def _is_due(self, content: Any) -> bool:
        shapes = tuple(tensor_shapes(content))
        is_new, self._num_batches = shapes not in self._shapes, self._num_batches + 1
        self._shapes.add(shapes)
        has_rest = self._latest is not None and plan_key(self._latest) in self._with_rest
        return is_new or has_rest or self._num_batches % _RECHECK_EVERY == 0

    def _recheck(self, batch: RecordedBatch) -> bool:
        """Replace half of the samples: do their rows move, and only theirs, and nothing else of the loss?"""
        num, plan = len(batch), self._latest
        if plan is None:
            return False
        mask = torch.randperm(num, generator=torch.Generator().manual_seed(self._num_batches)) < (num + 1) // 2
        with _probing(batch, batch.variant()) as probe:
            base = probe.ask(plan=plan)
            plan = self._known(base, num)
            if plan is None:
                return False
            self._latest, base = plan, probe.ask(plan=plan)
            if not is_planned(base.calls, plan):
                return False
            if num == 1:
                return True
            mask, other = probe.ask_alike(mask, base, plan)
            pairs = zip(other.calls, base.calls, strict=True)
            if any(moves_foreign(term, then, mask, probe.tolerance) for term, then in pairs):
                return False
            if not all(call.is_linear for call in plan):
                return not rest_depends_on_samples(probe, plan, [mask])
            (rest, slack), (rest_then, _) = rest_of(base), rest_of(other)
            return abs(rest - rest_then) <= slack

    def _known(self, evaluated: Evaluated, num: int) -> SplitPlan | None:
        """What was proved of batches that make the same loss calls."""
        key = calls_of(evaluated.calls)
        return None if num > 1 and key in self._of_one else self._plans.get(key)

    def _fits(self, evaluated: Evaluated, plan: SplitPlan) -> bool:
        if not is_planned(evaluated.calls, plan):
            return False
        if plan_key(plan) in self._with_rest:
            return True
        rest, slack = rest_of(evaluated)
        return abs(rest) <= slack

    def _prove(self, batch: RecordedBatch) -> SplitPlan:
        with _probing(batch, batch.variant()) as probe:
            probe.check_repeatable()
            plan = self._keep(prove_split(probe), len(batch))
            evaluated = probe.ask(plan=plan)
            check_parts(evaluated, batch.micro.sizes)
            rest, slack = rest_of(evaluated)
            # Of functions that are not linear in the rows the value says nothing: these are always looked into, too.
            if abs(rest) > slack or not all(call.is_linear for call in plan):
                self._with_rest.add(plan_key(plan))
            self._latest = plan
            return plan

    def _keep(self, plan: SplitPlan, num: int) -> SplitPlan:
        """Join what a batch shows with what those before it did; both must hold."""
        key = plan_key(plan)
        before = self._plans.get(key)
        if num == 1:
            self._of_one |= set() if before else {key}
            return self._plans.setdefault(key, plan)
        if key in self._of_one and not all(call.rules for call in plan):
            raise LossSplitError(
                "A loss call that depends on no sample, a penalty, it seems, counted as the sample's in a batch of one."
            )
        if before is not None and key not in self._of_one:
            plan = tuple(_joined(now, then) for now, then in zip(plan, before, strict=True))
        self._of_one.discard(key)
        self._plans[key] = plan
        return plan


@contextmanager
def _advised(batch: RecordedBatch) -> Iterator[None]:
    try:
        yield
    except LossSplitError as error:
        text = f"{error} {advice_for(batch, names_weights=WEIGH_THEM in str(error))}"
        raise LossSplitError(text) from error


@contextmanager
def _probing(batch: RecordedBatch, variant: Variant) -> Iterator[Probe]:
    """Ask for the batch's loss with samples replaced; module and random state stay as they are."""
    module, surroundings = batch.module, batch.surroundings
    with (
        untouched_randomness(surroundings.device),
        untouched_module(module, checks=True) as restore,
        surroundings.as_stage("train"),
        torch.enable_grad(),
        widened(module, surroundings) as wide,
    ):
        shake(batch.params)
        probed = replace(batch, restore=restore, split=None)

        def evaluate(content: Any, plan: SplitPlan | None, weights: Tensor) -> Evaluated:
            probed.content = content
            return probed.evaluate_under(plan, weights, surroundings=wide, independent=True)

        tolerance = 1e-11 if batch.params[0].dtype is torch.float64 else 1e-5
        yield Probe(evaluate, variant, len(batch), batch.params, tolerance, batch.micro.sizes)


def _joined(now: RowOwners, then: RowOwners) -> RowOwners:
    rules = now.rules & then.rules
    if now.opened is not None and not (now.rules and then.rules):
        rules = now.rules | then.rules  # a hinge may be zero in a whole batch; a penalty moves in none
    if (now.rules or then.rules) and not rules:
        raise LossSplitError(
            f"Which rows of {now.call[0]} belong to which sample changes from batch to batch by no rule that was seen."
        )
    return replace(now, rules=rules, is_linear=now.is_linear and then.is_linear)


def shake(params: list[nn.Parameter]) -> None:
    """Move the parameters a little, so that samples differ even in a network that starts at zero."""
    with torch.no_grad():
        source = torch.Generator().manual_seed(0)
        for param in params:
            noise = torch.randn(param.shape, generator=source).to(param)
            param.add_(noise, alpha=0.02 + 0.05 * float(param.detach().float().pow(2).mean().sqrt()))
