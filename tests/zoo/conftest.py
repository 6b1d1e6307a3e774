# SPDX-License-Identifier: Apache-2.0
"""Modules that others wrote; each file needs the package that it is named after.

`make test` puts those of packages.txt into a folder of their own, which stands at the end of the path while these files
are collected and their tests run: what they hold besides, and PyPI's torchvision, which does not import beside a CPU
build of torch, stay out of the way of everything else, and of the processes that other tests start.
"""

import sys
import warnings
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

FOLDER = str(Path(sys.prefix, "zoo"))
sys.path.append(FOLDER)

NAMED_OTHERWISE = {"tutorials": "torch", "bolts": "torch", "glue": "transformers", "optimizers_of_packages": "torch"}


@pytest.hookimpl(trylast=True)
def pytest_collection_finish():
    sys.path.remove(FOLDER)


@pytest.fixture(autouse=True)
def on_the_path():
    sys.path.append(FOLDER)
    yield
    sys.path.remove(FOLDER)


def package(path):
    name = path.stem.removeprefix("test_")
    return NAMED_OTHERWISE.get(name, name)


def import_torchvision():
    """Also where its compiled part does not load: importing it needs two of its operations to be known by name."""
    try:
        import torchvision
    except RuntimeError as error:
        if "does not exist" not in str(error):
            raise
        for name in ("nms", "qnms"):
            torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        import torchvision
    return torchvision


if find_spec("torchvision"):
    with warnings.catch_warnings(action="ignore"):
        import_torchvision()

collect_ignore = [path.name for path in Path(__file__).parent.glob("test_*.py") if find_spec(package(path)) is None]
