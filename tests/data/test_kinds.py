# SPDX-License-Identifier: Apache-2.0
"""What people put into batches is compared by value, copied, packed and put together again, without pickle."""

import enum
import json
import pathlib
import zoneinfo
from collections import OrderedDict, defaultdict, deque
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta, timezone
from decimal import Decimal
from functools import cached_property
from uuid import UUID

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_sequence, pad_packed_sequence

from lightning_sgdclean.base.errors import UnsupportedTrainingError
from lightning_sgdclean.data.batches import as_float64, cloned, with_neighbours
from lightning_sgdclean.data.fingerprints import batch_digest, fingerprint
from lightning_sgdclean.data.packing import PackedBatch, pack_batch
from lightning_sgdclean.data.unpacking import pack_surely, unpack_batch

pytestmark = pytest.mark.filterwarnings("ignore:Sparse .* support", "ignore:The PyTorch API of nested tensors")

CPU = torch.device("cpu")
X = torch.arange(6.0).reshape(3, 2)


class Color(enum.Enum):
    RED = 1
    BLUE = "b"


class Flags(enum.Flag):
    A = 1
    B = 2


@dataclass(frozen=True, slots=True)
class Frozen:
    x: object


@dataclass(slots=True)
class Slotted:
    x: object


class Hidden:
    """Its data lie behind a property, in a slot of a private name."""

    __slots__ = ("__x",)

    def __init__(self, x):
        self.__x = x

    @property
    def x(self):
        return self.__x


class Measured:
    """Holds what a property has cached."""

    def __init__(self, x):
        self.x = x

    @cached_property
    def length(self):
        return self.x.norm()


def hung(x, name="camera"):
    x = x.clone()
    x.source, x.scale = name, torch.ones(2)
    return x


