# SPDX-License-Identifier: Apache-2.0
"""Batches of every make: ranked as their data in plain tensors, with the training untouched, or refused by name."""

import enum
from collections import deque, namedtuple
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn.utils.rnn import pack_sequence, pad_packed_sequence
from torch.utils.data import DataLoader, default_collate

from cases import Case, Plain, fit, loaders, quiet_trainer
from datasets import OPTIONS
from lightning_sgdclean import SGDInfluence
from lightning_sgdclean.base.errors import UnsupportedTrainingError
from reference import influences
from structures import Wrapping

pytestmark = pytest.mark.filterwarnings("ignore:Sparse .* support", "ignore:The PyTorch API of nested tensors")

Old = namedtuple("Old", "x y i")
COLUMNS = pd.Index([*"abcde", "y", "i"])  # shared by all batches, and asked while they are trained on
WORDS = np.array(["cat", "dog", "cow"], dtype=object)


class Color(enum.Enum):
    RED = "red"


@dataclass(slots=True)
class Slots:
    x: object
    y: object
    i: object


@dataclass(frozen=True, slots=True)
class Frozen:
    x: object
    y: object
    i: object


class Hidden:
    """Its data lie behind properties, in slots of private names."""

    __slots__ = ("__x", "__y", "i")

    def __init__(self, x, y, i):
        self.__x, self.__y, self.i = x, y, i

    @property
    def x(self):
        return self.__x

    @property
    def y(self):
        return self.__y


class Scaled:
    """What it computes is cached as soon as it is asked."""

    def __init__(self, x, y, i):
        self.half, self.y, self.i = x / 2, y, i

    @cached_property
    def x(self):
        return 2 * self.half


class Ringed:
    def __init__(self, x, y, i):
        self.x, self.inner, self.me = x, [y, {"i": i}], self
        self.inner.append(self.inner)


class Picture(Tensor):
    """A tensor class without data of its own."""


class Opaque(Wrapping):
    pass


def hung(x, y, i):
    x = x.clone()
    x.y, x.i, x.source = y, i, Path("a/b")
    return x


def records(x, y, i):
    found = np.zeros(len(x), dtype=[("x", "f4", 5), ("y", "i8"), ("i", "i8")])
    found["x"], found["y"], found["i"] = x, y, i
    return found


def table(x, y, i):
    made = pd.DataFrame(x.numpy(), columns=list("abcde"))
    return made.assign(y=pd.Categorical.from_codes(y.numpy(), ["u", "v", "w"]), i=i.numpy(), when=pd.Timestamp("2026"))


def many(x, y, i):
    return {
        "x": x,
        "y": y,
        "i": i,
        "path": [Path("a"), Path("b")],
        "plain": (Color.RED, Decimal("1.5"), datetime(2026, 1, 2, tzinfo=UTC), None, 1 + 2j, b"raw"),
        "others": SimpleNamespace(sets=[{"a", "b"}, frozenset({1})], places=[range(3), slice(1, None), ...]),
        "pandas": [pd.Timestamp("2026-01-02", tz="UTC"), pd.NaT, pd.Series([1.0], name="s")],
    }


def of_arrays(batch):
    return [torch.from_numpy(np.array(batch[key])) for key in "xyi"]


def of_columns(batch):
    at = [batch["cols"].get_loc(name) for name in "aeyi"]
    values = batch["values"]
    return [values[:, at[0] : at[1] + 1], values[:, at[2]].long(), values[:, at[3]].long()]


def parts(b):
    return [b.x, b.y, b.i]


MAKES = {
    "arrays": (lambda x, y, i: {"x": x.numpy(), "y": y.numpy(), "i": i.numpy()}, of_arrays),
    "records": (records, of_arrays),
    "dates": (
        lambda x, y, i: {"x": x, "y": y.numpy().astype("M8[D]"), "i": i},
        lambda b: [b["x"], torch.from_numpy(b["y"].astype("i8")), b["i"]],
    ),
    "words": (
        lambda x, y, i: {"x": x, "y": WORDS[y.numpy()], "i": i},
        lambda b: [b["x"], torch.tensor([list(WORDS).index(word) for word in b["y"]]), b["i"]],
    ),
    "table": (
        table,
        lambda b: [
            torch.tensor(b[list("abcde")].to_numpy()),
            torch.tensor(b["y"].cat.codes.to_numpy()).long(),
            torch.tensor(b["i"].to_numpy()),
        ],
    ),
    "column names": (
        lambda x, y, i: {"cols": COLUMNS, "values": torch.cat([x, y[:, None].float(), i[:, None].float()], 1)},
        of_columns,
    ),
    "pictures": (
        lambda x, y, i: {"x": [Image.fromarray(row[None].numpy()) for row in x], "y": y, "i": i},
        lambda b: [torch.from_numpy(np.stack([np.array(one)[0] for one in b["x"]])), b["y"], b["i"]],
    ),
    "bytes": (
        lambda x, y, i: {"x": [row.numpy().tobytes() for row in x], "y": y, "i": i},
        lambda b: [torch.from_numpy(np.stack([np.frombuffer(row, "f4") for row in b["x"]])), b["y"], b["i"]],
    ),
    "complex": (lambda x, y, i: [torch.complex(x, x), y, i], lambda b: [b[0].real, b[1], b[2]]),
    "named tuple": (Old, parts),
    "deque": (lambda x, y, i: {"x": x, "rest": deque([y, i], 2)}, lambda b: [b["x"], *b["rest"]]),
    "slots": (Slots, parts),
    "frozen slots": (lambda *b: SimpleNamespace(inner=Frozen(*b)), lambda b: parts(b.inner)),
    "properties": (Hidden, parts),
    "cached properties": (Scaled, parts),
    "holds itself": (Ringed, lambda b: [b.x, b.inner[0], b.inner[2][1]["i"]]),
    "many kinds": (many, lambda b: [b["x"], b["y"], b["i"]]),
    "attributes": (lambda *b: SimpleNamespace(x=hung(*b)), lambda b: [b.x, b.x.y, b.x.i]),
    "tensor class": (
        lambda x, y, i: SimpleNamespace(x=x.as_subclass(Picture), y=y, i=i),
        lambda b: [b.x.as_subclass(Tensor), b.y, b.i],
    ),
    "views": (lambda x, y, i: {"x": x[:, :5], "flat": x.view(-1), "y": y, "again": y, "i": i}, lambda b: [
        b["x"], b["again"], b["i"]
    ]),
    "packed sequences": (
        lambda x, y, i: {"x": pack_sequence([row[:, None] for row in x]), "y": y, "i": i},
        lambda b: [pad_packed_sequence(b["x"], batch_first=True)[0].squeeze(2).contiguous(), b["y"], b["i"]],
    ),
    "nested": (
        lambda x, y, i: {"x": torch.nested.nested_tensor(list(x)), "y": y, "i": i},
        lambda b: [b["x"].to_padded_tensor(0.0), b["y"], b["i"]],
    ),
    "jagged": (
        lambda x, y, i: {"x": torch.nested.nested_tensor(list(x), layout=torch.jagged), "y": y, "i": i},
        lambda b: [torch.stack(list(b["x"].unbind())), b["y"], b["i"]],
    ),
    "sparse": (lambda x, y, i: [x.to_sparse(), y, i], lambda b: [b[0].to_dense(), b[1], b[2]]),
    "sparse by rows": (lambda x, y, i: [x.to_sparse_csr(), y, i], lambda b: [b[0].to_dense(), b[1], b[2]]),
}  # fmt: skip


