# SPDX-License-Identifier: Apache-2.0
"""The options of the callback, of ``retrace`` and of ``counterfactual``: one class, checked when it is made."""

import inspect
import math
import os
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, TypeAlias

from lightning_sgdclean.base.resources import Lost, Travelling, pyarrow

SampleId: TypeAlias = int | str
ObjectiveFn = Callable[[Any, Any], Any]  # (pl_module, batch) -> scalar, or scalar and weight
SampleLosses = Callable[[Any, Any], Any]  # (pl_module, batch) -> losses (B,)
WeightedLoss = Callable[[Any, Any, Any], Any]  # (pl_module, batch, weights (B,)) -> scalar


class _TheRuns:
    def __repr__(self) -> str:
        return "the run's"


THE_RUNS: Any = _TheRuns()  # the default of an option that was written down with the run
FORMATS = ("csv", "parquet")
FURTHER_COLUMNS = ("label", "prediction", "loss", "source", "by_epoch", "relabel")


@dataclass(frozen=True, kw_only=True, eq=False)
class Options:
    """What can be set; each option is described at :class:`~lightning_sgdclean.SGDInfluence`.

    Raises:
        ValueError: If an option has the wrong type or value; names it, what was expected and what was given.
        ImportError: If ``formats`` asks for Parquet and pyarrow is not installed.
    """

    monitor: str = "val_loss"
    mode: Literal["min", "max"] = "min"
    objective: ObjectiveFn | dict[str, ObjectiveFn] | None = None
    val_dataloaders: Any = None
    epochs: int | Literal["all"] = 1
    at: Literal["last", "best"] = "last"
    curvature: Literal["exact", "gauss-newton", "finite", "none"] = "exact"
    finite_radius: float = 0.03
    dirpath: str | Path | None = None
    overwrite: bool = False
    sample_ids: Callable[[Any], Any] | Literal["content"] | None = None
    keep_batches: bool | Literal["auto"] = "auto"
    sample_losses: SampleLosses | None = None
    weighted_loss: WeightedLoss | None = None
    snapshots: Literal["auto", "every", "sqrt"] | int = "auto"
    max_bytes: int | None = None
    on_mismatch: Literal["raise", "warn"] = "raise"
    tolerance: float | None = None
    retrace_precision: Literal["auto", "run", "float32"] = "auto"
    verify: int | Literal["auto"] = "auto"
    rerank: int = 0
    columns: Sequence[str] = ()
    formats: Sequence[str] = ("csv",)
    page: bool = True
    render: Callable[[Any], Any] | None = None
    class_names: Sequence[str] | Mapping[Any, str] | None = None
    show_samples: bool = True
    keep_trajectory: bool = True

    def __post_init__(self) -> None:
        for option in fields(self):
            object.__setattr__(self, option.name, checked(option.name, getattr(self, option.name)))
        if self.sample_losses is not None and self.weighted_loss is not None:
            raise ValueError(
                "sample_losses= and weighted_loss= both say what a sample's weight does to the training loss. Give "
                "sample_losses= where that is a mean over samples, else weighted_loss=, not both."
            )

    def __getstate__(self) -> dict[str, Any]:
        """Everything, but of the user's own objects only those that can be pickled: see :class:`Travelling`."""
        return {name: Travelling(name, value) if name in _OWN else value for name, value in vars(self).items()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """As it was sent; a mere copy travels nowhere."""
        vars(self).update({name: v.value if isinstance(v, Travelling) else v for name, v in state.items()})

    def check_whole(self) -> None:
        """Before they are used: did everything arrive, if they come out of a pickle?

        Raises:
            ValueError: Naming the option that did not.
        """
        lost = next((value for value in vars(self).values() if isinstance(value, Lost)), None)
        if lost is not None:
            raise ValueError(
                f"{lost.name}= was left behind when this callback was pickled, since it cannot be pickled itself "
                f"({lost.why}). Give a function of a module instead of a lambda or a local one."
            )

    @classmethod
    def among(cls, arguments: Mapping[str, Any]) -> "Options":
        """The options among a function's arguments, by name; others are passed over."""
        names = [option.name for option in fields(cls)]
        return cls(**{name: arguments[name] for name in names if name in arguments})

    @property
    def finds_split(self) -> bool:
        """Whether it is to be found, and not given, what a sample's weight does to the loss."""
        return self.sample_losses is None and self.weighted_loss is None

    @property
    def objectives(self) -> dict[str, ObjectiveFn | None]:
        """What the samples are ranked by, first, and what else their influence on is wanted; None: what is logged."""
        if self.objective is None:
            return {self.monitor: None}
        if isinstance(self.objective, dict):
            return dict(self.objective)
        return {getattr(self.objective, "__name__", "objective"): self.objective}


# May hold anything.
_OWN = frozenset({"objective", "val_dataloaders", "sample_ids", "sample_losses", "weighted_loss", "render"})


def checked(name: str, value: Any) -> Any:
    """An option's value as it is kept, e.g. a sequence as a tuple.

    Raises:
        ValueError: If the value has the wrong type, or is none of those that there are.
    """
    return _CHECKS[name](name, value)


def _wrong(name: str, expected: str, value: Any) -> ValueError:
    return ValueError(f"{name} must be {expected}, got {value!r:.200}.")


def check_choice(name: str, value: Any, allowed: Sequence[str]) -> None:
    """Is a value one of these words?

    Raises:
        ValueError: If not.
    """
    if not (isinstance(value, str) and value in allowed):
        raise _wrong(name, f"one of {', '.join(map(repr, allowed))}", value)


def _one_of(*allowed: str) -> Callable[[str, Any], Any]:
    def check(name: str, value: Any) -> Any:
        check_choice(name, value, allowed)
        return value

    return check


def _yes_or_no(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise _wrong(name, "True or False", value)
    return value


def _text(name: str, value: Any) -> str:
    if not (isinstance(value, str) and value):
        raise _wrong(name, "a name", value)
    return value


def _count(name: str, value: Any) -> int:
    if type(value) is not int or value < 0:
        raise _wrong(name, "a whole number, 0 or more", value)
    return value


def _count_or_auto(name: str, value: Any) -> Any:
    if value != "auto" and (type(value) is not int or value < 0):
        raise _wrong(name, 'a whole number, 0 or more, or "auto"', value)
    return value


def _positive_int_or(*allowed: str) -> Callable[[str, Any], Any]:
    """A positive int, or one of these words."""
    words = ", ".join(f'"{word}"' for word in allowed)
    expected = f"{words} or a positive int" if len(allowed) > 1 else f"a positive int or {words}"

    def check(name: str, value: Any) -> Any:
        if not (isinstance(value, str) and value in allowed) and not (type(value) is int and value >= 1):
            raise _wrong(name, expected, value)
        return value

    return check


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and not math.isnan(value)


def _radius(name: str, value: Any) -> float:
    if not (_is_number(value) and 0 < value < math.inf):
        raise _wrong(name, "positive and finite", value)
    return float(value)


def _tolerance(name: str, value: Any) -> float | None:
    if value is not None and not (_is_number(value) and 0 <= value < math.inf):
        raise _wrong(name, "a finite number, 0 or more, or None", value)
    return value  # type: ignore[no-any-return]


def _bytes(name: str, value: Any) -> Any:
    if value is not None and not (_is_number(value) and value > 0):
        raise _wrong(name, "positive, or None", value)
    return value


def _path(name: str, value: Any) -> Any:
    if value is not None and not (isinstance(value, str | os.PathLike) and os.fspath(value)):
        raise _wrong(name, "a path or None", value)
    return value


def _keep_batches(name: str, value: Any) -> Any:
    if not (isinstance(value, bool) or (isinstance(value, str) and value == "auto")):
        raise _wrong(name, 'True, False or "auto"', value)
    return value


def _callable(described: str) -> Callable[[str, Any], Any]:
    def check(name: str, value: Any) -> Any:
        if value is not None and not callable(value):
            raise ValueError(f"{name} must be a callable {described}, got {type(value).__name__}.")
        return value

    return check


def _sample_ids(name: str, value: Any) -> Any:
    if value is not None and value != "content" and not callable(value):
        raise ValueError(
            f'{name} must be a callable from a batch to its samples\' ids, or "content", got {value!r:.200} of type '
            f"{type(value).__name__}."
        )
    return value


def _objective(name: str, value: Any) -> Any:
    """One callable, several by name, or none."""
    several = isinstance(value, dict)
    if several and not value:
        raise ValueError(f"{name} is an empty dict; expected callables (pl_module, batch) -> scalar by name.")
    for key, one in value.items() if several else [(name, value)]:
        if not isinstance(key, str) or not key:
            raise ValueError(f"{name} has the name {key!r}; expected text.")
        if not callable(one) and (several or one is not None):
            where = f"{name}[{key!r}]" if several else name
            raise ValueError(f"{where} must be a callable (pl_module, batch) -> scalar, got {type(one).__name__}.")
    return value


def _some_of(*allowed: str) -> Callable[[str, Any], Any]:
    """A sequence of these names, each once."""

    def check(name: str, value: Any) -> tuple[str, ...]:
        is_sequence = isinstance(value, Sequence) and not isinstance(value, str | bytes)
        unknown = [one for one in value if one not in allowed] if is_sequence else [value]
        if unknown:
            raise ValueError(f"{name} holds {unknown[0]!r}; expected a sequence of some of {', '.join(allowed)}.")
        return tuple(dict.fromkeys(value))

    return check


def _formats(name: str, value: Any) -> tuple[str, ...]:
    """CSV in any case, since it is what everything else reads."""
    found = tuple(dict.fromkeys(("csv", *_some_of(*FORMATS)(name, value))))
    if "parquet" in found:
        pyarrow()
    return found


def _class_names(name: str, value: Any) -> Any:
    is_list = isinstance(value, Sequence) and not isinstance(value, str | bytes)
    if value is not None and not is_list and not isinstance(value, Mapping):
        raise _wrong(name, "a sequence of names, or names by label", value)
    return value


def _loaders(name: str, given: Any) -> Any:
    """Loaders in a list, tuple or dict or alone; one that is an import path, as in YAML, is made."""
    if isinstance(given, dict):
        return {key: _loaders(name, one) for key, one in given.items()}
    if isinstance(given, list | tuple):
        return [_loaders(name, one) for one in given]
    found = given
    if isinstance(given, str):
        try:
            found = pkgutil.resolve_name(given)
        except (ValueError, ImportError, AttributeError) as error:
            raise ValueError(
                f"{name} is {given!r}, at which nothing can be imported ({error}). Expected loaders, or the "
                "import path of a loader or of a function that makes it."
            ) from error
        found = found() if inspect.isroutine(found) else found
    if found is not None and (isinstance(found, str | type) or not hasattr(found, "__iter__")):
        raise ValueError(
            f"{name} must be loaders such as torch's DataLoader, got {given!r} of type {type(found).__name__}."
        )
    return found


_CHECKS: dict[str, Callable[[str, Any], Any]] = {
    "monitor": _text,
    "mode": _one_of("min", "max"),
    "objective": _objective,
    "val_dataloaders": _loaders,
    "epochs": _positive_int_or("all"),
    "at": _one_of("last", "best"),
    "curvature": _one_of("exact", "gauss-newton", "finite", "none"),
    "finite_radius": _radius,
    "dirpath": _path,
    "overwrite": _yes_or_no,
    "sample_ids": _sample_ids,
    "keep_batches": _keep_batches,
    "sample_losses": _callable("(pl_module, batch) -> losses (B,)"),
    "weighted_loss": _callable("(pl_module, batch, weights) -> scalar"),
    "snapshots": _positive_int_or("auto", "every", "sqrt"),
    "max_bytes": _bytes,
    "on_mismatch": _one_of("raise", "warn"),
    "tolerance": _tolerance,
    "retrace_precision": _one_of("auto", "run", "float32"),
    "verify": _count_or_auto,
    "rerank": _count,
    "columns": _some_of(*FURTHER_COLUMNS),
    "formats": _formats,
    "page": _yes_or_no,
    "render": _callable("from a sample to what is shown"),
    "class_names": _class_names,
    "show_samples": _yes_or_no,
    "keep_trajectory": _yes_or_no,
}


# Those whose value can be written down, in YAML say; the others are objects of the user's.
PLAIN_OPTIONS = _CHECKS.keys() - _OWN
Positions = list[SampleId] | SampleId  # keys of a dataset: a list for a batch, a single one without batching
