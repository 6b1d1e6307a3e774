# SPDX-License-Identifier: Apache-2.0
"""A parameter group's options: which of them are recorded, and how JSON holds them.

Tensors of one element stay tensors: a float32 learning rate makes torch round the step size to float32.
"""

from typing import Any

import torch
from torch import Tensor

_PLAIN = (bool, int, float, str, type(None))


def is_plain(value: Any) -> bool:
    """Whether an option is a number, a string, None, a tensor of one element, or a sequence of such."""
    if isinstance(value, Tensor):
        return value.numel() == 1
    return isinstance(value, _PLAIN) or (isinstance(value, list | tuple) and all(is_plain(v) for v in value))


def noted(value: Any) -> Any:
    """A plain option as it stands now, apart from the optimizer's own: tensors copied, tuples as lists."""
    if isinstance(value, Tensor):
        return value.detach().cpu().reshape(()).clone()
    return [noted(item) for item in value] if isinstance(value, list | tuple) else value


def packed(value: Any) -> Any:
    """A noted option, or a mapping of such, as JSON can hold it."""
    if isinstance(value, Tensor):
        return {"tensor": value.item(), "dtype": str(value.dtype).removeprefix("torch.")}
    if isinstance(value, dict):
        return {key: packed(item) for key, item in value.items()}
    return [packed(item) for item in value] if isinstance(value, list) else value


def unpacked(value: Any) -> Any:
    """Undo :func:`packed`."""
    if isinstance(value, dict):
        if value.keys() == {"tensor", "dtype"}:
            return torch.tensor(value["tensor"], dtype=getattr(torch, value["dtype"]))
        return {key: unpacked(item) for key, item in value.items()}
    return [unpacked(item) for item in value] if isinstance(value, list) else value
