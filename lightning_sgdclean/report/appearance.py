# SPDX-License-Identifier: Apache-2.0
"""What a sample looks like: picture, text or values."""

import base64
import dataclasses
import io
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import interpolate

from lightning_sgdclean.data.datasets import picture_values

MAX_SIDE = 192  # pixels kept of the longer side
_LOSSLESS_SIDE = 64  # up to here PNG, which is small then; beyond it JPEG
_MODES = {1: "L", 3: "RGB", 4: "RGBA"}
_BYTE_LIKE = 64.0  # floats from 0 to some value above this, at most 255, are bytes
_TAIL = 5.0  # percent of the pictures whose extremes may lie outside what is shown as black to white
Ranges = dict[int, NDArray[np.float32]]


@dataclass(frozen=True)
class Thumbnail:
    """A picture reduced to what is shown.

    Attributes:
        pixels: ``(H, W, C)`` with 1, 3 or 4 channels, uint8, or float32 of a range that is not known yet.
        size: Width and height before it was reduced.
    """

    pixels: NDArray[Any]
    size: tuple[int, int]


def thumbnail_of(value: Any) -> Thumbnail | None:
    """The picture that a value is, at most ``MAX_SIDE`` pixels a side; None for what is no picture.

    Truth values and whole numbers from 0 to 255 become bytes, all else stays a float.
    """
    array = picture_values(value)
    if array is None:
        return None
    size = (array.shape[1], array.shape[0])
    if array.dtype == np.bool_:
        array = array.astype(np.uint8) * np.uint8(255)
    is_bytes = array.dtype.kind in "iu" and array.min() >= 0 and array.max() <= 255
    array = array.astype(np.uint8) if is_bytes else _finite(array.astype(np.float32))
    if max(size) > MAX_SIDE:
        array = _reduced(array)
    return Thumbnail(array, size)


def _finite(array: NDArray[np.float32]) -> NDArray[np.float32]:
    """Infinite numbers as the largest or smallest finite one, NaN as the smallest."""
    finite = array[np.isfinite(array)]
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 0.0)
    return np.nan_to_num(array, nan=low, posinf=high, neginf=low)


def _reduced(array: NDArray[Any]) -> NDArray[Any]:
    """Each pixel the mean of those that it stands for."""
    scale = MAX_SIDE / max(array.shape[:2])
    wanted = [max(1, round(side * scale)) for side in array.shape[:2]]
    planes = torch.from_numpy(np.moveaxis(array, 2, 0).astype(np.float32))[None]
    reduced = np.moveaxis(interpolate(planes, wanted, mode="area")[0].numpy(), 0, 2)
    return np.rint(reduced).astype(np.uint8) if array.dtype == np.uint8 else reduced


def ranges_of(thumbnails: Iterable[Thumbnail]) -> Ranges:
    """What is black and what is white, for pictures of floats, by their number of channels.

    Floats within 0 and 1, or bytes, keep that range. Anything else, such as pictures normalised by mean and
    deviation, is spread between the extremes that the pictures of that kind have in common, channel by channel,
    which undoes such a normalisation where pictures reach black and white.

    Returns:
        For each number of channels ``C`` an array ``(2, C)``: black and white.
    """
    extremes: dict[int, list[NDArray[np.float32]]] = {}
    for thumbnail in thumbnails:
        if thumbnail.pixels.dtype != np.uint8:
            flat = thumbnail.pixels.reshape(-1, thumbnail.pixels.shape[2])
            extremes.setdefault(flat.shape[1], []).append(np.stack([flat.min(0), flat.max(0)]))
    return {channels: _range(np.stack(found)) for channels, found in extremes.items()}


def _range(extremes: NDArray[np.float32]) -> NDArray[np.float32]:
    """Black and white of one kind of pictures from their extremes ``(N, 2, C)``."""
    low, high, channels = float(extremes[:, 0].min()), float(extremes[:, 1].max()), extremes.shape[2]
    if low >= 0 and high <= 1:
        return np.array([[0.0] * channels, [1.0] * channels], dtype=np.float32)
    if low >= 0 and _BYTE_LIKE < high <= 255:
        return np.array([[0.0] * channels, [255.0] * channels], dtype=np.float32)
    black = np.percentile(extremes[:, 0], _TAIL, axis=0)
    white = np.percentile(extremes[:, 1], 100 - _TAIL, axis=0)
    return np.stack([black, white]).astype(np.float32)


