# SPDX-License-Identifier: Apache-2.0
"""How faithful a replay is: what a step, run again, gives is held against what was recorded of it."""

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from lightning_sgdclean.base.errors import ReplayMismatchError
from lightning_sgdclean.base.lightning import Hooks
from lightning_sgdclean.losses.evaluate import RecordedBatch
from lightning_sgdclean.trajectory.records import State, Step

_GENERATORS = (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)
_NAMED = 5  # hooks, at most
_UPDATE_SLACK = 100  # an update is a small difference of large numbers: its relative error is larger


@dataclass
class Fidelity:
    """How far the steps, run again, were off the record, and what to do where that is too far.

    Attributes:
        tolerance: Largest relative difference of a loss; an update may be off by a hundred times that.
        on_mismatch: ``"raise"`` or ``"warn"``.
        hooks: Hooks of the user's, for the message.
        module: The LightningModule, in which causes are looked for.
        loss: Largest relative difference of a loss.
        update: Largest difference of an update of parameters or optimizer state, relative to its length,
            rounding deducted.
        num_bitwise: Micro-batches whose loss came out the same to the last bit, of ``num_batches``.
        num_batches: Micro-batches replayed.
        segments_bitwise: Segments between two snapshots that, repeated, led to the second to the last bit,
            of ``num_segments``.
        num_segments: Segments that were repeated.
        joints: Steps after which a fit went on from a checkpoint. In ``64-true`` Lightning loads it into float32 first,
            and the parameters are rounded.
        complaints: What exceeded the tolerance, where that is only warned about.
    """

    tolerance: float
    on_mismatch: str
    hooks: Hooks = field(default_factory=Hooks)
    module: nn.Module | None = None
    loss: float = 0.0
    update: float = 0.0
    num_bitwise: int = 0
    num_batches: int = 0
    segments_bitwise: int = 0
    num_segments: int = 0
    joints: set[int] = field(default_factory=set)
    complaints: list[str] = field(default_factory=list)

    def mismatch(self, step: Step, text: str) -> None:
        """Refuse, or note, a replay that differs from the record.

        Raises:
            ReplayMismatchError: Unless mismatches are only warned about.
        """
        message = f"Step {step.index} (epoch {step.epoch}), run again, is not what was recorded: {text}"
        if self.on_mismatch == "raise":
            raise ReplayMismatchError(f'{message} on_mismatch="warn" ranks all the same.')
        if message not in self.complaints:  # a step that was repeated on the way to its snapshot is replayed, too
            self.complaints.append(message)

    def compare_batch(self, step: Step, number: int, digest: Tensor) -> None:
        """Is micro-batch ``number``, at hand again, the one that was trained on?"""
        micro = step.micro[number]
        assert micro.digest is not None
        if torch.equal(digest, micro.digest):
            return
        off = (digest != micro.digest).nonzero().flatten().tolist()
        self.mismatch(
            step,
            f"{len(off)} of {len(digest)} samples of its batch, fetched again, hold other data "
            f"(sample {micro.ids[off[0]]!r} first). Random augmentation, in the dataset, the collate function or a "
            "transfer hook, or data that changed since, is the likely cause. Train again with keep_batches=True, which "
            "stores batches as they are trained on; where a position has come to be another sample, or a collate "
            "function takes samples from batches before, with sample_ids=, which names them, too.",
        )

    def compare_losses(
        self, step: Step, losses: list[Tensor], counts: bool = True, batches: Sequence[RecordedBatch] = ()
    ) -> None:
        """Are the losses of the micro-batches, as differentiated, the recorded ones?

        Args:
            step: The step.
            losses: Of each micro-batch.
            counts: Whether it counts in the summary.
            batches: The micro-batches, where the losses may be those of a callable of the user's.
        """
        for number, (loss, micro) in enumerate(zip(losses, step.micro, strict=True)):
            assert micro.loss is not None
            recorded, now = float(micro.loss), float(loss)
            self.num_batches += counts
            self.num_bitwise += counts and recorded == now
            off = abs(now - recorded) / max(abs(recorded), 1e-12)
            self.loss = max(self.loss, off)
            if not off <= self.tolerance:
                undo = step.divisor / (micro.scale or 1.0)
                text = f"loss {now * undo!r} instead of {recorded * undo!r}. "
                own = batches[number].own_loss if number < len(batches) else None
                if own is not None:
                    trained = float(batches[number].as_trained())
                    if abs(trained - recorded) <= self.tolerance * max(abs(recorded), 1e-12):
                        text += f"The former is {own}, the latter what training_step gives again. "
                        self.mismatch(step, f"{text}{own[0].upper()}{own[1:]} has to be the training loss.")
                        continue
                self.mismatch(step, text + _causes(self.module, [*self.hooks.edit, *self.hooks.between]))

    def compare_buffers(
        self, step: Step, module: nn.Module, recorded: dict[str, Tensor], scratch: frozenset[str] = frozenset()
    ) -> None:
        """Did the step move the buffers of the module, but for ``scratch``, as it did in training?"""
        for name, buffer in module.named_buffers():
            if name in scratch:
                continue
            wanted = recorded[name].to(buffer.device)
            if buffer.is_floating_point() and not torch.allclose(buffer, wanted, rtol=1e-3, atol=1e-5):
                self.mismatch(
                    step,
                    f"the buffer {name!r} came out differently. Likely causes: something besides the step moves it, or "
                    "a training_step that returned no loss had moved it before.",
                )

    def compare_update(self, step: Step, changes: "Changes") -> None:
        """Are the parameters and the optimizer's state after the step those that the recomputed gradient leads to?"""
        relative = changes.relative(self._rounding_after(step))
        self.update = max(self.update, relative)
        if not relative <= _UPDATE_SLACK * self.tolerance:
            self.mismatch(
                step, f"the update differs by {relative:.1e} of its length though the loss agrees. {self._why}"
            )

    def compare_segment(self, steps: list[Step], changes: "Changes", is_bitwise: bool) -> None:
        """Did steps, repeated from one snapshot, lead to the next?"""
        self.num_segments += 1
        self.segments_bitwise += is_bitwise
        relative = changes.relative(self._rounding_after(steps[-1]))
        self.update = max(self.update, relative)
        if not relative <= _UPDATE_SLACK * self.tolerance:
            self.mismatch(
                steps[-1],
                f"the steps from {steps[0].index} on, repeated from the snapshot before them, miss the one after it by "
                f"{relative:.1e} of the way though the losses agree. {self._why}",
            )

    def _rounding_after(self, step: Step) -> float:
        return torch.finfo(torch.float32).eps if step.index in self.joints else 0.0

    @property
    def _why(self) -> str:
        named = f" Here these hooks could: {', '.join(self.hooks.edit)}." if self.hooks.edit else ""
        return (
            "Likely causes: gradients edited in a hook (on_before_optimizer_step, configure_gradient_clipping, "
            "optimizer_step) or by hand in training_step (manual optimization), or weights moved after the "
            f"step.{named} Move what they do into the loss, or out of training."
        )