class Taking(Plain):
    """Takes what it needs out of a batch, which stays on the CPU."""

    take = staticmethod(list)

    def training_step(self, batch, batch_idx):
        x, y, i = self.take(batch)
        return super().training_step([x.double().contiguous(), y, i], batch_idx)

    def transfer_batch_to_device(self, batch, device, dataloader_idx):
        return batch


def case(name, make, take):
    kind = type("Taking", (Taking,), {"take": staticmethod(take)})
    return Case(name, OPTIONS, loader={"collate_fn": lambda items: make(*default_collate(items))}, make=kind)


@pytest.fixture(scope="module")
def as_list(tmp_path_factory):
    """Weights and influences where batches are lists of tensors; the weights without a callback."""
    plain = case("list", lambda *columns: list(columns), list)
    callback = SGDInfluence("val_loss", epochs="all", dirpath=tmp_path_factory.mktemp("list") / "run")
    fit(plain, callback)
    return fit(plain).state_dict(), influences(callback)


@pytest.mark.parametrize("keep", ["auto", True, False])
@pytest.mark.parametrize("name", MAKES)
def test_a_batch_of_any_make_is_ranked_as_plain_tensors_are_and_its_training_untouched(as_list, name, keep):
    weights, expected = as_list
    callback = SGDInfluence("val_loss", epochs="all", keep_batches=keep)
    module = fit(case(name, *MAKES[name]), callback)
    assert all(torch.equal(tensor, weights[key]) for key, tensor in module.state_dict().items())
    assert influences(callback) == pytest.approx(expected, rel=1e-12, abs=1e-15)
    assert callback.summary["batches"]["kept"] == (15 if keep is True else 0)


def refused_at_first_batch(match, make, take=list, **options):
    train = DataLoader(loaders()[0].dataset, batch_size=5, collate_fn=lambda items: make(*default_collate(items)))
    module, trainer = case("refused", make, take), quiet_trainer([SGDInfluence("val_loss", **options)])
    with pytest.raises(UnsupportedTrainingError, match=match):
        trainer.fit(module.make(), train, loaders()[1])
    assert trainer.global_step == 0


@pytest.mark.parametrize("keep", ["auto", True, False])
def test_a_tensor_class_that_does_not_tell_what_it_holds_is_refused_at_the_first_batch(keep):
    refused_at_first_batch(
        r"holds a test_kinds_of_batch\.Opaque",
        lambda x, y, i: SimpleNamespace(x=Opaque(x), y=y, i=i),
        parts,
        keep_batches=keep,
    )


class Forgetful:
    """Copies lack its data."""

    def __init__(self, *batch):
        self.batch = batch

    def __getstate__(self):
        return {"x": 0}


class Careless:
    """Takes its data from elsewhere when it is copied, but not when it is made anew of its parts."""

    def __init__(self, *batch):
        self.batch = batch

    def __deepcopy__(self, memo):
        return Careless(*self.batch)

    def __getstate__(self):
        return {"x": 0}


@pytest.mark.parametrize("keep", ["auto", True, False])
def test_what_cannot_be_copied_as_it_is_is_refused_at_the_first_batch(keep):
    refused_at_first_batch(r"holds a test_kinds_of_batch\.Forgetful: copied", Forgetful, keep_batches=keep)


def test_what_does_not_come_back_as_it_was_is_refused_at_the_first_batch_only_where_it_must_be_kept(as_list):
    refused_at_first_batch(r"holds a test_kinds_of_batch\.Careless.*put together again", Careless, keep_batches=True)
    callback = SGDInfluence("val_loss", epochs="all")
    fit(case("careless", Careless, lambda b: b.batch), callback)
    assert np.array_equal(influences(callback), as_list[1])
