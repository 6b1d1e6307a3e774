# SPDX-License-Identifier: Apache-2.0
"""The objective ``F``, as validation computes it, and its gradient: where the walk backwards starts."""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from lightning_sgdclean._lightning import batch_size_of
from lightning_sgdclean.curvature import gradient
from lightning_sgdclean.errors import NonFiniteError, ObjectiveError
from lightning_sgdclean.randomness import untouched_randomness
from lightning_sgdclean.replay import Surroundings, eagerly, logging_to, takes_batch_idx, untouched_module
from lightning_sgdclean.running_stats import RunningStatistics

ObjectiveFn = Callable[[Any, Any], Any]
ValidationBatch = tuple[Any, int, int]  # batch, batch_idx, dataloader_idx


@dataclass
class ObjectiveGradient:
    """``F`` and its derivatives by parameters (in their order) and running statistics (by name)."""

    value: float
    params: list[Tensor]
    buffers: dict[str, Tensor]


def loaders_in(loaders: Any) -> list[Any]:
    """The loaders in one loader, or in a list, tuple or dict of them, in Lightning's order."""
    if isinstance(loaders, dict):
        loaders = list(loaders.values())
    if isinstance(loaders, list | tuple):
        return [found for inner in loaders for found in loaders_in(inner)]
    return [loaders]


def validation_batches(loaders: Any, limits: list[float] | None) -> Iterator[ValidationBatch]:
    """All batches of one loader or several, cut to Lightning's limits."""
    for number, loader in enumerate(loaders_in(loaders)):
        limit = limits[number] if limits is not None and number < len(limits) else math.inf
        for batch_idx, batch in enumerate(islice(loader, None if math.isinf(limit) else int(limit))):
            yield batch, batch_idx, number


def logged_value(
    module: Any, batch: ValidationBatch, monitor: str, num_loaders: int
) -> tuple[Tensor | None, float, list[str]]:
    """Run ``validation_step`` and catch what it logs as ``monitor``.

    Returns:
        The value with its graph (None if this batch logs none of that name), the weight that Lightning
        would give it, and all names that were logged.

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
        step(*arguments)
    name = monitor if monitor in seen else monitor.removesuffix("_epoch")
    if name not in seen:
        return None, 0.0, list(seen)
    value, options = seen[name]
    _check_differentiable(monitor, value, options)
    weight = options.get("batch_size")
    return value.mean(), float(batch_size_of(content) if weight is None else weight), list(seen)


def logs_value(module: Any, batch: ValidationBatch, monitor: str, num_loaders: int, surroundings: Surroundings) -> bool:
    """Whether ``validation_step`` logs ``monitor`` for this batch; module and random state stay as they are.

    Raises:
        ObjectiveError: If it does not, though there is one loader only, or if the value cannot be differentiated.
    """
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        untouched_randomness(surroundings.device),
        untouched_module(module),
        surroundings.as_stage("validate"),
        surroundings.val_context(),
    ):
        value, _, names = logged_value(module, batch, monitor, num_loaders)
    if value is None and num_loaders == 1:
        raise no_such_value(monitor, names)
    return value is not None


def _check_differentiable(monitor: str, value: Any, options: dict[str, Any]) -> None:
    found = None
    if not isinstance(value, Tensor):
        found = f"a {type(value).__name__}"
    elif value.grad_fn is None:
        found = "a tensor without a graph (detached, or made of counts such as an accuracy)"
    elif options.get("reduce_fx", "mean") not in ("mean", torch.mean):
        found = f"a value reduced by {options['reduce_fx']!r} over batches; expected the mean"
    if found is not None:
        raise ObjectiveError(
            f"validation_step logs {monitor!r} as {found}, which cannot be differentiated. Log the loss tensor itself, "
            f"self.log({monitor!r}, loss), or give objective=, a callable (pl_module, batch) -> scalar."
        )


def objective_gradient(
    module: Any,
    params: list[nn.Parameter],
    batches: Iterable[ValidationBatch],
    surroundings: Surroundings,
    monitor: str,
    objective: ObjectiveFn | None,
    num_loaders: int,
) -> ObjectiveGradient:
    """Mean over the validation set, weighted by batch sizes as Lightning weights, and its gradient.

    Raises:
        ObjectiveError: If no batch gives a value of that name, or one that cannot be differentiated.
        NonFiniteError: If the value or its gradient is not finite.
    """
    total, weights = 0.0, 0.0
    by_param = [torch.zeros_like(param) for param in params]
    by_buffer: dict[str, Tensor] = {}
    names: list[str] = []
    module.eval()
    for content, batch_idx, number in batches:
        watched = RunningStatistics(module)
        batch = surroundings.prepare(content, number), batch_idx, number
        with eagerly(), surroundings.val_context(), watched:
            value, weight, seen = (
                logged_value(module, batch, monitor, num_loaders)
                if objective is None
                else _called(objective, module, batch[0])
            )
        names += [name for name in seen if name not in names]
        if value is None:
            continue
        leaves = list(watched.leaves.items())
        found = gradient([value], [*params, *(leaf for _, leaf in leaves)], [torch.full_like(value, weight)])
        torch._foreach_add_(by_param, found[: len(params)])
        for (name, _), grad in zip(leaves, found[len(params) :], strict=True):
            by_buffer[name] = by_buffer[name] + grad if name in by_buffer else grad
        total, weights = total + weight * float(value.detach()), weights + weight
    if weights == 0:
        raise no_such_value(monitor, names)
    result = ObjectiveGradient(
        total / weights, [g / weights for g in by_param], {n: g / weights for n, g in by_buffer.items()}
    )
    if not math.isfinite(result.value) or not all(bool(torch.isfinite(g).all()) for g in result.params):
        raise NonFiniteError(
            f"The objective is {result.value} or its gradient is not finite: nothing can be ranked by it."
        )
    return result


def no_such_value(monitor: str, names: list[str]) -> ObjectiveError:
    """The error for a missing validation value, with those that there are."""
    listed = ", ".join(sorted(names)) if names else "none at all"
    return ObjectiveError(
        f"No value named {monitor!r} was logged in validation_step; names seen: {listed}. Log it there with "
        f"self.log({monitor!r}, loss), give monitor= one of these names, or give objective=."
    )


def _called(objective: ObjectiveFn, module: Any, batch: Any) -> tuple[Tensor, float, list[str]]:
    with logging_to(module, lambda *_, **__: None):
        result = objective(module, batch)
    value, weight = result if isinstance(result, tuple) else (result, None)
    if not isinstance(value, Tensor) or value.numel() != 1 or not value.requires_grad:
        raise ObjectiveError("objective= must return a scalar tensor that can be differentiated, or (scalar, weight).")
    return value.reshape(()), float(batch_size_of(batch) if weight is None else weight), []
