# SPDX-License-Identifier: Apache-2.0
"""What stands for the Trainer around a module, and what the module keeps in itself: set up, noted, put back."""

import operator
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, Dataset

from lightning_sgdclean.base.lightning import silent_logger


@dataclass(frozen=True)
class Surroundings:
    """What a LightningModule sees around its steps, as callables: the later stages need no Trainer.

    Attributes:
        device: Where the module and its batches belong.
        prepare: ``(batch, dataloader_idx)`` -> the batch converted, moved and through the transfer hooks.
        train_context: Precision context of a training step.
        val_context: Precision context of a validation step.
        set_clock: ``(epoch, global_step)`` that ``current_epoch`` and ``global_step`` are to show.
        precision: The Trainer's, e.g. ``"32-true"`` or ``"bf16-mixed"``.
        as_stage: Context in which the Trainer claims to be ``"train"`` or ``"validate"`` and logs nowhere.
        widen: Brings a prepared batch to the precision to compute in.
    """

    device: torch.device
    prepare: Callable[[Any, int], Any]
    train_context: Callable[[], AbstractContextManager[Any]]
    val_context: Callable[[], AbstractContextManager[Any]]
    set_clock: Callable[[int, int], None]
    precision: str
    as_stage: Callable[[str], AbstractContextManager[Any]]
    widen: Callable[[Any], Any] = lambda batch: batch


def surroundings_of(trainer: Any, module: Any) -> Surroundings:
    """What ``module`` saw around its steps under this Trainer."""
    epochs = trainer.fit_loop.epoch_progress.current
    steps = trainer.fit_loop.epoch_loop.automatic_optimization.optim_progress.optimizer.step.total

    def prepare(batch: Any, dataloader_idx: int) -> Any:
        batch = trainer.precision_plugin.convert_input(batch)
        batch = module._on_before_batch_transfer(batch, dataloader_idx=dataloader_idx)
        return trainer.strategy.batch_to_device(batch, dataloader_idx=dataloader_idx)

    def set_clock(epoch: int, global_step: int) -> None:
        epochs.completed, steps.completed = epoch, global_step

    @contextmanager
    def as_stage(stage: str) -> Iterator[None]:
        loggers, found, clock = trainer.loggers, trainer.state.stage, (epochs.completed, steps.completed)
        put_options_back = _options_of(trainer)
        trainer.loggers = [silent_logger(trainer)] if loggers else []
        setattr(trainer, "training" if stage == "train" else "validating", True)
        try:
            yield
        finally:
            trainer.loggers, trainer.state.stage = loggers, found
            set_clock(*clock)
            put_options_back()

    return Surroundings(
        device=trainer.strategy.root_device,
        prepare=prepare,
        train_context=trainer.precision_plugin.train_step_context,
        val_context=trainer.precision_plugin.val_step_context,
        set_clock=set_clock,
        precision=str(trainer.precision),
        as_stage=as_stage,
    )


_TORCH_OWN = frozenset({"_parameters", "_buffers", "_modules"})
_CONTAINERS = (list, dict, set, deque)
_NOT_THE_USERS = frozenset(
    {"torch", "torchmetrics", "lightning", "pytorch_lightning", "lightning_fabric", "numpy", "builtins", "functools"}
)


class Attributes:
    """The plain attributes of a module and its submodules, as they were when this was made.

    Noted are which object each attribute is, the members of lists, dicts, sets and deques (nested, too), the
    attributes of the user's own objects, and the content of tensors and arrays that are attributes themselves.
    Tensors within containers are noted by identity alone: a list of all losses so far would be slow to copy.
    """

    def __init__(self, module: nn.Module) -> None:
        self._namespaces: list[tuple[dict[str, Any], dict[str, Any]]] = []
        self._containers: list[tuple[Any, Any]] = []
        self._arrays: list[tuple[Any, Any]] = []
        self._seen: set[int] = set()
        for part in module.modules():
            self._note_namespace(vars(part))

    def _note_namespace(self, live: dict[str, Any]) -> None:
        saved = {name: value for name, value in live.items() if name not in _TORCH_OWN}
        self._namespaces.append((live, saved))
        for value in saved.values():
            if isinstance(value, Tensor):
                self._arrays.append((value, value.detach().clone()))
            elif isinstance(value, np.ndarray):
                self._arrays.append((value, value.copy()))
            else:
                self._note(value)

    def _note(self, value: Any) -> None:
        if id(value) in self._seen:
            return
        if type(value) in _CONTAINERS:
            self._seen.add(id(value))
            self._containers.append((value, value.copy()))
            for member in _members(value):
                self._note(member)
        elif type(value) is tuple:
            for member in value:
                self._note(member)
        elif _is_own_object(value):
            self._seen.add(id(value))
            self._note_namespace(vars(value))

    def restore(self) -> None:
        """Put everything back, the very objects."""
        for live, saved in self._namespaces:
            for name in [name for name in live if name not in saved and name not in _TORCH_OWN]:
                del live[name]
            live.update(saved)
        for live, content in self._containers:
            if not _holds(live, content):
                live.clear()
                live.extend(content) if isinstance(live, list | deque) else live.update(content)
        with torch.no_grad():
            for array, content in self._arrays:  # what did not change may be part of a graph: writing would break it
                if isinstance(array, Tensor):
                    if not torch.equal(array, content):
                        array.copy_(content)
                else:
                    np.copyto(array, content)


