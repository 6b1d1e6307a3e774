# SPDX-License-Identifier: Apache-2.0
"""One segment of a trajectory: some steps and states in a file (safetensors), written and read back.

Few tensors hold what many steps have, since each that is written takes Python's lock away from the training.
"""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lightning_sgdclean.errors import RunDirectoryError
from lightning_sgdclean.options import packed, unpacked
from lightning_sgdclean.packing import PackedBatch
from lightning_sgdclean.randomness import RandomState
from lightning_sgdclean.trajectory import MicroBatch, Step

Flat = dict[str, Tensor]  # a state's tensors one after another, by dtype


def write_segment(path: Path, steps: list[Step], states: dict[int, Flat]) -> None:
    """Write steps, and states by the number of the step that they lie before.

    Raises:
        OSError: If it cannot be written.
    """
    random: dict[str, list[Tensor]] = {}
    tensors = {f"state/{index}/{dtype}": tensor for index, flat in states.items() for dtype, tensor in flat.items()}
    rows = []
    for step in steps:
        rows.append(_row(step, random))
        for i, micro in enumerate(step.micro):
            kept = [] if micro.batch is None else micro.batch.tensors
            tensors |= {f"batch/{step.index}/{i}/{n}": tensor for n, tensor in enumerate(kept)}
    if steps:
        tensors["digest"] = torch.cat([micro.digest for step in steps for micro in step.micro])
    tensors |= {f"random/{name}": torch.stack(states) for name, states in random.items()}
    try:
        save_file(tensors, path, metadata={"steps": json.dumps(rows)})
    except SafetensorError as error:
        raise OSError(f"{path} cannot be written: {error}") from error


def _row(step: Step, random: dict[str, list[Tensor]]) -> dict[str, Any]:
    return {
        "index": step.index,
        "epoch": step.epoch,
        "ends_epoch": step.ends_epoch,
        "groups": packed(step.groups),
        "clip": step.clip,
        "divisor": step.divisor,
        "unused": step.unused,
        "micro": [_micro_row(micro, random) for micro in step.micro],
    }


def _micro_row(micro: MicroBatch, random: dict[str, list[Tensor]]) -> dict[str, Any]:
    assert micro.loss is not None
    return {
        "ids": micro.ids,
        "positions": micro.positions,
        "epoch": micro.epoch,
        "batch_idx": micro.batch_idx,
        "loss": float(micro.loss),
        "global_step": micro.global_step,
        "scale": micro.scale,
        "loader": micro.loader,
        "random": {name: _place(tensor, random.setdefault(name, [])) for name, tensor in micro.random.items()},
        "batch": None if micro.batch is None else micro.batch.skeleton,
        "num_tensors": 0 if micro.batch is None else len(micro.batch.tensors),
    }


def _place(tensor: Tensor, held: list[Tensor]) -> int:
    """Where among those held it lies; appended unless it is the last one."""
    if not held or (held[-1] is not tensor and not held[-1].equal(tensor)):
        held.append(tensor)
    return len(held) - 1


class Segment:
    """A segment's file, opened: its steps are read, the rest when it is asked for.

    Raises:
        RunDirectoryError: If it cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self._file = _opened(path)
        self._rows = {row["index"]: row for row in json.loads(self._file.metadata()["steps"])}

    def steps(self) -> list[Step]:
        """The steps. Of batches and random states they have skeletons and names only: the rest may be large."""
        lengths = [len(micro["ids"]) for row in self._rows.values() for micro in row["micro"]]
        digests = iter(self._file.get_tensor("digest").split(lengths) if lengths else ())
        return [_step(row, digests) for row in self._rows.values()]

    def whole_steps(self, before: int) -> Iterator[Step]:
        """Those before a step, with all that was written of them."""
        for step in self.steps():
            if step.index < before:
                for i, micro in enumerate(step.micro):
                    micro.random, micro.batch = self.random(step.index, i), self.batch(step.index, i)
                yield step

    def random(self, index: int, micro: int) -> RandomState:
        """Random state before micro-batch ``micro`` of step ``index``."""
        places = self._rows[index]["micro"][micro]["random"]
        return {name: self._file.get_slice(f"random/{name}")[place] for name, place in places.items()}

    def batch(self, index: int, micro: int) -> PackedBatch | None:
        """Micro-batch ``micro`` of step ``index``, if it was kept."""
        row = self._rows[index]["micro"][micro]
        if row["batch"] is None:
            return None
        names = [f"batch/{index}/{micro}/{n}" for n in range(row["num_tensors"])]
        return PackedBatch(row["batch"], [self._file.get_tensor(name) for name in names])

    def state(self, index: int, dtypes: Iterable[str]) -> Flat:
        """The state before step ``index``, whose tensors are of these dtypes."""
        return {dtype: self._file.get_tensor(f"state/{index}/{dtype}") for dtype in dtypes}


def _opened(path: Path) -> Any:
    try:
        return safe_open(path, "pt")
    except Exception as error:  # safetensors raises its own class, and OSError
        raise RunDirectoryError(f"{path} cannot be read: {error}") from error


def _step(row: dict[str, Any], digests: Iterator[Tensor]) -> Step:
    micro = [_micro(row, next(digests)) for row in row["micro"]]
    clip = tuple(row["clip"]) if row["clip"] else None
    return Step(**row | {"micro": micro, "groups": unpacked(row["groups"]), "clip": clip})


def _micro(row: dict[str, Any], digest: Tensor) -> MicroBatch:
    given = {key: value for key, value in row.items() if key != "num_tensors"}
    given["loss"] = torch.tensor(row["loss"], dtype=torch.float64)
    given["random"] = dict.fromkeys(row["random"], torch.empty(0))
    given["batch"] = None if row["batch"] is None else PackedBatch(row["batch"], [])
    return MicroBatch(**given, digest=digest)
