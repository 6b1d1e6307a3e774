# SPDX-License-Identifier: Apache-2.0
"""The trajectory on disk, read back: a manifest (JSON), the segments that it names, and how the fit ended."""

import math
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from itertools import pairwise
from pathlib import Path
from typing import Any, NotRequired, TypedDict

from lightning_sgdclean.base.errors import RunDirectoryError
from lightning_sgdclean.base.files import checksum_of, naming, read_sealed, write_sealed
from lightning_sgdclean.base.options import PLAIN_OPTIONS, THE_RUNS, Options, checked
from lightning_sgdclean.base.randomness import RandomState, from_plain_text, in_plain_text
from lightning_sgdclean.data.packing import PackedBatch
from lightning_sgdclean.trajectory.flat_state import Layout, dtypes_of, nbytes_of, unflatten
from lightning_sgdclean.trajectory.manifest import (
    Count,
    SegmentEntry,
    check_segment,
    in_full,
    read_manifest,
    stretch_to,
)
from lightning_sgdclean.trajectory.records import State, Step
from lightning_sgdclean.trajectory.segments import Segment

_NAME = "ending.json"


@dataclass(frozen=True)
class FitEnd:
    """What the Trainer knew when its fit was over.

    Attributes:
        monitor: The value that was watched.
        logged: That value after each validation, by the number of steps made by then.
        best_step: Steps made when the ModelCheckpoint saved its best model; None where none was watched or saved.
        num_val_batches: How many batches of each validation loader Lightning took, infinity where all; None where
            it never validated.
        is_complete: Whether the fit came to its end, rather than to an exception.
        unexplained: What moved the optimizer's options and may have followed the training; see
            :meth:`lightning_sgdclean.record.rates.RateNotes.unexplained`. None where that is not known.
        random: Random state before the validations that drew random numbers and may be an end point, by the number of
            steps made by then.
        averages: Of averages of the weights that it ended with; see
            :func:`~lightning_sgdclean.trajectory.averages.read_averages`. None where there are none.
    """

    monitor: str
    logged: dict[int, float] = field(default_factory=dict)
    best_step: int | None = None
    num_val_batches: list[float] | None = None
    is_complete: bool = False
    unexplained: dict[str, Any] | None = None
    random: dict[int, RandomState] = field(default_factory=dict, compare=False)
    averages: dict[str, Any] | None = None

    def logged_at(self, monitor: str, index: int) -> float | None:
        """The value of ``monitor`` that was logged after so many steps."""
        return self.logged.get(index) if monitor == self.monitor else None


class WrittenAverages(TypedDict):
    """What an ending says of averages of the weights."""

    by: str
    checksum: str
    since: Count


class _Ending(TypedDict):
    """What of it stands in the file."""

    run: str
    monitor: str
    logged: list[tuple[Count, str]]
    best_step: Count | None
    num_val_batches: list[Count | float | None] | None
    is_complete: bool
    unexplained: dict[str, Any] | None
    random: NotRequired[list[tuple[Count, dict[str, Any]]]]
    averages: NotRequired[WrittenAverages | None]


def write_ending(folder: Path, run: str, ending: FitEnd) -> str:
    """Write it beside the trajectory of ``run``; its checksum, for the manifest."""
    content = asdict(ending) | {"run": run, "logged": [[step, repr(value)] for step, value in ending.logged.items()]}
    content.pop("random")
    if ending.averages is None:  # as versions before this one know it
        content.pop("averages")
    if ending.random:
        content["random"] = [[step, in_plain_text(state)] for step, state in ending.random.items()]
    if ending.num_val_batches is not None:
        content["num_val_batches"] = [None if math.isinf(number) else number for number in ending.num_val_batches]
    write_sealed(folder / _NAME, content)
    return checksum_of(folder / _NAME)


def read_ending(folder: Path, run: str, checksum: str | None) -> FitEnd | None:
    """Undo :func:`write_ending`; None where the fit was killed before it.

    Args:
        folder: The trajectory's.
        run: Its run.
        checksum: What :func:`write_ending` returned, as the manifest has it; None where it was not called.

    Raises:
        RunDirectoryError: If the file is gone or damaged, or of another run.
    """
    if checksum is None:
        return None
    if not (folder / _NAME).exists():
        raise RunDirectoryError(
            f"{folder / _NAME} is missing, though the manifest says that the fit was over. Restore it from a copy."
        )
    written = read_sealed(folder / _NAME, _Ending)
    content: dict[str, Any] = {**written}
    if content.pop("run") != run:
        raise RunDirectoryError(f"{folder / _NAME} belongs to another run. Restore the run directory from a copy.")
    if checksum_of(folder / _NAME) != checksum:
        raise RunDirectoryError(f"{folder / _NAME} is that of another fit. Restore the run directory from a copy.")
    with naming(folder / _NAME):
        content["logged"] = {step: float(value) for step, value in content["logged"]}
        content["random"] = {step: from_plain_text(state) for step, state in content.get("random", [])}
        if content["num_val_batches"] is not None:
            content["num_val_batches"] = [math.inf if n is None else n for n in content["num_val_batches"]]
        return FitEnd(**content)


