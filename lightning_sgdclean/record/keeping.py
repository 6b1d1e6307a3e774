# SPDX-License-Identifier: Apache-2.0
"""Which batches are stored, since fetched again they would hold other data.

Two signs show random data, and neither fetches from the user's dataset: random numbers drawn while a batch was loaded
(seen at the second batch, unless workers drew them), and a sample that holds other data than when it was last drawn
(seen in the second epoch). Small batches wait in a queue and are fingerprinted a few at a time: done alone, one takes
four times as long as right after another, since training fills the processor's caches.
"""

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from torch import Tensor

from lightning_sgdclean.base.errors import BudgetError, SGDInfluenceWarning, UnsupportedTrainingError
from lightning_sgdclean.base.options import Positions, SampleId
from lightning_sgdclean.base.randomness import RandomState
from lightning_sgdclean.base.resources import in_bytes
from lightning_sgdclean.data.batches import is_dense
from lightning_sgdclean.data.fingerprints import Fingerprint
from lightning_sgdclean.data.packing import Classes, PackedBatch, pack_batch
from lightning_sgdclean.data.unpacking import check_copied, pack_surely
from lightning_sgdclean.trajectory.records import MicroBatch

_MOST, _MOST_BYTES = 32, 16 << 20  # that wait


class Taken(NamedTuple):
    """A batch that is to be read.

    Attributes:
        micro: What is known of it.
        batch: Itself, or a copy.
        drew: Whether its loading drew random numbers; see :class:`~lightning_sgdclean.record.keeping.RandomnessWatch`.
    """

    micro: MicroBatch
    batch: Any
    drew: bool | None = None


class FingerprintQueue:
    """Hands batches on to be read, at once or together with those that follow.

    Only a small batch of plain tensors waits, as a copy: a training step may write to it, and a loader fill its memory
    again.

    Args:
        read: Takes in batches, in their order.
    """

    def __init__(self, read: Callable[[list[Taken]], None]) -> None:
        self._read = read
        self._waiting: list[Taken] = []

    def take(self, taken: Taken, may_wait: bool) -> None:
        """A batch, about to be trained on.

        Raises:
            Exception: What ``read`` raises, of this batch or one that waited.
        """
        copied = _small_copy(taken.batch) if may_wait else None
        self._waiting.append(taken if copied is None else Taken(taken.micro, copied, taken.drew))
        if copied is None or len(self._waiting) >= _MOST:
            self.read_all()

    def read_all(self) -> None:
        """Read all that wait.

        Raises:
            Exception: What ``read`` raises.
        """
        waiting, self._waiting = self._waiting, []
        if waiting:
            self._read(waiting)


def _small_copy(batch: Any) -> Any:
    """A copy of a batch that is made of plain tensors and nothing else, or None if it is not, or large."""
    kind = type(batch)
    parts = list(batch.values()) if kind is dict else batch if kind in (list, tuple) else [batch]
    if not parts or not all(type(part) is Tensor and is_dense(part) for part in parts):
        return None
    if any(part.requires_grad or vars(part) for part in parts):
        return None
    if sum(part.nbytes for part in parts) > _MOST_BYTES // _MOST:
        return None
    copies = [part.clone() for part in parts]
    if kind is dict:
        return dict(zip(batch, copies, strict=True))
    return kind(copies) if kind in (list, tuple) else copies[0]


KeepBatches = bool | Literal["auto"]


# Keep batches until 256 repeated samples were compared. A change of 2% of the samples is then missed in 0.5% of
# runs, which the retrace refuses.
_ENOUGH = 256
_FIRST = 8  # batches, at most, kept until it was once seen what their loading draws


@dataclass(frozen=True)
class KeepPlan:
    """What is known of the run that batches would be kept for.

    Attributes:
        num_batches: As many as lie on disk at once, at most; infinite where that is not known.
        first_epoch: First epoch of the window if training is not ended early; infinite where that is not known.
        free: Bytes that may be taken.
    """

    num_batches: float
    first_epoch: float
    free: float


