# SPDX-License-Identifier: Apache-2.0
"""Where a sample's label stands: one rule, which every way to a new label follows, and which guesses nothing."""

import enum
import pickle
import re
from collections import UserDict, namedtuple
from types import MappingProxyType

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader, Dataset

from cases import quiet_trainer
from lightning_sgdclean import Cleansed, Ranking, apply_decisions
from lightning_sgdclean.cleansing.decisions import DECISION_COLUMNS
from lightning_sgdclean.data.labels import (
    LABEL_KEYS,
    LabelSetter,
    RelabelledDataset,
    converted_label,
    place_of_label,
    with_label,
)
from lightning_sgdclean.ranking.ranking import run_id
from lightning_sgdclean.report.samples import fetch_shown

RANKING = Ranking.from_influence(range(3), [-3.0, -2.0, 1.0], [1] * 3)
Pair = namedtuple("Pair", "x other")
Point = namedtuple("Point", "x target")
LabelFirst = namedtuple("LabelFirst", "label x")
Weighted = namedtuple("Weighted", "x y weight")
Numbered = namedtuple("Numbered", "x index label")
TwoLabels = namedtuple("TwoLabels", "x y label")
BothLabels = namedtuple("BothLabels", "target label")
NoLabel = namedtuple("NoLabel", "x index weight")


class Listed(Dataset):
    def __init__(self, samples):
        self.samples = samples

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, position):
        return self.samples[position]


# --- the doors: each gives sample 0 of three another label


def by_function(sample, new):
    return with_label(sample, new)


def by_dataset(sample, new, **options):
    return RelabelledDataset(Listed([sample] * 3), {0: new}, **options)[0]


