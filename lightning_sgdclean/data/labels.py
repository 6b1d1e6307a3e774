# SPDX-License-Identifier: Apache-2.0
"""The label of a dataset's sample: where it stands, what it is as a plain value, and samples with another one.

One rule says where a label stands, :func:`place_of_label`. It does not guess: an index or a weight that was taken for
the label would be overwritten silently.
"""

import copy
import math
import re
from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

Label = int | float | str
Place = int | str

LABEL_KEYS = ("label", "labels", "target", "targets", "y", "class")

_INTEGER = re.compile(r"-?[0-9]{1,19}")
_TRUTHS: dict[Any, bool] = {"True": True, "False": False, "1": True, "0": False, 1: True, 0: False}


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
    return value.item() if math.prod(value.shape) == 1 else None


def place_of_label(sample: Any) -> Place | None:
    """Where the label of a sample stands; None where that is not clear.

    - The only field of a named tuple, or the only key of a mapping, that is named like a label: ``label``,
      ``labels``, ``target``, ``targets``, ``y`` or ``class``. With two such names it is not clear.
    - Else the second of a pair, a tuple or list of two items. A number and then a text is not clear: some datasets of
      texts have the label first.

    In a longer tuple or list nothing tells a label from an index or a weight. Knowing the label's value does not help:
    an index can have the same value by chance.

    Example:
        >>> place_of_label(("picture", 3)), place_of_label({"text": "fine", "label": 1})
        (1, 'label')
        >>> place_of_label(("picture", 3, "more")) is None
        True
    """
    if isinstance(sample, Mapping):
        named = _names_of_labels(sample)
        return named[0] if len(named) == 1 else None
    if not isinstance(sample, tuple | list):
        return None
    fields = getattr(sample, "_fields", ())
    named = _names_of_labels(fields)
    if named:
        return int(fields.index(named[0])) if len(named) == 1 else None
    return 1 if len(sample) == 2 and not _is_number_and_text(sample) else None


def _names_of_labels(names: Any) -> list[str]:
    return [name for name in LABEL_KEYS if name in names]


def _is_number_and_text(sample: Any) -> bool:
    return len(sample) == 2 and isinstance(_item(sample[0]), int | float) and isinstance(sample[1], str)


def likely_place_of_label(sample: Any) -> Place | None:
    """For showing only: as :func:`place_of_label`, or the first single value behind the first item."""
    place = place_of_label(sample)
    if place is None and isinstance(sample, tuple | list):
        return next((i for i, item in enumerate(sample) if i and plain_label(item) is not None), None)
    return place


def label_of(sample: Any, place: Place | None) -> Label | None:
    """The plain label at a place, None where there is none."""
    try:
        return None if place is None else plain_label(sample[place])
    except (IndexError, KeyError, TypeError):
        return None


def converted_label(label: Any, old: Any) -> Any:
    """A new label in the type of the old one, and with its shape.

    Args:
        label: A single number or text; text is also read as the number that it stands for.
        old: The label so far.

    Raises:
        TypeError: If one of them is not a single number or text, or the old one is text and the new one is not.
        ValueError: If the new label does not fit that type, as 2.5 for a whole number or 300 for 8 bits.
    """
    value, single = _item(label), _item(old)
    for whose, given, plain in (("dataset's", old, single), ("new", label, value)):
        if not isinstance(plain, int | float | str):
            raise TypeError(f"the {whose} label is a {type(given).__name__}, expected a single number or text")
    value = _value_like(single, value)
    try:
        changed = _in_type_of(old, value)
        plain = _item(changed)
        fits = math.isfinite(plain) if isinstance(plain, float) else plain == value
    except (OverflowError, RuntimeError, ValueError):
        fits = False
    if not fits:
        kind = getattr(old, "dtype", type(old).__name__)
        raise ValueError(f"the new label is {value!r}, which does not fit into {kind}")
    return changed


def _value_like(old: Label, label: Label) -> Label:
    """The new label as the truth value, whole number, number or text that the old one is."""
    found: Label | None
    if isinstance(old, str):
        expected, found = "text", label if isinstance(label, str) else None
    elif isinstance(old, bool):
        expected, found = "True or False", _TRUTHS.get(label)
    elif isinstance(old, int):
        expected, found = "a whole number", _whole(label)
    else:
        expected, found = "a finite number", _finite(label)
    if found is None:
        error = TypeError if isinstance(old, str) else ValueError
        raise error(f"the new label is {label!r}, but the dataset's is {old!r}; expected {expected}")
    return found


def _whole(label: Label) -> int | None:
    is_whole = _INTEGER.fullmatch(label) if isinstance(label, str) else isinstance(label, int) or label.is_integer()
    return int(label) if is_whole else None


def _finite(label: Label) -> float | None:
    try:
        number = float(label)
    except (OverflowError, ValueError):
        return None
    return number if math.isfinite(number) else None


def _in_type_of(old: Any, value: Label) -> Any:
    if isinstance(old, Tensor):
        return torch.full_like(old, value)  # type: ignore[arg-type] # a number, as the old one is
    with np.errstate(over="ignore"):  # an infinity is seen by the caller
        if not isinstance(old, np.ndarray):
            return type(old)(value)
        changed = old.copy()
        changed[...] = value
        return changed


