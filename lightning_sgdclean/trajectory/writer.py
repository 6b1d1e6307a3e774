# SPDX-License-Identifier: Apache-2.0
"""Writes a trajectory while the fit goes on, on a thread of its own."""

import math
import uuid
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import partial
from pathlib import Path

from torch import Tensor

from lightning_sgdclean.base.errors import BudgetError, RunDirectoryError, warn_of
from lightning_sgdclean.base.files import appearing_whole, checksum_of, put_on_disk
from lightning_sgdclean.base.resources import in_bytes
from lightning_sgdclean.trajectory.flat_state import Flat, Flattener, Layout, StateRows, unflatten
from lightning_sgdclean.trajectory.manifest import (
    FORMAT,
    NAME,
    Manifest,
    SegmentEntry,
    in_full,
    in_short,
    number_of,
    read_manifest,
    segment_name,
    write_manifest,
)
from lightning_sgdclean.trajectory.records import State, Step
from lightning_sgdclean.trajectory.schedule import is_snapshot
from lightning_sgdclean.trajectory.segments import write_segment

_MOST_WAITING = 2
_TELLS_AFTER, _GIVES_UP_AFTER = 60.0, 900.0  # seconds


class Background:
    """Runs jobs one after another. After one that failed none is run any more.

    Each method raises the error of a job that failed before, once, and RunDirectoryError if one never ends.
    """

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="sgd-influence")
        self._waiting: deque[Future[None]] = deque()
        self._has_failed = False

    def submit(self, job: Callable[[], None]) -> None:
        """Hand over a job; waits while too many are waiting, so that memory stays bounded."""
        self.check()
        while len(self._waiting) >= _MOST_WAITING:
            self._end(self._waiting.popleft())
        self._waiting.append(self._pool.submit(self._run, job))

    def check(self) -> None:
        """Raise what has gone wrong by now."""
        while self._waiting and self._waiting[0].done():
            self._waiting.popleft().result()

    def wait(self) -> None:
        """Until all jobs are done."""
        while self._waiting:
            self._end(self._waiting.popleft())

    def _end(self, job: "Future[None]") -> None:
        """Wait for a job, but not for ever: a disk that hangs must not take the training with it."""
        for seconds, is_last in ((_TELLS_AFTER, False), (_GIVES_UP_AFTER - _TELLS_AFTER, True)):
            if wait([job], timeout=seconds).done:
                return job.result()
            if not is_last:
                warn_of([f"Training waits for the trajectory to be written, for {seconds:.0f} seconds by now."])
        self._has_failed = True  # what comes after it is never written
        self._waiting.clear()
        raise RunDirectoryError(
            f"The trajectory was not written within {_GIVES_UP_AFTER:.0f} seconds: expected a segment of some MB to "
            "take seconds. The disk or network drive hangs, it seems. Choose another dirpath=."
        )

    def _run(self, job: Callable[[], None]) -> None:
        if self._has_failed:
            return
        try:
            job()
        except BaseException:  # whatever it was, nothing may be written after it
            self._has_failed = True
            raise


_SEGMENT_BYTES = 32 << 20
_SEGMENT_STEPS = 256


