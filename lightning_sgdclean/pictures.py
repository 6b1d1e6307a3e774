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
    if isinstance(sample, Tensor | np.ndarray):
        return _from_array(sample)
    is_pil = hasattr(sample, "convert") and hasattr(sample, "getbands")  # without importing PIL, nor pixels of others
    return _from_pil(sample) if is_pil else None


def _first(parts: Any) -> NDArray[np.uint8] | None:
    return next((found for part in parts if (found := picture_of(part)) is not None), None)


def _from_pil(image: Any) -> NDArray[np.uint8] | None:
    grey = image.mode in ("1", "L", "LA")
    if image.mode.startswith(("I", "F")):  # 16 bits and more, which converting would cut off
        return _from_array(np.asarray(image))
    return _from_array(np.asarray(image.convert("L" if grey else "RGB")))


def _from_array(values: Tensor | NDArray[Any]) -> NDArray[np.uint8] | None:
    array = _to_numpy(values) if isinstance(values, Tensor) else values
    if array.dtype.kind not in "buif":
        return None
    if array.ndim == 3:
        if array.shape[0] in _CHANNELS:
            array = np.moveaxis(array, 0, -1)
        elif array.shape[2] not in _CHANNELS:
            return None
        array = array[..., 0] if array.shape[2] == 1 else array[..., :3]  # transparency is not shown
    if array.ndim not in (2, 3) or min(array.shape[:2]) < _SMALLEST:
        return None
    return np.ascontiguousarray(_as_bytes(array))


def _to_numpy(tensor: Tensor) -> NDArray[Any]:
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
