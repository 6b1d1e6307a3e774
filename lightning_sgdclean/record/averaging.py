# SPDX-License-Identifier: Apache-2.0
"""Callbacks that end the training with averages of the weights: which of them are followed."""

import dis
import warnings
from pathlib import Path
from types import BuiltinFunctionType, FunctionType, ModuleType
from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from lightning_sgdclean.base.errors import SGDInfluenceWarning, UnsupportedTrainingError
from lightning_sgdclean.base.lightning import LIGHTNING_MODULES, check_callbacks
from lightning_sgdclean.record.average_notes import AverageNotes, EpochAverageNotes

# What makes the averages, of each of Lightning's callbacks.
_HOOKS = {
    "WeightAveraging": (
        "setup",
        "on_train_batch_end",
        "on_train_epoch_end",
        "on_train_end",
        "on_validation_epoch_start",
        "on_validation_epoch_end",
        "_swap_models",
        "_copy_average_to_current",
    ),
    "StochasticWeightAveraging": (
        "setup",
        "on_fit_start",
        "on_train_epoch_start",
        "on_train_epoch_end",
        "on_train_end",
        "update_parameters",
        "transfer_weights",
    ),
}


def averaging_of(trainer: Any, at: str, folder: Path, logged: dict[int, float]) -> AverageNotes:
    """What follows the averages of a Trainer's callback, if one has them and can be followed.

    Args:
        trainer: The Trainer, with its fit set up.
        at: The end point that is asked for.
        folder: The trajectory's.
        logged: See :class:`AverageNotes`.

    Raises:
        UnsupportedTrainingError: If the average is followed, but not at the best model, or is no sum of multiples, or
            if the callback will round the weights.
    """
    callbacks = check_callbacks(trainer)
    names = ", ".join(type(callback).__name__ for callback in callbacks)
    if not callbacks:
        return AverageNotes()
    why = (
        _why_not(callbacks[0], trainer.lightning_module)
        if len(callbacks) == 1
        else "the Trainer has several such callbacks"
    )
    if why:
        warnings.warn(
            f"{names} replaces the weights when training ends, and is not followed: {why}. The ranking is of the "
            "weights after the last optimizer step, not of the averaged ones.",
            SGDInfluenceWarning,
            stacklevel=2,
        )
        return AverageNotes(names)
    kind = _base_of(callbacks[0]).__name__
    if at == "best" and kind == "StochasticWeightAveraging":
        return AverageNotes(names)  # what is saved before the end are trained weights
    if at == "best":
        raise UnsupportedTrainingError(
            f'at="best" ends at the model that ModelCheckpoint saved, which holds the averages of {names} there. They '
            'are followed to the end of the training only. Use at="last".'
        )
    if kind == "WeightAveraging":
        _check_dtypes(names, callbacks[0]._average_model.module, trainer.lightning_module)
    follows = AverageNotes if kind == "WeightAveraging" else EpochAverageNotes
    notes = follows(names, callbacks[0], trainer.lightning_module, folder, logged)
    notes.factors(range(1, 4))  # refuses before training what no sum of multiples is
    return notes


def _check_dtypes(names: str, average: nn.Module, module: nn.Module) -> None:
    """The callback copies the module before the Trainer converts it, and keeps the weights there while it validates."""
    live = dict(module.named_parameters())
    for name, one in average.named_parameters():
        if torch.finfo(one.dtype).eps > torch.finfo(live[name].dtype).eps:
            raise UnsupportedTrainingError(
                f"{names} holds its averages in {one.dtype}, as the module was before the Trainer converted it to "
                f"{live[name].dtype}, and rounds the weights to that whenever it validates. Convert the module before "
                "fit, by model.double() for 64 bits."
            )


def _base_of(callback: Any) -> type:
    """Lightning's class that makes the averages."""
    kinds = [kind for kind in type(callback).__mro__ if kind.__module__.startswith(LIGHTNING_MODULES)]
    return next((kind for kind in kinds if kind.__name__ in _HOOKS), object)


def _why_not(callback: Any, module: nn.Module) -> str:
    """Why a callback's averages are not followed; empty where they are."""
    base = _base_of(callback)
    if base is object:
        return "it is none of Lightning's"
    named = _HOOKS[base.__name__]
    own = [name for name in named if getattr(type(callback), name, None) is not getattr(base, name, None)]
    if own:
        return f"it has a method {own[0]} of its own"
    functions = [getattr(callback, "_avg_fn", None)]
    if base.__name__ == "WeightAveraging":
        averaged = callback._average_model
        if type(averaged) is not AveragedModel:
            return f"its model is a {type(averaged).__name__}"
        functions = [averaged.avg_fn, averaged.multi_avg_fn]
    elif any(isinstance(one, nn.modules.batchnorm._BatchNorm) for one in module.modules()):
        return "it makes the running statistics of BatchNorm anew, in one more pass over the training data"
    if not all(function is None or _keeps_nothing(function) for function in functions):
        return "its function may remember something between calls; it should be a plain function of its arguments"
    return ""


def _keeps_nothing(function: Any) -> bool:
    """Whether to call a function once more does nothing to later calls, as far as its code tells."""
    while isinstance(function, FunctionType) and function.__globals__["__name__"].startswith("torch."):
        if not hasattr(function, "__wrapped__"):  # as by torch.no_grad
            break
        function = function.__wrapped__
    if not isinstance(function, FunctionType):
        return False
    code, known = function.__code__, function.__globals__
    cells = [cell.cell_contents for cell in function.__closure__ or ()]
    read = [known[name] for name in code.co_names if name in known]
    fixed = (bool, int, float, str, type(None))
    defaults = [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
    held = all(isinstance(value, fixed) for value in [*cells, *defaults])
    seen = all(isinstance(value, (*fixed, ModuleType, FunctionType, BuiltinFunctionType, type)) for value in read)
    writes = any(
        one.opname in ("STORE_GLOBAL", "STORE_ATTR", "DELETE_GLOBAL")
        or (one.opname == "STORE_DEREF" and one.argval in code.co_freevars)
        for one in dis.get_instructions(code)
    )
    return held and seen and not writes
