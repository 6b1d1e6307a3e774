# SPDX-License-Identifier: Apache-2.0
"""Fingerprints tell batches apart, sample by sample."""

import numpy as np
import pytest
import torch
from torch.nn.utils.rnn import pad_sequence

from lightning_sgdclean.data import fingerprints as module
from lightning_sgdclean.data.batches import cloned
from lightning_sgdclean.data.fingerprints import _dot, _row_digests, _table, batch_digest, fingerprint, fingerprints
from structures import Node, Pair, Slotted


@pytest.mark.parametrize(
    "dtype",
    [torch.float32, torch.float64, torch.bfloat16, torch.complex128, torch.uint8, torch.bool, torch.int64],
    ids=str,
)
def test_digest_sees_the_row_that_changed_and_a_flipped_picture(dtype):
    batch = torch.arange(24).reshape(4, 6).remainder(3).to(dtype)
    other = batch.clone()
    other[2] = batch[2].flip(0)
    differs = batch_digest([batch, "s"], 4) != batch_digest([other, "s"], 4)
    assert differs.tolist() == [False, False, True, False]
    assert (batch_digest([batch, "s"], 4) != batch_digest([batch, "t"], 4)).all()


def boxes(*counts):
    return [torch.arange(4.0 * n).reshape(n, 4) + n for n in counts]


def only_row(row, shape=(3, 5000)):
    array = np.zeros(shape)
    array[row, shape[1] // 2] = 1
    return array


BY_SAMPLE = {
    "a list of strings": (["a", "b", "c"], ["a", "x", "c"]),
    "a tuple of numbers": ((1, 2, 3), (1, 7, 3)),
    "pictures of different sizes": (boxes(1, 2, 5), [boxes(1)[0], boxes(2)[0] + 1, boxes(5)[0]]),
    "a list of dicts": (
        [{"boxes": b, "name": "n"} for b in boxes(1, 2, 4)],
        [{"boxes": b, "name": "nm"[i == 1]} for i, b in enumerate(boxes(1, 2, 4))],
    ),
    "lists of tokens in a dict": ({"t": [[1, 2], [3], [4, 5]]}, {"t": [[1, 2], [9], [4, 5]]}),
    "a named tuple": (Pair(torch.zeros(3, 2), ["u", "v", "w"]), Pair(torch.zeros(3, 2), ["u", "_", "w"])),
    "slots": (Slotted(torch.zeros(3)), Slotted(torch.tensor([0.0, 1.0, 0.0]))),
    "a NumPy array too large to print": (np.zeros((3, 5000)), only_row(1)),
    "an object in a circle": (Node(torch.zeros(3)), Node(torch.tensor([0.0, 1.0, 0.0]))),
}


@pytest.mark.parametrize("name", BY_SAMPLE)
def test_digest_points_at_the_sample_that_changed(name):
    batch, other = BY_SAMPLE[name]
    assert torch.equal(batch_digest(batch, 3), batch_digest(cloned(batch), 3))
    assert (batch_digest(batch, 3) != batch_digest(other, 3)).tolist() == [False, True, False]


def graphs(*sizes):
    """Nodes of all graphs in one tensor, as graph networks take them: rows are no samples."""
    return {"x": torch.arange(sum(sizes) * 2.0).reshape(-1, 2), "batch": torch.arange(len(sizes)).repeat_interleave(3)}


COMMON = {
    "rows that are no samples": lambda n: {**graphs(3, 3, 3), "x": graphs(3, 3, 3)["x"] + n},
    "a sparse matrix": lambda n: (n * torch.eye(4)).to_sparse(),
    "a sparse matrix by rows": lambda n: (n * torch.eye(4)).to_sparse_csr(),
    "a nested tensor": lambda n: torch.nested.nested_tensor([box + n for box in boxes(1, 2)]),
    "a number": torch.tensor,
    "a key": lambda n: {n: 1},
    "bytes": lambda n: b"a" * n,
    "nothing in another shape": lambda n: torch.zeros(0, n),
}


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support", "ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("name", COMMON)
def test_what_belongs_to_no_sample_is_part_of_every_digest(name):
    one, same, two = ([torch.arange(3), COMMON[name](n)] for n in (1, 1, 2))
    assert torch.equal(batch_digest(one, 3), batch_digest(same, 3))
    assert (batch_digest(one, 3) != batch_digest(two, 3)).all()


def test_objects_without_a_repr_of_their_own_do_not_differ_by_their_address():
    assert torch.equal(batch_digest([object()], 2), batch_digest([object()], 2))


def test_sets_are_equal_in_any_order():
    forth, back = {"a", "b", "c", "d"}, {"d", "c", "b", "a"}
    assert torch.equal(batch_digest([forth, 1], 3), batch_digest([back, 1], 3))
    assert (batch_digest([forth, 1], 3) != batch_digest([{"a"}, 1], 3)).all()


def test_two_tensors_of_two_samples_are_not_taken_for_one_entry_a_sample():
    x, y = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([0, 1])
    forth, back = fingerprint([x, y], 2), fingerprint([x.flip(0), y.flip(0)], 2)
    assert np.array_equal(forth.rows, back.rows[::-1])
    assert forth.setting == back.setting


def test_a_padded_sample_has_the_same_fingerprint_in_any_batch_that_is_padded_as_long():
    words = [torch.tensor([5, 6]), torch.tensor([7]), torch.tensor([8, 9, 10]), torch.tensor([3, 2, 1])]
    first = fingerprint(pad_sequence([words[0], words[1], words[2]], batch_first=True), 3)
    second = fingerprint(pad_sequence([words[3], words[1], words[0]], batch_first=True), 3)
    shorter = fingerprint(pad_sequence([words[0], words[1], words[1]], batch_first=True), 3)
    assert first.rows[1] == second.rows[1]
    assert first.rows[0] == second.rows[2]
    assert first.setting == second.setting != shorter.setting


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32])
def test_both_ways_to_sum_products_wrap_around_as_integers_of_64_bits_do(dtype, monkeypatch):
    monkeypatch.setattr(module, "_PIECE", 12)
    limits = torch.iinfo(dtype)
    words = torch.randint(limits.min, limits.max, (3, 11), dtype=torch.int64).to(dtype)
    table = _table(11, torch.device("cpu"))
    sums = [sum(w * t for w, t in zip(row, table.tolist(), strict=True)) for row in words.tolist()]
    wrapped = [(total + (1 << 63)) % (1 << 64) - (1 << 63) for total in sums]
    assert _dot(words, table).tolist() == _row_digests(words, 3).tolist() == wrapped


