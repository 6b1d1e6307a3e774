# SPDX-License-Identifier: Apache-2.0
"""Are learning rates, momenta and the like functions of the step alone, or do they follow the training?

Influences take them for constants. A rate that is computed from losses or weights is none: a sample moves it as well.
So the schedulers are asked again when the training is over. What is a function of the step gives the recorded rates
once more; what reads the model, or a metric, now reads another one.
"""

import copy
import math
import warnings
from array import array
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from operator import is_, methodcaller
from types import FunctionType, MethodType
from typing import Any

import numpy as np
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lightning_sgdclean.base.lightning import gradient_hooks
from lightning_sgdclean.base.randomness import untouched_randomness
from lightning_sgdclean.losses.module_state import untouched_module
from lightning_sgdclean.losses.surroundings import ignore, logging_to, surroundings_of, untouched_options
from lightning_sgdclean.trajectory.live_state import counted_options
from lightning_sgdclean.trajectory.records import Step

_MOST_PERIODS = 16
_SAME = 1e-6  # relative; rates of several schedulers are products, rounded in any order


class _Period:
    """Steps during which the same schedulers were at work, and copies of these as they stood at the first of them."""

    def __init__(self, first: int, configs: list[Any]) -> None:
        self.first = first
        self.configs = [copy.copy(config) for config in configs]  # a callback may put another scheduler into one
        self._schedulers = [config.scheduler for config in configs]
        self.copies = [*map(_copy_of, self._schedulers)]
        self._counters = [*map(_counter_of, self._schedulers)]
        self._rows = array("q")  # of each step its number, and how often each scheduler had been stepped by then
        self.began_with = self._now()

    def is_of(self, configs: list[Any]) -> bool:
        """Whether these are its schedulers."""
        now = [config.scheduler for config in configs]
        return len(now) == len(self._schedulers) and all(map(is_, self._schedulers, now))

    def note(self, index: int) -> None:
        """The optimizer made this step."""
        if self.configs:
            self._rows.extend((index, *self._now()))

    def _now(self) -> list[int]:
        return [-1 if counter is None else int(counter.last_epoch) for counter in self._counters]

    def counts(self) -> dict[int, list[int]]:
        """How often each scheduler had been stepped, by the number of the step."""
        table = np.array(self._rows, dtype=np.int64).reshape(-1, 1 + len(self.configs)).tolist()
        return {index: counts for index, *counts in table}


@dataclass(frozen=True)
class _Seen:
    """Of a recorded step what matters here."""

    index: int
    epoch: int
    batch_idx: int
    ends_epoch: bool
    groups: list[dict[str, Any]]


