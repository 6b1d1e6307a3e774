# SPDX-License-Identifier: Apache-2.0
"""The label of a dataset's sample: where it lies, what it is as a plain value, and a sample with another one."""

import copy
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from torch import Tensor

Label = int | float | str
Place = int | str

LABEL_KEYS = ("label", "labels", "target", "targets", "y", "class")

_INTEGER = re.compile(r"-?[0-9]{1,19}")
_TRUTHS = {"True": True, "False": False, "1": True, "0": False}


def place_of_label(sample: Any) -> Place | None:
    """Where a sample has its label, by rule: the second of a pair, or the only key of a dict that names one.

    Example:
        >>> place_of_label(("picture", 3)), place_of_label({"text": "fine", "label": 1})
        (1, 'label')
        >>> place_of_label(("picture", 3, "more")) is None
        True
    """
    if isinstance(sample, tuple | list):
        return 1 if len(sample) == 2 else None
    if isinstance(sample, Mapping):
        keys = [key for key in LABEL_KEYS if key in sample]
        return keys[0] if len(keys) == 1 else None
    return None


def likely_place_of_label(sample: Any) -> Place | None:
    """For showing only: as :func:`place_of_label`, or the first single value behind the first item."""
    place = place_of_label(sample)
    if place is None and isinstance(sample, tuple | list):
        return next((i for i, item in enumerate(sample) if i and plain_label(item) is not None), None)
    return place


def plain_label(value: Any) -> Label | None:
    """A label as int, float or str; None where it is not a single finite value."""
    value = _item(value)
    if isinstance(value, bool):
        return int(value)
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, int | float | str) else None


def _item(value: Any) -> Any:
    """What a tensor or array of one number holds; None for one of several, and anything else as it is."""
    if not isinstance(value, Tensor | np.ndarray | np.generic):
        return value
    return value.item() if math.prod(value.shape) == 1 and value.ndim <= 1 else None


def label_of(sample: Any, place: Place | None) -> Label | None:
    """The plain label at a place, None where there is none."""
    try:
        return None if place is None else plain_label(sample[place])
    except (IndexError, KeyError, TypeError):
        return None


def converted_label(text: str, old: Any) -> Any:
    """A label read from text, of the type that the old one has.

    Raises:
        ValueError: If the text is no such label, or the old one not a single value; ends with what was expected.
    """
    if not isinstance(old, Tensor | np.ndarray | np.generic) or _item(old) is None:
        return _single(text, old)
    changed: Any = np.array(old) if isinstance(old, np.generic) else copy.deepcopy(old)
    try:
        changed[...] = _single(text, _item(old))
    except (OverflowError, RuntimeError) as error:
        raise ValueError(f"the new label is {text!r}, which does not fit into {changed.dtype}") from error
    return changed[()] if isinstance(old, np.generic) else changed


def _single(text: str, old: Any) -> Label:
    if isinstance(old, str):
        return text
    if isinstance(old, bool):
        if text not in _TRUTHS:
            raise ValueError(f"the new label is {text!r}, but the dataset's is {old}; expected True or False")
        return _TRUTHS[text]
    if isinstance(old, int):
        if not _INTEGER.fullmatch(text):
            raise ValueError(f"the new label is {text!r}, but the dataset's is {old}; expected a whole number")
        return int(text)
    if isinstance(old, float):
        try:
            number = float(text)
        except ValueError:
            number = math.nan
        if not math.isfinite(number):
            raise ValueError(f"the new label is {text!r}, but the dataset's is {old}; expected a finite number")
        return number
    raise ValueError(
        f"the dataset's label is a {type(old).__name__}, expected a single number or text; "
        "give label=, a callable from the sample and the new label's text to the relabelled sample"
    )


def with_label(sample: Any, place: Place, label: Any) -> Any:
    """A copy of the sample, of its own type, with another label; the sample itself stays as it is."""
    if isinstance(sample, tuple):
        items = [*sample]
        items[int(place)] = label
        return type(sample)(*items) if hasattr(sample, "_fields") else tuple(items)
    changed: Any = copy.copy(sample)
    changed[place] = label
    return changed


def place_or_refuse(sample: Any, label: "Place | Callable[..., Any] | None") -> Place:
    """The place that the user gave, or that the rule finds.

    Raises:
        TypeError: If neither leads to a label; says what to give.
    """
    place = place_of_label(sample) if label is None else label
    if place is None or callable(place):
        what = f"a {type(sample).__name__}" + (f" of {len(sample)} items" if isinstance(sample, tuple | list) else "")
        if isinstance(sample, Mapping):
            what += f" with the keys {', '.join(map(repr, sample))}"
        raise TypeError(
            f"A sample of the dataset is {what}, so where its label lies is not clear. Give label=: its index or key, "
            "or a callable from the sample and the new label's text to the relabelled sample."
        )
    try:
        sample[place]
    except (IndexError, KeyError, TypeError) as error:
        raise TypeError(f"label={place!r} leads nowhere in a sample of type {type(sample).__name__}.") from error
    return place
