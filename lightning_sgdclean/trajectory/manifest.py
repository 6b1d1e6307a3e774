# SPDX-License-Identifier: Apache-2.0
"""The manifest of a trajectory: which files are its segments, and what lies in them.

It may come from a stranger, and its checksum can be made by anyone. So it is read as data that may say anything: each
value has its type, each number its bounds, and a segment its own kind of name, which leads out of no folder.
"""

import math
from pathlib import Path
from typing import Annotated, Any, TypedDict

from msgspec import Meta

from lightning_sgdclean.base.errors import DamagedFileError, RunDirectoryError
from lightning_sgdclean.base.files import check_plain, checked_as, checksum_of, read_json, read_sealed, write_sealed

FORMAT = 5
NAME = "manifest.json"

_MOST_STEPS = 1 << 20  # of a segment; a writer's have a few hundred at most

Count = Annotated[int, Meta(ge=0, lt=1 << 53)]
Positive = Annotated[int, Meta(gt=0, lt=1 << 53)]
Number = Annotated[int, Meta(ge=-1, lt=1 << 53)]  # of a step, -1 before the first
Kept = tuple[int, int]  # number of the step that a state lies before, and that of its layout
_Row = tuple[str, str, str, str, list[Count]]  # of a layout: kind, name, key, dtype, shape


class SegmentEntry(TypedDict):
    """What the manifest says of a segment.

    ``states`` are rows of: number of the step that the first one lies before, how many, distance, layout.
    """

    file: Annotated[str, Meta(pattern=r"\Asegment-[0-9]{6}\.safetensors\Z")]
    first: Count
    last: Number
    epoch: Count
    begins_epoch: bool
    states: list[tuple[Count, Positive, Positive, Count]]
    bytes: Count
    checksum: str


class Manifest(TypedDict):
    """See :class:`~lightning_sgdclean.trajectory.store.Trajectory`, whose attributes most of it becomes."""

    format: int
    run: str
    trained: dict[str, str]
    fits: Annotated[list[tuple[Count, str]], Meta(min_length=1)]
    gaps: list[Count]
    ending: str | None
    layouts: list[list[list[Any]]]
    segments: list[SegmentEntry]


def segment_name(number: int) -> str:
    """The file of a segment."""
    return f"segment-{number:06d}.safetensors"


def number_of(file: str) -> int:
    """Undo :func:`segment_name`."""
    return int(file[8:14])


def segments_in(folder: Path) -> list[Path]:
    """The files that have the name of a segment, whoever made them."""
    return sorted(folder.glob(f"segment-{'[0-9]' * 6}.safetensors"))


def in_short(states: list[Kept]) -> list[tuple[int, int, int, int]]:
    """States at equal distances and of one layout as rows of: first number, how many, distance, layout."""
    rows: list[tuple[int, int, int, int]] = []
    for index, layout in states:
        if rows and rows[-1][3] == layout:
            first, num, distance, _ = rows[-1]
            if num == 1 or index == first + num * distance:
                rows[-1] = first, num + 1, (index - first if num == 1 else distance), layout
                continue
        rows.append((index, 1, 1, layout))
    return rows


def in_full(rows: list[tuple[int, int, int, int]]) -> list[Kept]:
    """Undo :func:`in_short`."""
    return [(first + n * distance, layout) for first, num, distance, layout in rows for n in range(num)]


def read_manifest(folder: Path) -> Manifest:
    """The manifest of the trajectory in a folder.

    Raises:
        RunDirectoryError: If there is none, or one of another format.
        DamagedFileError: If it is damaged, or says what no writer says.
    """
    path = folder / NAME
    try:
        found = read_json(path)
    except DamagedFileError as error:
        raise DamagedFileError(f"{folder} holds no readable trajectory: {error}") from error
    written_as = found.get("format") if isinstance(found, dict) else None
    if written_as != FORMAT:
        remedy = "Retrace it with the version that recorded it."
        if isinstance(written_as, int) and written_as > FORMAT:
            remedy = "It was recorded by a newer version; install that one."
        raise RunDirectoryError(
            f"{folder} is a trajectory of format {written_as!r}; this version reads format {FORMAT}. {remedy}"
        )
    manifest = read_sealed(path, Manifest)
    checked_as(list[list[_Row]], manifest["layouts"], path)
    before: Any = None
    for segment in manifest["segments"]:
        if not _is_in_bounds(segment, len(manifest["layouts"])) or (before and before["last"] >= segment["first"]):
            raise DamagedFileError(f"{path}: what it says of {segment['file']} cannot be.")
        before = segment
    return manifest


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write it, sealed."""
    write_sealed(folder / NAME, manifest)


def _is_in_bounds(segment: SegmentEntry, num_layouts: int) -> bool:
    """Whether a segment says of its steps and states what can be: counts are small before anything is made of them."""
    first, end = segment["first"], segment["last"] + 1
    rows = segment["states"]
    return (
        first <= end <= first + _MOST_STEPS
        and sum(num for _, num, _, _ in rows) <= end - first + 1
        and all(first <= at and at + (num - 1) * distance <= end for at, num, distance, _ in rows)
        and all(layout < num_layouts for *_, layout in rows)
    )


def stretch_to(folder: Path, manifest: Manifest, end: int | None) -> list[SegmentEntry]:
    """Segments each of which goes on where the one before ended, up to the step ``end``, or the last ones.

    Raises:
        RunDirectoryError: If what leads to ``end`` was let go.
    """
    stretches: list[list[SegmentEntry]] = [[]]
    for segment in manifest["segments"]:
        before: float = stretches[-1][-1]["last"] if stretches[-1] else math.inf
        if any(before < gap <= segment["first"] for gap in manifest["gaps"]):
            stretches.append([])
        stretches[-1].append(segment)
    if end is None:
        return stretches[-1]
    found = [number for number, stretch in enumerate(stretches) if stretch and stretch[0]["first"] < end]
    stretch = stretches[max(found, default=0)]
    if found and stretch is not stretches[-1] and stretch[-1]["last"] + 1 < end:
        raise RunDirectoryError(
            f"{folder} keeps no steps from {stretch[-1]['last'] + 1} on that lead to step {end}: they were let go "
            'while the run went on. Use at="last".'
        )
    return stretch


def check_segment(folder: Path, segment: SegmentEntry) -> None:
    """Is a segment the file that was written?

    Raises:
        RunDirectoryError: If it is gone, or damaged.
    """
    path = folder / segment["file"]
    if not path.exists():
        raise RunDirectoryError(f"{path} is missing, though the manifest names it.")
    check_plain(path)
    size = path.stat().st_size
    if size != segment["bytes"]:
        raise RunDirectoryError(f"{path} is cut short or grown: it has {size} bytes instead of {segment['bytes']}.")
    if checksum_of(path) != segment["checksum"]:
        raise RunDirectoryError(
            f"{path} is damaged, or belongs to another place or run: its content is not what was written there. "
            "A trajectory cannot be repaired; restore it from a copy, or train again."
        )
