# SPDX-License-Identifier: Apache-2.0
"""A fit that goes on from a checkpoint joins the trajectory of the fit that wrote it.

What was recorded after the checkpoint is cut off. A run that was killed is continued where it lies; one
that came to its end is left alone, and its segments are linked into a new run's directory.
"""

import os
import shutil
import warnings
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from lightning_sgdclean.base.errors import RunDirectoryError, SGDInfluenceWarning
from lightning_sgdclean.base.files import (
    appearing_whole,
    checksum_of,
    fresh_directory,
    naming,
    remove_results,
)
from lightning_sgdclean.trajectory.flat_state import Layout, dtypes_of
from lightning_sgdclean.trajectory.manifest import (
    SegmentEntry,
    in_full,
    in_short,
    number_of,
    read_manifest,
    segment_name,
    segments_in,
    write_manifest,
)
from lightning_sgdclean.trajectory.segments import Segment, write_segment
from lightning_sgdclean.trajectory.store import Trajectory, fit_of, forget_ending, read_ending


@dataclass(frozen=True)
class CheckpointMark:
    """What a checkpoint says of the trajectory that led to it; plain values, as checkpoints want them.

    Attributes:
        run: The run's name in its manifest.
        step: Number that the next step would have had.
        folder: The run directory.
        is_between_steps: Whether no batch waited for its step.
        fit: Name of the fit that recorded the step before; empty where there is none.
        best: See :class:`lightning_sgdclean.record.recorder.BestModel`.
        evidence: See :class:`lightning_sgdclean.record.keeping.RandomnessWatch`.
    """

    run: str
    step: int
    folder: str
    is_between_steps: bool
    fit: str
    best: list[int] | None = None
    evidence: str = ""


def join(said: dict[str, Any], wanted: str | Path | None, log_dir: str, overwrite: bool) -> Path | None:
    """The run directory in which the fit goes on, its trajectory ending at the checkpoint.

    Args:
        said: What the checkpoint says, a :class:`CheckpointMark` as a dict.
        wanted: The user's directory, if any.
        log_dir: Where directories go otherwise.
        overwrite: Whether a finished run in the wanted one may be lost.

    Returns:
        The directory, or None after a warning where there is nothing to join.
    """
    try:
        return _join(mark_of(said), None if wanted is None else Path(wanted), log_dir, overwrite)
    except (RunDirectoryError, OSError) as error:
        warnings.warn(
            f"What was recorded before this checkpoint cannot be joined, so only steps from here on are: {error}",
            SGDInfluenceWarning,
            stacklevel=3,
        )
        return None


def mark_of(said: dict[str, Any]) -> CheckpointMark:
    """Read what a checkpoint says.

    Raises:
        RunDirectoryError: If another version of this package wrote it, which says more or less.
    """
    wanted = {each.name for each in fields(CheckpointMark)}
    if said.keys() != wanted:
        other = ", ".join(map(repr, sorted(said.keys() ^ wanted)))
        raise RunDirectoryError(f"the checkpoint was written by another version of this package: {other}.")
    return CheckpointMark(**said)


def without_mark(step: int) -> str:
    """What is to be said of a fit that begins with this step though nothing leads it to recorded ones before."""
    return (
        f"This fit goes on from step {step}, but what it goes on from names no recorded steps that led there (a "
        "checkpoint saved without SGDInfluence or after its recording had stopped, or an earlier fit of this Trainer), "
        "so only steps from here on are recorded. The window (epochs=) may reach further back."
    )


def _join(mark: CheckpointMark, wanted: Path | None, log_dir: str, overwrite: bool) -> Path:
    source = next((f for f in (Path(mark.folder), wanted) if f is not None and _run_in(f) == mark.run), None)
    if source is None:
        raise RunDirectoryError(f"{mark.folder} does not hold the run any more.")
    if not mark.is_between_steps:
        raise RunDirectoryError("the checkpoint was written while batches waited for their step.")
    found = Trajectory(source / "trajectory")  # once: all of it is checksummed
    if _is_finished(source, found) and not (wanted == source and (overwrite or _loses_nothing(source, found, mark))):
        target = fresh_directory(wanted, log_dir, overwrite)
        try:
            shutil.copytree(source / "trajectory", target / "trajectory", copy_function=_link, dirs_exist_ok=True)
            cut_off(target / "trajectory", mark)
        except BaseException:  # also Ctrl-C: half a copy must not pass for a run
            shutil.rmtree(target / "trajectory")
            raise
        return target
    cut_off(source / "trajectory", mark)
    remove_results(source)
    return source


