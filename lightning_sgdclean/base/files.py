# SPDX-License-Identifier: Apache-2.0
"""Files that are whole or not there at all, and that show when a bit of them has changed."""

import errno
import hashlib
import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import xxhash

from lightning_sgdclean.base.errors import RunDirectoryError

_PIECE = 1 << 20  # bytes read at once


@contextmanager
def appearing_whole(path: Path) -> Iterator[Path]:
    """A temporary path beside ``path`` that takes its name once the block is through and its content on the disk."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
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


def write_sealed(path: Path, content: dict[str, Any]) -> None:
    """Write JSON that holds its own checksum, on one line: with more, Python's lock would be held much longer."""
    with appearing_whole(path) as temporary:
        temporary.write_text(_sealed(content), encoding="utf-8")


def read_sealed(path: Path) -> dict[str, Any]:
    """Undo :func:`write_sealed`.

    Raises:
        RunDirectoryError: If the text is not, to the last byte, what was written.
    """
    try:
        text = path.read_text(encoding="utf-8")
        content = json.loads(text)
    except (OSError, ValueError) as error:
        raise RunDirectoryError(f"{path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise RunDirectoryError(f"{path} holds no JSON object; it is not a file of this package.")
    content.pop("checksum", None)
    if text != _sealed(content):
        raise RunDirectoryError(f"{path} is damaged: what it holds is not what its checksum was taken of.")
    return content


def _sealed(content: dict[str, Any]) -> str:
    seal = hashlib.sha256(json.dumps(content).encode()).hexdigest()
    return json.dumps(content | {"checksum": seal}) + "\n"
