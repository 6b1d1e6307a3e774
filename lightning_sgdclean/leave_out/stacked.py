# SPDX-License-Identifier: Apache-2.0
"""Many runs at once by ``torch.func.vmap``, their states side by side.

Whether the module's code means the same under ``vmap`` is checked: now and then one run's gradient is computed by
itself, too, and where the two differ, all runs are made one by one.
"""

import copy
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from lightning_sgdclean.adjoint.objective import objective_values
from lightning_sgdclean.adjoint.optimizers import Gradients, clipped, is_elementwise, update_of
from lightning_sgdclean.base.resources import slots_for
from lightning_sgdclean.losses.evaluate import RecordedBatch
from lightning_sgdclean.losses.precision import is_low
from lightning_sgdclean.replay.forward import Borrowed, Weights, accumulate, live_state, load_all, losses_of
from lightning_sgdclean.replay.replay import OpenedRun, Replay
from lightning_sgdclean.trajectory.records import State, Step, copied, nudged


class BatchedStates:
    """The states of ``K`` runs. The first is that of the live module and optimizer when this is made.

    Attributes:
        params: By name, each ``(K, ...)``.
        buffers: Likewise.
    """

    def __init__(self, replay: Replay, optimizer: Borrowed) -> None:
        self._replay, self._optimizer = replay, optimizer
        self._update = update_of(optimizer.optimizer)
        self.params = {name: param.detach()[None].clone().requires_grad_() for name, param in replay.params.items()}
        self.buffers = {name: buffer.detach()[None].clone() for name, buffer in replay.module.named_buffers()}
        self._entries = {name: self._entries_of(param) for name, param in replay.params.items()}

    def __len__(self) -> int:
        return len(next(iter(self.params.values())))

    def _entries_of(self, param: Tensor) -> dict[str, Any]:
        entries = self._optimizer.optimizer.state.get(param, {})
        return {
            key: value[None].clone() if self._has_rows(key, value) else copy.copy(value)
            for key, value in entries.items()
        }

    def _has_rows(self, key: str, value: Any) -> bool:
        """Whether an entry of the optimizer's state has a part for each run; counters are the same for all."""
        return isinstance(value, Tensor) and self._update.is_followed(key, value)

    def append(self, seeds: list[int | None]) -> None:
        """Copies of the first row, one for each seed; with a seed, off by rounding errors."""
        first_new, num = len(self), len(seeds)
        self.params = {name: _more(tensor, num) for name, tensor in self.params.items()}
        self.buffers = {name: _more(tensor, num) for name, tensor in self.buffers.items()}
        for entries in self._entries.values():
            entries |= {key: _more(value, num) for key, value in entries.items() if self._has_rows(key, value)}
        for number, seed in enumerate(seeds, first_new):
            if seed is not None:
                for name, param in nudged({name: t[number] for name, t in self.params.items()}, seed).items():
                    self.params[name][number] = param
        for tensor in self.params.values():
            tensor.requires_grad_()

    def state(self, number: int) -> State:
        """The state of one run, in tensors of its own."""
        optimizer = {
            name: {
                key: value[number] if self._has_rows(key, value) else value
                for key, value in entries.items()
                if isinstance(value, Tensor)
            }
            for name, entries in self._entries.items()
        }
        params = {name: tensor[number] for name, tensor in self.params.items()}
        return copied(State(params, {name: tensor[number] for name, tensor in self.buffers.items()}, optimizer))

    @torch.no_grad()
    def step(self, step: Step, gradients: Gradients) -> None:
        """Clip each run's gradients by themselves, then let the user's optimizer step them all as one tensor."""
        optimizer = self._optimizer.optimizer
        for name, gradient in clipped(gradients, step.clip).items():
            self.params[name].grad = gradient
        held = [group["params"] for group in optimizer.param_groups]
        rows = {id(param): self.params[name] for name, param in self._replay.params.items()}
        self._optimizer.set_options(step.groups)
        for group, params in zip(optimizer.param_groups, held, strict=True):
            group["params"] = [rows.get(id(param), param) for param in params]
        optimizer.state.update({self.params[name]: entries for name, entries in self._entries.items() if entries})
        try:
            self._optimizer.step(None)
        finally:
            for name, tensor in self.params.items():
                self._entries[name] = optimizer.state.pop(tensor, {})
                tensor.grad = None
            for group, params in zip(optimizer.param_groups, held, strict=True):
                group["params"] = params


def _more(tensor: Tensor, num: int) -> Tensor:
    """The rows, and copies of the first."""
    return torch.cat([tensor.detach(), tensor.detach()[:1].expand(num, *tensor.shape[1:])])


_NUM_CHECKS = 8
_FEW = 4  # runs
_MOST = 128  # runs: more at once are no faster
_LARGE = 1 << 20  # bytes: on a CPU, runs that compute more in a step are as fast one by one


