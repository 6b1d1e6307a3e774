# SPDX-License-Identifier: Apache-2.0
"""Files that appear whole and show damage, and the folder that a run writes to."""

import errno
import hashlib
import json
import math
import os
import secrets
import shutil
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar, cast

import msgspec
import xxhash

from lightning_sgdclean.base.errors import DamagedFileError, RunDirectoryError, SGDInfluenceError

T = TypeVar("T")

_PIECE = 1 << 20  # bytes read at once
_MOST_BYTES = 1 << 28  # that a JSON file may have


@contextmanager
def appearing_whole(path: Path) -> Iterator[Path]:
    """A new file beside ``path`` that takes its name once the block is through and its content on the disk.

    Its own name cannot be guessed, and nothing may lie there: in a shared folder a link that somebody planted would
    lead the writing elsewhere.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0), 0o666))
    try:
        yield temporary
        put_on_disk(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def put_on_disk(path: Path) -> None:
    """Wait until a file, or a folder's list of names, would outlast a power failure."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # a file system that has no such thing
            raise
    finally:
        os.close(number)


def write_json(path: Path, content: Any) -> None:
    """Write JSON under a temporary name, then rename; what is not finite becomes null."""
    with appearing_whole(path) as temporary:
        text = json.dumps(without_nan(content), indent=2, allow_nan=False)
        temporary.write_text(text + "\n", encoding="utf-8")


def without_nan(value: Any) -> Any:
    """Plain values with None in the place of NaN and infinities, which JSON does not have."""
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def checksum_of(path: Path) -> str:
    """XXH3 (64 bits) of a file's content: no proof against forgery, but it shows damage, and is taken in no time."""
    found, piece = xxhash.xxh3_64(), bytearray(_PIECE)
    with path.open("rb", buffering=0) as file:
        while num := file.readinto(piece):
            found.update(memoryview(piece)[:num])
    return found.hexdigest()


def write_sealed(path: Path, content: Mapping[str, object]) -> None:
    """Write JSON that holds its own checksum, on one line: with more, Python's lock would be held much longer."""
    with appearing_whole(path) as temporary:
        temporary.write_text(_sealed(content), encoding="utf-8")


def read_sealed(path: Path, schema: type[T]) -> T:
    """Undo :func:`write_sealed`.

    Args:
        path: The file.
        schema: The type of what it holds.

    Raises:
        DamagedFileError: If the text is not, to the last byte, what was written, or not of that type.
    """
    text = _text_in(path)
    content = json_in(text, path)
    if not isinstance(content, dict):
        raise DamagedFileError(f"{path} holds no JSON object; it is not a file of this package.")
    content.pop("checksum", None)
    if text != _sealed(content):
        raise DamagedFileError(f"{path} is damaged: what it holds is not what its checksum was taken of.")
    return checked_as(schema, content, path)


def read_json(path: Path) -> Any:
    """What a JSON file holds.

    Raises:
        DamagedFileError: If it cannot be read.
    """
    return json_in(_text_in(path), path)


def json_in(text: str, path: Path) -> Any:
    """What JSON says.

    Raises:
        DamagedFileError: If it is none.
    """
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DamagedFileError(f"{path}: expected JSON ({error}).") from error


def _text_in(path: Path) -> str:
    try:
        check_plain(path, _MOST_BYTES)
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise DamagedFileError(f"{path} cannot be read: {error}") from error


def checked_as(schema: type[T], content: Any, path: Path) -> T:
    """What was read from JSON, if it is of the expected type.

    Raises:
        DamagedFileError: If not; names the place within the file.
    """
    try:
        msgspec.convert(content, schema)
    except (msgspec.ValidationError, RecursionError) as error:
        raise DamagedFileError(f"{path}: {error}.") from error
    return cast("T", content)


def check_plain(path: Path, most: float = math.inf) -> None:
    """May a file be read that a stranger may have put there?

    Raises:
        FileNotFoundError: If there is none.
        DamagedFileError: If it is a link, a pipe, a device or a folder, or larger than so many bytes.
    """
    about = path.lstat()
    if not stat.S_ISREG(about.st_mode):
        raise DamagedFileError(f"{path} is a link, a pipe, a device or a folder; expected a file.")
    if about.st_size > most:
        raise DamagedFileError(f"{path} has {about.st_size} bytes; expected {most:.0f} at most.")


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Whatever goes wrong while a file's content is made sense of becomes an error that names the file.

    Raises:
        DamagedFileError: Instead of what Python and the libraries raise where content is of another kind than expected.
    """
    try:
        yield
    except SGDInfluenceError:
        raise
    except Exception as error:  # of Python's, torch's or safetensors', of any kind
        raise DamagedFileError(
            f"{path} does not hold what this package writes there: {type(error).__name__}: {error}"
        ) from error


def _sealed(content: Mapping[str, object]) -> str:
    seal = hashlib.sha256(json.dumps(content).encode()).hexdigest()
    return json.dumps({**content, "checksum": seal}) + "\n"


def fresh_directory(wanted: str | Path | None, log_dir: str | Path, overwrite: bool) -> Path:
    """The wanted directory, emptied of a run if it may be, or the next free name in ``log_dir``.

    Args:
        wanted: The user's; None for a name of ours.
        log_dir: Where the Trainer writes its logs.
        overwrite: Whether a run in the wanted directory may be deleted.

    Raises:
        RunDirectoryError: If the wanted directory holds a run that may not be deleted, if it cannot be written to, if
            another run took it at the same moment, or if it is an address rather than a local path.
    """
    folder = _local(log_dir if wanted is None else wanted)
    if wanted is None:
        folder, parent, number = folder / "sgd_influence", folder, 1
        while os.path.lexists(folder):
            number += 1
            folder = parent / f"sgd_influence-{number}"
    elif _holds_run(folder):
        if not overwrite:
            raise RunDirectoryError(
                f"{wanted} already holds a run. Give another dirpath=, or overwrite=True to delete that one."
            )
        shutil.rmtree(folder / "trajectory", ignore_errors=True)
        remove_results(folder)
    try:
        (folder / "trajectory").mkdir(parents=True)
    except FileExistsError as error:
        why = "was just taken by another run" if folder.is_dir() else "is no folder"
        raise RunDirectoryError(f"{folder} {why}. Give each run a dirpath= of its own.") from error
    except OSError as error:
        raise RunDirectoryError(f"{folder} cannot be written to ({error}). Give another dirpath=.") from error
    return folder


def _local(path: str | Path) -> Path:
    """A path on this machine. Lightning takes addresses of buckets, too, of which ``Path`` would make local folders.

    Raises:
        RunDirectoryError: If it is an address.
    """
    protocol, mark, rest = str(path).partition("://")
    if not mark:
        return Path(path)
    if protocol in ("file", "local"):
        return Path(rest)
    raise RunDirectoryError(
        f"{str(path)!r} is an address; the run directory has to lie on this machine, since a trajectory is written and "
        "read in pieces all the time. Give dirpath= a local folder, and copy it where you like when the fit is over."
    )


def _holds_run(folder: Path) -> bool:
    """Whether there are files of a run in it."""
    return (folder / "trajectory").exists() or (folder / "influence.csv").exists()


def remove_results(folder: Path) -> None:
    """Remove what a ranking left, but for the trajectory."""
    for name in ("influence.csv", "influence.parquet", "summary.json", "report.html"):
        (folder / name).unlink(missing_ok=True)