class RandomnessWatch:
    """Finds out from batches passing by whether the training data are random.

    Attributes:
        evidence: Why they are, in words; empty while nothing speaks for it.
    """

    def __init__(self) -> None:
        self.evidence = ""
        self._seen: dict[SampleId, int] = {}  # fingerprints in short, by sample
        self._num_again = self._num_equal = self._num_batches = self._num_looks = 0
        self._states: RandomState | None = None

    @property
    def is_undecided(self) -> bool:
        """Whether the last batch came too early to know."""
        no_look_yet = self._num_batches == 1 or (self._num_looks == 0 and self._num_batches <= _FIRST)
        return no_look_yet or 0 < self._num_again <= _ENOUGH

    def look(self, ids: list[SampleId], print_: Fingerprint, epoch: int, drew: bool | None) -> None:
        """Take in a batch that training went on with, and what :meth:`batch_begins` said at its start."""
        self._num_batches += 1
        if drew is not None and not self.evidence and self._num_equal < _ENOUGH:
            self._num_looks += 1
            if drew:
                self.evidence = "random numbers were drawn while a batch was loaded"
        self._compare(ids, print_, epoch)

    def batch_ends(self, random_state: Callable[[], RandomState]) -> None:
        """The batch was trained on: whatever is drawn until the next one starts, its loading draws."""
        self._states = random_state() if not self.evidence and self._num_equal < _ENOUGH else None

    def batch_begins(self, random: RandomState) -> bool | None:
        """Whether its loading drew random numbers, as far as that can be told from the random state by now."""
        then, self._states = self._states, None
        return None if then is None else not _are_equal(then, random)

    def is_interrupted(self) -> None:
        """More than loading happens before the next batch: validation, or another epoch."""
        self._states = None

    def _compare(self, ids: list[SampleId], print_: Fingerprint, epoch: int) -> None:
        """Hold each sample against its last visit, if that was in a like setting: padded as long, and so on."""
        prints = print_.short[: len(ids)]
        last = list(map(self._seen.get, ids))
        self._seen.update(zip(ids, prints, strict=True))
        self._num_again += len(ids) - last.count(None)
        differ = [] if last == prints else [each for each in zip(ids, last, prints, strict=True) if each[1] != each[2]]
        self._num_equal += len(ids) - len(differ)
        changed = [name for name, before, now in differ if before is not None and before >> 32 == now >> 32]
        if changed:
            self.evidence = (
                f"sample {changed[0]!r} holds other data in epoch {epoch} than when it was last drawn (random "
                "augmentation, or a collate function that reorders samples)"
            )
        if self._num_equal >= _ENOUGH and self.evidence.startswith("random numbers"):
            self.evidence = ""  # they were drawn for something else: by the sampler, say


def _are_equal(then: RandomState, now: RandomState) -> bool:
    """Two readings of the same :class:`~lightning_sgdclean.base.randomness.RandomStates`; a GPU's is not looked at."""
    same = all(now[name] is then[name] for name in then if name not in ("torch", "cuda"))
    return same and now["torch"].equal(then["torch"])