class NotVmappedError(Exception):
    """The runs have to be made one by one; says why."""


class VmappedRuns:
    """Runs side by side; the first is that which happened, so that the others differ from it by their samples alone."""

    def __init__(self, this: OpenedRun, optimizer: Borrowed) -> None:
        self._this, self._replay, self._optimizer = this, this.replay, optimizer
        self._bound, self._places = _Bound(this.replay.module), _places(this.replay.module)
        self._rows: BatchedStates | None = None  # made when the first run joins
        self._num_steps, self._every = 0, max(1, len(this.steps) // _NUM_CHECKS)
        is_double = next(iter(this.replay.params.values())).dtype is torch.float64
        self._tolerance = 1e-9 if is_double else 1e-4

    @staticmethod
    def why_not(this: OpenedRun, num_runs: int, is_wanted: bool) -> str | None:
        """Why runs are not to be made at once, as far as can be told before; None if nothing speaks against it.

        Args:
            this: The run.
            num_runs: How many there are.
            is_wanted: Whether they are to be made at once even where that is no faster.
        """
        module, optimizer = this.replay.module, this.run.optimizer
        if not is_elementwise(optimizer):
            return f"a step of {type(optimizer).__name__} may mix the numbers of a tensor"
        if this.replay.teachers.live:
            return "the module has teachers"
        if this.averages is not None:
            return f"{this.averages.by} averages the weights"
        if is_low(this.replay.surroundings, module) or any(
            micro.scale not in (0.0, 1.0) for step in this.steps for micro in step.micro
        ):
            return "the run computes in 16 bits"
        if not type(module).backward.__module__.startswith(("lightning.", "pytorch_lightning.")):
            return "the module has a backward of its own"
        if is_wanted:
            return None
        if num_runs < _FEW:
            return "there are few of them"
        if this.replay.surroundings.device.type == "cpu" and bytes_of_a_run(this) > _LARGE:
            return "a step of this module keeps a processor busy as it is"
        return None

    @staticmethod
    def at_once(this: OpenedRun) -> int:
        """How many runs fit in memory."""
        return max(1, min(_MOST, slots_for(2 * bytes_of_a_run(this), this.replay.surroundings.device)))

    def join(self, seeds: list[int | None]) -> None:
        """See :class:`lightning_sgdclean.leave_out.leave_out.Runs`."""
        if seeds:
            self._some_rows().append(seeds)

    def _some_rows(self) -> BatchedStates:
        if self._rows is None:
            self._rows = BatchedStates(self._replay, self._optimizer)
        return self._rows

    def step(self, step: Step, batches: list[RecordedBatch], weights: list[Weights]) -> None:
        """See :class:`lightning_sgdclean.leave_out.leave_out.Runs`.

        Raises:
            NotVmappedError: If the module cannot be called for all of them, or means something else then.
        """
        rows = self._some_rows()
        looked_at = self._looked_at(weights) if step.is_update else None
        before = None if looked_at is None else rows.state(looked_at)
        with _or_one_by_one(self._this):
            gradients = self._gradients(step, batches, weights)
        if looked_at is not None and before is not None:
            own: Weights = [None] * len(batches) if looked_at == 0 else weights[looked_at - 1]
            found = {name: None if g is None else g[looked_at] for name, g in gradients.items()}
            moved = {name: buffer[looked_at] for name, buffer in rows.buffers.items()}
            self._check(step, before, losses_of(batches, own), found, moved)
        if step.is_update:
            rows.step(step, gradients)

    def _looked_at(self, weights: list[Weights]) -> int | None:
        """The run to look at in this step, if it is time: a different one each time, one that does without a sample."""
        due, turn = self._num_steps % self._every == 0, self._num_steps // self._every
        self._num_steps += 1
        without = [number for number, each in enumerate(weights, 1) if any(one is not None for one in each)]
        chosen = without or [*range(len(weights) + 1)]
        return chosen[turn % len(chosen)] if due else None

    def _gradients(self, step: Step, batches: list[RecordedBatch], weights: list[Weights]) -> Gradients:
        """Move the buffers of all runs, and sum up the gradients of each; None for parameters that are not used."""
        params = self._some_rows().params
        total: dict[str, Tensor | None] = dict.fromkeys(params)
        for number, batch in enumerate(batches):
            given = [each[number] for each in weights]
            some = next((one for one in given if one is not None), None)
            if some is None:
                losses = self._everywhere(batch.loss)
            else:
                ones = torch.ones_like(some)
                losses = self._everywhere(batch.loss, torch.stack([ones, *(ones if w is None else w for w in given)]))
            self._replay.restore()
            if not step.is_update or not batch.micro.scale:
                continue
            found = torch.autograd.grad((losses / step.divisor).sum(), [*params.values()], allow_unused=True)
            for name, gradient in zip(params, found, strict=True):
                before = total[name]
                total[name] = gradient if before is None else before if gradient is None else before + gradient
        return total

    def _everywhere(self, function: Callable[..., Tensor], *by_run: Tensor) -> Tensor:
        """Call a function of the live module for all runs, each with its row of ``by_run``."""
        rows = self._some_rows()

        def of_one(tensors: dict[str, Tensor], *given: Tensor) -> Tensor:
            result: Tensor = functional_call(self._bound, tensors, (function, *given), tie_weights=False)
            return result

        known = rows.params | rows.buffers
        tensors = {f"module.{place}": known[name] for place, name in self._places.items() if name in known}
        values: Tensor = vmap(of_one, randomness="same")(tensors, *by_run)
        return values

    def _check(
        self,
        step: Step,
        before: State,
        loss_of: Callable[[int], Tensor],
        gradients: Gradients,
        buffers: dict[str, Tensor],
    ) -> None:
        """Are the gradients of one run, and its buffers after the step, what they are by itself?"""
        replay, optimizer = self._replay, self._optimizer
        happened = copied(live_state(replay, optimizer))
        load_all(replay, optimizer, before)
        accumulate(step, replay, optimizer, loss_of)
        alone = {name: param.grad for name, param in replay.params.items()}
        moved = {name: buffer.detach().clone() for name, buffer in replay.module.named_buffers()}
        load_all(replay, optimizer, happened)
        if off_by(alone, gradients) > self._tolerance:
            raise NotVmappedError("side by side, runs of this module have other gradients than one by one")
        if any(off_by({name: moved[name]}, {name: buffers[name]}) > self._tolerance for name in moved):
            raise NotVmappedError("side by side, runs of this module move its buffers otherwise than one by one")

    def values(self) -> list[float]:
        """See :class:`lightning_sgdclean.leave_out.leave_out.Runs`.

        Raises:
            NotVmappedError: If the validation cannot be called for all of them, or means something else then.
        """
        rows, this = self._some_rows(), self._this
        with _or_one_by_one(this):
            values = objective_values(self._replay, *this.validation(), this.options, self._everywhere)
        for number in {0, len(rows) - 1}:
            load_all(self._replay, self._optimizer, rows.state(number))
            (alone,) = objective_values(self._replay, *this.validation(), this.options, lambda value: value()[None])
            both_diverged = math.isnan(alone) and math.isnan(values[number])
            if not both_diverged and not math.isclose(alone, values[number], rel_tol=self._tolerance):
                raise NotVmappedError("side by side, runs of this module have other objectives than one by one")
        return values


class _Bound(nn.Module):
    """Makes a function of a live module one that takes the module's tensors."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, function: Callable[..., Tensor], *given: Tensor) -> Tensor:
        return function(*given)


def _places(module: nn.Module) -> dict[str, str]:
    """Every place that holds a tensor, and the name that the tensor goes by.

    A module that is reached by two paths is one place. ``functional_call`` would take it for two, put a tensor there
    twice, and put back what it had put there the first time.
    """
    names = {id(tensor): name for name, tensor in (*module.named_parameters(), *module.named_buffers())}
    return {
        f"{path}.{name}".removeprefix("."): names[id(tensor)]
        for path, part in module.named_modules()
        for held in (part.named_parameters, part.named_buffers)
        for name, tensor in held(recurse=False, remove_duplicate=False)
    }


def off_by(alone: Mapping[str, Tensor | None], beside: Mapping[str, Tensor | None]) -> float:
    """How far apart tensors are as one vector, relative to its length; what is None counts as zero."""
    size = off = 0.0
    for name, one in alone.items():
        found = [tensor.detach().double() for tensor in (one, beside[name]) if tensor is not None]
        if found:
            size += max(float(tensor.pow(2).sum()) for tensor in found)
            off += float((found[0] - (found[1] if len(found) > 1 else 0.0)).pow(2).sum())
    return math.sqrt(off / size) if off else 0.0


def bytes_of_a_run(this: OpenedRun) -> int:
    """What a step of one run needs: state, gradients, and what the loss keeps for its derivative."""
    sizes: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    first = next(step for step in this.steps if step.is_update)
    with (
        this.replay.surroundings.as_stage("train"),
        torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor),
    ):
        this.replay.batch(first, 0).loss()
    this.replay.restore()
    return 2 * this.trajectory.state_bytes + sum(sizes.values())


@contextmanager
def _or_one_by_one(this: OpenedRun) -> Iterator[None]:
    """Whatever goes wrong in a module that is called for many runs at once: by itself it may be right."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="There is a performance drop")
            yield
    except Exception as error:
        this.replay.restore()
        text = str(error).partition("\n")[0]
        reason = f"called for all of them at once, the module fails ({type(error).__name__}: {text})"
        raise NotVmappedError(reason) from error
