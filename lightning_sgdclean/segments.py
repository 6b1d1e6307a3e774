# SPDX-License-Identifier: Apache-2.0
"""One segment of a trajectory: some steps and states in a file (safetensors), written and read back.

Few tensors hold what many steps have, since each that is written takes Python's lock away from the training.
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lightning_sgdclean.errors import RunDirectoryError
from lightning_sgdclean.flat_state import Flat
from lightning_sgdclean.options import packed, unpacked
from lightning_sgdclean.packing import PackedBatch
from lightning_sgdclean.randomness import RandomState
from lightning_sgdclean.trajectory import MicroBatch, SampleId, Step


@dataclass
class _Held:
    """What the rows of a segment's steps only point to, since JSON would be slow with it."""

    random: dict[str, list[Tensor]] = field(default_factory=dict)
    ids: "list[np.ndarray[Any, Any]]" = field(default_factory=list)
    groups: tuple[list[dict[str, Any]], Any] = field(default_factory=lambda: ([], []))  # the last ones, and packed

    def packed_groups(self, groups: list[dict[str, Any]]) -> Any:
        """As JSON holds them; the same object for the same groups."""
        if groups is not self.groups[0]:
            self.groups = groups, packed(groups)
        return self.groups[1]


def write_segment(path: Path, steps: list[Step], states: dict[int, Flat]) -> None:
    """Write steps, and states by the number of the step that they lie before.

    Raises:
        OSError: If it cannot be written.
    """
    held = _Held()
    tensors = {f"state/{index}/{dtype}": tensor for index, flat in states.items() for dtype, tensor in flat.items()}
    rows = []
    for step in steps:
        rows.append(_row(step, held))
        for i, micro in enumerate(step.micro):
            kept = [] if micro.batch is None else micro.batch.tensors
            tensors |= {f"batch/{step.index}/{i}/{n}": tensor for n, tensor in enumerate(kept)}
    tensors["steps"] = torch.frombuffer(bytearray(json.dumps(rows).encode()), dtype=torch.uint8)
    if steps:
        digests = [micro.digest for step in steps for micro in step.micro if micro.digest is not None]
        tensors["digest"] = torch.cat(digests)
    if held.ids:
        tensors["ids"] = torch.from_numpy(np.concatenate(held.ids))
    tensors |= {f"random/{name}": torch.stack(states) for name, states in held.random.items()}
    try:
        save_file(tensors, path)
    except SafetensorError as error:
        raise OSError(f"{path} cannot be written: {error}") from error


def _row(step: Step, held: _Held) -> dict[str, Any]:
    return {
        "index": step.index,
        "epoch": step.epoch,
        "ends_epoch": step.ends_epoch,
        "groups": held.packed_groups(step.groups),
        "clip": step.clip,
        "divisor": step.divisor,
        "unused": step.unused,
        "micro": [_micro_row(micro, held) for micro in step.micro],
    }


def _micro_row(micro: MicroBatch, held: _Held) -> dict[str, Any]:
    assert micro.loss is not None
    return {
        "ids": _names(micro.ids, held),
        **({} if micro.positions == micro.ids else {"positions": micro.positions}),
        "epoch": micro.epoch,
        "batch_idx": micro.batch_idx,
        "loss": float(micro.loss),
        "global_step": micro.global_step,
        "scale": micro.scale,
        "loader": micro.loader,
        "random": {name: _place(tensor, held.random.setdefault(name, [])) for name, tensor in micro.random.items()},
        "batch": None if micro.batch is None else micro.batch.skeleton,
        "num_tensors": 0 if micro.batch is None else len(micro.batch.tensors),
    }


def _names(ids: list[SampleId], held: _Held) -> list[SampleId] | int:
    """The ids, or how many of those held come next."""
    numbers = np.array(ids)
    if numbers.dtype != np.int64:
        return ids
    held.ids.append(numbers)
    return len(ids)


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
        rows = json.loads(bytes(self._file.get_tensor("steps").numpy()))
        self._rows = {row["index"]: row for row in rows}

    def steps(self) -> list[Step]:
        """The steps. Of batches and random states they have skeletons and names only: the rest may be large."""
        ids = [micro["ids"] for row in self._rows.values() for micro in row["micro"]]
        digests = self._parts("digest", [held if isinstance(held, int) else len(held) for held in ids])
        numbers = self._parts("ids", [held for held in ids if isinstance(held, int)])
        return [_step(row, digests, numbers) for row in self._rows.values()]

    def _parts(self, name: str, lengths: list[int]) -> Iterator[Tensor]:
        return iter(self._file.get_tensor(name).split(lengths) if lengths else ())

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


def _step(row: dict[str, Any], digests: Iterator[Tensor], numbers: Iterator[Tensor]) -> Step:
    micro = [_micro(row, next(digests), numbers) for row in row["micro"]]
    clip = tuple(row["clip"]) if row["clip"] else None
    return Step(**row | {"micro": micro, "groups": unpacked(row["groups"]), "clip": clip})


def _micro(row: dict[str, Any], digest: Tensor, numbers: Iterator[Tensor]) -> MicroBatch:
    given = {key: value for key, value in row.items() if key != "num_tensors"}
    given["ids"] = next(numbers).tolist() if isinstance(row["ids"], int) else row["ids"]
    given.setdefault("positions", [*given["ids"]])
    given["loss"] = torch.tensor(row["loss"], dtype=torch.float64)
    given["random"] = dict.fromkeys(row["random"], torch.empty(0))
    given["batch"] = None if row["batch"] is None else PackedBatch(row["batch"], [])
    return MicroBatch(**given, digest=digest)
