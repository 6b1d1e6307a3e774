# SPDX-License-Identifier: Apache-2.0
"""A state as one flat tensor a dtype, and memory for states that are to be written.

Buffers for writing are rows of larger tensors, since a file system takes one large piece in half the time of many
small ones.
"""

from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from operator import attrgetter, methodcaller
from typing import Any

import torch
from torch import Size, Tensor

from lightning_sgdclean.trajectory.records import State

DTYPES: dict[str, torch.dtype] = {str(dtype).removeprefix("torch."): dtype for dtype in (
    torch.float64, torch.float32, torch.float16, torch.bfloat16,
    torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool,
)}  # fmt: skip
_PAIRS = {"complex64": "float32", "complex128": "float64"}  # held as real and imaginary parts: rotary embeddings, say
_NAMES = {dtype: name for name, dtype in DTYPES.items()} | {getattr(torch, name): name for name in _PAIRS}
Layout = list[list[Any]]  # rows of: kind, name, key, dtype, shape
Flat = dict[str, Tensor]  # a state's tensors one after another, by dtype
BufferFor = Callable[[str, int], Tensor]  # gives a tensor of a dtype and length to copy into
_data_ptr, _shape = methodcaller("data_ptr"), attrgetter("shape")


def flatten(state: State) -> tuple[Layout, Flat]:
    """Copy a state into flat tensors on the CPU, and say what lies where."""
    return Flattener().flatten(state, lambda dtype, length: torch.empty(length, dtype=DTYPES[dtype]))


class Flattener:
    """Flattens the states of one run, step after step.

    A state that is the same object as before is made of the same tensors, and these mostly lie where they lay. Then
    their views do, too, and a step costs little more than the copy of its bytes.
    """

    def __init__(self) -> None:
        self._state: State | None = None
        self._tensors: list[Tensor] = []
        self._places: list[Any] = []
        self._layout: Layout = []
        self._views: list[tuple[str, int, list[Tensor]]] = []  # dtype, length, and what it is made of

    def flatten(self, state: State, buffer_for: BufferFor) -> tuple[Layout, Flat]:
        """Copy a state, live or not; the layout is the same object as before where it says the same."""
        if state is not self._state or self._places != _places(self._tensors):
            self._look(state)
        flat = {}
        for dtype, length, views in self._views:
            flat[dtype] = into = buffer_for(dtype, length)
            if views[0].device == into.device:
                torch.cat(views, out=into)
            else:
                into.copy_(torch.cat(views))
        return self._layout, flat

    def _look(self, state: State) -> None:
        entries = _entries(state)
        layout = [[*where, _NAMES[tensor.dtype], list(tensor.shape)] for *where, tensor in entries]
        if layout != self._layout:
            self._layout = layout
        self._tensors = _tensors(state)
        self._places = _places(self._tensors)
        views: dict[str, list[Tensor]] = {}
        stay = True
        for (*_, tensor), live in zip(entries, self._tensors, strict=True):
            name, plain = _NAMES[tensor.dtype], tensor.detach().resolve_conj()
            flat = torch.view_as_real(plain) if name in _PAIRS else plain
            views.setdefault(_held_as(name), []).append(flat.reshape(-1))
            stay = stay and tensor is live and tensor.is_contiguous() and not tensor.is_conj()  # else it is a copy
        self._views = [(dtype, sum(view.numel() for view in parts), parts) for dtype, parts in views.items()]
        self._state = state if stay else None


def _held_as(dtype: str) -> str:
    """The dtype of the flat tensor in which tensors of this one lie."""
    return _PAIRS.get(dtype, dtype)


def _tensors(state: State) -> list[Tensor]:
    """All tensors of a state, in the order of :func:`_entries`."""
    entries = [tensor for entries in state.optimizer.values() for tensor in entries.values()]
    return [*state.params.values(), *state.buffers.values(), *entries]


