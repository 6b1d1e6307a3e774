# SPDX-License-Identifier: Apache-2.0
"""Batches come back from JSON and tensors as they were; what would need pickle is refused by name."""

import json
from collections import OrderedDict, UserDict, namedtuple
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_sgdclean.base.errors import RunDirectoryError, UnsupportedTrainingError
from lightning_sgdclean.data.fingerprints import batch_digest
from lightning_sgdclean.data.packing import PackedBatch, pack_batch
from lightning_sgdclean.data.unpacking import unpack_batch
from structures import Slotted, Wrapping

CPU = torch.device("cpu")


class Pair(NamedTuple):
    x: Any
    y: Any


@dataclass
class Plain:
    x: Tensor
    names: list[str]
    built: int = field(default=0, init=False)

    def __post_init__(self):
        self.built += 1


@dataclass(frozen=True, slots=True)
class Frozen:
    x: Tensor
    scale: float = 0.1


class Custom:
    """As in torch's documentation of pinned custom batches."""

    def __init__(self, items):
        self.inp, self.tgt = torch.stack([item[0] for item in items]), torch.stack([item[1] for item in items])


class Encoding(UserDict):
    """A mapping with further state and its own idea of it, as tokenizers' batches are."""

    def __init__(self, data, num):
        super().__init__(data)
        self._num = num

    def __getattr__(self, name):
        try:
            return self.data[name]
        except KeyError as error:
            raise AttributeError(name) from error

    def __getstate__(self):
        return {"data": self.data, "num": self._num}

    def __setstate__(self, state):
        self.data, self._num = state["data"], state["num"]


class Doubling(Wrapping):
    factor = 2


class Delegating:
    def __reduce__(self):
        return print, ("made",)


class Picture(Tensor):
    """A tensor class without data of its own, as torchvision's are."""


def again(batch):
    """Through JSON and back, as through a file."""
    classes = {}
    packed = pack_batch(batch, classes)
    back = PackedBatch(json.loads(json.dumps(packed.skeleton)), [tensor.clone() for tensor in packed.tensors])
    return unpack_batch(back, classes, CPU)


X = torch.arange(6.0).reshape(3, 2)
BATCHES = {
    "nested": {"x": [torch.arange(3), ("t", 1.5, None, True)], 7: {"deep": (X,)}, ("a", 1): -3},
    "named tuple": Pair(X, Pair(torch.arange(3), "s")),
    "named tuple of the old kind": namedtuple("Old", "x y")(X, [1, 2, 3]),
    "dataclass": Plain(X, ["a", "b", "c"]),
    "frozen dataclass with slots": Frozen(X),
    "custom class": Custom([(torch.ones(2), torch.zeros(1))] * 3),
    "mapping class": Encoding({"input_ids": X.long()}, 3),
    "ordered dict": OrderedDict(b=X, a=1),
    "arrays": [np.arange(6, dtype=np.int16).reshape(3, 2), np.float64(0.1), np.bool_(True)],
    "number types": [torch.zeros(3, dtype=d) for d in (torch.bfloat16, torch.bool, torch.int8, torch.complex128)],
    "no numbers": [torch.zeros(0, 4), torch.tensor(3.0)],
    "floats that JSON does not know": [float("inf"), 1e-320, 2**80],
    "fraction": Fraction(1, 3),
    "dataclass with slots": Slotted(X),
    "size": X.shape,
}


@pytest.mark.parametrize("name", BATCHES)
def test_batch_comes_back_as_it_was(name):
    batch = BATCHES[name]
    back = again(batch)
    assert type(back) is type(batch)
    assert torch.equal(batch_digest(back, 3), batch_digest(batch, 3))
    assert str(back) == str(batch) or "object at" in str(batch)


def test_dataclass_is_rebuilt_without_running_its_constructor():
    assert again(Plain(X, [])).built == 1
    assert again(Frozen(X)).scale == 0.1


def test_strides_and_tensor_classes_come_back():
    picture = torch.rand(2, 3, 4, 4).to(memory_format=torch.channels_last).as_subclass(Picture)
    picture.source = "camera"
    back = again([picture, X.T, X[:, :1]])
    assert type(back[0]) is Picture
    assert back[0].source == "camera"
    assert back[0].stride() == picture.stride()
    assert torch.equal(back[0].as_subclass(Tensor), picture.as_subclass(Tensor))
    assert back[1].stride() == X.T.stride()
    assert torch.equal(back[1], X.T)
    assert torch.equal(back[2], X[:, :1])
    assert again(X.clone().requires_grad_()).requires_grad


def test_packing_copies():
    x = X.clone()
    packed = pack_batch([x], {})
    x.zero_()
    back = unpack_batch(packed, {}, CPU)
    back[0].zero_()
    assert torch.equal(unpack_batch(packed, {}, CPU)[0], X)
    assert packed.nbytes == 24


def ring():
    batch = [X]
    batch.append((batch,))
    return batch[1]


UNKEEPABLE = {
    "list_iterator": lambda: [iter([1])],
    "builtins.function|builtins.type": lambda: {"f": test_packing_copies},
    "which computes for itself": lambda: [Doubling(X)],
    "which is quantized": lambda: torch.quantize_per_tensor(X, 0.1, 0, torch.qint8),
    "with a graph behind it": lambda: X.clone().requires_grad_() * 2,
    "which holds itself": ring,
    r"numpy\.ndarray of dtype": lambda: np.zeros(2, dtype=[("a", object)]),
    "made by a function of its own": Delegating,
    "known by its name": lambda: [NotImplemented],
}


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
@pytest.mark.parametrize("match", UNKEEPABLE)
def test_what_would_need_pickle_is_refused_by_name(match):
    with pytest.raises(UnsupportedTrainingError, match=f"(?s)({match}).*cannot be kept without pickle"):
        pack_batch(UNKEEPABLE[match](), {})


def test_a_file_cannot_name_a_class_that_no_batch_of_this_process_is_made_of():
    for skeleton in (
        {"new": "subprocess.Popen", "args": [], "state": {"value": None}, "items": [], "pairs": []},
        {"call": "os.system", "args": [{"value": "true"}], "state": {"value": None}, "items": [], "pairs": []},
        {"tensor": 0, "device": "cpu", "class": "builtins.exec", "attributes": {"dict": []}},
    ):
        with pytest.raises(RunDirectoryError, match="no batch of this process is made of"):
            unpack_batch(PackedBatch(skeleton, [X]), {"some.Class": Plain}, CPU)


def test_two_classes_of_one_name_are_refused():
    def make():
        class Local:
            def __init__(self):
                self.x = X

        return Local()

    with pytest.raises(UnsupportedTrainingError, match="two different classes that are both called"):
        pack_batch([make(), make()], {})
