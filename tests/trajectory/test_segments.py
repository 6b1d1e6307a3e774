# SPDX-License-Identifier: Apache-2.0
"""A segment's file gives back what was written, however its steps differ, and is written without torch's threads."""

import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lightning_sgdclean.data.packing import pack_batch
from lightning_sgdclean.data.unpacking import unpack_batch
from lightning_sgdclean.trajectory.manifest import in_full, in_short
from lightning_sgdclean.trajectory.records import MicroBatch, Step
from lightning_sgdclean.trajectory.segments import Segment, write_segment
from processes import python

BATCH = {"x": torch.arange(6.0).view(2, 3), "words": ["a", "b"], "n": 2}


def micro(number, **given):
    plain = MicroBatch(
        ids=[number, number + 1],
        positions=[number, number + 1],
        epoch=3,
        batch_idx=number,
        random={"torch": torch.full((16,), number // 2, dtype=torch.uint8), "gauss": torch.tensor([0.0, number / 3])},
        digest=torch.tensor([number, -number]),
        loss=torch.tensor(number / 7),
        global_step=40 + number,
    )
    return replace(plain, **given)


def step(index, *batches, **given):
    groups = [{"lr": 0.1, "betas": [0.9, 0.99], "params": ["a"]}]
    return replace(Step(index, 3, False, groups, None, len(batches) or 1, [], list(batches)), **given)


STEPS = {
    "plain": [step(40, micro(0)), step(41, micro(1)), step(42, micro(2), ends_epoch=True)],
    "several batches a step": [step(40, micro(0), micro(1)), step(41, micro(2)), step(42, micro(3), micro(4))],
    "numbers of steps left out": [step(40, micro(0)), step(45, micro(1))],
    "names": [step(40, micro(0, ids=["a", "b"])), step(41, micro(1, ids=["c,d", 'e"']))],
    "names and numbers": [step(40, micro(0)), step(41, micro(1, ids=[2**70, "x"]))],
    "no positions": [step(40, micro(0, positions=None)), step(41, micro(1))],
    "one position": [step(40, micro(0, ids=[5], positions=5, digest=torch.tensor([1])))],
    "kept batches": [step(40, micro(0, batch=pack_batch(BATCH, {}))), step(41, micro(1)), step(42, micro(2))],
    "a batch of no tensors": [step(40, micro(0, batch=pack_batch(["a"], {})))],
    "of several loaders": [step(40, micro(0, sizes=[2, 0], positions=None)), step(41, micro(1, sizes=[1, 1]))],
    "thrown away": [step(40, micro(0, scale=0.0), micro(1))],
    "scaled": [step(40, micro(0, scale=1024.0, loader=2))],
    "clipped": [step(40, micro(0), clip=("norm", 0.5)), step(41, micro(1)), step(42, micro(2), clip=("value", 1.0))],
    "other options": [step(40 + n, micro(n), groups=[{"lr": 0.1 / (n + 1), "params": ["a"]}]) for n in range(3)],
    "a rate that is a tensor": [step(40, micro(0), groups=[{"lr": torch.tensor(0.1), "params": ["a"]}])],
    "unused parameters": [step(40, micro(0)), step(41, micro(1), unused=["a"])],
    "no update": [step(40, micro(0), groups=[], unused=["a"]), step(41, micro(1))],
    "no random states": [step(40, micro(0, random={})), step(41, micro(1, random={}))],
    "none": [],
}


@pytest.mark.parametrize("steps", STEPS.values(), ids=STEPS.keys())
def test_steps_come_back_as_they_went(steps, tmp_path):
    write_segment(tmp_path / "x.safetensors", steps, {})
    segment = Segment(tmp_path / "x.safetensors")
    for read in (segment.steps(), list(segment.whole_steps(1 << 40))):
        assert len(read) == len(steps)
        for found, true in zip(read, steps, strict=True):
            assert replace(found, micro=[]) == replace(true, micro=[])
            assert len(found.micro) == len(true.micro)
            for number, (one, other) in enumerate(zip(found.micro, true.micro, strict=True)):
                assert_same(one, other, segment.random(true.index, number), segment.batch(true.index, number))


def assert_same(found, true, random, batch):
    for name in ("ids", "positions", "epoch", "batch_idx", "global_step", "scale", "loader"):
        assert getattr(found, name) == getattr(true, name), name
    assert float(found.loss) == float(true.loss)
    assert torch.equal(found.digest, true.digest)
    assert list(random) == list(true.random) == list(found.random)
    assert all(torch.equal(random[name], state) for name, state in true.random.items())
    assert (batch is None) == (found.batch is None) == (true.batch is None)
    if batch is not None:
        assert str(unpack_batch(batch, {}, None)) == str(unpack_batch(true.batch, {}, None))


def test_states_of_any_dtypes_are_found_again(tmp_path):
    """Some lie one behind the other, some do not; one has other dtypes, one is longer."""
    whole = torch.arange(40.0).view(10, 4)
    states = {
        10: {"float32": whole[0], "int64": torch.tensor([1, 2])},
        11: {"float32": whole[1], "int64": torch.tensor([3, 4])},
        12: {"float32": whole[2]},
        15: {"float32": whole[3], "bfloat16": torch.ones(3, dtype=torch.bfloat16)},
        16: {"float32": whole[5]},
        17: {"float32": torch.arange(7.0), "int64": torch.tensor([5])},
    }
    write_segment(tmp_path / "x.safetensors", [], states)
    segment = Segment(tmp_path / "x.safetensors")
    for index, state in states.items():
        found = segment.state(index, state)
        assert found.keys() == state.keys()
        assert all(torch.equal(found[dtype], tensor) for dtype, tensor in state.items())


THREADS = """
import os, sys, torch
from pathlib import Path
from test_segments import micro, step
from lightning_sgdclean.trajectory.writer import Background
from lightning_sgdclean.trajectory.segments import write_segment

torch.set_num_threads(2)
torch.randn(1 << 20).exp().sum()  # the training's team of threads
steps = [
    step(n, micro(n, random={"torch": torch.randint(256, (5056,), dtype=torch.uint8)}, ids=[*range(512)],
                  positions=[*range(512)], digest=torch.arange(512)))
    for n in range(256)
]
rows = torch.randn(256, 4096)
background, numbers = Background(), []

def job():
    write_segment(Path(sys.argv[1]), steps, {n: {"float32": row} for n, row in enumerate(rows.unbind())})
    numbers.append(len(os.listdir("/proc/self/task")))

background.submit(lambda: numbers.append(len(os.listdir("/proc/self/task"))))
background.submit(job)
background.wait()
print(*numbers)
"""


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs Linux's list of threads")
def test_the_thread_that_writes_has_no_team_of_threads_of_its_own(tmp_path):
    """With more threads than cores the training's own team would wait longer at every turn, for good."""
    done = python("-c", THREADS, tmp_path / "x.safetensors")
    before, after = map(int, done.stdout.split())
    assert after == before


SERIES = {
    "none": ([], []),
    "one": ([(7, 0)], [(7, 1, 1, 0)]),
    "every step's": ([(n, 1) for n in range(256, 512)], [(256, 256, 1, 1)]),
    "one in five": ([(10, 0), (15, 0), (20, 0)], [(10, 3, 5, 0)]),
    "another layout from the second on": ([(0, 0), (1, 1), (2, 1)], [(0, 1, 1, 0), (1, 2, 1, 1)]),
    "another distance": ([(0, 0), (4, 0), (8, 0), (9, 0)], [(0, 3, 4, 0), (9, 1, 1, 0)]),
}


@pytest.mark.parametrize(("states", "rows"), SERIES.values(), ids=SERIES.keys())
def test_states_at_equal_distances_make_one_row(states, rows):
    assert in_short(states) == rows
    assert in_full(rows) == states


def test_any_states_are_found_again():
    rng = random.Random(0)
    for _ in range(200):
        numbers = sorted(rng.sample(range(40), rng.randrange(20)))
        states = [(number, rng.randrange(2)) for number in numbers]
        assert in_full(in_short(states)) == states