class Seeing(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.weight, self.seen = torch.nn.Parameter(torch.zeros(())), []

    def training_step(self, batch, batch_idx):
        self.seen += batch
        return self.weight

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def transfer_batch_to_device(self, batch, device, dataloader_idx):
        return batch


def as_they_are(samples):
    return samples


def by_fit(sample, new, **options):
    module = Seeing()
    loader = DataLoader(Listed([sample] * 3), collate_fn=as_they_are)
    quiet_trainer([Cleansed(labels={0: new}, **options)], pl, max_epochs=1, precision="32-true").fit(module, loader)
    return module.seen[0]


def by_decision(sample, new, **options):
    lines = [",".join(DECISION_COLUMNS), f"0,relabel,{new},,{run_id(RANKING)}"]
    with open("decisions.csv", "w", encoding="utf-8") as file:
        file.write("\n".join(lines))
    return apply_decisions(Listed([sample] * 3), "decisions.csv", run=RANKING, **options)[0]


DOORS = [by_function, by_dataset, by_fit, by_decision]
CLEAR = [
    (("picture", 3), 1),
    (["picture", 3], 1),
    ((1.5, 3), 1),
    ((1.5, torch.tensor(3)), 1),
    (("text", "a class"), 1),
    ((torch.zeros(2), np.int64(3)), 1),
    (Pair("picture", 3), 1),
    (Point("picture", 3), 1),
    (LabelFirst(3, "picture"), 0),
    (Weighted("picture", 3, 0.5), 1),
    (Numbered("picture", 17, 3), 2),
    *(({"x": "picture", key: 3, "weight": 2}, key) for key in LABEL_KEYS),
    (UserDict(x="picture", label=3), "label"),
]
UNCLEAR = [
    (("picture", 3, 0.5), "tuple of 3 items"),
    (("picture", 17, 3), "tuple of 3 items"),
    (["picture", 3, 7], "list of 3 items"),
    (("picture",), "tuple of 1 item"),
    ((), "tuple of 0 items"),
    ((3, "a text"), "tuple of a number and a text, either of which may be the label"),
    (TwoLabels("picture", 3, 4), "TwoLabels with the fields 'x', 'y', 'label'"),
    (BothLabels(3, 4), "BothLabels with the fields 'target', 'label'"),
    (NoLabel("picture", 17, 0.5), "NoLabel with the fields 'x', 'index', 'weight'"),
    ({"x": "picture"}, "dict with the keys 'x'"),
    ({"x": "picture", "label": 3, "class": 4}, "dict with the keys 'x', 'label', 'class'"),
    (torch.zeros(2), "Tensor"),
    (3, "int"),
]


def is_text(sample, place):
    return isinstance(sample[place], str)


@pytest.mark.parametrize(("sample", "place"), CLEAR, ids=str)
@pytest.mark.parametrize("door", DOORS)
def test_every_door_changes_the_same_entry(door, sample, place):
    before = pickle.dumps(sample)
    found = door(sample, "9")
    assert type(found) is type(sample)
    assert pickle.dumps(sample) == before  # the dataset's own sample
    entries = dict(found) if isinstance(place, str) else dict(enumerate(found))
    assert entries.pop(place) == ("9" if is_text(sample, place) else 9)
    assert type(found[place]) is type(sample[place])
    assert all(value is sample[key] for key, value in entries.items()) or isinstance(sample, UserDict)


@pytest.mark.parametrize(("sample", "place"), CLEAR, ids=str)
def test_the_page_shows_the_entry_that_the_doors_change(sample, place):
    rows, complaints = fetch_shown(Listed([sample]), [0])
    assert not complaints
    assert rows[0].label == ("a class" if is_text(sample, place) else 3)


@pytest.mark.parametrize(("sample", "found"), UNCLEAR, ids=str)
@pytest.mark.parametrize("door", DOORS)
def test_every_door_refuses_to_guess_and_names_its_way_out(door, sample, found):
    assert place_of_label(sample) is None
    way_out = "give label=" if door is by_decision else "give set_label="
    with pytest.raises(TypeError, match=re.escape(f"not clear: found {found}; {way_out}")):
        door(sample, "9")


def test_the_ways_out_lead_out():
    def third(sample, label):
        return *sample[:2], int(label)

    sample = ("picture", 17, 3)
    assert by_dataset(sample, 9, set_label=third) == by_fit(sample, 9, set_label=third) == ("picture", 17, 9)
    assert by_decision(sample, 9, label=2) == by_decision(sample, 9, label=third) == ("picture", 17, 9)
    assert by_decision(sample, 9, label=-1) == ("picture", 17, 9)
    assert by_decision({"x": 1, "label": 2, "class": 3}, 9, label="class") == {"x": 1, "label": 2, "class": 9}
    assert by_decision((3, "a text"), 9, label=0) == (9, "a text")


def test_a_row_that_is_a_tensor_is_left_as_it_is():
    row = torch.tensor([1.0, 2.0, 3.0])
    assert by_decision(row, 9, label=2).tolist() == [1.0, 2.0, 9.0]
    assert row.tolist() == [1.0, 2.0, 3.0]


def test_a_mapping_that_cannot_be_written_becomes_a_dict():
    assert with_label(MappingProxyType({"x": 1, "label": 2}), 9) == {"x": 1, "label": 9}


# --- the label that the loss saw


def test_an_expected_label_has_to_stand_where_the_rule_says():
    assert by_dataset(("picture", 3), 9, expected={0: 3.0}) == ("picture", 9)
    assert by_dataset(("picture", "cat"), "dog", expected={0: "cat"}) == ("picture", "dog")
    for label in (4, "cat", torch.tensor([3, 3])):
        with pytest.raises(ValueError, match=r"^Sample 0: the loss held it to the label 3\.0, but .*; give set_label="):
            by_dataset(("picture", label), 9, expected={0: 3.0})


def test_an_expected_label_that_stands_at_one_place_only_proves_nothing():
    # 3 may be the index of sample 3, or the label: that the loss saw a 3 here does not tell.
    with pytest.raises(TypeError, match="not clear"):
        by_dataset(("picture", 3, "cat"), 9, expected={0: 3.0})


def test_an_error_names_the_sample():
    with pytest.raises(TypeError, match=r"^Sample 0: where the label .* to the relabelled sample\.$"):
        by_dataset((1, 2, 3), 9)
    with pytest.raises(ValueError, match=r"^Sample 0: the new label is 2.5, .* expected a whole number\.$"):
        by_dataset((1, 2), 2.5)


# --- the type of the label


class Animal(enum.IntEnum):
    CAT, DOG = 0, 1


@pytest.mark.parametrize(
    ("label", "old", "expected"),
    [
        ("2", 1, 2),
        (2.0, 1, 2),
        (torch.tensor(2), 1, 2),
        (np.array([2.0]), 1, 2),
        (True, 0, 1),
        (2, 0.5, 2.0),
        ("0.25", 0.5, 0.25),
        (1.0, False, True),
        ("0", True, False),
        (np.bool_(True), False, True),
        ("dog", "cat", "dog"),
        ("elephant", np.str_("cat"), np.str_("elephant")),
        (1.0, Animal.CAT, Animal.DOG),
        ("1", Animal.CAT, Animal.DOG),
        (2.0, np.uint8(1), np.uint8(2)),
        (True, np.bool_(False), np.bool_(True)),
    ],
    ids=str,
)
def test_a_label_gets_the_type_of_the_old_one(label, old, expected):
    found = converted_label(label, old)
    assert found == expected
    assert type(found) is type(old)


@pytest.mark.parametrize("label", [2, 2.0, "2", torch.tensor(2.0), np.int64(2)], ids=repr)
@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.float32, torch.bfloat16])
def test_a_label_gets_shape_and_dtype_of_the_old_one(label, shape, dtype):
    old = torch.ones(shape, dtype=dtype, requires_grad=dtype.is_floating_point)
    found = converted_label(label, old)
    assert (found.shape, found.dtype, found.item(), old.item()) == (shape, dtype, 2, 1)
    if dtype is not torch.bfloat16:
        old = old.detach().numpy()
        found = converted_label(label, old)
        assert (found.shape, found.dtype, found.item(), old.item()) == (shape, old.dtype, 2, 1)


