# SPDX-License-Identifier: Apache-2.0
"""The trainings of a cleansing on disk, so that none is done twice or mixed with those of another."""

import hashlib
import inspect
import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from lightning_sgdclean.base.errors import RunDirectoryError
from lightning_sgdclean.base.files import read_sealed, write_sealed
from lightning_sgdclean.base.resources import versions
from lightning_sgdclean.cleansing.plan import Settings, Trial

FORMAT = 2  # 1 took ids for positions even where they were names


class TrialStore:
    """A folder with one file a training, and one that says what they are trainings of.

    Args:
        folder: Made if missing.
        identity: What must be the same for trainings to belong together, fit for JSON.

    Raises:
        RunDirectoryError: If it holds trainings of another identity, or files of others.
    """

    def __init__(self, folder: Path, identity: dict[str, Any]) -> None:
        self._trials = folder / "trials"
        path = folder / "cleansing.json"
        identity = json.loads(json.dumps({"format": FORMAT, **identity}))
        if path.exists():
            _check_same(path, read_sealed(path, dict[str, Any]), identity)
        elif folder.exists():
            _clear_of_beginnings(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_sealed(path, identity)
        self._trials.mkdir(exist_ok=True)

    def result(self, trial: Trial) -> dict[str, Any] | None:
        """What is remembered of a training, or None if it was not finished.

        Raises:
            RunDirectoryError: If the file is damaged.
        """
        path = self._path(trial)
        return read_sealed(path, dict[str, Any]) if path.exists() else None

    def save(self, trial: Trial, result: dict[str, Any]) -> None:
        """Remember it."""
        write_sealed(self._path(trial), result)

    def _path(self, trial: Trial) -> Path:
        return self._trials / f"{trial.name}.json"


def _clear_of_beginnings(folder: Path) -> None:
    """Remove what is left of a cleansing that was killed before it could say what it was of."""
    found = list(folder.iterdir())
    halves = [path for path in found if path.match(".cleansing.json.*.tmp")]
    empty = [path for path in found if path.name == "trials" and path.is_dir() and not any(path.iterdir())]
    if len(halves) + len(empty) < len(found):
        raise RunDirectoryError(f"{folder} is not empty and holds no cleansing. Give another dirpath=.")
    for path in halves:
        path.unlink()


def _check_same(path: Path, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    differing = [name for name in sorted({*found, *wanted}) if found.get(name) != wanted.get(name)]
    if differing:
        name = differing[0]
        raise RunDirectoryError(
            f"{path.parent} holds a cleansing with another {name} ({found.get(name)}; now {wanted.get(name)}), whose "
            "trainings are not comparable. Give another dirpath=, or remove that folder."
        )


def identity_of(build: Callable[..., Any], settings: Settings) -> dict[str, Any]:
    """Whatever trainings depend on and can be told: the source of ``build``, options, versions.

    What functions that ``build`` calls do cannot be told; a ``build`` with an attribute ``config`` tells by that.
    """
    return {
        "build": _described(build) | {"source": _source_checksum(build), "config": getattr(build, "config", None)},
        "influence": None if settings.influence is None else {k: _plain(v) for k, v in settings.influence.items()},
        "action": settings.action,
        "set_label": _plain(settings.set_label),
        "on": settings.on,
        "ckpt_path": settings.ckpt_path,
        "versions": versions(),
    }


def _described(build: Any) -> dict[str, Any]:
    if isinstance(build, partial):
        arguments = [_plain(value) for value in build.args], {k: _plain(v) for k, v in build.keywords.items()}
        return _described(build.func) | {"arguments": arguments}
    named = build if hasattr(build, "__qualname__") else type(build)
    return {"name": f"{named.__module__}.{named.__qualname__}"}


def _source_checksum(build: Any) -> str | None:
    build = build.func if isinstance(build, partial) else build
    try:
        source = inspect.getsource(build if hasattr(build, "__qualname__") else type(build))
    except (OSError, TypeError):  # typed into an interpreter
        return None
    return hashlib.sha256(source.encode()).hexdigest()


def _plain(value: Any) -> Any:
    """The value where JSON can hold it, else what kind of thing it is; an address in memory would differ each time."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, str | int | float | bool):
        return value
    if isinstance(value, Path):
        return str(value)
    named = value if hasattr(value, "__qualname__") else type(value)
    return f"{named.__module__}.{named.__qualname__}"