class BatchKeeper:
    """Keeps, packed, the batches that have to be kept; says how much that takes before the first is written.

    Args:
        mode: ``True``: all of them; ``False``: none; ``"auto"``: those of random data.
        plan: Asked when there is something to announce.
        say: Prints a line.

    Attributes:
        classes: What kept batches are made of, by name.
        watch: Whether the data are random.
    """

    def __init__(self, mode: KeepBatches, plan: Callable[[], KeepPlan], say: Callable[[str], None]) -> None:
        self._mode, self._plan, self._say = mode, plan, say
        self._may_keep, self._is_announced = mode is not False, False
        self._is_first = True
        self._is_tried = False  # whether a batch was packed and put together again
        self._epochs_without: set[int] = set()  # of which a batch was not kept
        self.watch = RandomnessWatch()
        self.classes: Classes = {}
        self._why, self._num_kept, self._nbytes = "", 0, 0

    def summary(self) -> dict[str, Any]:
        """How many batches were kept because they had to be, why, and the bytes of their tensors."""
        return {"kept": self._num_kept, "why": self._why, "bytes": self._nbytes}

    def packed(
        self, batch: Any, positions: Positions | None, print_: Fingerprint, epoch: int, drew: bool | None
    ) -> PackedBatch | None:
        """The batch as it is to be kept, or None if it is to be fetched again.

        Args:
            batch: As ``training_step`` gets it.
            positions: In the dataset; None where it cannot be fetched again.
            print_: The batch's fingerprint.
            epoch: The batch's epoch.
            drew: See :meth:`RandomnessWatch.batch_begins`.

        Raises:
            UnsupportedTrainingError: It must be kept, but holds what cannot be without pickle; or, of the first batch,
                copies of it hold other data.
            BudgetError: The batches that must be kept do not fit the disk.
        """
        if self._is_first:
            check_copied(batch, len(print_.rows))
            self._is_first = False
        if positions is None or self._mode is True:
            why = "they cannot be fetched again" if positions is None else "keep_batches=True"
            packed: PackedBatch | None = self._pack(batch, len(print_.rows))
            self._announce(why, packed, epoch, must=True)
        else:
            names = positions if isinstance(positions, list) else [positions]
            # Of a batch with more or fewer rows than were drawn, it is not known which sample to compare.
            self.watch.look(names if len(names) == len(print_.rows) else [], print_, epoch, drew)
            why = self.watch.evidence
            packed = self._pack_if_wanted(batch, len(print_.rows), why)
            self._announce(why, packed, epoch, must=False)
            packed = packed if self._may_keep else None
        if packed is None:
            self._epochs_without.add(epoch)
        elif why:
            self._why, self._num_kept, self._nbytes = why, self._num_kept + 1, self._nbytes + packed.nbytes
        return packed

    def _pack(self, batch: Any, num_samples: int) -> PackedBatch:
        """A batch packed; the first one, and any with classes not met before, put together again to see that it can."""
        num_known = len(self.classes)
        packed = pack_batch(batch, self.classes)
        if not self._is_tried or len(self.classes) > num_known:
            pack_surely(batch, num_samples, self.classes)
            self._is_tried = True
        return packed

    def _pack_if_wanted(self, batch: Any, num_samples: int, why: str) -> PackedBatch | None:
        if not (self._may_keep and (why or self.watch.is_undecided)):
            return None
        try:
            return self._pack(batch, num_samples)
        except UnsupportedTrainingError as error:
            if why:
                _warn(f"Training batches would have to be kept, since {why}, but cannot be: {error} {_REFUSED_LATER}")
                self._may_keep, self._is_announced = False, True
            return None

    def _announce(self, why: str, packed: PackedBatch | None, epoch: int, must: bool) -> None:
        if not why or self._is_announced:
            return
        self._is_announced = True
        if packed is None:
            _warn(f"Training batches would have to be kept, since {why}, but keep_batches=False. {_REFUSED_LATER}")
            return
        plan = self._plan()
        text, fits = announcement(why, packed.nbytes, plan)
        if must:
            if not fits:
                raise BudgetError(f"{text} Make room, choose a shorter window (epochs=) or another dirpath=.")
            self._say(text)
            return
        self._may_keep = fits
        lost = [e for e in sorted(self._epochs_without) if e >= plan.first_epoch]
        if not fits:
            text = f"{text} So they are not kept. {_REFUSED_LATER}"
        elif lost:
            text = (
                f"{text} But batches of {'epoch' if len(lost) == 1 else 'epochs'} {', '.join(map(str, lost))}, which "
                f"the window reaches, are gone already. {_REFUSED_LATER}"
            )
        _warn(text)


def _warn(text: str) -> None:
    warnings.warn(text, SGDInfluenceWarning, stacklevel=4)


_REFUSED_LATER = (
    "They will be fetched again after training, and refused if they differ by then. To rank this training, start it "
    "again with keep_batches=True, or without the randomness."
)


def announcement(why: str, nbytes: int, plan: KeepPlan) -> tuple[str, bool]:
    """Say what keeping the batches takes, and whether it fits.

    Args:
        why: They are kept.
        nbytes: Bytes of one batch.
        plan: How many there will be.
    """
    needed = nbytes if math.isinf(plan.num_batches) else nbytes * plan.num_batches
    fits = needed <= plan.free
    if math.isinf(plan.num_batches):
        size = f"{in_bytes(nbytes)} a batch, for as long as training lasts"
    else:
        size = f"{in_bytes(nbytes)} a batch times {plan.num_batches:.0f} batches of the window, {in_bytes(needed)}"
    verb = "are kept as they were trained on" if fits else "would have to be kept"
    return f"Training batches {verb}, since {why}: {size}, of {in_bytes(plan.free)} that may be taken.", fits