class RateNotes:
    """Notes while training goes on how far the schedulers are, and asks them again when it is over.

    Args:
        trainer: The Trainer, before it has taken up a checkpoint.
        goes_on: Whether the trajectory holds the steps of a fit before this one.
    """

    def __init__(self, trainer: Any, goes_on: bool) -> None:
        self._periods: list[_Period] = []
        self._from_scratch = _Period(0, trainer.lr_scheduler_configs)
        self._groups: list[dict[str, Any]] | None = None
        self._may_vary = goes_on

    def note(self, trainer: Any, index: int, groups: list[dict[str, Any]]) -> None:
        """The optimizer made step ``index`` with these options; the schedulers were not stepped since."""
        self._may_vary = self._may_vary or (self._groups is not None and self._groups is not groups)
        self._groups = groups
        configs = trainer.lr_scheduler_configs
        if not self._periods or not self._periods[-1].is_of(configs):
            if len(self._periods) == _MOST_PERIODS:  # of schedulers made anew all the time nothing can be said
                return
            self._periods.append(_Period(index, configs))
        self._periods[-1].note(index)

    def unexplained(self, trainer: Any, module: Any, steps: Iterable[Step]) -> dict[str, Any]:
        """What changed in the recorded steps, and is no function of the step alone as far as can be told.

        The user's functions are called with the module as it is now. Everything is afterwards as it was.

        Args:
            trainer: The Trainer, whose fit has come to its end.
            module: The LightningModule.
            steps: The recorded steps, in order.

        Returns:
            Of the first such change ``group`` (its number), ``option``, ``by`` (schedulers, or the module's own hook;
            empty where it was neither), ``raised`` (by these, asked again) and ``first``, the step before which it
            came; ``last`` is that of the last one. Nothing if there is none.
        """
        if not self._may_vary or not self._periods:
            return {}
        seen = [_Seen(each.index, each.epoch, each.micro[-1].batch_idx, each.ends_epoch, each.groups) for each in steps]
        varying = _varying([step.groups for step in seen if step.groups], counted_options(trainer.optimizers[0]))
        if not varying:
            return {}
        hook, found = f"{type(module).__name__}.optimizer_step", {}
        for asked in ("", hook) if hook in gradient_hooks(trainer, module) else ("",):
            with _untouched(trainer, module) as set_clock:
                found = self._compared(seen, _Twins(module, trainer.optimizers[0], varying, set_clock, asked))
            if not found:
                break
        return found

    def _compared(self, seen: list[_Seen], twins: "_Twins") -> dict[str, Any]:
        """What the twins do not explain; see :meth:`unexplained`."""
        found: dict[str, Any] = {}
        coming, counts = [*self._periods], self._counts_before(seen)
        twins.begin(self._from_scratch)
        before: _Seen | None = None
        for step in seen:
            is_given = before is None or step.index > before.index + 1  # others were let go between the two
            while coming and coming[0].first <= step.index:
                is_given, counts = True, coming[0].counts()
                twins.begin(coming.pop(0))
            if step.groups:
                advanced = twins.go_to(before or step, counts.get(step.index), is_given)
                differing = twins.compare(step, is_given)
                if differing is not None:
                    by = " and ".join(advanced) or twins.hook
                    group, option = differing
                    found = found or {"group": group, "option": option, "by": by, "raised": "", "first": step.index}
                    found |= {"raised": twins.raised, "last": step.index}
            before = step
        return found

    def _counts_before(self, seen: list[_Seen]) -> dict[int, list[int]]:
        """How often the schedulers had been stepped in the fits that this one goes on from, by Lightning's rules."""
        first = self._periods[0]
        counts = next(iter(first.counts().values()), None)
        if counts is None or len(first.configs) != len(self._from_scratch.configs):
            return {}
        found = {}
        for step in reversed([step for step in seen if step.index < first.first]):
            counts = [count - _is_due(config, step) for count, config in zip(counts, first.configs, strict=True)]
            found[step.index] = counts
        return found


def _is_due(config: Any, step: _Seen) -> bool:
    """Whether Lightning steps a scheduler after this step."""
    by_step = config.interval == "step"
    return (by_step or step.ends_epoch) and ((step.batch_idx if by_step else step.epoch) + 1) % config.frequency == 0


class _Twins:
    """Copies of the schedulers that are stepped again, and write to the optimizer's own groups.

    Attributes:
        hook: The user's ``optimizer_step`` if it is asked as well, by name; else empty.
        raised: What a function of the user's raised, in words.
    """

    def __init__(
        self,
        module: Any,
        optimizer: Optimizer,
        varying: list[tuple[int, str]],
        set_clock: Callable[[int, int], None],
        hook: str,
    ) -> None:
        self._module, self._optimizer, self._varying = module, optimizer, varying
        self._set_clock, self.hook, self.raised = set_clock, hook, ""
        self._jumps: list[Any] = []  # steps of schedulers that wait for a metric

    def begin(self, period: _Period) -> None:
        """Take up the schedulers of another period as they stood at its beginning."""
        self._twins = [_copy_of(scheduler) for scheduler in period.copies]
        self._configs, self._done = period.configs, period.began_with

    def go_to(self, before: _Seen, counts: list[int] | None, is_given: bool) -> list[str]:
        """Step them, as after the step ``before``, until they were stepped so often; names of those that were."""
        advanced: list[str] = []
        self._jumps = []
        self._set_clock(before.epoch, before.index + 1)
        counts = counts or self._done
        for twin, config, done, wanted in zip(self._twins, self._configs, self._done, counts, strict=True):
            due = wanted - done if wanted >= 0 else int(not is_given and _is_due(config, before))  # not counted
            for _ in range(due if twin is not None else 0):
                if config.reduce_on_plateau:
                    self._jumps.append(twin)
                else:
                    self._ask(self._module.lr_scheduler_step, twin, None)
            advanced += [type(config.scheduler).__name__] * (due > 0)
        self._done = counts
        return advanced

    def _ask(self, function: Callable[..., Any], *arguments: Any) -> None:
        try:
            function(*arguments)
        except Exception as error:  # the user's, of any kind
            self.raised = f"{type(error).__name__}: {error}"

    def compare(self, step: _Seen, is_given: bool) -> tuple[int, str] | None:
        """Hold the options against those that were recorded of a step, and go on with the recorded ones.

        Args:
            step: The step.
            is_given: Whether these are to be taken as they are.

        Returns:
            Group and name of the first option that is another one.
        """
        found: list[tuple[int, str] | None] = []

        def make_step(closure: Any = None) -> None:
            """What the user's hook calls in its middle: it may set the next step's options afterwards."""
            if closure is not None:
                closure()
            if not found:
                found.append(None if is_given else self._differing(step))
                self._take(step)

        if self.hook:
            self._set_clock(step.epoch, step.index)
            self._optimizer.__dict__["step"] = make_step
            self._ask(self._module.optimizer_step, step.epoch, step.batch_idx, self._optimizer, ignore)
        make_step()
        return found[0]

    def _differing(self, step: _Seen) -> tuple[int, str] | None:
        found = self._first_differing(step)
        while found is not None and self._jumps:  # on a plateau the rate falls; when, is a matter of the metric
            self._ask(methodcaller("_reduce_lr", 0), self._jumps.pop(0))
            found = self._first_differing(step)
        return found

    def _first_differing(self, step: _Seen) -> tuple[int, str] | None:
        now = self._optimizer.param_groups
        for number, key in self._varying:
            if key in step.groups[number] and not _is_same(now[number].get(key), step.groups[number][key]):
                return number, key
        return None

    def _take(self, step: _Seen) -> None:
        """Have the optimizer's options be the recorded ones, which differ in the last bit at most if at all."""
        for group, key in self._varying:
            options, value = self._optimizer.param_groups[group], step.groups[group].get(key)
            if value is None:
                continue
            value = value.item() if isinstance(value, Tensor) else value
            if isinstance(options.get(key), Tensor):
                options[key].fill_(value)
            else:
                options[key] = tuple(value) if isinstance(value, list) else value


