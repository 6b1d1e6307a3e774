# SPDX-License-Identifier: Apache-2.0
"""Options of the callback, checked when they are given."""

import inspect
import pkgutil
from collections.abc import Callable
from typing import Any

from torch import Tensor

from lightning_sgdclean.base.resources import pyarrow


def check_choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    """Is an option of the callback one of those that there are?"""
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}.")


def check_count(name: str, value: Any) -> None:
    """Is an option a number of things?"""
    if type(value) is not int or value < 0:
        raise ValueError(f"{name} must be a whole number, 0 or more, got {value!r}.")


FORMATS = ("csv", "parquet")
FURTHER_COLUMNS = ("label", "prediction", "loss", "source", "by_epoch", "relabel")


def check_objective(objective: Any) -> None:
    """One callable, several by name, or none.

    Raises:
        ValueError: If it is something else.
    """
    several = isinstance(objective, dict)
    if several and not objective:
        raise ValueError("objective is an empty dict; expected callables (pl_module, batch) -> scalar by name.")
    for name, one in objective.items() if several else [("objective", objective)]:
        if not isinstance(name, str) or not name:
            raise ValueError(f"objective has the name {name!r}; expected text.")
        if not callable(one) and (several or one is not None):
            where = f"objective[{name!r}]" if several else "objective"
            raise ValueError(f"{where} must be a callable (pl_module, batch) -> scalar, got {type(one).__name__}.")


def check_columns(columns: Any) -> None:
    """Names of further columns that there are.

    Raises:
        ValueError: If one is unknown.
    """
    unknown = [columns] if isinstance(columns, str) else [name for name in columns if name not in FURTHER_COLUMNS]
    if unknown:
        raise ValueError(f"columns holds {unknown[0]!r}; expected a sequence of some of {', '.join(FURTHER_COLUMNS)}.")


def check_formats(formats: Any) -> None:
    """Files that the ranking can be written as, and what that needs.

    Raises:
        ValueError: If one is unknown.
        ImportError: If pyarrow is needed and not installed.
    """
    unknown = [formats] if isinstance(formats, str) else [name for name in formats if name not in FORMATS]
    if unknown:
        raise ValueError(f"formats holds {unknown[0]!r}; expected a sequence of some of {', '.join(FORMATS)}.")
    if "parquet" in formats:
        pyarrow()


def check_render(render: Any) -> None:
    """What the page shows of a sample.

    Raises:
        ValueError: If it cannot be called.
    """
    if render is not None and not callable(render):
        raise ValueError(f"render must be a callable from a sample to what is shown, got {type(render).__name__}.")


def loaders_given(given: Any) -> Any:
    """Loaders for the objective, in a list, tuple or dict or alone; one that is an import path, as in YAML, is made.

    Raises:
        ValueError: If something is no loader, or nothing can be found at an import path.
    """
    if isinstance(given, dict):
        return {name: loaders_given(one) for name, one in given.items()}
    if isinstance(given, list | tuple):
        return [loaders_given(one) for one in given]
    found = given
    if isinstance(given, str):
        try:
            found = pkgutil.resolve_name(given)
        except (ValueError, ImportError, AttributeError) as error:
            raise ValueError(
                f"val_dataloaders is {given!r}, at which nothing can be imported ({error}). Expected loaders, or the "
                "import path of a loader or of a function that makes it."
            ) from error
        found = found() if inspect.isroutine(found) else found
    if found is not None and (isinstance(found, str | type) or not hasattr(found, "__iter__")):
        raise ValueError(
            f"val_dataloaders must be loaders such as torch's DataLoader, got {given!r} of type {type(found).__name__}."
        )
    return found


SampleId = int | str
ObjectiveFn = Callable[[Any, Any], Any]
SampleLosses = Callable[[Any, Any], Tensor]