def _causes(module: nn.Module | None, hooks: list[str]) -> str:
    """What of the things that change a loss between a step and its repetition was seen here."""
    parts = [] if module is None else [(name or type(module).__name__, part) for name, part in module.named_modules()]
    kept = [(f"{name}.{key}", value) for name, part in parts for key, value in vars(part).items()]
    own = [name for name, value in kept if isinstance(value, _GENERATORS)]
    compiled = [name for name, part in parts if hasattr(part, "_orig_mod") or part._compiled_call_impl is not None]
    found = []
    if hooks:
        found.append(
            "weights, gradients, the batch or an attribute of the module, moved between the steps by one of these "
            f"hooks: {', '.join(hooks[:_NAMED])}"
        )
    if own:
        found.append(f"random numbers from a generator of the module's own, which is not set again: {', '.join(own)}")
    if compiled:
        found.append(
            f"dropout in a part that is compiled ({compiled[0]}), unless torch._inductor.config.fallback_random is true"
        )
    if found:
        return f"Likely causes, seen here: {'; or '.join(found)}."
    return (
        "No hook beside the steps, no generator and no compiled part was seen here, so another network or loss than "
        "the recorded one, state that is kept outside of the module, or other code that moves weights is the cause."
    )


@dataclass
class Changes:
    """Squared lengths, summed over tensors, of what one kind of entry did in a step, or in several."""

    _sums: dict[tuple[str, torch.dtype], list[float]] = field(default_factory=dict)

    def add(self, kind: str, now: Tensor, recorded: Tensor, before: Tensor | None) -> None:
        """Take in one tensor.

        Args:
            kind: Tensors of one kind (``"param"``, or a key of the optimizer's state) are judged together.
            now: As recomputed.
            recorded: As recorded after the step, in the precision that the optimizer computed in.
            before: As recorded before it; None if the step made it.
        """
        sums = self._sums.setdefault((kind, recorded.dtype), [0.0, 0.0, 0.0])
        was = torch.zeros_like(now) if before is None else before
        for i, difference in enumerate((now - recorded, recorded - was, recorded)):
            sums[i] += float(difference.double().pow(2).sum())

    def relative(self, rounding_between: float = 0.0) -> float:
        """The largest of the kinds' differences, relative to the change, what rounding explains deducted.

        Args:
            rounding_between: Relative size of roundings that came on top, after the step.
        """
        worst = 0.0
        for (_, dtype), (off, moved, size) in self._sums.items():
            # What a step adds passes through some ten roundings, the sum of old and new through one or two.
            eps = torch.finfo(dtype).eps if dtype.is_floating_point else 0.0
            rounding = eps * (4 * math.sqrt(size) + 16 * math.sqrt(moved)) + rounding_between * math.sqrt(size)
            beyond = max(0.0, math.sqrt(off) - rounding)
            worst = max(worst, beyond / math.sqrt(moved) if moved else (math.inf if beyond else 0.0))
        return worst


