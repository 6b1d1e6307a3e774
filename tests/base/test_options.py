# SPDX-License-Identifier: Apache-2.0
"""Every option, wrong by type, by value and by case, is refused in the same words at all four doors."""

import inspect
import json
import re
from dataclasses import fields

import pytest

from lightning_sgdclean import SGDInfluence, counterfactual, retrace
from lightning_sgdclean.base.options import PLAIN_OPTIONS, THE_RUNS, Options
from lightning_sgdclean.cli import main

NO_CHOICE = [None, 3, True, ["min"], "", "Min", "EXACT"]
WRONG = {
    "monitor": [None, 3, "", b"val_loss"],
    "mode": [*NO_CHOICE, "minimum", "MAX"],
    "objective": [3, "loss", {}, {"loss": None}, {"": len}, {3: len}, [len]],
    "val_dataloaders": [3, "no.such.module", "math", [3], {"a": 3}, object],
    "epochs": [0, -3, 1.0, True, "All", "ALL", "", None, "1", [1]],
    "at": [*NO_CHOICE, "Last", "BEST", "first"],
    "curvature": [*NO_CHOICE, "Exact", "full", "gauss"],
    "finite_radius": [0, -1.0, float("nan"), float("inf"), "0.01", None, True],
    "dirpath": ["", 3, ["runs"], True],
    "overwrite": [None, 0, 1, "yes", "True"],
    "sample_ids": [3, "ids", [len]],
    "keep_batches": [None, 0, 1, "Auto", "always"],
    "sample_losses": [3, "losses", [len]],
    "weighted_loss": [3, "loss", [len]],
    "snapshots": [0, -1, 2.0, True, "Auto", "all", None],
    "max_bytes": [0, -1, float("nan"), "1 GB", True],
    "on_mismatch": [*NO_CHOICE, "error", "Raise", "WARN"],
    "tolerance": [-1e-9, float("nan"), float("inf"), "small", True],
    "retrace_precision": [*NO_CHOICE, "fp32", "Float32"],
    "verify": [-1, 1.5, True, None, "8", "Auto", "all"],
    "rerank": [-1, 1.5, True, None, "8"],
    "columns": ["label", ["Label"], ["label", "colour"], 3, None, {"label": 1}],
    "formats": ["csv", ["CSV"], ["json"], 3, None],
    "page": [None, 0, "yes"],
    "render": [3, "picture"],
    "class_names": [3, "cat", len],
    "show_samples": [None, 1, "no"],
    "keep_trajectory": [None, 0, "no"],
}
CASES = [pytest.param(name, value, id=f"{name}={value!r}"[:40]) for name, values in WRONG.items() for value in values]


def words_of(call, **options):
    with pytest.raises(ValueError, match=r"\w") as refused:
        call(**options)
    return str(refused.value)


def test_every_option_has_wrong_values():
    assert list(WRONG) == [option.name for option in fields(Options)]


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_option_is_refused_in_the_same_words_wherever_it_can_be_given(name):
    doors = [
        SGDInfluence,
        lambda **options: retrace("nowhere", None, **options),
        lambda **options: counterfactual("nowhere", None, without=[0], **options),
    ]
    takers = [SGDInfluence.__init__, retrace, counterfactual]
    open_to = [door for door, taker in zip(doors, takers, strict=True) if name in inspect.signature(taker).parameters]
    if name == "val_dataloaders":  # for a retrace these are the data that fit would get, whatever they are
        open_to = open_to[:1]
    assert open_to
    for value in WRONG[name]:
        said = words_of(Options, **{name: value})
        assert name in said
        assert {words_of(door, **{name: value}) for door in open_to} == {said}


def in_yaml(value):
    """As it would stand in a file, or None where it cannot."""
    try:
        return json.dumps(value, allow_nan=False)
    except (TypeError, ValueError):
        return None


@pytest.mark.parametrize("name", sorted(PLAIN_OPTIONS))
@pytest.mark.parametrize("command", ["check", "cleanse"])
def test_a_wrong_option_in_a_configuration_is_refused_in_the_same_words(command, name, tmp_path, capsys):
    config = tmp_path / "config.yaml"
    for number, value in enumerate(WRONG[name]):
        written = in_yaml(value)
        if written is None:
            continue  # a float or an object that no YAML file holds
        config.write_text(
            "model: {class_path: no.such.Model}\n"
            "trainer:\n  callbacks:\n    - class_path: lightning_sgdclean.SGDInfluence\n"
            f"      init_args: {{{name}: {written}}}\n",
            encoding="utf-8",
        )
        more = ["--metric", "test_loss", "--output", str(tmp_path / f"out-{number}")] if command == "cleanse" else []
        assert main([command, str(config), *more]) == 1
        error = " ".join(capsys.readouterr().err.split())
        assert " ".join(words_of(Options, **{name: value}).split()) in error


def test_the_callback_has_the_defaults_of_the_options():
    given = {name: one.default for name, one in inspect.signature(SGDInfluence.__init__).parameters.items()}
    del given["self"]
    assert given == {option.name: option.default for option in fields(Options)}


@pytest.mark.parametrize("taker", [retrace, counterfactual])
def test_what_others_take_is_by_default_the_runs(taker):
    options = {option.name for option in fields(Options)} - {"val_dataloaders"}  # those are data
    taken = {name: one for name, one in inspect.signature(taker).parameters.items() if name in options}
    assert {one.default for one in taken.values()} == {THE_RUNS}
    assert str(taken["tolerance"]) == "tolerance: float | None = the run's"


def test_options_are_read_as_attributes_of_the_callback_and_not_set():
    callback = SGDInfluence(epochs=3)
    assert callback.epochs == callback.options.epochs == 3
    with pytest.raises(AttributeError, match="no setter"):
        callback.epochs = 0


def test_only_one_of_them_says_what_a_weight_does_to_the_loss():
    def loss(*given):
        return 0.0

    with pytest.raises(ValueError, match="sample_losses= and weighted_loss= both say"):
        Options(sample_losses=loss, weighted_loss=loss)
    assert not Options(weighted_loss=loss).finds_split


def test_what_is_right_passes():
    options = Options(epochs="all", columns=["label", "label"], formats=["csv"], finite_radius=1, max_bytes=1e9)
    assert options.columns == ("label",)
    assert options.formats == ("csv",)
    assert not re.search("^val", next(iter(Options(objective={"a": len}).objectives)))
