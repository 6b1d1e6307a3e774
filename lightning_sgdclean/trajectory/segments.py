# SPDX-License-Identifier: Apache-2.0
"""One segment of a trajectory: some steps and states in a file (safetensors).

Tables hold what every step has, JSON only what few steps have: writing steps one by one would take Python's lock away
from the training. Torch's kernels are not used: one that runs on several threads would give the writing thread a team
of its own, and with more threads than cores the training's team waits much longer at each turn.
"""

import json
from collections.abc import Iterable, Iterator
from itertools import accumulate, groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lightning_sgdclean.base.errors import RunDirectoryError
from lightning_sgdclean.base.randomness import RandomState
from lightning_sgdclean.data.packing import PackedBatch
from lightning_sgdclean.trajectory.flat_state import Flat, stretches
from lightning_sgdclean.trajectory.live_state import packed, unpacked
from lightning_sgdclean.trajectory.records import MicroBatch, Step

_NOT_KEPT = -1  # the number of tensors of a batch that is to be fetched again


def write_segment(path: Path, steps: list[Step], states: dict[int, Flat]) -> None:
    """Write steps, and states by the number of the step that they lie before.

    Raises:
        OSError: If it cannot be written.
    """
    tensors = _state_tables(states)
    batches = [micro for step in steps for micro in step.micro]
    words: dict[str, Any] = {"options": [], "positions": {}, "batches": {}, "sizes": {}}
    if steps:
        tensors["steps"] = torch.tensor([_step_row(step, words["options"]) for step in steps])
        tensors["micro"] = torch.tensor([_micro_row(micro) for micro in batches])
        tensors["loss"] = torch.tensor([(_loss_of(micro), micro.scale) for micro in batches], dtype=torch.float64)
        digests = [micro.digest.numpy() for micro in batches if micro.digest is not None]
        tensors["digest"] = torch.from_numpy(np.concatenate(digests))
        tensors |= _random_tables(batches, words)
        tensors |= _ids_table(batches, words)
    for number, micro in enumerate(batches):
        if micro.positions != micro.ids:
            words["positions"][number] = micro.positions
        if micro.sizes:
            words["sizes"][number] = micro.sizes
        if micro.batch is not None:
            words["batches"][number] = micro.batch.skeleton
            tensors |= {f"batch/{number}/{n}": tensor for n, tensor in enumerate(micro.batch.tensors)}
    text = json.dumps(words | {"options": [packed(options) for options in words["options"]]})
    tensors["words"] = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)
    try:
        save_file(tensors, path)
    except SafetensorError as error:
        raise OSError(f"{path} cannot be written: {error}") from error


def _state_tables(states: dict[int, Flat]) -> dict[str, Tensor]:
    """Rows of states, by the first of them: as many to a tensor as lie one behind the other."""
    tables = {"kept": torch.tensor([*states], dtype=torch.int64)}
    for dtype in dict.fromkeys(dtype for flat in states.values() for dtype in flat):
        for having in _neighbours_with(dtype, states):
            first = 0
            for rows in stretches(states[index][dtype] for index in having):
                tables[f"state/{having[first]}/{dtype}"] = rows
                first += len(rows)
    return tables


def _neighbours_with(dtype: str, states: dict[int, Flat]) -> Iterator[list[int]]:
    """Those of the states, as far as one follows another, that hold numbers of a dtype."""
    for holds, some in groupby(states, key=lambda index: dtype in states[index]):
        if holds:
            yield list(some)


def _step_row(step: Step, options: list[list[Any]]) -> tuple[int, ...]:
    """The numbers of a step; its options are the last of these, or appended to them."""
    now = [step.groups, step.clip, step.unused]
    if not options or options[-1][0] is not step.groups or options[-1] != now:
        options.append(now)
    return step.index, step.epoch, step.ends_epoch, step.divisor, len(step.micro), len(options) - 1


def _micro_row(micro: MicroBatch) -> tuple[int, ...]:
    kept = _NOT_KEPT if micro.batch is None else len(micro.batch.tensors)
    return micro.epoch, micro.batch_idx, micro.global_step, micro.loader, len(micro.ids), kept


def _loss_of(micro: MicroBatch) -> float:
    assert micro.loss is not None
    return float(micro.loss)


def _random_tables(batches: list[MicroBatch], words: dict[str, Any]) -> dict[str, Tensor]:
    """Random states, each that is another than the one before it, and for every batch the places of its own."""
    words["random"] = list(batches[0].random)
    tables, places = {}, []
    for name, first in batches[0].random.items():
        held, last = [first.numpy().tobytes()], first
        places.append([0] * len(batches))
        for number, micro in enumerate(batches):
            state = micro.random[name]
            if state is not last and (content := state.numpy().tobytes()) != held[-1]:
                held.append(content)
            last, places[-1][number] = state, len(held) - 1
        tables[f"random/{name}"] = torch.frombuffer(bytearray(b"".join(held)), dtype=first.dtype).view(len(held), -1)
    return tables | ({"places": torch.tensor(places)} if places else {})