VALUES = {
    "bytes": (b"raw", b"row"),
    "bytearray": (bytearray(b"ab"), bytearray(b"ac")),
    "complex": (1 + 2j, 1 + 3j),
    "set": ({"b", "a"}, {"b", "c"}),
    "frozenset": (frozenset({1, 2}), frozenset({1, 3})),
    "range": (range(3), range(4)),
    "slice": (slice(1, None), slice(2, None)),
    "ellipsis": ([...], [None]),
    "path": (pathlib.Path("a/b"), pathlib.Path("a/c")),
    "pure path": (pathlib.PureWindowsPath("a"), pathlib.PureWindowsPath("b")),
    "enum": (Color.RED, Color.BLUE),
    "flag": (Flags.A | Flags.B, Flags.A),
    "decimal": (Decimal("1.10"), Decimal("1.1")),
    "date": (date(2026, 1, 2), date(2026, 1, 3)),
    "datetime": (datetime(2026, 1, 2, 3, tzinfo=UTC), datetime(2026, 1, 2, 3)),
    "zone": (
        datetime(2026, 1, 2, tzinfo=zoneinfo.ZoneInfo("Europe/Berlin")),
        datetime(2026, 1, 2, tzinfo=timezone(timedelta(hours=1))),
    ),
    "time": (time(1, 2), time(1, 3)),
    "timedelta": (timedelta(1), timedelta(2)),
    "uuid": (UUID(int=1), UUID(int=2)),
    "deque": (deque([torch.zeros(5000)]), deque([torch.ones(5000)])),
    "defaultdict": (defaultdict(list, a=[1]), defaultdict(list, a=[2])),
    "ordered": (OrderedDict(a=1), OrderedDict(a=2)),
    "dtype": (torch.float32, torch.float64),
    "device": (torch.device("cpu"), torch.device("meta")),
    "NumPy's dtype": (np.dtype([("a", "f4")]), np.dtype("f4")),
    "a class": (Color, Flags),
    "frozen slots": (Frozen(X), Frozen(X + 1)),
    "slots": (Slotted(X), Slotted(X + 1)),
    "private slots": (Hidden(X), Hidden(X + 1)),
    "records": (np.array([(1, "a")], "i4,U3"), np.array([(1, "b")], "i4,U3")),
    "dates of NumPy": (np.array(["2026-01-02"], "M8[D]"), np.array(["2026-01-03"], "M8[D]")),
    "a date of NumPy": (np.datetime64("2026-01-02"), np.datetime64("2026-01-03")),
    "strings of NumPy": (np.array(["a", "bc"]), np.array(["a", "bd"])),
    "objects of NumPy": (np.array(["a", X], object), np.array(["a", X + 1], object)),
    "unsigned": (np.array([1, 2], np.uint16), np.array([1, 3], np.uint16)),
    "another order of bytes": (np.array([1.0, 2.0], ">f4"), np.array([1.0, 3.0], ">f4")),
    "long doubles": (np.array([1, 2], np.longdouble), np.array([1, 3], np.longdouble)),
    "a long double": (np.longdouble(1), np.longdouble(2)),
    "no strings": (np.array([], "U3"), np.array(["a"], "U3")),
    "masked": (np.ma.array([1, 2], mask=[0, 1]), np.ma.array([1, 2])),
    "recarray": (np.rec.array([(1, 2.0)]), np.rec.array([(1, 3.0)])),
    "read-only": (np.broadcast_to(np.array(1.0), (2, 2)), np.broadcast_to(np.array(2.0), (2, 2))),
    "attributes of a tensor": (hung(X), hung(X, "scanner")),
    "a view": (X.T[1:], X.T[:1]),
    "expanded": (torch.ones(1, 2).expand(4, 2), torch.ones(1, 3).expand(4, 3)),
    "packed sequence": (pack_sequence([X, X[:2]], False), pack_sequence([X, X[1:]], False)),
    "sparse": (X.to_sparse(), (X + 1).to_sparse()),
    # Made in the test, since they warn that they are new.
    "sparse by rows": lambda: (X.to_sparse_csr(), (X + 1).to_sparse_csr()),
    "sparse by columns": lambda: (X.to_sparse_csc(), (X + 1).to_sparse_csc()),
    "sparse by blocks": lambda: (torch.eye(4).to_sparse_bsr((2, 2)), torch.ones(4, 4).to_sparse_bsr((2, 2))),
    "nested": lambda: (torch.nested.nested_tensor([X, X[:1]]), torch.nested.nested_tensor([X, X[1:2]])),
    "jagged": lambda: tuple(torch.nested.nested_tensor([X, X[i : i + 1]], layout=torch.jagged) for i in (0, 1)),
    "parameter": (nn.Parameter(X), nn.Parameter(X + 1)),
}


def again(batch):
    """Through JSON and back, as through a file."""
    classes = {}
    packed = pack_surely(batch, 7, classes)
    back = PackedBatch(json.loads(json.dumps(packed.skeleton)), [tensor.clone() for tensor in packed.tensors])
    return unpack_batch(back, classes, CPU)


def words(value):
    return value.tolist() if isinstance(value, np.ma.MaskedArray | np.recarray) else repr(value)


@pytest.mark.parametrize("name", VALUES)
def test_a_value_is_told_from_others_copied_and_put_together_again(name):
    pair = VALUES[name]
    value, other = ({"x": X, "value": one} for one in (pair if isinstance(pair, tuple) else pair()))
    back, copy = again(value), cloned(value)
    assert type(back["value"]) is type(value["value"])
    if "slot" not in name and name not in ("set", "jagged"):  # these show addresses, or what changes
        assert words(back["value"]) == words(value["value"])
    for equal in (back, copy, value):
        assert torch.equal(batch_digest(equal, 7), batch_digest(value, 7))
    assert not torch.equal(batch_digest(other, 7), batch_digest(value, 7))


