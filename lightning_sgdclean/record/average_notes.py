# SPDX-License-Identifier: Apache-2.0
"""When a callback of Lightning's averages the weights, and how.

When it does shows in the callback's own counters. By how much is asked of its function afterwards, with numbers of our
own; once an epoch, all tensors of an update are held against the answer.
"""

from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypedDict

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from lightning_sgdclean.base.errors import RunDirectoryError, UnsupportedTrainingError
from lightning_sgdclean.base.files import read_sealed, write_sealed
from lightning_sgdclean.base.randomness import untouched_randomness
from lightning_sgdclean.trajectory.averages import AverageUpdate, write_averages
from lightning_sgdclean.trajectory.manifest import Count
from lightning_sgdclean.trajectory.store import steps_written

_NOTES = "averaged.json"


class _Kept(TypedDict):
    """What stands in it: see :meth:`AverageNotes.save`."""

    before: Count
    since: Count
    after: list[int]
    asked: list[Count]
    factors: list[list[float]]


class AverageNotes:
    """Notes after which steps a callback of Lightning's updates its averages.

    Attributes:
        names: The callback's; of several, all of theirs.
        said: What the ending is to say of the averages; None where they are not followed, or not known yet.

    Args:
        names: See there.
        callback: A WeightAveraging, whose hooks are Lightning's; None where nothing is followed.
        module: The LightningModule that is trained.
        folder: The trajectory's.
        logged: Values that were validated, by the number of steps made by then: what was validated before an update
            is not of the averages after it, and goes.
    """

    def __init__(
        self,
        names: str = "",
        callback: Any = None,
        module: Any = None,
        folder: Path = Path(),
        logged: dict[int, float] | None = None,
    ) -> None:
        self.names, self._folder = names, folder
        self.said: dict[str, Any] | None = None
        self._callback, self._module, self._logged = callback, module, {} if logged is None else logged
        self._counters: tuple[int, ...] | None = None  # as they were seen last
        self._num_before = self._since = 0  # updates before the first batch, and that batch's step
        self._after: list[int] = []  # step after which each update came
        self._epoch = -1  # of which an update is held against the factors
        self._was: dict[str, Tensor] = {}  # the averages before it
        self._checked: dict[int, list[float]] = {}  # what was answered then, by how many updates came before
        self._written: int | None = None  # how often the averages were written to, when an update was seen last
        self._problem: UnsupportedTrainingError | None = None  # is raised when the training is over

    def look(self, next_step: int, *, is_between: bool) -> None:
        """Whether the averages were updated since the last look.

        Args:
            next_step: One more than the last step's number.
            is_between: Whether no batch waits for its step.
        """
        if self._callback is None or self._problem is not None:
            return
        found = self._now()
        if self._counters is None:
            self._counters, self._num_before, self._since = found, self._num(), next_step
            self._go_on(next_step)
        num = sum(now != was for now, was in zip(found, self._counters, strict=True))
        self._counters = found
        if not num:
            return
        if not is_between:
            self._problem = UnsupportedTrainingError(
                f"{self.names} updated its averages while batches waited for their step, after step {next_step - 1}. "
                "Let should_update say yes only where a step was made."
            )
        self._after += [next_step - 1] * num
        self._logged.pop(next_step, None)
        is_first = self._num_before + len(self._after) == 1  # a copy, which says little
        if self._was and num == 1 and not self._is_in_module():
            self._check()
        self._was = self._copies() if is_first else {}
        self._written = self._times_written()

    def begin_epoch(self, epoch: int) -> None:
        """One update of each epoch is held against the factors: keep the averages before it."""
        if self._callback is not None and epoch != self._epoch:
            self._epoch, self._was = epoch, self._copies()

    def _copies(self) -> dict[str, Tensor]:
        """On the CPU, since the training may need all of the device's memory."""
        return {name: tensor.to("cpu", copy=True) for name, tensor in _held(self._averaged)}

    def _times_written(self) -> int:
        """As torch counts; what validation puts in their place and back does not count."""
        return sum(tensor._version for _, tensor in _held(self._averaged))

    def _is_in_module(self) -> bool:
        """Whether the module holds the averages, as it does when the training is over."""
        live = dict(self._module.named_parameters())
        return all(torch.equal(live[name].to(one), one) for name, one in self._averaged.named_parameters())

    def save(self) -> None:
        """Keep beside the trajectory what a fit has to know that goes on from a checkpoint written now."""
        if self._counters is not None and self._problem is None:
            asked = [1, 2, 3, self._num_before + len(self._after)]
            updates = {"before": self._num_before, "since": self._since, "after": self._after}
            write_sealed(self._folder / _NOTES, {**updates, "asked": asked, "factors": self._answers(asked)})

    def _go_on(self, next_step: int) -> None:
        """Take up what was kept, if that is what has led here: as many updates, by a function that answers the same."""
        if not next_step or not self._num_before or not (self._folder / _NOTES).exists():
            return
        with suppress(RunDirectoryError):
            kept = read_sealed(self._folder / _NOTES, _Kept)
            after = [step for step in kept["after"] if step < next_step]
            is_same = self._answers(kept["asked"]) == kept["factors"]
            if kept["before"] + len(after) == self._num_before and is_same:
                self._num_before, self._since, self._after = kept["before"], kept["since"], after

    def _answers(self, asked: list[int]) -> list[list[float]]:
        return [[*params, *buffers] for params, buffers in self.factors(asked)]

    def close(self) -> None:
        """Write the averages beside the trajectory, once the training has ended.

        Raises:
            UnsupportedTrainingError: If they were not updated as the callback's counters and its function say.
        """
        if self._problem is not None:
            raise self._problem
        if self._callback is None:
            return
        num, seen = self._num(), self._num_before + len(self._after)
        if num != seen:
            raise UnsupportedTrainingError(
                f"{self.names} says that it updated its averages {num} times, but its counters moved {seen} times: "
                "something else updates them. Let only the callback do so."
            )
        if self._written is not None and self._times_written() != self._written:
            raise UnsupportedTrainingError(
                f"Something wrote to the averages of {self.names} after their last update (update_bn, say, which makes "
                "running statistics anew), so they are no sum over the steps any more. Let only the callback write to "
                "them, and make statistics anew after fit."
            )
        if any(self._answers([number]) != [known] for number, known in self._checked.items()):
            raise UnsupportedTrainingError(
                f"The function by which {self.names} averages changed during the training, so how much the weights "
                "count in its averages is not known. Let it depend on its arguments only, the number of updates "
                "among them."
            )
        since = max(self._since, next((step.index for step in steps_written(self._folder)), 0))
        matter = [number for number, step in enumerate(self._after) if step >= since]
        factors = self.factors([self._num_before + number for number in matter])
        updates = [AverageUpdate(self._after[number], *both) for number, both in zip(matter, factors, strict=True)]
        self.said = {"by": self.names, "checksum": self._write(updates), "since": self._since}

    @property
    def _averaged(self) -> nn.Module:
        """Holds the averages."""
        found: nn.Module = self._callback._average_model.module
        return found

    def _now(self) -> tuple[int, ...]:
        """The callback's counters, of which each moves with an update."""
        return self._callback._latest_update_step, self._callback._latest_update_epoch

    def _num(self) -> int:
        """How many updates there were, as the callback counts."""
        return int(self._callback._average_model.n_averaged)

    def _write(self, updates: list[AverageUpdate]) -> str:
        return write_averages(
            self._folder, dict(self._averaged.named_parameters()), dict(self._averaged.named_buffers()), updates
        )

    def _updating(self, weights: nn.Module) -> tuple[nn.Module, Callable[[int], None]]:
        """A stand-in for the averages, and what updates it by ``weights`` as the callback would."""
        real = self._callback._average_model
        given = {"avg_fn": real.avg_fn, "multi_avg_fn": real.multi_avg_fn, "use_buffers": real.use_buffers}
        twin = AveragedModel(weights, **given)

        def update(number: int) -> None:
            twin.n_averaged.fill_(number)
            twin.update_parameters(weights)

        return twin.module, update

    def factors(self, numbers: Sequence[int]) -> list[tuple[tuple[float, float], tuple[float, float]]]:
        """Of parameters and of buffers, ``own`` and ``share`` of an update that so many came before.

        Raises:
            UnsupportedTrainingError: If an update is no sum of multiples of the average and of the weights.
        """
        weights, found = _Numbers(), []
        average: Any
        average, update = self._updating(weights)
        with untouched_randomness(torch.device("cpu")):
            for number in numbers:
                was, now = _numbers(number)
                average.fill(was)
                weights.fill(now)
                try:
                    update(number)
                except Exception as error:  # of the user's function
                    raise UnsupportedTrainingError(
                        f"The function of {self.names} raises {type(error).__name__} for tensors other than the "
                        f"module's ({error}), so how it averages is not known. Average each number by itself."
                    ) from error
                params, buffers = (self._factors(one, was, now) for one in (average.param, average.buffer))
                found.append((params, buffers))
        return found

    def _factors(self, outcome: Tensor, was: Tensor, now: Tensor) -> tuple[float, float]:
        own, share = outcome[:2].tolist()
        if not torch.allclose(outcome.detach(), own * was + share * now, rtol=1e-9, atol=1e-12):
            raise UnsupportedTrainingError(
                f"The averages of {self.names} are no sums of multiples of what they were and of the weights, so what "
                "samples do through them is not followed. Average with a function that is linear in its first two "
                "arguments, such as that of EMAWeightAveraging."
            )
        return own, share

    @torch.no_grad()
    def _check(self) -> None:
        number = self._num_before + len(self._after) - 1
        try:
            of_params, of_buffers = self.factors([number])[0]
        except UnsupportedTrainingError as error:
            self._problem = error
            return
        self._checked[number] = [*of_params, *of_buffers]
        live, buffers = dict(_held(self._module)), dict(self._module.named_buffers())
        for name, now in _held(self._averaged):
            if not now.is_floating_point():
                continue
            own, share = of_buffers if name in buffers else of_params
            was, param, after = self._was[name].double(), live[name].cpu().double(), now.cpu().double()
            eps = max(torch.finfo(one.dtype).eps for one in (now, live[name]))
            bound = _ROUNDINGS * eps * (abs(own) * was.abs() + abs(share) * param.abs())
            off = (after - own * was - share * param).abs()
            if bool((off > bound).any()):
                self._problem = UnsupportedTrainingError(
                    f"The average of {name!r} that {self.names} made after step {self._after[-1]} is not what its "
                    "function makes of other numbers of the same kind. Average each number by itself, all in the same "
                    "way, as EMAWeightAveraging does."
                )


