# SPDX-License-Identifier: Apache-2.0
"""Every option of the callback can be set from YAML, as a LightningCLI reads it."""

import importlib
import inspect
import sys

import jsonargparse
import pytest
import yaml

from lightning_sgdclean import SGDInfluence

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of jsonargparse, for those who build parsers

MODULE = """
import torch
from torch.utils.data import DataLoader


def losses(module, batch):
    return module.loss(batch, "none")


def typed_losses(module, batch) -> torch.Tensor:
    return module.loss(batch, "none")


def weighted(module, batch, weights):
    return (weights * module.loss(batch, "none")).mean()


def objective(module, batch):
    return module.loss(batch)


def ids(batch):
    return batch[2]


def render(sample):
    return "text"


def val_loader():
    return DataLoader([0, 1], batch_size=2)


ready_loader = DataLoader([0, 1], batch_size=2)
"""
# What YAML says, and what the callback then has: a value, or the name of a function in the module.
OPTIONS = {
    "monitor": [("other", "other")],
    "mode": [("max", "max")],
    "objective": [("mine.objective", "objective"), ({"one": "mine.objective"}, {"one": "objective"})],
    "val_dataloaders": [],  # below: they are made
    "epochs": [(2, 2), ("all", "all")],
    "at": [("best", "best")],
    "curvature": [("finite", "finite")],
    "finite_radius": [(0.02, 0.02)],
    "dirpath": [("runs", "runs")],
    "overwrite": [(True, True)],
    "sample_ids": [("mine.ids", "ids"), ("content", "content")],
    "keep_batches": [(True, True), (False, False), ("auto", "auto")],
    "sample_losses": [("mine.losses", "losses"), ("mine.typed_losses", "typed_losses")],
    "weighted_loss": [("mine.weighted", "weighted")],
    "snapshots": [(3, 3), ("sqrt", "sqrt")],
    "max_bytes": [(1000, 1000)],
    "on_mismatch": [("warn", "warn")],
    "tolerance": [(1e-3, 1e-3)],
    "retrace_precision": [("float32", "float32")],
    "verify": [(12, 12), (0, 0), ("auto", "auto")],
    "rerank": [(5, 5)],
    "columns": [(["label", "loss"], ("label", "loss"))],
    "formats": [(["csv"], ("csv",))],
    "page": [(False, False)],
    "render": [("mine.render", "render")],
    "class_names": [(["cat", "dog"], ["cat", "dog"]), ({0: "cat", 1: "dog"}, {0: "cat", 1: "dog"})],
    "show_samples": [(False, False)],
    "keep_trajectory": [(False, False)],
}


@pytest.fixture
def mine(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(MODULE, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    yield importlib.import_module("mine")
    del sys.modules["mine"]


def callback_of(options):
    """Read as a LightningCLI reads the Trainer's callbacks: a subclass by its path, and its arguments."""
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(SGDInfluence, "callback")
    text = yaml.safe_dump({"callback": {"class_path": "lightning_sgdclean.SGDInfluence", "init_args": options}})
    return parser.instantiate_classes(parser.parse_string(text)).callback


def test_every_option_is_tried():
    assert list(OPTIONS) == [name for name in inspect.signature(SGDInfluence.__init__).parameters if name != "self"]


@pytest.mark.parametrize(
    ("name", "given", "expected"),
    [(name, *pair) for name, pairs in OPTIONS.items() for pair in pairs],
    ids=lambda value: str(value)[:30],
)
def test_an_option_can_be_set_from_yaml(name, given, expected, mine):
    functions = vars(mine)
    if isinstance(expected, dict) and name == "objective":
        expected = {key: functions[function] for key, function in expected.items()}
    elif str(given).startswith("mine."):
        expected = functions[expected]
    found = getattr(callback_of({name: given}), name)
    assert str(found) == expected if name == "dirpath" else found == expected


@pytest.mark.parametrize("path", ["mine.val_loader", "mine.ready_loader"])
def test_loaders_are_made_of_their_import_path(path, mine):
    (batch,) = callback_of({"val_dataloaders": path}).val_dataloaders
    assert batch.tolist() == [0, 1]


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ("mine.nothing", r"val_dataloaders.*'mine\.nothing'"),
        ("text", "val_dataloaders.*'text'"),
        (7, "val_dataloaders must be .*int"),
        (object(), "val_dataloaders must be .*object"),
    ],
)
@pytest.mark.usefixtures("mine")
def test_what_is_no_loader_is_refused_at_once(given, match):
    with pytest.raises((ValueError, ImportError), match=match):
        SGDInfluence(val_dataloaders=given)
