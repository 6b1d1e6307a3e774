# SPDX-License-Identifier: Apache-2.0
"""Files that are whole or not there at all, and that show when a bit of them has changed."""

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning_sgdclean.errors import RunDirectoryError


@contextmanager
def appearing_whole(path: Path) -> Iterator[Path]:
    """A temporary path beside ``path`` that takes its name once the block is through."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, content: Any) -> None:
    """Write JSON under a temporary name, then rename."""
    with appearing_whole(path) as temporary:
        temporary.write_text(_text(content), encoding="utf-8")


def checksum_of(path: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_sealed(path: Path, content: dict[str, Any]) -> None:
    """Write JSON that holds its own checksum."""
    write_json(path, content | {"checksum": _seal(content)})


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
    seal = content.pop("checksum", None)
    if seal != _seal(content) or text != _text(content | {"checksum": seal}):
        raise RunDirectoryError(f"{path} is damaged: what it holds is not what its checksum was taken of.")
    return content


def _text(content: Any) -> str:
    return json.dumps(content, indent=2) + "\n"


def _seal(content: dict[str, Any]) -> str:
    return hashlib.sha256(_text(content).encode()).hexdigest()