def test_what_hangs_on_a_tensor_comes_along():
    batch = {"x": hung(X)}
    changed = with_neighbours(batch, torch.tensor([True, False, False]))
    for one in (again(batch), cloned(batch), as_float64(batch), changed):
        assert one["x"].source == "camera"
        assert one["x"].scale is not batch["x"].scale or one is changed
    assert as_float64(batch)["x"].scale.dtype is torch.float64
    assert changed["x"].tolist() == [[4, 5], [2, 3], [4, 5]]


def test_what_a_property_has_cached_is_not_the_value():
    fresh, used = Measured(X), Measured(X)
    assert used.length > 0
    assert torch.equal(batch_digest(fresh, 3), batch_digest(used, 3))
    changed = with_neighbours(used, torch.tensor([True, False, False]))
    assert changed.length == changed.x.norm() != used.length


def test_what_occurs_twice_or_holds_itself_does_so_afterwards():
    ring = [X]
    ring.append({"ring": ring, "again": X})
    node = Measured(X)
    node.me = node
    key = ("a", "b")
    back = again({"ring": ring, "node": node, "keys": {key: [key]}, "ordered": OrderedDict({key: [key]})})
    assert back["keys"] == dict(back["ordered"]) == {key: [key]}
    assert back["ring"][1]["ring"] is back["ring"]
    assert back["ring"][1]["again"] is back["ring"][0] is back["node"].x
    assert back["node"].me is back["node"]


def test_arrays_give_their_places_to_neighbours():
    mask = torch.tensor([True, False, True])
    changed = with_neighbours({"x": X.numpy(), "time": X.numpy().T, "masked": np.ma.array([1, 2, 3])}, mask)
    assert changed["x"].tolist() == changed["time"].T.tolist() == [[4, 5], [2, 3], [2, 3]]
    assert changed["masked"].tolist() == [3, 2, 2]


def test_packed_sequences_keep_their_lengths():
    sequences = [torch.arange(2.0), torch.arange(3.0) + 10, torch.arange(1.0) + 20]
    for enforced in (False, True):
        ordered = sorted(sequences, key=len, reverse=True) if enforced else sequences
        batch = pack_sequence([one.unsqueeze(1) for one in ordered], enforced)
        changed, lengths = pad_packed_sequence(with_neighbours(batch, torch.tensor([True, False, True])), True)
        expected = [one.tolist() + [0.0] * (3 - len(one)) for one in ordered]
        for place in (0, 2):
            reach = min(len(ordered[place]), len(ordered[place - 1]))
            expected[place][:reach] = ordered[place - 1][:reach].tolist()
        assert changed.squeeze(2).tolist() == expected
        assert lengths.tolist() == [len(one) for one in ordered]


class Opaque(torch.Tensor):
    """Does not tell what it holds."""

    @staticmethod
    def __new__(cls, inner):
        made = torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        raise NotImplementedError(function)


def test_a_tensor_class_that_does_not_tell_what_it_holds_is_refused_by_name():
    with pytest.raises(UnsupportedTrainingError, match=r"test_kinds\.Opaque.*computes for itself"):
        fingerprint([Opaque(X)], 3)
    with pytest.raises(UnsupportedTrainingError, match=r"test_kinds\.Opaque which computes for itself"):
        pack_batch([Opaque(X)], {})
    assert cloned([Opaque(X)])[0].inner is not None


class Forgetful:
    """Copies lack its data."""

    def __init__(self, x):
        self.x = x

    def __getstate__(self):
        return {}


class Careless:
    """Wants to be told its name."""

    def __init__(self, name):
        self.name = name

    def __reduce__(self):
        return Careless, ()


@pytest.mark.parametrize(("make", "why"), [(Forgetful, "other data"), (Careless, "TypeError")])
def test_what_does_not_come_back_is_refused_by_name(make, why):
    with pytest.raises(UnsupportedTrainingError, match=rf"holds a test_kinds\.{make.__name__}.*{why}"):
        pack_surely({"x": X, "inner": [1, (make(X),)]}, 3, {})