def _varying(recorded: list[list[dict[str, Any]]], counted: tuple[str, ...]) -> list[tuple[int, str]]:
    """Group and name of the options that are not always the same; what is no number with a point moves in jumps."""
    found: dict[tuple[int, str], None] = {}
    first = last = recorded[0] if recorded else []
    for groups in recorded:
        if groups is not last:
            pairs = [(n, key) for n, group in enumerate(groups) for key in group if key not in ("params", *counted)]
            found |= {(n, key): None for n, key in pairs if not _is_same(groups[n][key], first[n].get(key), 0.0)}
            last = groups
    jumping = int | str | None
    return [(n, key) for n, key in found if not all(isinstance(groups[n].get(key), jumping) for groups in recorded)]


def _is_same(one: Any, other: Any, slack: float = _SAME) -> bool:
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(_is_same(a, b, slack) for a, b in zip(one, other, strict=True))
    if isinstance(one, Tensor | int | float) and isinstance(other, Tensor | int | float):
        return math.isclose(float(one), float(other), rel_tol=slack, abs_tol=0.0)
    return bool(one == other)


@contextmanager
def _untouched(trainer: Any, module: Any) -> Iterator[Callable[[int, int], None]]:
    """Functions of the user's may be called within, and nothing is another afterwards.

    Yields:
        What sets the epoch and the step that they see.
    """
    around = surroundings_of(trainer, module)
    with (
        warnings.catch_warnings(),
        untouched_randomness(around.device),
        untouched_module(module),
        logging_to(module, ignore),
        around.as_stage("train"),
        untouched_options(trainer.optimizers[0]),
    ):
        warnings.simplefilter("ignore")
        yield around.set_clock


def _counter_of(scheduler: Any) -> Any:
    """What counts how often a scheduler was stepped; None where nothing does."""
    inner = getattr(scheduler, "_schedulers", None)
    if not hasattr(scheduler, "last_epoch") and inner:  # ChainedScheduler
        return _counter_of(inner[0])
    return scheduler if isinstance(getattr(scheduler, "last_epoch", None), int | float) else None


def _copy_of(scheduler: Any) -> Any:
    """A scheduler with numbers and containers of its own, or None where it cannot be copied; functions are shared."""
    try:
        twin = object.__new__(type(scheduler))
        vars(twin).update({name: _own(value, scheduler, twin) for name, value in vars(scheduler).items()})
    except Exception:  # theirs, of any kind: then it cannot be asked
        return None
    return twin


def _own(value: Any, scheduler: Any, twin: Any) -> Any:
    if isinstance(value, LRScheduler):
        return _copy_of(value)
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, list | tuple) and type(value) in (list, tuple):
        return type(value)(_own(item, scheduler, twin) for item in value)
    if isinstance(value, MethodType) and value.__self__ is scheduler:
        return MethodType(value.__func__, twin)
    is_object = callable(value) and not isinstance(value, type | FunctionType | MethodType | nn.Module)
    return copy.copy(value) if is_object or isinstance(value, dict | set) else value