_ROUNDINGS = 16


class EpochAverageNotes(AverageNotes):
    """The same for a StochasticWeightAveraging, which averages the weights that epochs begin with, and no buffers."""

    def close(self) -> None:
        """As of any average, if the callback has put it into the module: it does so only after all epochs."""
        if self._is_in_module():
            super().close()
            self._logged.clear()  # what it validates are trained weights

    @property
    def _averaged(self) -> nn.Module:
        found: nn.Module = self._callback._average_model
        return found

    def _now(self) -> tuple[int, ...]:
        return (self._callback._latest_update_epoch,)

    def _num(self) -> int:
        found = self._callback.n_averaged
        return int(self._callback._init_n_averaged if found is None else found)

    def _write(self, updates: list[AverageUpdate]) -> str:
        last = max((step.index for step in steps_written(self._folder)), default=-1)
        of_end = AverageUpdate(last, params=(1.0, 0.0), buffers=(0.0, 1.0))
        params, buffers = dict(self._averaged.named_parameters()), dict(self._module.named_buffers())
        return write_averages(self._folder, params, buffers, [*updates, of_end])

    def _updating(self, weights: nn.Module) -> tuple[nn.Module, Callable[[int], None]]:
        average, callback = _Numbers(), self._callback

        def update(number: int) -> None:
            callback.update_parameters(average, weights, torch.tensor(number), callback._avg_fn)

        return average, update


def _held(module: nn.Module) -> list[tuple[str, Tensor]]:
    """Parameters and buffers, by name."""
    return [(name, one.detach()) for name, one in (*module.named_parameters(), *module.named_buffers())]


class _Numbers(nn.Module):
    """Stands for a model whose averages are known by hand."""

    buffer: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.param = nn.Parameter(torch.zeros(6, dtype=torch.float64))
        self.register_buffer("buffer", torch.zeros(6, dtype=torch.float64))

    @torch.no_grad()
    def fill(self, numbers: Tensor) -> None:
        """Have both hold these."""
        self.param.copy_(numbers)
        self.buffer.copy_(numbers)


def _numbers(seed: int) -> tuple[Tensor, Tensor]:
    """What an average was, and weights: the first two show the factors, the others whether there are any."""
    source = torch.Generator().manual_seed(seed)
    was, now = torch.randn(2, 6, dtype=torch.float64, generator=source)
    was[:2], now[:2] = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    return was, now
