# SPDX-License-Identifier: Apache-2.0
"""The line to write where a loss could not be split: made of the module and the batch that were seen."""

import inspect
from typing import Any

from torch import Tensor, nn

_CONTRACT = "sample_losses=, a callable (pl_module, batch) -> tensor of shape (B,) whose mean is the training loss"


def advice_for(module: nn.Module, batch: Any, num: int) -> str:
    """What to do about a loss that cannot be split, with a line for this module and this batch.

    Args:
        module: The LightningModule.
        batch: As ``training_step`` gets it.
        num: ``B``.
    """
    fields = _fields(batch, num)
    inputs = fields[0] if fields else "batch"
    target = fields[1] if len(fields) > 1 else inputs
    output = f"{_caller(module)}({inputs})"
    criterion = next((name for name, part in module.named_children() if _is_loss(part)), None)
    if criterion is not None:
        pairs = f"for out, y in zip({output}, {target}, strict=True)"
        line = f"torch.stack([m.{criterion}(out[None], y[None]) {pairs}])"
        return f"Give {_CONTRACT}; here, probably: sample_losses=lambda m, batch: {line}"
    last = _last_return(module)
    ends = f"; training_step ends with `{last}`: give what stood before the mean over the batch" if last else ""
    line = f'F.cross_entropy({output}, {target}, reduction="none")'
    return f"Give {_CONTRACT}{ends}. For a classifier: sample_losses=lambda m, batch: {line}"


def _fields(batch: Any, num: int) -> list[str]:
    """How the batch's tensors that have a row for each sample are reached."""
    if isinstance(batch, dict):
        named = [(f"batch[{key!r}]", value) for key, value in batch.items()]
    elif isinstance(batch, list | tuple):
        named = [(f"batch[{number}]", value) for number, value in enumerate(batch)]
    else:
        named = [("batch", batch)]
    return [name for name, value in named if isinstance(value, Tensor) and value.ndim and value.shape[0] == num]


def _caller(module: nn.Module) -> str:
    """How the network is called: the module itself, or its first part where it has no forward of its own."""
    owner = next((kind for kind in type(module).__mro__ if "forward" in vars(kind)), nn.Module)
    if owner.__module__.startswith(("lightning.", "pytorch_lightning.", "torch.")):
        part = next((name for name, part in module.named_children() if not _is_loss(part)), None)
        return "m" if part is None else f"m.{part}"
    return "m"


def _is_loss(part: nn.Module) -> bool:
    name = type(part).__name__.lower()
    return "loss" in name or "entropy" in name or "criterion" in name


def _last_return(module: Any) -> str | None:
    try:
        lines = inspect.getsource(module.training_step).splitlines()
    except (OSError, TypeError):
        return None
    found = [line.strip() for line in lines if line.strip().startswith("return ")]
    return found[-1] if found else None