def forget_ending(folder: Path) -> None:
    """Remove it: the fit goes on."""
    (folder / _NAME).unlink(missing_ok=True)


_OPTIONS = "options.json"
_PLACES = {"dirpath", "overwrite", "class_names"}  # of the directory and the page, not of the run
_CODE = {
    "objective": "or monitor= to rank by a logged value",
    "sample_losses": "or None if the loss splits by itself",
    "weighted_loss": "or None if the loss splits by itself",
}


class _WrittenOptions(TypedDict):
    plain: dict[str, Any]
    code: list[str]


def write_options(folder: Path, options: Options) -> None:
    """Write what a fit was asked for beside its trajectory; of callables, that they were given, and their names."""
    content = {
        "plain": {name: getattr(options, name) for name in sorted(PLAIN_OPTIONS - _PLACES)},
        "code": [name for name in _CODE if getattr(options, name) is not None],
    }
    write_sealed(folder / _OPTIONS, content)


def options_for(run_dir: str | Path, given: Mapping[str, Any]) -> tuple[Options, list[str]]:
    """The options of a run, where others are not given.

    Args:
        run_dir: The run directory. One of a version that wrote no options has the callback's defaults.
        given: Arguments of a function by name; those that are ``THE_RUNS`` are taken from the run.

    Returns:
        The options, and in words which of them are other than the run's.

    Raises:
        ValueError: If an option of the run is code, or depends on what is given, and has to be given as well.
        RunDirectoryError: If the file is damaged.
    """
    path = Path(run_dir) / "trajectory" / _OPTIONS
    content = read_sealed(path, _WrittenOptions) if path.exists() else _WrittenOptions(plain={}, code=[])
    written, default = content["plain"], {one.name: one.default for one in fields(Options)}
    known = {name: value for name, value in given.items() if name in default}
    missing = [name for name, value in known.items() if value is THE_RUNS]
    asks_anew = {"monitor", "objective"} & (known.keys() - set(missing))
    for name, remedy in _CODE.items():
        if name in missing and name in content["code"] and not (name == "objective" and asks_anew):
            raise ValueError(
                f"The run had {name}=, which is code and was not written down. Give {name}= again, {remedy}."
            )
    is_same = asks_anew == {"monitor"} and not content["code"] and known["monitor"] == written.get("monitor")
    if "mode" in missing and written.get("mode", "min") != "min" and asks_anew and not is_same:
        raise ValueError(
            f"The run had mode={written['mode']!r}, and {' and '.join(sorted(asks_anew))}= asks for another objective "
            'or is code. Give mode= as well: "min" if the value should be low, "max" if it should be high.'
        )
    options = Options.among(known | {name: written.get(name, default[name]) for name in missing})
    own = {name: checked(name, value) for name, value in written.items() if name in known}
    return options, [
        f"{name}={getattr(options, name)!r} (the run: {value!r})"
        for name, value in own.items()
        if getattr(options, name) != value
    ]


