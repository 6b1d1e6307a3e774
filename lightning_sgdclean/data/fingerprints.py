# SPDX-License-Identifier: Apache-2.0
"""Fingerprints of batches: numbers that tell, sample by sample, whether two hold the same."""

import re
import zlib
from collections import deque
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property, lru_cache
from operator import attrgetter
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_sgdclean.base.errors import UnsupportedTrainingError
from lightning_sgdclean.data.batches import attributes_of, extras_of, is_by_row, is_entry_each, is_wrapper
from lightning_sgdclean.data.kinds import COMMON, Kind, kind_of, reduced

# Words of 32 bits at most: the trailing zeros of round 64-bit floats would swallow most of a product.
_WORD = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int32}
_ARRAY_WORD: dict[torch.dtype, type[np.integer[Any]]] = {
    **dict.fromkeys((torch.bool, torch.int8, torch.uint8), np.uint8),
    **dict.fromkeys((torch.int16, torch.float16), np.int16),
    **dict.fromkeys((torch.int32, torch.float32, torch.int64, torch.float64), np.int32),
}
_MIX = 0x9E3779B97F4A7C15 - (1 << 64)  # an odd 64-bit constant, so that mixing loses nothing
_PIECE = 1 << 24  # products held at once
_SMALL = 1 << 16  # bytes: to copy more than that takes longer than to read it by itself
_form = attrgetter("shape", "dtype", "device", "layout")
_PLAIN = (str, int, float, complex, bytes, bytearray, set, frozenset, type, type(None))
_ADDRESS = re.compile(r"0x[0-9a-fA-F]+")  # of an object without a repr of its own


@lru_cache(maxsize=16)
def _multipliers(length: int, device: torch.device) -> Tensor:
    source = torch.Generator().manual_seed(0)  # our own: the global random state stays as it is
    drawn = torch.randint(-(1 << 62), 1 << 62, (length,), generator=source, dtype=torch.int64)
    return (drawn | 1).to(device)


@lru_cache(maxsize=256)
def _table(length: int, device: torch.device) -> Tensor:
    """As many multipliers; those of a few sizes serve all lengths that padding may lead to."""
    return _multipliers(1 << max(length - 1, 0).bit_length(), device)[:length]


@lru_cache(maxsize=256)
def _array_table(length: int) -> "np.ndarray[Any, Any]":
    return _table(length, torch.device("cpu")).numpy()


def _row_digests(tensor: Tensor, rows: int) -> "np.ndarray[Any, Any]":
    """A fixed random linear map of each row over the ring of 64-bit integers: order matters, sums wrap around."""
    width = tensor.numel() // rows
    if tensor.is_cpu and tensor.dtype in _ARRAY_WORD:  # in NumPy: a call of torch's takes longer than many products
        array = np.ascontiguousarray(tensor.numpy(force=True).reshape(rows, width))
        numbers = array.view(_ARRAY_WORD[tensor.dtype])
        return np.asarray(np.einsum("ij,j->i", numbers, _array_table(numbers.shape[1])))  # products stay in the cache
    flat = tensor.detach().resolve_neg().resolve_conj().reshape(rows, width).contiguous()
    if flat.is_complex():
        flat = torch.view_as_real(flat).flatten(1)
    words = flat.to(torch.uint8) if flat.dtype is torch.bool else flat.view(_WORD[flat.element_size()])
    return _dot(words, _table(words.shape[1], words.device)).cpu().numpy()