def _run_in(folder: Path) -> str | None:
    try:
        return read_manifest(folder / "trajectory")["run"]
    except RunDirectoryError:
        return None


def _is_finished(source: Path, trajectory: Trajectory) -> bool:
    """Whether the run was ranked, or trained to its end at least: then it can still be ranked."""
    ending = read_ending(trajectory.folder, trajectory.run, trajectory.ending)
    return (source / "summary.json").exists() or (ending is not None and ending.is_complete)


def _loses_nothing(source: Path, trajectory: Trajectory, mark: CheckpointMark) -> bool:
    """Whether the run was killed between its last step and its ranking, and the checkpoint is of that step."""
    ends_there = all(step.index + 1 == mark.step for step in trajectory.steps[-1:])
    return ends_there and not (source / "summary.json").exists()


def _link(source: str, target: str) -> None:
    """Have a file in two places, without taking the disk twice where that works."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def cut_off(folder: Path, mark: CheckpointMark) -> None:
    """Remove from a trajectory what was recorded after a checkpoint, and what a kill left behind.

    Raises:
        RunDirectoryError: If it does not reach the checkpoint, does not lead to it, or is not what was recorded.
    """
    trajectory = Trajectory(folder)
    reached = trajectory.steps[-1].index + 1 if trajectory.steps else 0
    if reached < mark.step:
        raise RunDirectoryError(f"{folder} ends before step {reached}, the checkpoint was written before {mark.step}.")
    if fit_of(trajectory.fits, mark.step - 1) != mark.fit:
        raise RunDirectoryError(
            f"the steps before {mark.step} in {folder} are not those that led to the checkpoint: another fit has gone "
            "on from an earlier checkpoint since."
        )
    manifest = read_manifest(folder)
    numbers = [number_of(path.name) for path in segments_in(folder)]
    kept = []
    for segment in manifest["segments"]:
        if segment["last"] < mark.step and all(index < mark.step for index, _ in in_full(segment["states"])):
            kept.append(segment)
        elif segment["first"] < mark.step:
            kept.append(_shortened(folder, segment, manifest["layouts"], mark.step, max(numbers) + 1))
    manifest["segments"] = kept
    manifest["fits"] = [(first, fit) for first, fit in manifest["fits"] if first < mark.step]
    manifest["gaps"] = [index for index in manifest["gaps"] if index < mark.step]
    if kept and kept[-1]["last"] + 1 < mark.step:  # the checkpoint is of a step that was let go
        manifest["gaps"].append(mark.step)
    manifest["ending"] = None
    write_manifest(folder, manifest)
    forget_ending(folder)
    names = {segment["file"] for segment in kept}
    for path in (*segments_in(folder), *folder.glob("retracing-*"), *folder.glob(".*.tmp")):
        if path.name not in names:
            path.unlink()


def _shortened(folder: Path, segment: SegmentEntry, layouts: list[Layout], step: int, number: int) -> SegmentEntry:
    """A new file with the part of a segment that lies before a step; the old one stays until no manifest names it."""
    with naming(folder / segment["file"]):
        whole = Segment(folder / segment["file"])
        steps = list(whole.whole_steps(step))
        before = [(index, layout) for index, layout in in_full(segment["states"]) if index < step]
        states = {index: whole.state(index, dtypes_of(layouts[layout])) for index, layout in before}
    name = segment_name(number)
    with appearing_whole(folder / name) as temporary:
        write_segment(temporary, steps, states)
        return segment | {
            "file": name,
            "last": steps[-1].index,
            "epoch": steps[-1].epoch,
            "states": in_short(before),
            "bytes": temporary.stat().st_size,
            "checksum": checksum_of(temporary),
        }