def _members(container: Any) -> Iterator[Any]:
    return iter(container.values() if isinstance(container, dict) else container)


def _holds(live: Any, content: Any) -> bool:
    """Whether a container has these very members, in this order."""
    if len(live) != len(content):
        return False
    if isinstance(live, dict) and not all(map(operator.is_, live, content)):
        return False
    return live == content if isinstance(live, set) else all(map(operator.is_, _members(live), _members(content)))


def _is_own_object(value: Any) -> bool:
    """Whether this is an object of the user's that may keep state: no module, data set, class or function."""
    return (
        hasattr(value, "__dict__")
        and not callable(getattr(value, "forward", None))
        and not isinstance(value, type | nn.Module | Dataset | DataLoader | torch.Generator)
        and type(value).__module__.partition(".")[0] not in _NOT_THE_USERS
    )


@contextmanager
def untouched_module(module: nn.Module) -> Iterator[Callable[[], None]]:
    """Leave the module as it was found: parameters, buffers, modes, metric states, its lists.

    Yields:
        A callable that restores all but parameters and buffers already now, so that a module that
        collects its losses in a list does not collect those of every replayed step.
    """
    attributes = Attributes(module)
    owners = [(part, name, buffer) for part in module.modules() for name, buffer in part._buffers.items()]
    tensors = [*module.parameters(), *(buffer for *_, buffer in owners if buffer is not None)]
    contents = [tensor.detach().clone() for tensor in tensors]
    try:
        yield attributes.restore
    finally:
        attributes.restore()
        for part, name, buffer in owners:
            part._buffers[name] = buffer
        with torch.no_grad():
            for tensor, content in zip(tensors, contents, strict=True):
                tensor.copy_(content)


def _options_of(trainer: Any) -> Callable[[], None]:
    """Note the optimizers' options and the schedulers' state, which a ``training_step`` may move; puts them back."""
    noted = [(group, dict(group)) for optimizer in trainer.optimizers for group in optimizer.param_groups]
    noted += [(vars(config.scheduler), dict(vars(config.scheduler))) for config in trainer.lr_scheduler_configs]
    values = [value for _, saved in noted for value in saved.values()]
    tensors = [(value, value.detach().clone()) for value in values if isinstance(value, Tensor)]
    lists = [(value, value.copy()) for value in values if type(value) is list]

    def put_back() -> None:
        for live, saved in noted:
            live.clear()
            live.update(saved)
        for content, saved_content in lists:
            content[:] = saved_content
        with torch.no_grad():
            for tensor, saved_tensor in tensors:
                tensor.copy_(saved_tensor)

    return put_back


@contextmanager
def untouched_options(optimizer: Optimizer) -> Iterator[None]:
    """Within the block the optimizer makes no step; what is written to its groups meanwhile is put back."""
    groups = [(group, dict(group)) for group in optimizer.param_groups]
    options = [value for group, _ in groups for key, value in group.items() if key != "params"]
    tensors = [(value, value.detach().clone()) for value in options if isinstance(value, Tensor)]
    own: dict[str, Any] = {name: vars(optimizer)[name] for name in ("step", "zero_grad") if name in vars(optimizer)}
    vars(optimizer).update(step=ignore, zero_grad=ignore)
    try:
        yield
    finally:
        for name in ("step", "zero_grad"):
            del vars(optimizer)[name]
        vars(optimizer).update(own)
        for group, saved in groups:
            group.clear()
            group.update(saved)
        with torch.no_grad():
            for tensor, content in tensors:
                tensor.copy_(content)


@contextmanager
def logging_to(module: Any, receive: Callable[..., None]) -> Iterator[None]:
    """Within the block ``self.log`` and ``self.log_dict`` of the module go to ``receive(name, value, **options)``."""

    def log_dict(dictionary: Any, *args: Any, **options: Any) -> None:
        for name, value in dictionary.items():
            receive(name, value, *args, **options)

    module.__dict__.update(log=receive, log_dict=log_dict)
    try:
        yield
    finally:
        for name in ("log", "log_dict"):
            module.__dict__.pop(name, None)


def eagerly() -> AbstractContextManager[Any]:
    """Run compiled parts of the module as they were written: what was compiled without our watchers passes by them."""
    return torch.compiler.set_stance("force_eager")  # type: ignore[no-any-return]


def ignore(*_: Any, **__: Any) -> None:
    """Log nowhere."""