def compare(live: State, recorded: State, start: State, scratch: frozenset[str] = frozenset()) -> tuple[Changes, bool]:
    """What the steps since ``start`` led to, now and then, and whether it is the same to the last bit."""
    changes, is_bitwise = Changes(), True
    now, then, before = dict(_entries(live)), dict(_entries(recorded)), dict(_entries(start))
    for kind, name in now.keys() | then.keys():  # an entry that one of them lacks counts as zero
        if kind == "buffer" and name in scratch:
            continue
        one, other = now.get((kind, name)), then.get((kind, name))
        one = torch.zeros_like(then[kind, name]) if one is None else one.detach().cpu()
        other = torch.zeros_like(one) if other is None else other
        is_same = _same_bits(one, other)
        is_bitwise &= is_same
        if not (is_same and kind == "buffer"):  # buffers may hold infinities, whose difference is none
            changes.add(kind, one, other, before.get((kind, name)))
    return changes, is_bitwise


def _entries(state: State) -> Iterator[tuple[tuple[str, str], Tensor]]:
    """All tensors by their kind (that of an optimizer's entry is its key) and the name of the parameter or buffer."""
    for name, tensor in state.params.items():
        yield ("param", name), tensor
    for name, tensor in state.buffers.items():
        yield ("buffer", name), tensor
    for name, entries in state.optimizer.items():
        for key, tensor in entries.items():
            yield (key, name), tensor


def _same_bits(one: Tensor, other: Tensor) -> bool:
    def bits(tensor: Tensor) -> Tensor:
        return tensor.reshape(-1).view(torch.uint8)

    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(bits(one), bits(other))