def address_of(thumbnail: Thumbnail, ranges: Ranges) -> str:
    """The picture as a ``data:`` address, PNG where it is small or clear in parts, else JPEG.

    Raises:
        ImportError: If Pillow is not installed.
    """
    from PIL import Image

    pixels = thumbnail.pixels
    channels = pixels.shape[2]
    if pixels.dtype != np.uint8:
        black, white = ranges[channels]
        span = np.where(white > black, white - black, 1.0)
        pixels = np.rint(np.clip((pixels - black) / span, 0.0, 1.0) * 255).astype(np.uint8)
    image = Image.fromarray(np.ascontiguousarray(pixels[:, :, 0] if channels == 1 else pixels), _MODES[channels])
    is_lossless = max(pixels.shape[:2]) <= _LOSSLESS_SIDE or _MODES[channels] == "RGBA"
    file = io.BytesIO()
    image.save(file, "PNG" if is_lossless else "JPEG", optimize=True, quality=85)
    return f"data:image/{'png' if is_lossless else 'jpeg'};base64,{base64.b64encode(file.getvalue()).decode()}"


Render = Callable[[Any], Any]
_MAX_TEXT = 2000  # characters
_SHORT_TEXT = 60  # up to here text among other values is one of them
_MAX_VALUES = 24  # of one vector
_MAX_FEATURES = 60
_MAX_DEPTH = 4
_NO_PILLOW = "pictures need Pillow: pip install lightning-sgdclean[page]"


@dataclass(frozen=True)
class Appearance:
    """A sample as it is shown, all of it plain text.

    Attributes:
        picture: A ``data:`` address, or empty.
        size: Width and height of the picture in pixels, before it was reduced.
        text: Text, or empty.
        features: Names and values.
        note: What is to be said besides, e.g. why there is nothing to see.
    """

    picture: str = ""
    size: tuple[int, int] = (0, 0)
    text: str = ""
    features: tuple[tuple[str, str], ...] = ()
    note: str = ""


