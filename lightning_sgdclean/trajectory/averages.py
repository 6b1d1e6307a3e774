# SPDX-License-Identifier: Apache-2.0
"""Averages of the weights that a callback of Lightning ends the training with, as a function of the trajectory.

Each update makes the average ``own`` times what it was, plus ``share`` times the weights after a step. So the last
average is a sum of the weights after the steps, each times a number: that number is what a derivative needs, and what
samples left out move the average by. Buffers, which may be averaged or copied, have numbers of their own.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lightning_sgdclean.base.errors import RunDirectoryError, UnsupportedTrainingError
from lightning_sgdclean.base.files import appearing_whole, check_plain, checksum_of, naming
from lightning_sgdclean.trajectory.records import State

_NAME = "averages.safetensors"

Factors = tuple[float, float]  # own, share


@dataclass(frozen=True)
class AverageUpdate:
    """One update of the average.

    Attributes:
        step: Number of the step after which it was made.
        params: ``own`` and ``share`` of parameters.
        buffers: The same of buffers.
    """

    step: int
    params: Factors
    buffers: Factors


@dataclass(frozen=True)
class Averages:
    """The averages that a training ended with.

    Attributes:
        by: The callback that made them.
        params: The averaged parameters, by name.
        buffers: The averaged buffers.
        of_params: What the weights after each step count in ``params``, by the step's number.
        of_buffers: Likewise of buffers.
    """

    by: str
    params: dict[str, Tensor]
    buffers: dict[str, Tensor]
    of_params: dict[int, float]
    of_buffers: dict[int, float]

    def state(self, end: State) -> State:
        """The end point: the averages in the place of what the last step left."""
        both = self.params | self.buffers
        return State(
            {name: both.get(name, tensor) for name, tensor in end.params.items()},
            {name: both.get(name, tensor) for name, tensor in end.buffers.items()},
            end.optimizer,
        )

    def weight_of(self, name: str, step: int) -> float:
        """What the tensor of this name after a step counts in its average."""
        return (self.of_buffers if name in self.buffers else self.of_params).get(step, 0.0)


class Drift:
    """How far the averages of a run beside the one that happened lie from the recorded ones, in float64."""

    def __init__(self, averages: Averages) -> None:
        self._averages = averages
        self._sums: dict[str, Tensor] = {}

    def add(self, step: int, state: State, happened: State) -> None:
        """Take in what a step left in the run, and in the one that happened."""
        for name, tensor, other in _pairs(state, happened):
            weight = self._averages.weight_of(name, step)
            if weight and tensor.is_floating_point():
                self._sums[name] = self._sums.get(name, 0.0) + weight * (tensor.double() - other.double())

    def state(self, end: State) -> State:
        """The run's end point, where ``end`` is what its last step left."""
        whole = self._averages.state(end)
        for held in (whole.params, whole.buffers):
            moved = {name: self._sums[name] for name in held.keys() & self._sums.keys()}
            held |= {name: (held[name].to(by) + by).to(held[name].dtype) for name, by in moved.items()}
        return whole


def _pairs(state: State, other: State) -> Iterable[tuple[str, Tensor, Tensor]]:
    for ours, theirs in ((state.params, other.params), (state.buffers, other.buffers)):
        yield from ((name, tensor, theirs[name]) for name, tensor in ours.items())


def write_averages(
    folder: Path, params: Mapping[str, Tensor], buffers: Mapping[str, Tensor], updates: list[AverageUpdate]
) -> str:
    """Write them beside a trajectory; the checksum of the file.

    Args:
        folder: The trajectory's.
        params: The averaged parameters, by name.
        buffers: The averaged buffers.
        updates: The last of them, in order, as many as may matter.
    """
    held = {f"param/{name}": param for name, param in params.items()}
    held |= {f"buffer/{name}": buffer for name, buffer in buffers.items()}
    tensors = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in held.items()}
    tensors["steps"] = torch.tensor([one.step for one in updates], dtype=torch.int64)
    factors = [[*one.params, *one.buffers] for one in updates]
    tensors["factors"] = torch.tensor(factors, dtype=torch.float64).reshape(-1, 4)
    with appearing_whole(folder / _NAME) as temporary:
        save_file(tensors, temporary)
    return checksum_of(folder / _NAME)


def read_averages(folder: Path, said: Mapping[str, Any], first: int) -> Averages:
    """Undo :func:`write_averages`.

    Args:
        folder: The trajectory's.
        said: What its ending says: ``by``, ``checksum``, and ``since``, the first step whose updates are known.
        first: Number of the first step that they are asked for.

    Raises:
        RunDirectoryError: If the file is gone or damaged.
        UnsupportedTrainingError: If what steps from ``first`` on count in them is not known.
    """
    path = folder / _NAME
    try:
        check_plain(path)
    except FileNotFoundError as error:
        raise RunDirectoryError(
            f"{path} is missing, though the run ended with the averages of {said['by']}. Restore it from a copy."
        ) from error
    if checksum_of(path) != said["checksum"]:
        raise RunDirectoryError(f"{path} is damaged, or that of another fit. Restore the run directory from a copy.")
    with naming(path):
        tensors = load_file(path)
        steps, factors = tensors.pop("steps").tolist(), tensors.pop("factors").tolist()
        rows = list(zip(steps, factors, strict=True))
        (of_params, left), (of_buffers, of_others) = (
            _weights([(step, (row[column], row[column + 1])) for step, row in rows]) for column in (0, 2)
        )
        parts: dict[str, dict[str, Tensor]] = {"param": {}, "buffer": {}}
        for name, tensor in tensors.items():
            kind, _, own = name.partition("/")
            parts[kind][own] = tensor
    if first < said["since"] and (left or (of_others and parts["buffer"])):
        raise UnsupportedTrainingError(
            f"The weights that {said['by']} averaged before step {said['since']} count in its averages, but the fit "
            f"went on from a checkpoint there, so how much is not known; the window begins with step {first}. Ask for "
            "fewer epochs (epochs=), or train again without an interruption."
        )
    return Averages(said["by"], parts["param"], parts["buffer"], of_params, of_buffers)


def _weights(updates: list[tuple[int, Factors]]) -> tuple[dict[int, float], float]:
    """What the weights after each step count, and what is left for the average as it was before all of that."""
    found: dict[int, float] = {}
    left = 1.0
    for step, (own, share) in reversed(updates):
        found[step] = found.get(step, 0.0) + left * share
        left *= own
    return found, left