def _places(tensors: list[Tensor]) -> list[Any]:
    return [*map(_data_ptr, tensors), *map(_shape, tensors)]


def _entries(state: State) -> list[tuple[str, str, str, Tensor]]:
    """Kind, name, key and tensor of all that a state holds; an optimizer's lie where their parameter lies."""
    return [
        *(("param", name, "", tensor) for name, tensor in state.params.items()),
        *(("buffer", name, "", tensor) for name, tensor in state.buffers.items()),
        *(
            ("optimizer", name, key, tensor.to(state.params[name].device))
            for name, entries in state.optimizer.items()
            for key, tensor in entries.items()
        ),
    ]


def dtypes_of(layout: Layout) -> list[str]:
    """Those of the flat tensors of a state."""
    return list(dict.fromkeys(_held_as(row[3]) for row in layout))


def nbytes_of(layout: Layout) -> int:
    """Bytes that a state takes."""
    sizes = {name: dtype.itemsize for name, dtype in DTYPES.items()} | {"complex64": 8, "complex128": 16}
    return sum(sizes[dtype] * Size(shape).numel() for *_, dtype, shape in layout)


def unflatten(layout: Layout, flat: Flat) -> State:
    """Undo :func:`flatten`; the tensors are views into ``flat``, complex ones copies."""
    state, offset = State(), dict.fromkeys(flat, 0)
    for kind, name, key, dtype, shape in layout:
        held, parts = _held_as(dtype), [*shape, 2] if dtype in _PAIRS else shape
        size = Size(parts).numel()
        tensor = flat[held][offset[held] : offset[held] + size].reshape(parts)
        tensor = torch.view_as_complex(tensor.clone()) if dtype in _PAIRS else tensor  # which an odd offset forbids
        offset[held] += size
        if kind == "optimizer":
            state.optimizer.setdefault(name, {})[key] = tensor
        else:
            (state.params if kind == "param" else state.buffers)[name] = tensor
    return state


_PIECE_BYTES, _PIECE_ROWS = 4 << 20, 256


class StateRows:
    """A FIFO pool of row buffers.

    Who takes rows one after another, and gives them back in that order, mostly gets rows that lie one behind the other.
    """

    def __init__(self) -> None:
        self._free: defaultdict[tuple[torch.dtype, int], deque[Tensor]] = defaultdict(deque)

    def take(self, dtype: str, length: int) -> Tensor:
        """A row of so many numbers."""
        free = self._free[DTYPES[dtype], length]
        if not free:
            num = min(_PIECE_ROWS, _PIECE_BYTES // (length * DTYPES[dtype].itemsize or 1))
            free.extend(torch.empty(max(1, num), length, dtype=DTYPES[dtype]).unbind())
        return free.popleft()

    def give_back(self, flat: Flat) -> None:
        """The rows of a state are needed no more."""
        for row in flat.values():
            self._free[row.dtype, row.numel()].append(row)

    def clear(self) -> None:
        """Let go of the memory of free rows."""
        self._free.clear()

    def __len__(self) -> int:
        return sum(map(len, self._free.values()))


def stretches(rows: Iterable[Tensor]) -> Iterator[Tensor]:
    """Rows that lie one behind the other as one tensor each, ``(N, length)``, without a copy."""
    held: list[Tensor] = []
    for row in rows:
        if held and not _follows(row, held[-1]):
            yield _as_one(held)
            held = []
        held.append(row)
    if held:
        yield _as_one(held)


def _follows(row: Tensor, before: Tensor) -> bool:
    same = row.dtype == before.dtype and row.numel() == before.numel()
    behind = row.storage_offset() == before.storage_offset() + before.numel()
    return same and behind and row.untyped_storage().data_ptr() == before.untyped_storage().data_ptr()


def _as_one(rows: list[Tensor]) -> Tensor:
    length = rows[0].numel()
    return rows[0].as_strided((len(rows), length), (length, 1)) if len(rows) > 1 else rows[0].reshape(1, -1)
