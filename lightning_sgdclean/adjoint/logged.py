# SPDX-License-Identifier: Apache-2.0
"""What ``validation_step`` says of a batch: the value that it logs, or the one that it returns in its place."""

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from lightning_sgdclean.base.errors import ObjectiveError, warn_of
from lightning_sgdclean.base.lightning import batch_size_of
from lightning_sgdclean.base.options import Options
from lightning_sgdclean.base.randomness import random_state, set_random_state
from lightning_sgdclean.data.batches import cloned
from lightning_sgdclean.data.fetching import ValidationBatch
from lightning_sgdclean.losses.evaluate import takes_batch_idx
from lightning_sgdclean.losses.surroundings import Surroundings, ignore, logging_to
from lightning_sgdclean.losses.verified import callable_in, caller_of, fields_of

_ROUNDINGS = 16
FAR = 1e-4  # relative: no rounding
_CONTRACT = "objective=, a callable (pl_module, batch) -> scalar that can be differentiated"


class Said(NamedTuple):
    """What is said of one validation batch.

    Attributes:
        value: A scalar; None if nothing is said.
        weight: What it weighs in the mean over batches.
        names: All names that were logged.
        source: Where it comes from: it was ``"logged"`` for the batch; it is that of a ``"metric"``, whose value over
            the epoch may be no mean over batches; or ``validation_step`` ``"returned"`` it and logs nothing of that
            name. The mean of the latter two has to be compared with what was logged at the epoch's end.
    """

    value: Tensor | None
    weight: float
    names: list[str]
    source: Literal["logged", "metric", "returned"] = "logged"


def logged_value(module: Any, batch: ValidationBatch, monitor: str, num_loaders: int, needs_graph: bool = True) -> Said:
    """Run ``validation_step`` and catch what it logs as ``monitor``, or returns in its place.

    What was logged without a graph (a detached loss, a number) is replaced by the loss that ``validation_step``
    returns, alone or as ``"loss"``, if that has the same value.

    Args:
        module: The LightningModule.
        batch: One of the validation set.
        monitor: Name of the value.
        num_loaders: How many validation loaders there are.
        needs_graph: Whether the value is to be differentiated.

    Raises:
        ObjectiveError: If the value cannot be differentiated, or is not averaged over batches.
    """
    content, batch_idx, number = batch
    seen: dict[str, tuple[Any, dict[str, Any]]] = {}

    def receive(name: str, value: Any, *_: Any, **options: Any) -> None:
        full = name
        if num_loaders > 1 and options.get("add_dataloader_idx", True):
            full = f"{name}/dataloader_idx_{number}"
        seen[full] = value, options

    with logging_to(module, receive):
        step = module.validation_step
        arguments = [content, *([batch_idx] if takes_batch_idx(step) else []), *([number] if num_loaders > 1 else [])]
        returned = returned_loss(step(*arguments))
    name = monitor if monitor in seen else monitor.removesuffix("_epoch")
    has_graph = returned is not None and (returned.requires_grad or not needs_graph)
    if name not in seen:
        # Of several loaders, those that another value is logged for return a loss as well.
        is_taken = has_graph and num_loaders == 1
        return Said(returned, 1.0, list(seen), "returned") if is_taken else Said(None, 0.0, list(seen))
    logged, options = seen[name]
    if options.get("reduce_fx", "mean") not in ("mean", torch.mean):
        found = f"a value reduced by {options['reduce_fx']!r} over batches; expected the mean"
        raise _no_gradient(monitor, found, f"Log the mean, or give {_CONTRACT}.")
    is_metric = not isinstance(logged, Tensor) and hasattr(logged, "_forward_cache")  # torchmetrics, as Lightning asks
    value = logged._forward_cache if is_metric else logged
    if not (isinstance(value, Tensor) and (value.grad_fn is not None or not needs_graph)):
        value = _with_graph(module, content, monitor, logged, value, returned if has_graph else None, needs_graph)
    weight = options.get("batch_size")
    check_weight(weight)
    weight = float(batch_size_of(content) if weight is None else weight)
    return Said(value.mean(), weight, list(seen), "metric" if is_metric else "logged")


def said_again(
    module: Any,
    batch: ValidationBatch,
    num_loaders: int,
    options: Options,
    around: Surroundings,
    restore: Callable[[], None],
) -> Said:
    """What ``validation_step`` says of a batch, if it says the same twice from the same random state.

    Args:
        module: The LightningModule.
        batch: As ``validation_step`` gets it.
        num_loaders: How many validation loaders there are.
        options: The callback's.
        around: What stands for the Trainer.
        restore: Puts the module's plain attributes back.

    Raises:
        ObjectiveError: If it says something else, or nothing though there is one loader only, or as
            :func:`logged_value`.
    """
    content, *numbers = batch
    random, found = random_state(around.device), []
    with around.as_stage("validate"), around.val_context():
        for _ in range(2):
            set_random_state(random, around.device)
            found.append(logged_value(module, (cloned(content), *numbers), options.monitor, num_loaders))
            restore()
    said, again = (one.value for one in found)
    if said is None and num_loaders == 1:
        raise no_such_value(options.monitor, found[0].names)
    if said is not None and again is not None and _differ(plain(said), plain(again)):
        text = (
            f"validation_step gives {options.monitor!r} as {plain(said)!r} and then as {plain(again)!r} for one batch, "
            "one model and one random state: it draws from a generator of its own (torch.Generator, "
            "np.random.default_rng), or counts its calls. So the objective cannot be computed again. Draw from the "
            "global generator of torch, NumPy or Python, or give objective=, a callable (pl_module, batch) -> scalar."
        )
        if options.on_mismatch == "raise":
            raise ObjectiveError(text)
        warn_of([text])
    return found[0]


