# SPDX-License-Identifier: Apache-2.0
"""The picture in a sample of an image dataset, as pixels that can be shown."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_SMALLEST = 4  # pixels a side; what is flatter is a table or a vector
_CHANNELS = (1, 3, 4)


def picture_of(sample: Any) -> NDArray[np.uint8] | None:
    """The first picture in a sample, however the sample is nested.

    A picture is a PIL image, or a tensor or array ``(C, H, W)``, ``(H, W, C)`` with 1, 3 or 4 channels, or ``(H, W)``,
    of 4 pixels a side at least. Fractions from 0 to 1 and whole numbers from 0 to 255 are taken as they are; values
    that reach beyond (normalised images) are stretched, the smallest to black and the largest to white.

    Args:
        sample: What ``dataset[position]`` gives.

    Returns:
        Grey values ``(H, W)`` or colours ``(H, W, 3)``, or None if there is no picture.
    """
    if isinstance(sample, Mapping):
        return _first(list(sample.values()))
    if isinstance(sample, list | tuple):
        return _first(sample)
    values = picture_values(sample)
    if values is None:
        return None
    colours = values[..., 0] if values.shape[2] == 1 else values[..., :3]  # transparency is not shown
    return np.ascontiguousarray(_as_bytes(colours))


def picture_values(value: Any) -> NDArray[Any] | None:
    """The picture that a single value is, its numbers as they are.

    Args:
        value: A PIL image, a tensor or an array, as for :func:`picture_of`.

    Returns:
        Numbers ``(H, W, C)`` with 1, 3 or 4 channels, or None if it is no picture.
    """
    if isinstance(value, Tensor | np.ndarray):
        return _from_array(value)
    is_pil = hasattr(value, "convert") and hasattr(value, "getbands")  # without importing PIL, nor pixels of others
    return _from_pil(value) if is_pil else None


def _first(parts: Any) -> NDArray[np.uint8] | None:
    return next((found for part in parts if (found := picture_of(part)) is not None), None)


def _from_pil(image: Any) -> NDArray[Any] | None:
    if image.mode.startswith(("I", "F")):  # 16 bits and more, which converting would cut off
        return _from_array(np.asarray(image))
    clear = image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info
    grey = image.mode in ("1", "L")
    return _from_array(np.asarray(image.convert("RGBA" if clear else "L" if grey else "RGB")))


def _from_array(values: Tensor | NDArray[Any]) -> NDArray[Any] | None:
    if not 2 <= values.ndim <= 3:
        return None
    array = _to_numpy(values) if isinstance(values, Tensor) else values
    if array is None or array.dtype.kind not in "buif":
        return None
    if array.ndim == 2:
        array = array[..., None]
    elif array.shape[0] in _CHANNELS and min(array.shape[1:]) >= _SMALLEST:
        array = np.moveaxis(array, 0, -1)
    if array.shape[2] not in _CHANNELS or min(array.shape[:2]) < _SMALLEST:
        return None
    return array


def _to_numpy(tensor: Tensor) -> NDArray[Any] | None:
    if tensor.layout is not torch.strided or tensor.is_quantized:
        return None
    tensor = tensor.detach().cpu()
    found: NDArray[Any] = (tensor.float() if tensor.dtype is torch.bfloat16 else tensor).numpy()
    return found


def _as_bytes(array: NDArray[Any]) -> NDArray[np.uint8]:
    if array.dtype == np.uint8:
        return array
    values = np.nan_to_num(array.astype(np.float64), posinf=0.0, neginf=0.0)
    low, high = float(values.min()), float(values.max())
    top = 1.0 if array.dtype.kind in "bf" else 255.0
    if low < 0.0 or high > top:
        values, top = values - low, max(high - low, 1e-300)
    return (values / top * 255).round().astype(np.uint8)
