# SPDX-License-Identifier: Apache-2.0
"""Pictures as the page shows them: reduced, spread between black and white, and as an address that holds them."""

import base64
import io
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.functional import interpolate

from lightning_sgdclean.data.pictures import picture_values

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