@dataclass(frozen=True)
class LabelSetter:
    """Gives a sample another label. A class instead of a closure, so that it can be sent to workers.

    Args:
        way_out: What an error tells the user to do: which argument says where the label stands.
        place: Where it stands; by default where :func:`place_of_label` finds it.
    """

    way_out: str
    place: Place | None = None

    def place_in(self, sample: Any) -> Place:
        """Where the sample's label stands.

        Raises:
            TypeError: If that is not clear, or the place that was given leads nowhere.
        """
        if self.place is None:
            place = place_of_label(sample)
            if place is None:
                found = _described(sample)
                raise TypeError(f"where the label of a sample stands is not clear: found {found}; {self.way_out}")
            return place
        try:
            sample[self.place]
        except (IndexError, KeyError, TypeError) as error:
            raise TypeError(
                f"label={self.place!r} leads nowhere in a sample of type {type(sample).__name__}"
            ) from error
        return self.place

    def __call__(self, sample: Any, label: Any) -> Any:
        """As :func:`with_label`."""
        place = self.place_in(sample)
        try:
            new = converted_label(label, sample[place])
        except TypeError as error:
            raise TypeError(f"{error}; {self.way_out}") from error
        return _replaced(sample, place, new)


def _described(sample: Any) -> str:
    kind = type(sample).__name__
    if isinstance(sample, Mapping):
        return f"{kind} with the keys {', '.join(map(repr, sample))}"
    if not isinstance(sample, tuple | list):
        return kind
    if hasattr(sample, "_fields"):
        return f"{kind} with the fields {', '.join(map(repr, sample._fields))}"
    if _is_number_and_text(sample):
        return f"{kind} of a number and a text, either of which may be the label"
    return f"{kind} of {len(sample)} item{'' if len(sample) == 1 else 's'}"


def _replaced(sample: Any, place: Any, label: Any) -> Any:
    """A copy of the sample with the label at this place."""
    if isinstance(sample, tuple):
        items = [*sample]
        items[place] = label
        return type(sample)(*items) if hasattr(sample, "_fields") else type(sample)(items)
    if isinstance(sample, Mapping) and not isinstance(sample, MutableMapping):
        return {**sample, place: label}
    # A shallow copy of a tensor, or of a class that keeps its entries in an attribute, would share them.
    changed: Any = copy.copy(sample) if isinstance(sample, list | dict) else copy.deepcopy(sample)
    changed[place] = label
    return changed


_BY_RULE = LabelSetter("give set_label=, a callable from the sample and the new label to the relabelled sample")


def with_label(sample: Any, label: Any) -> Any:
    """A sample with another label, where it is clear which part of it is the label.

    The label is the only field of a named tuple or key of a mapping that is called ``label``, ``labels``, ``target``,
    ``targets``, ``y`` or ``class``; else the second item of a pair (tuple or list), unless these are a number and a
    text. The new label gets the type of the old one. The sample itself is not changed.

    Args:
        sample: What ``dataset[position]`` gives.
        label: A single number or text.

    Returns:
        A copy of the sample, of its own type.

    Raises:
        TypeError: If it is not clear where the label stands, or it is not a single number or text.
        ValueError: If the new label does not fit the type of the old one, as 2.5 for a whole number.
    """
    return _BY_RULE(sample, label)


class RelabelledDataset(Dataset[Any]):
    """The dataset, with other labels for some positions.

    Args:
        dataset: With positions.
        labels: New label by position.
        set_label: Callable ``(sample, label)`` to the sample with that label; by default :func:`with_label`.
        expected: Label by position that the sample has to have so far; not asked of a ``set_label`` of one's own.

    Raises:
        IndexError: If there is no such position.
        TypeError, ValueError: When a sample is asked for that cannot be relabelled, or has another label than expected.
    """

    def __init__(
        self,
        dataset: Any,
        labels: Mapping[int, Any],
        set_label: Callable[[Any, Any], Any] | None = None,
        expected: Mapping[int, Any] | None = None,
    ) -> None:
        size = len(dataset)
        beyond = [position for position in labels if not 0 <= position < size]
        if beyond:
            raise IndexError(
                f"Sample id {beyond[0]} is no position in the training loader's dataset of {size} samples."
            )
        self._dataset, self._labels, self._set_label = dataset, dict(labels), set_label or _BY_RULE
        self._expected = dict(expected or {}) if set_label is None else {}
        if hasattr(dataset, "__getitems__"):
            self.__getitems__ = self._getitems  # torch's fetcher asks whether there is one

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, position: int) -> Any:
        return self._changed(position, self._dataset[position])

    def _getitems(self, positions: list[int]) -> list[Any]:
        samples = self._dataset.__getitems__(positions)
        return [self._changed(position, sample) for position, sample in zip(positions, samples, strict=True)]

    def _changed(self, position: int, sample: Any) -> Any:
        if position not in self._labels:
            return sample
        if not isinstance(self._set_label, LabelSetter):  # the user's callable, whose errors stay as they are
            return self._set_label(sample, self._labels[position])
        try:
            self._check_expected(position, sample)
            return self._set_label(sample, self._labels[position])
        except (TypeError, ValueError) as error:
            kind = TypeError if isinstance(error, TypeError) else ValueError
            raise kind(f"Sample {position}: {error}.") from error

    def _check_expected(self, position: int, sample: Any) -> None:
        if position not in self._expected:
            return
        now = sample[_BY_RULE.place_in(sample)]
        if plain_label(now) is None or plain_label(now) != plain_label(self._expected[position]):
            raise ValueError(
                f"the loss held it to the label {self._expected[position]}, but where its label seems to stand there "
                f"is {now}; {_BY_RULE.way_out}"
            )

    def __getattr__(self, name: str) -> Any:
        if name == "_dataset":  # while it is being unpickled
            raise AttributeError(name)
        return getattr(self._dataset, name)