def returned_loss(output: Any) -> Tensor | None:
    """The scalar that a step returns, alone or as ``"loss"``."""
    loss = output.get("loss") if isinstance(output, Mapping) else output
    return loss.reshape(()) if isinstance(loss, Tensor) and loss.numel() == 1 else None


def _with_graph(
    module: Any, content: Any, monitor: str, logged: Any, value: Any, returned: Tensor | None, needs_graph: bool
) -> Tensor:
    """What stands for a logged value that has no graph; ``value`` is its number, as a metric has it."""
    number = plain(value) if _is_number(value) else None
    if number is not None and returned is not None and is_close(number, plain(returned), value, returned):
        return returned
    if number is not None and not needs_graph:
        return torch.tensor(number, dtype=torch.float64)
    found = f"a {type(logged).__name__}"
    if isinstance(logged, Tensor):
        found = "a tensor without a graph (detached, or made of counts such as an accuracy)"
    if number is not None and returned is not None:
        found += f", {number!r}, and returns another value, {plain(returned)!r}"
    advice = "" if number is None else objective_advice(module, content, number)
    raise _no_gradient(monitor, found, f"Log the loss tensor itself, self.log({monitor!r}, loss), {advice or _GIVE}")


_GIVE = f"or give {_CONTRACT}."


def _no_gradient(monitor: str, found: str, remedy: str) -> ObjectiveError:
    return ObjectiveError(f"validation_step logs {monitor!r} as {found}, which cannot be differentiated. {remedy}")


def plain(value: Any) -> float:
    """A number, or a tensor of one, which may have a graph."""
    return float(value.detach() if isinstance(value, Tensor) else value)


def _differ(one: float, other: float) -> bool:
    return math.isfinite(one) and not math.isclose(one, other, rel_tol=FAR)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) or (isinstance(value, Tensor) and value.numel() == 1)


def is_close(one: float, other: float, *tensors: Any) -> bool:
    """Whether two values are the same but for rounding in the precision of the tensors that they were made of."""
    kinds = [tensor.dtype for tensor in tensors if isinstance(tensor, Tensor) and tensor.is_floating_point()]
    eps = max((torch.finfo(kind).eps for kind in kinds), default=torch.finfo(torch.float32).eps)
    return math.isclose(one, other, rel_tol=_ROUNDINGS * eps, abs_tol=1e-12)


def objective_advice(module: Any, content: Any, logged: float) -> str:
    """What to give as ``objective=``: a line whose value on this batch is the logged one, or the contract alone.

    Args:
        module: The LightningModule, in the state that the value was logged in.
        content: The batch.
        logged: The value.
    """
    for line in _lines(module, content):
        try:
            with torch.enable_grad(), logging_to(module, ignore):
                found = callable_in(line)(module, content)
            is_scalar = isinstance(found, Tensor) and found.numel() == 1 and found.requires_grad
            if is_scalar and is_close(plain(found), logged, found):
                return f"or give objective={line}, which has that value here."
        except Exception:  # whatever the module makes of a line that is not made for it
            continue
    return _GIVE


def _lines(module: Any, content: Any) -> list[str]:
    fields = fields_of(content, int(batch_size_of(content)))
    lines = [f"lambda m, batch: m.training_step(batch, 0){part}" for part in ("", "['loss']")]
    if len(fields) > 1:
        output = f"{caller_of(module)}({fields[0]})"
        lines += [f"lambda m, batch: F.{name}({output}, {fields[1]})" for name in ("cross_entropy", "mse_loss")]
    return lines


def no_such_value(monitor: str, names: list[str], more: str = "") -> ObjectiveError:
    """The error for a missing validation value, with those that there are."""
    listed = ", ".join(sorted(names)) if names else "none at all"
    return ObjectiveError(
        f"No value named {monitor!r} was logged in validation_step; names seen: {listed}.{more} Log it there with "
        f"self.log({monitor!r}, loss), give monitor= one of these names, or give objective=."
    )


def unlike(mean: float, logged: Any) -> str:
    """Why what ``validation_step`` returns, with this mean, cannot stand for the value logged at the epoch's end."""
    if logged is None:
        return (
            f" What validation_step returns has the mean {mean!r}; nothing of that name was logged at the end of the "
            "epoch to hold it against."
        )
    return (
        f" What validation_step returns has the mean {mean!r}, but {plain(logged)!r} was logged at the end of the "
        "epoch, so that is another value."
    )


def check_weight(weight: Any) -> None:
    """Is what a batch weighs in the objective's mean a constant?

    Raises:
        ObjectiveError: If it depends on the parameters.
    """
    if isinstance(weight, Tensor) and weight.requires_grad:
        raise ObjectiveError(
            "The weight of a batch in the objective's mean depends on the parameters, which is not followed. Detach "
            "it, or give objective=, a callable (pl_module, batch) -> (scalar, weight) with a weight that is a number."
        )