def _dot(words: Tensor, table: Tensor) -> Tensor:
    rows = len(words)
    digests = torch.zeros(rows, dtype=torch.int64, device=words.device)
    width = max(1, _PIECE // rows)
    for piece, factors in zip(torch.split(words, width, 1), torch.split(table, width), strict=True):
        digests += (piece * factors).sum(1)
    return digests


def _strided(tensor: Tensor) -> list[Tensor]:
    """The dense tensors that make up a sparse, nested or quantized one."""
    if tensor.is_quantized:
        return [tensor.int_repr()]
    if tensor.is_nested:
        return list(tensor.unbind())
    if is_wrapper(tensor):
        return _inner(tensor)
    if tensor.layout is torch.sparse_coo:
        return [tensor._indices(), tensor._values()]
    if tensor.layout is torch.strided:
        return [tensor]
    if tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        return [tensor.crow_indices(), tensor.col_indices(), tensor.values()]
    if tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        return [tensor.ccol_indices(), tensor.row_indices(), tensor.values()]
    return [tensor.to_dense()]


def _inner(tensor: Any) -> list[Tensor]:
    """The tensors that one of a class of its own computes with.

    Raises:
        UnsupportedTrainingError: If the class does not tell them.
    """
    try:
        return [getattr(tensor, name) for name in tensor.__tensor_flatten__()[0]]
    except Exception as error:  # theirs
        kind = type(tensor)
        raise UnsupportedTrainingError(
            f"A training batch holds a {kind.__module__}.{kind.__qualname__}, a tensor class that computes for itself "
            "and does not tell what it holds (no __tensor_flatten__), so batches cannot be compared. Put plain tensors "
            "into the batch, and make it of them in training_step."
        ) from error


def _mix(left: int, right: int) -> int:
    """``left * _MIX + right`` in signed 64-bit arithmetic, as torch has it."""
    return (left * _MIX + right + (1 << 63)) % (1 << 64) - (1 << 63)


def _of_plain(value: Any) -> int:
    if isinstance(value, bytes):
        return zlib.crc32(value)
    if isinstance(value, set | frozenset):  # whose order means nothing
        return zlib.crc32(repr(sorted(map(repr, value))).encode())
    text = repr(value) if isinstance(value, str | int | float) else _ADDRESS.sub("", repr(value))
    return zlib.crc32(text.encode())


@lru_cache(maxsize=256)
def _of_kind(dtype: torch.dtype, shape: torch.Size) -> int:
    return _of_plain((str(dtype), tuple(shape)))


@dataclass
class Fingerprint:
    """What a batch holds, told by numbers.

    Attributes:
        rows: ``(B,)`` int64: what belongs to one sample each.
        setting: What the samples share: shapes, keys, and tensors without a row for each of them.
    """

    rows: "np.ndarray[Any, Any]"
    setting: int = 0

    @cached_property
    def digest(self) -> Tensor:
        """One int64 a sample, ``(B,)``, of its own content and of what it shares with the others."""
        return torch.from_numpy(self.rows * _MIX + self.setting)

    @cached_property
    def short(self) -> list[int]:
        """One int a sample: 32 bits of what it shares with the others above 32 of its own."""
        setting = np.array(self.setting & 0xFFFFFFFF, dtype=np.uint64).astype(np.int64) << 32
        found: list[int] = ((self.rows ^ (self.rows >> 32)) & 0xFFFFFFFF | setting).tolist()
        return found

    def split(self, num: int) -> "list[Fingerprint]":
        """Those of so many samples each, with all that can be told of them together at less cost."""
        parts = [Fingerprint(rows, self.setting) for rows in self.rows.reshape(-1, num)]
        for number, (part, digest) in enumerate(zip(parts, torch.split(self.digest, num), strict=True)):
            part.digest, part.short = digest, self.short[number * num : (number + 1) * num]
        return parts

    def add(self, value: Any, above: tuple[int, ...] = ()) -> None:
        """Take in one more value, whatever it is made of; ``above`` are the objects that hold it."""
        if isinstance(value, Tensor):
            self._add_tensor(value)
            for name, extra in extras_of(value).items():
                self._share(_of_plain(name))
                if isinstance(extra, Tensor):
                    self.add(extra, (*above, id(value)))
                else:  # a list that is as long as the batch may name columns
                    self._share(_mix(*_whole(extra, (*above, id(value)))))
        elif (kind := _kind_of(value)) is not None:
            self._add_kind(value, kind, (*above, id(value)))
        elif hasattr(value, "__array_interface__"):  # NumPy's arrays and numbers
            self._add_array(np.asarray(value))
        elif id(value) in above:
            self._share(0)  # a circle
        elif isinstance(value, Mapping):
            for key in value:
                self._share(_of_plain(key))
                self.add(value[key], (*above, id(value)))
        elif isinstance(value, list | tuple | deque):
            self._add_sequence(value if isinstance(value, list | tuple) else list(value), (*above, id(value)))
        elif not isinstance(value, type) and (attributes := attributes_of(value)):
            self.add(attributes, (*above, id(value)))
        else:
            self._add_single(value, (*above, id(value)))

    def _add_kind(self, value: Any, kind: Kind, above: tuple[int, ...]) -> None:
        """What is taken apart by value: by its rows, or as one."""
        self._share(_of_plain(type(value).__qualname__))
        parts = kind.parts(value)
        named = parts if isinstance(parts, dict) else {"": parts}
        for name, part in named.items():
            if kind.take is None or name in COMMON:
                self._share(_mix(*_whole(part, above)))
            else:
                self.add(part, above)

    def _add_single(self, value: Any, above: tuple[int, ...]) -> None:
        """What has no attributes: plain, or known by what it is made anew of; else by its words."""
        if not isinstance(value, _PLAIN):
            with suppress(Exception):  # theirs: what cannot be copied
                _, args, *rest = reduced(value)
                state, items, pairs = (*rest, None, None, None)[:3]
                parts = [list(args), state, list(items or ()), list(pairs or ())]
                self._share(_of_plain(type(value).__qualname__))
                self.add(parts, above)
                return
        self._share(_of_plain(value))

    def _share(self, part: int) -> None:
        self.setting = _mix(self.setting, part)

    def _own(self, parts: "np.ndarray[Any, Any] | list[int]") -> None:
        self.rows = self.rows * _MIX + parts

    def _add_tensor(self, tensor: Tensor) -> None:
        num = len(self.rows)
        for part in _strided(tensor):
            by_row = part is tensor and is_by_row(tensor, num)
            self._share(_of_kind(part.dtype, part.shape[by_row:]))
            if by_row:
                self._own(_row_digests(part, num))
            else:
                self._share(int(_row_digests(part, 1)[0]))

    def _add_array(self, array: "np.ndarray[Any, Any]") -> None:
        array = np.ascontiguousarray(array)
        if array.dtype.char in "gG":  # longer than torch's, and with bytes that mean nothing
            self.add([str(array.dtype), list(map(repr, array.ravel())), array.shape])
            return
        if not array.dtype.isnative:
            array = array.astype(array.dtype.newbyteorder("="))
        try:
            self._add_tensor(torch.from_numpy(array if array.flags.writeable else array.copy()))
        except TypeError:  # strings, dates, objects
            self.add(array.tolist())

    def _add_sequence(self, items: list[Any] | tuple[Any, ...], above: tuple[int, ...]) -> None:
        if is_entry_each(items, len(self.rows)):
            self._own([_mix(*_whole(item, above)) for item in items])
        else:
            self._share(len(items))
            for item in items:
                self.add(item, above)


def _kind_of(value: Any) -> Kind | None:
    return None if isinstance(value, _PLAIN) else kind_of(type(value))


def _whole(item: Any, above: tuple[int, ...]) -> tuple[int, int]:
    alone = Fingerprint(np.zeros(1, dtype=np.int64))
    alone.add(item, above)
    return int(alone.rows[0]), alone.setting


def fingerprint(batch: Any, num_samples: int) -> Fingerprint:
    """Fingerprint of a batch, by sample wherever it has a row or an entry for each.

    Args:
        batch: Any nesting of mappings, lists, tuples and objects around tensors and other values.
        num_samples: ``B``. Tensors whose first dimension it is, and lists of that length, are
            taken row by row; everything else is common to all samples.

    Returns:
        Equal batches have equal fingerprints; of unequal ones about one in 2**32 goes unnoticed.
    """
    found = Fingerprint(np.zeros(num_samples, dtype=np.int64))
    found.add(batch)
    return found


def fingerprints(batches: list[tuple[Any, int]]) -> list[Fingerprint]:
    """Those of several batches, each given with its ``B``.

    Where they are alike, with a row for each sample in all tensors, what they are made of is found out but once.
    """
    num = batches[0][1]
    columns = _columns([batch for batch, _ in batches], num) if {of for _, of in batches} == {num} else None
    if columns is None:
        return [fingerprint(batch, of) for batch, of in batches]
    found = Fingerprint(np.zeros(num * len(batches), dtype=np.int64), fingerprint(*batches[0]).setting)
    for column in columns:
        found._own(_column_digests(column, num))
    return found.split(num)


def _columns(batches: list[Any], num: int) -> list[tuple[Tensor, ...]] | None:
    """The tensors of batches that differ in nothing but these tensors' numbers; None if they do."""
    kind = type(batches[0])
    if len(batches) == 1 or kind not in (list, tuple, dict) or set(map(type, batches)) != {kind}:
        return None
    if len(set(map(tuple if kind is dict else len, batches))) > 1:
        return None
    columns = list(zip(*(batch.values() if kind is dict else batch for batch in batches), strict=True))
    if any(
        set(map(type, column)) != {Tensor} or any(map(vars, column)) or len(set(map(_form, column))) > 1
        for column in columns
    ):
        return None
    first = [column[0] for column in columns]
    return columns if all(is_by_row(part, num) and not part.is_quantized for part in first) else None


def _column_digests(column: tuple[Tensor, ...], num: int) -> "np.ndarray[Any, Any]":
    if column[0].nbytes <= _SMALL:
        return _row_digests(torch.cat(column), num * len(column))
    return np.concatenate([_row_digests(tensor, num) for tensor in column])


def batch_digest(batch: Any, num_samples: int) -> Tensor:
    """:attr:`Fingerprint.digest` of :func:`fingerprint`, ``(B,)``."""
    return fingerprint(batch, num_samples).digest