def _ids_table(batches: list[MicroBatch], words: dict[str, Any]) -> dict[str, Tensor]:
    """All ids, as numbers if they are such."""
    ids = [name for micro in batches for name in micro.ids]
    numbers = np.array(ids)
    if numbers.dtype == np.int64:
        return {"ids": torch.from_numpy(numbers)}
    words["ids"] = ids
    return {}


class Segment:
    """A segment's file, opened: its steps are read, the rest when it is asked for.

    Raises:
        RunDirectoryError: If it cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self._file = _opened(path)
        self._words = json.loads(bytes(self._file.get_tensor("words").numpy()))
        self._names = set(self._file.keys())
        self._kept, self._steps, self._micro, self._losses, self._places, self._ids = (
            self._file.get_tensor(name).tolist() if name in self._names else []
            for name in ("kept", "steps", "micro", "loss", "places", "ids")
        )
        lengths = [num for *_, num, _ in self._steps]
        firsts = [0, *accumulate(lengths)]
        if firsts[-1] != len(self._micro):
            raise ValueError(f"{len(self._micro)} batches of steps that have {firsts[-1]}")
        self._batches_of = {row[0]: range(*firsts[n : n + 2]) for n, row in enumerate(self._steps)}

    def steps(self) -> list[Step]:
        """The steps. Of batches and random states they have skeletons and names only: the rest may be large."""
        options = [unpacked(each) for each in self._words["options"]]
        batches, found = self._batches(), []
        for index, epoch, ends_epoch, divisor, _, place in self._steps:
            groups, clip, unused = options[place]
            micro = [batches[number] for number in self._batches_of[index]]
            clip = tuple(clip) if clip else None
            found.append(Step(index, epoch, bool(ends_epoch), groups, clip, divisor, unused, micro))
        return found

    def _batches(self) -> list[MicroBatch]:
        """All micro-batches, one after another."""
        lengths = [num for *_, num, _ in self._micro]
        digests = self._file.get_tensor("digest").split(lengths) if lengths else ()
        names, firsts = self._words.get("ids", self._ids), [0, *accumulate(lengths)]
        if len(names) != firsts[-1]:
            raise ValueError(f"{len(names)} ids of {firsts[-1]} samples")
        found = []
        for number, (epoch, batch_idx, global_step, loader, num, kept) in enumerate(self._micro):
            ids, (loss, scale) = names[firsts[number] : firsts[number] + num], self._losses[number]
            positions = self._words["positions"].get(str(number), [*ids])
            found.append(
                MicroBatch(
                    ids=ids,
                    positions=positions,
                    epoch=epoch,
                    batch_idx=batch_idx,
                    random=dict.fromkeys(self._words["random"], torch.empty(0)),
                    digest=digests[number],
                    loss=torch.tensor(loss, dtype=torch.float64),
                    global_step=global_step,
                    scale=scale,
                    loader=loader,
                    batch=None if kept == _NOT_KEPT else PackedBatch(self._words["batches"][str(number)], []),
                    sizes=self._words.get("sizes", {}).get(str(number), []),
                )
            )
        return found

    def whole_steps(self, before: int) -> Iterator[Step]:
        """Those before a step, with all that was written of them."""
        for step in self.steps():
            if step.index < before:
                for i, micro in enumerate(step.micro):
                    micro.random, micro.batch = self.random(step.index, i), self.batch(step.index, i)
                yield step

    def random(self, index: int, micro: int) -> RandomState:
        """Random state before micro-batch ``micro`` of step ``index``."""
        number = self._batches_of[index][micro]
        named = zip(self._words["random"], self._places, strict=True)
        return {name: self._file.get_slice(f"random/{name}")[places[number]] for name, places in named}

    def batch(self, index: int, micro: int) -> PackedBatch | None:
        """Micro-batch ``micro`` of step ``index``, if it was kept."""
        number = self._batches_of[index][micro]
        num_tensors = self._micro[number][-1]
        if num_tensors == _NOT_KEPT:
            return None
        tensors = [self._file.get_tensor(f"batch/{number}/{n}") for n in range(num_tensors)]
        return PackedBatch(self._words["batches"][str(number)], tensors)

    def state(self, index: int, dtypes: Iterable[str]) -> Flat:
        """The state before step ``index``, whose tensors are of these dtypes."""
        return {dtype: self._row(self._kept.index(index), dtype) for dtype in dtypes}

    def _row(self, place: int, dtype: str) -> Tensor:
        """What is of a dtype in the state that is kept in this place: in the last table that begins by then."""
        names = ((first, f"state/{self._kept[first]}/{dtype}") for first in range(place, -1, -1))
        first, name = next((pair for pair in names if pair[1] in self._names), (0, ""))
        table = self._file.get_slice(name)
        row: Tensor = table[place - first]
        return row if table.get_shape()[0] == 1 else row.clone()  # a view would hold on to all of the table


def _opened(path: Path) -> Any:
    try:
        return safe_open(path, "pt")
    except Exception as error:  # safetensors raises its own class, and OSError
        raise RunDirectoryError(f"{path} cannot be read: {error}") from error