def image(seed, num=4, **options):
    return torch.randn(num, 3, 5, generator=torch.Generator().manual_seed(seed), **options)


ALIKE = {
    "pairs": lambda n: [image(n), torch.arange(4) + n],
    "two samples, two tensors": lambda n: (image(n, 2), image(n + 9, 2)),
    "dicts": lambda n: {"x": image(n), "y": torch.arange(4) * n},
    "a tensor alone": image,
    "large": lambda n: [image(n).repeat(1, 1, 2000)],
    "bool and double": lambda n: [image(n) > 0, image(n).double()],
    "empty": lambda n: [],
    "of another length": lambda n: [image(n, 3 + n % 2)],
    "of another dtype": lambda n: [image(n).to(torch.float64 if n % 2 else torch.float32)],
    "of another width": lambda n: [image(n)[..., : 3 + n % 2]],
    "of another kind": lambda n: [image(n)] if n % 2 else (image(n),),
    "other keys": lambda n: {"x" if n % 2 else "z": image(n)},
    "more parts": lambda n: [image(n)] * (1 + n % 2),
    "a part without samples": lambda n: [image(n), torch.tensor(n)],
    "words": lambda n: [image(n), ["a", "b", "c", str(n)]],
    "sparse": lambda n: [image(n).relu().to_sparse()],
    "parameters": lambda n: [torch.nn.Parameter(image(n))],
}


LENGTHS = {"two samples, two tensors": lambda n: 2, "of another length": lambda n: 3 + n % 2}


@pytest.mark.parametrize("name", ALIKE)
def test_batches_read_together_have_the_fingerprints_that_they_have_alone(name):
    batches = [ALIKE[name](n) for n in range(5)]
    lengths = [LENGTHS.get(name, lambda n: 4)(n) for n in range(5)]
    together = fingerprints(list(zip(batches, lengths, strict=True)))
    for batch, num, found in zip(batches, lengths, together, strict=True):
        alone = fingerprint(batch, num)
        assert found.setting == alone.setting
        assert found.rows.tolist() == alone.rows.tolist()
        assert found.digest.tolist() == alone.digest.tolist()
        assert found.short == alone.short