class TrajectoryWriter:
    """Appends steps; keeps a few in memory and writes them a segment at a time.

    Of the states between the steps only snapshots are written, each with the step that it lies before,
    and at the end the last one. Older segments can go while those that a window reaches stay. The files are
    written on a thread of their own; an error of its is raised by the method that is called next.

    Attributes:
        keeps_epochs: Whether the state before each epoch is a snapshot, too. Where the window is to begin with an
            epoch, nothing of the epochs before it is then needed.

        run: What tells the run from others; a fit that goes on from a checkpoint keeps it.
        fit: What tells this fit from others, also from those that went on from the same checkpoint.
        fits: See :class:`~lightning_sgdclean.trajectory.store.Trajectory`.

    Args:
        folder: Where the files go; made if need be. A trajectory in it is continued.
        interval: Steps from one snapshot to the next; see :func:`~lightning_sgdclean.trajectory.schedule.is_snapshot`.
        max_bytes: As many may lie there at once.
        trained: What a retrace in another process has to know: ``precision``, ``device`` and ``optimizer``.
        complete: Called before steps are written, for what is still missing of them.
    """

    def __init__(
        self,
        folder: Path,
        interval: int | None = 1,
        max_bytes: float = math.inf,
        trained: dict[str, str] | None = None,
        complete: Callable[[], None] = lambda: None,
    ) -> None:
        self._folder, self._trained, self._complete = folder, trained or {}, complete
        folder.mkdir(parents=True, exist_ok=True)
        self.interval, self.max_bytes = interval, max_bytes
        self.keeps_epochs = False
        self.run = uuid.uuid4().hex  # not from a random state of the user's
        self.bytes_written = 0
        self._layouts: list[Layout] = []
        self._segments: list[SegmentEntry] = []
        self.fit = uuid.uuid4().hex
        self.fits: list[tuple[int, str]] = [(0, self.fit)]
        self._gaps: list[int] = []  # steps before which others were let go
        self._num_segments = 0
        self._num_steps = 0
        self._current: tuple[int, Flat] | None = None  # the state after the last step, where it is wanted
        self._is_start = False  # whether that state is what a fit began with
        self._has_ended_epoch = False
        self._begins_epoch = True  # the first of the steps in memory
        self._last_epoch = 0  # of the last step
        self._ending: str | None = None
        self._background = Background()
        self._flattener = Flattener()
        self._rows = StateRows()
        self._forget()
        if (folder / NAME).exists():
            self._continue()

    def _continue(self) -> None:
        manifest = read_manifest(self._folder)
        self.run, self._layouts, self._segments = manifest["run"], manifest["layouts"], manifest["segments"]
        self.fits = [*((first, fit) for first, fit in manifest["fits"]), (self.next_index, self.fit)]
        self._gaps = manifest["gaps"]
        self.bytes_written = sum(segment["bytes"] for segment in self._segments)
        self._num_segments = 1 + max((number_of(s["file"]) for s in self._segments), default=-1)

    def _forget(self) -> None:
        """Hold nothing in memory."""
        self._steps: list[Step] = []
        self._states: dict[int, tuple[int, Flat]] = {}  # layout and tensors, by the step that they lie before
        self._held = 0

    def begin(self, state: State, begins_epoch: bool = True) -> None:
        """Take the state before the first step of a fit, which is kept in any case.

        Args:
            state: The state.
            begins_epoch: Whether an epoch starts with it; false where a fit goes on within one.
        """
        if self._current is None:
            self._begins_epoch = begins_epoch
        self._current, self._is_start = self._flat(state), True
        self._background.submit(partial(self._write_manifest, list(self._segments), self._gaps))

    def append(self, step: Step, state_after: Callable[[], State], is_last: bool = False) -> None:
        """Add one step and the state after it, which is asked for where it is a snapshot or may be the last one."""
        if not self._num_steps and self._current is None:
            raise RunDirectoryError("A step came before the first state; begin() must be called first.")
        self._background.check()
        if self._steps and (self._is_full() or self._steps[-1].ends_epoch):
            self._hand_over()
        before, self._current = self._current, None  # cleared first, so that an interrupt cannot leave a stale state
        if self._num_steps and not self._steps:
            self._begins_epoch = step.epoch != self._last_epoch
        if (
            self._is_start
            or (self.keeps_epochs and self._has_ended_epoch)
            or is_snapshot(self._num_steps, self.interval)
        ):
            assert before is not None
            self._keep(step.index, before)
        elif before is not None:
            self._rows.give_back(before[1])
        self._is_start, self._has_ended_epoch, self._last_epoch = False, step.ends_epoch, step.epoch
        self._steps.append(step)
        self._num_steps += 1
        wanted = is_snapshot(self._num_steps, self.interval) or step.ends_epoch or is_last
        if wanted:
            self._current = self._flat(state_after())

    def amend(self, tensors: dict[str, Tensor]) -> None:
        """Put other values of buffers into the last state, if it is held."""
        if self._current is not None and tensors:
            held = unflatten(self._layouts[self._current[0]], self._current[1]).buffers
            for name, tensor in tensors.items():
                held[name].copy_(tensor.detach())

    def hold(self, nbytes: int) -> None:
        """So many bytes of batches came to be held in memory."""
        self._held += nbytes

    def close(self) -> None:
        """Write what is held in memory, and the state after the last step if it is known."""
        if self._current is not None and self._num_steps:
            self._keep(self.next_index, self._current)
            self._current = None
        self.flush()
        self._rows.clear()  # a retrace needs the memory

    def seal(self, ending: str) -> None:
        """Note that the fit is over, with the checksum of how it ended."""
        self._ending = ending
        self._background.submit(partial(self._write_manifest, list(self._segments), self._gaps))
        self.flush()

    def flush(self) -> None:
        """Write what is held in memory as one segment; it is on disk afterwards, and would outlast a power failure."""
        self._hand_over()
        self._background.wait()
        put_on_disk(self._folder)

    def _hand_over(self) -> None:
        """Have what is held in memory written as one segment, by and by."""
        if not self._steps and not self._states:
            return
        self._complete()
        following = self.next_index
        segment: SegmentEntry = {
            "file": segment_name(self._num_segments),
            "first": self._steps[0].index if self._steps else following,
            "last": following - 1,
            "epoch": self._steps[-1].epoch if self._steps else self._segments[-1]["epoch"],
            "begins_epoch": self._begins_epoch,
            "states": in_short([(index, layout) for index, (layout, _) in self._states.items()]),
            "bytes": 0,  # these two are known once it is written
            "checksum": "",
        }
        self._num_segments += 1
        self._segments.append(segment)
        states = {index: flat for index, (_, flat) in self._states.items()}
        self._background.submit(partial(self._write, list(self._segments), self._gaps, self._steps, states))
        self._forget()

    def _write(self, segments: list[SegmentEntry], gaps: list[int], steps: list[Step], states: dict[int, Flat]) -> None:
        """Write the last of these segments, and the manifest."""
        *others, segment = segments
        with appearing_whole(self._folder / segment["file"]) as temporary:
            write_segment(temporary, steps, states)
            size = temporary.stat().st_size
            self._check_fits(size + sum(other["bytes"] for other in others))
            segment["bytes"], segment["checksum"] = size, checksum_of(temporary)
        self.bytes_written += size
        self._write_manifest(segments, gaps)
        for flat in states.values():
            self._rows.give_back(flat)

    def keep_only(self, *windows: tuple[int, float]) -> None:
        """Forget what none of these windows will reach any more.

        Args:
            windows: First epoch of each, and the number of the step that it ends before; infinity for one that goes on.
                The state at its end stays, and so does all from the last snapshot at or before its beginning.
        """
        reaches = [(self._snapshot_before(epoch), end) for epoch, end in windows]

        def is_reached(segment: SegmentEntry) -> bool:
            return any(start <= segment["last"] and segment["first"] <= end for start, end in reaches)

        kept = [segment for segment in self._segments if is_reached(segment)]
        gone = [segment for segment in self._segments if not is_reached(segment)]
        if gone:
            firsts = [*(segment["first"] for segment in self._segments), *(step.index for step in self._steps[:1])]
            follows = zip(self._segments, firsts[1:], strict=False)
            gaps = {*self._gaps, *(first for before, first in follows if not is_reached(before))}
            self._segments = kept
            self._gaps = sorted(gap for gap in gaps if kept and gap > kept[0]["first"])
            self._background.submit(partial(self._drop, list(kept), self._gaps, gone))

    def _snapshot_before(self, epoch: int) -> int:
        """Number of the last state that is kept at or before the beginning of an epoch."""
        firsts = [segment["first"] for segment in self._segments if segment["epoch"] >= epoch]
        firsts += [step.index for step in self._steps if step.epoch >= epoch]
        states = [index for segment in self._segments for index, _ in in_full(segment["states"])]
        return max((index for index in [*states, *self._states] if firsts and index <= firsts[0]), default=0)

    def _drop(self, segments: list[SegmentEntry], gaps: list[int], gone: list[SegmentEntry]) -> None:
        self._write_manifest(segments, gaps)
        for segment in gone:
            (self._folder / segment["file"]).unlink(missing_ok=True)

    def _check_fits(self, total: int) -> None:
        if total > self.max_bytes:
            raise BudgetError(
                f"The trajectory would now take {in_bytes(total)}, of {in_bytes(self.max_bytes)} that it may take "
                "(max_bytes=)."
            )

    def _is_full(self) -> bool:
        return self._held >= _SEGMENT_BYTES or len(self._steps) >= _SEGMENT_STEPS

    @property
    def next_index(self) -> int:
        """One more than the number of the last step."""
        if self._steps:
            return self._steps[-1].index + 1
        return int(self._segments[-1]["last"]) + 1 if self._segments else 0

    def _flat(self, state: State) -> tuple[int, Flat]:
        layout, flat = self._flattener.flatten(state, self._rows.take)
        if not self._layouts or (self._layouts[-1] is not layout and self._layouts[-1] != layout):
            self._layouts.append(layout)
        return len(self._layouts) - 1, flat

    def _keep(self, index: int, state: tuple[int, Flat]) -> None:
        self._states[index] = state
        self._held += sum(tensor.nbytes for tensor in state[1].values())

    def _write_manifest(self, segments: list[SegmentEntry], gaps: list[int]) -> None:
        manifest: Manifest = {
            "format": FORMAT,
            "run": self.run,
            "trained": self._trained,
            "fits": self.fits,
            "gaps": gaps,
            "ending": self._ending,
            "layouts": list(self._layouts),
            "segments": segments,
        }
        write_manifest(self._folder, manifest)