class Trajectory:
    """A recorded run, read back. Steps are light and held in memory; states are read when asked for.

    Where the steps between two windows were deleted, reads the last gap-free run of steps before ``end``.

    Args:
        folder: Where it lies.
        end: Number of the step that the wanted stretch leads to; by default the one after the last.

    Attributes:
        folder: Where it lies.
        run: What tells the run from others.
        trained: The ``precision``, ``device`` and ``optimizer`` of the run.
        steps: In order; their positions in this list are those that states are asked for by.
        kept: Positions of the states on disk, ascending: state ``p`` lies before ``steps[p]``, and
            state ``len(steps)`` after the last.
        fits: Pairs of a step number and the name of the fit that recorded the steps from there on.
        ending: Checksum of how the fit ended; None where it was killed. See :class:`FitEnd`.
        begins_epoch: Whether what was kept begins with the first step of an epoch.
        joints: Steps after which a fit went on from a checkpoint.

    Raises:
        RunDirectoryError: If the folder holds no trajectory, one of another format, or one of which a bit has
            changed, or if what leads to ``end`` was let go.
    """

    def __init__(self, folder: Path, end: int | None = None) -> None:
        self.folder = folder
        manifest = read_manifest(folder)
        self.run: str = manifest["run"]
        self.trained: dict[str, str] = manifest["trained"]
        self.ending: str | None = manifest["ending"]
        self._layouts: list[Layout] = manifest["layouts"]
        self._open: tuple[str, Segment] | None = None
        self._files: list[str] = []  # of each step
        self._states: dict[int, tuple[str, int, int]] = {}  # file, index, layout of each state kept
        self.steps: list[Step] = []
        for segment in manifest["segments"]:
            check_segment(folder, segment)
        stretch = stretch_to(folder, manifest, end)
        self.begins_epoch = all(segment["begins_epoch"] for segment in stretch[:1])
        for segment in stretch:
            self._read_steps(segment)
        self.kept = sorted(self._states)
        self.fits: list[tuple[int, str]] = [(first, fit) for first, fit in manifest["fits"]]
        self.joints = {first - 1 for first, _ in self.fits[1:] if self.position(first) > 0}

    def _read_steps(self, segment: SegmentEntry) -> None:
        with naming(self.folder / segment["file"]):
            steps = self._segment(segment["file"]).steps()
            numbers = [segment["first"] - 1, *(step.index for step in steps), segment["last"] + 1]
            if any(one >= following for one, following in pairwise(numbers)):
                raise ValueError("its steps are not those that the manifest says")
        self._files += [segment["file"]] * len(steps)
        self.steps += steps
        for index, layout in in_full(segment["states"]):
            self._states[self.position(index)] = segment["file"], index, layout

    @property
    def state_bytes(self) -> int:
        """Bytes of the largest state."""
        return max(map(nbytes_of, self._layouts), default=0)

    def shapes(self, kind: str) -> dict[str, list[int]]:
        """Shapes of the states' entries of a kind, by name."""
        return {name: shape for layout in self._layouts for row, name, _, _, shape in layout if row == kind}

    def position(self, index: int) -> int:
        """Where in ``steps`` the step ``index`` stands, or would stand."""
        return bisect_left(self.steps, index, key=lambda step: step.index)

    def random(self, step: Step, micro: int) -> RandomState:
        """Random state before micro-batch ``micro`` of a step."""
        with self._naming(step) as segment:
            return segment.random(step.index, micro)

    def batch(self, step: Step, micro: int) -> PackedBatch | None:
        """Micro-batch ``micro`` of a step, if it was kept."""
        with self._naming(step) as segment:
            return segment.batch(step.index, micro)

    @contextmanager
    def _naming(self, step: Step) -> Iterator[Segment]:
        """The segment of a step; errors of its content name its file."""
        file = self._files[self.position(step.index)]
        with naming(self.folder / file):
            yield self._segment(file)

    def state(self, index: int) -> State:
        """The state before step ``index`` (after the last step, for the end point).

        Raises:
            RunDirectoryError: If it is none of those that were kept.
        """
        position = self.position(index)
        if position not in self._states:
            raise RunDirectoryError(f"{self.folder} keeps no state before step {index}.")
        file, number, layout = self._states[position]
        with naming(self.folder / file):
            held = self._segment(file).state(number, dtypes_of(self._layouts[layout]))
            return unflatten(self._layouts[layout], held)

    def _segment(self, file: str) -> Segment:
        if self._open is None or self._open[0] != file:
            self._open = file, Segment(self.folder / file)
        return self._open[1]


def states_around(trajectory: Trajectory, steps: Sequence[Step]) -> list[State]:
    """A few states that were kept, in order: the first two of a window and the last two. What moves in it shows there.

    Args:
        trajectory: The record.
        steps: The window.
    """
    indices = [step.index for step in trajectory.steps] + [trajectory.steps[-1].index + 1]
    kept = [indices[position] for position in trajectory.kept if indices[position] <= steps[-1].index + 1]
    begin = max(sum(index <= steps[0].index for index in kept) - 1, 0)
    return [trajectory.state(index) for index in dict.fromkeys([*kept[begin : begin + 2], *kept[-2:]])]


def steps_written(folder: Path) -> Iterator[Step]:
    """The steps that a manifest names, in order, for one who has just written them: no checksum is looked at."""
    for segment in read_manifest(folder)["segments"]:
        with naming(folder / segment["file"]):
            steps = Segment(folder / segment["file"]).steps()
        yield from steps


def fit_of(fits: Iterable[tuple[int, str]], index: int) -> str:
    """Name of the fit that recorded step ``index``; empty where none did."""
    return next((fit for first, fit in reversed([*fits]) if first <= index), "")