@dataclass
class Parts:
    """What was found in a sample, small enough to be kept of many at once.

    Attributes:
        picture: The first picture, reduced.
        texts: Names and texts.
        features: Names and values.
        notes: What is to be said besides.
    """

    picture: Thumbnail | None = None
    texts: list[tuple[str, str]] = field(default_factory=list)
    features: list[tuple[str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def parts_of(sample: Any) -> Parts:
    """What there is to see in a sample.

    Args:
        sample: The sample without its label, or what ``render=`` made of it: an image (PIL, tensor or array), text,
            a number, or a tuple, list, dict or dataclass of these. An ``Exception`` stands for a sample that could
            not be had.

    Raises:
        Exception: What the sample raises when it is looked at, as a damaged picture that is read late does.
    """
    parts = Parts()
    if isinstance(sample, Exception):
        parts.notes.append(f"{type(sample).__name__}: {sample}"[:300])
        return parts
    _collect("", sample, parts, 0)
    if len(parts.features) > _MAX_FEATURES:
        parts.notes.append(f"{len(parts.features) - _MAX_FEATURES} more values are not shown")
        del parts.features[_MAX_FEATURES:]
    if not (parts.picture or parts.texts or parts.features):
        parts.notes.append(f"nothing to show of a {type(sample).__name__}; render= says how to show it")
    return parts


def appearances_of(found: Sequence[Parts]) -> tuple[list[Appearance], list[str]]:
    """The samples as they are shown, their pictures in the range that they have in common.

    Returns:
        One a sample; and complaints, each in words.
    """
    ranges = ranges_of(parts.picture for parts in found if parts.picture is not None)
    appearances, complaints = [], []
    for parts in found:
        address = ""
        if parts.picture is not None:
            try:
                address = address_of(parts.picture, ranges)
            except ImportError:
                parts.notes.append(_NO_PILLOW)
                complaints.append(_NO_PILLOW)
        size = parts.picture.size if parts.picture is not None else (0, 0)
        appearances.append(Appearance(address, size, _joined(parts), tuple(parts.features), "; ".join(parts.notes)))
    return appearances, list(dict.fromkeys(complaints))


def _joined(parts: Parts) -> str:
    """The texts, named if there are several, cut to what fits."""
    several = len(parts.texts) > 1
    text = "\n\n".join(f"{name}: {text}" if several and name else text for name, text in parts.texts)
    if len(text) > _MAX_TEXT:
        parts.notes.append(f"the first {_MAX_TEXT:,} of {len(text):,} characters")
    return text[:_MAX_TEXT]


def _collect(name: str, value: Any, parts: Parts, depth: int) -> None:
    """Sort a value, or all values in it, into the parts."""
    if value is None or depth > _MAX_DEPTH:
        return
    if isinstance(value, str):
        (parts.features if depth and name and len(value) <= _SHORT_TEXT else parts.texts).append((name, value))
    elif isinstance(value, bool | int | float | np.generic):
        parts.features.append((name or "value", _number(value)))
    elif (picture := thumbnail_of(value)) is not None:
        _add_picture(name, picture, parts)
    elif isinstance(value, Tensor | np.ndarray):
        _add_array(name, value, parts)
    else:
        _collect_inner(name, value, parts, depth)


def _collect_inner(name: str, value: Any, parts: Parts, depth: int) -> None:
    if isinstance(value, Mapping):
        is_text = len(value) == 1 and isinstance(next(iter(value.values())), str)  # which then needs no name
        inner = [("" if is_text else str(key), item) for key, item in value.items()]
    elif hasattr(value, "_fields"):
        inner = list(zip(value._fields, value, strict=True))
    elif isinstance(value, tuple | list):
        if value and all(isinstance(item, bool | int | float) for item in value):
            _add_vector(name, value[:_MAX_FEATURES], len(value), parts)
            return
        if value and all(isinstance(item, str) for item in value):
            parts.texts.append((name, " ".join(value)))
            return
        inner = [("" if len(value) == 1 else f"item {i}", item) for i, item in enumerate(value)]
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        inner = [(entry.name, getattr(value, entry.name)) for entry in dataclasses.fields(value)]
    else:
        parts.features.append((name or "value", type(value).__name__))
        return
    for key, item in inner:
        _collect(f"{name}.{key}" if name and key else name or key, item, parts, depth + 1)


def _add_picture(name: str, picture: Thumbnail, parts: Parts) -> None:
    if parts.picture is None:
        parts.picture = picture
        return
    parts.features.append((name or "picture", f"another picture, {picture.size[0]} x {picture.size[1]}"))


def _add_array(name: str, value: Any, parts: Parts) -> None:
    shape = " x ".join(map(str, value.shape))
    try:
        array = _as_numpy(value)
    except (RuntimeError, TypeError):  # sparse ones, say
        parts.features.append((name or "value", f"{shape} numbers"))
        return
    if array.ndim == 0:
        parts.features.append((name or "value", _number(array.item())))
    elif array.ndim == 1:
        _add_vector(name, array[:_MAX_FEATURES].tolist(), len(array), parts)
    else:
        parts.features.append((name or "value", f"{shape} numbers{_spread(array)}"))


def _as_numpy(value: Any) -> NDArray[Any]:
    """The same numbers; those of a type that numpy does not have, such as bfloat16, as float32."""
    if isinstance(value, np.ndarray):
        return value
    tensor = value.detach().cpu()
    is_known = tensor.dtype in (torch.float32, torch.float64) or not tensor.is_floating_point()
    array: NDArray[Any] = (tensor if is_known else tensor.float()).numpy()
    return array


def _spread(array: NDArray[Any]) -> str:
    if not array.size or array.dtype.kind not in "iuf":
        return ""
    with np.errstate(all="ignore"):  # sums of infinite numbers
        low, high, mean = array.min(), array.max(), array.mean(dtype=np.float64)
    return f", from {_number(low)} to {_number(high)}, mean {_number(mean)}"


def _add_vector(name: str, first: Sequence[Any], num: int, parts: Parts) -> None:
    """Whole numbers in a row (tokens, say), others one by one; ``first`` are those of ``num`` that could be shown."""
    if first and all(isinstance(number, int) for number in first):
        shown = " ".join(map(str, first))
        more = f" … ({num} in all)" if num > len(first) else ""
        parts.features.append((name or "values", shown + more))
        return
    prefix = f"{name}[{{}}]" if name else "feature {}"
    for i, number in enumerate(first[:_MAX_VALUES]):
        parts.features.append((prefix.format(i), _number(number)))
    if num > _MAX_VALUES:
        parts.features.append((name or "…", f"{num - _MAX_VALUES} more"))


def _number(value: Any) -> str:
    value = value.item() if isinstance(value, np.generic) else value
    if isinstance(value, float):
        return f"{value:.5g}" if math.isfinite(value) else str(value)
    return str(value)
