# SPDX-License-Identifier: Apache-2.0
"""A batch's content: told apart by digests, fetched again by sample id, or kept as it was."""

import zlib
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_sgdclean.errors import UnsupportedTrainingError

# Words of 32 bits at most: the trailing zeros of round 64-bit floats would swallow most of a product.
_WORD = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int32}
_MIX = 0x9E3779B97F4A7C15 - (1 << 64)  # an odd 64-bit constant, so that mixing loses nothing


@lru_cache(maxsize=16)
def _multipliers(length: int, device: torch.device) -> Tensor:
    source = torch.Generator().manual_seed(0)  # our own: the global random state stays as it is
    drawn = torch.randint(-(1 << 62), 1 << 62, (length,), generator=source, dtype=torch.int64)
    return (drawn | 1).to(device)


def _row_digests(tensor: Tensor, rows: int) -> Tensor:
    flat = tensor.detach().reshape(rows, -1).contiguous()
    words = flat.to(torch.uint8) if flat.dtype is torch.bool else flat
    if words.is_complex():
        words = torch.view_as_real(words).reshape(rows, -1)
    words = words.view(_WORD[words.element_size()])
    # A fixed random linear map over the ring of 64-bit integers: order matters, sums wrap around.
    return (words * _multipliers(words.shape[1], words.device)).sum(1)


def _leaves(batch: Any) -> Iterator[Any]:
    if isinstance(batch, dict):
        for key in batch:
            yield from _leaves(batch[key])
    elif isinstance(batch, list | tuple):
        for item in batch:
            yield from _leaves(item)
    elif hasattr(batch, "__dict__") and not isinstance(batch, Tensor):
        yield from _leaves(vars(batch))
    else:
        yield batch


def batch_digest(batch: Any, num_samples: int) -> Tensor:
    """Fingerprint of a batch, one number a sample where the batch's tensors have a row for each.

    Args:
        batch: Any nesting of dicts, lists, tuples and plain objects around tensors and other values.
        num_samples: ``B``; tensors whose first dimension it is are digested row by row.

    Returns:
        int64 tensor ``(B,)`` on the CPU. Equal batches have equal digests; of unequal ones about
        one in 2**32 goes unnoticed.
    """
    digest = torch.zeros(num_samples, dtype=torch.int64)
    for leaf in _leaves(batch):
        if isinstance(leaf, Tensor) and leaf.layout is torch.strided:
            by_row = leaf.ndim > 0 and leaf.shape[0] == num_samples and leaf.numel() > 0
            part = _row_digests(leaf, num_samples if by_row else 1).cpu()
        else:
            part = torch.tensor(zlib.crc32(repr(leaf).encode()), dtype=torch.int64)
        digest = digest * _MIX + part
    return digest


def fetch_batch(loader: "DataLoader[Any]", ids: list[int]) -> Any:
    """The batch that the loader makes of these dataset positions, in this process.

    Args:
        loader: A loader over a map-style dataset.
        ids: Positions in ``loader.dataset``; a single one where the loader does not batch.
    """
    return collate_items(loader, fetch_items(loader, ids))


def fetch_items(loader: "DataLoader[Any]", ids: list[int]) -> list[Any]:
    """``loader.dataset[i]`` for every ``i`` of ``ids``, in the way the loader itself asks for them."""
    dataset = loader.dataset
    at_once = getattr(dataset, "__getitems__", None)
    if at_once is not None and loader.batch_sampler is not None:
        return list(at_once(ids))
    return [dataset[index] for index in ids]


def collate_items(loader: "DataLoader[Any]", items: list[Any]) -> Any:
    """Samples to a batch, as the loader makes one."""
    collate: Callable[[Any], Any] = loader.collate_fn
    return collate(items if loader.batch_sampler is not None else items[0])


def cloned(batch: Any) -> Any:
    """A batch of fresh tensors: what is done to it, the original does not feel."""
    if isinstance(batch, Tensor):
        return batch.clone()
    if isinstance(batch, dict):
        return {key: cloned(value) for key, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*map(cloned, batch))
    if isinstance(batch, list | tuple):
        return type(batch)(map(cloned, batch))
    return batch


def pack_batch(batch: Any) -> tuple[Any, list[Tensor]]:
    """Take a batch apart into a JSON skeleton and a list of tensors, without pickle.

    Raises:
        UnsupportedTrainingError: If it holds an object that is neither a tensor, a dict with string
            keys, a list, a tuple, a string, a number nor None.
    """
    tensors: list[Tensor] = []

    def pack(value: Any) -> Any:
        if isinstance(value, Tensor):
            tensors.append(value.detach())
            return {"tensor": len(tensors) - 1}
        if value is None or type(value) in (bool, int, float, str):
            return {"value": value}
        if type(value) is dict and all(isinstance(key, str) for key in value):
            return {"dict": {key: pack(item) for key, item in value.items()}}
        if type(value) in (list, tuple):
            return {type(value).__name__: [pack(item) for item in value]}
        raise UnsupportedTrainingError(
            f"A training batch holds a {type(value).__module__}.{type(value).__qualname__}, which cannot be kept "
            "without pickle. Expected tensors, dicts with string keys, lists, tuples, strings and numbers."
        )

    return pack(batch), tensors


def unpack_batch(skeleton: Any, tensors: list[Tensor]) -> Any:
    """Undo :func:`pack_batch`; the tensors are fresh copies."""
    ((kind, value),) = skeleton.items()
    if kind == "tensor":
        return tensors[value].clone()
    if kind == "dict":
        return {key: unpack_batch(item, tensors) for key, item in value.items()}
    if kind in ("list", "tuple"):
        items = [unpack_batch(item, tensors) for item in value]
        return items if kind == "list" else tuple(items)
    return value