@pytest.mark.parametrize(
    ("label", "old", "says"),
    [
        (2.5, 1, "2.5, but the dataset's is 1; expected a whole number"),
        ("2.0", 1, "'2.0', but the dataset's is 1; expected a whole number"),
        (float("nan"), 1, "nan, but the dataset's is 1; expected a whole number"),
        (2.5, torch.tensor(1), "expected a whole number"),
        (2, True, "2, but the dataset's is True; expected True or False"),
        (2, torch.tensor(True), "expected True or False"),
        (float("inf"), 1.0, "inf, but the dataset's is 1.0; expected a finite number"),
        (10**400, 1.0, "expected a finite number"),
        (300, np.uint8(1), "300, which does not fit into uint8"),
        (300, np.array([1], np.uint8), "300, which does not fit into uint8"),
        (300, torch.tensor(1, dtype=torch.uint8), "300, which does not fit into torch.uint8"),
        (1e300, np.float32(1), "1e+300, which does not fit into float32"),
        (1e300, torch.tensor(1.0), "1e+300, which does not fit into torch.float32"),
        (1e10, torch.tensor(1.0, dtype=torch.float16), "which does not fit into torch.float16"),
        ("elephant", np.array("cat"), "'elephant', which does not fit into <U3"),
        (7, Animal.CAT, "7, which does not fit into Animal"),
    ],
    ids=str,
)
def test_labels_that_would_be_others_then_are_refused(label, old, says):
    with pytest.raises(ValueError, match=re.escape(f"{says}") + "$"):
        converted_label(label, old)


@pytest.mark.parametrize("old", [torch.tensor([1, 2]), [1], {"label": 1}, None, 1j], ids=repr)
def test_what_is_not_a_single_value_is_not_replaced(old):
    says = f"the dataset's label is a {type(old).__name__}, expected a single number or text; give"
    for door in (by_function, by_dataset, by_fit):
        with pytest.raises(TypeError, match=f"{says} set_label="):
            door(("picture", old), 2)
    with pytest.raises(ValueError, match=f"line 2: {says} label="):
        by_decision(("picture", old), 2)


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [("cat", 2, "the new label is 2, but the dataset's is 'cat'; expected text"), (1, [2], "the new label is a list")],
)
def test_new_labels_of_another_kind_are_refused(old, new, says):
    with pytest.raises(TypeError, match=f"{says}.*; give set_label="):
        with_label(("picture", old), new)


def test_workers_can_be_sent_what_sets_labels():
    setter = pickle.loads(pickle.dumps(LabelSetter("give label=", 2)))
    assert setter((1, 2, 3), "4") == (1, 2, 4)
