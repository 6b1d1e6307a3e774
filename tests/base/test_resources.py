# SPDX-License-Identifier: Apache-2.0
"""What fits in memory, how long a step takes, and bytes in words."""

import os
from pathlib import Path

import pytest

from lightning_sgdclean.base import resources
from lightning_sgdclean.base.resources import StepTimer, in_bytes


@pytest.fixture
def container(tmp_path, monkeypatch):
    monkeypatch.setattr(resources, "_CGROUP", tmp_path)

    def limit(most, used):
        (tmp_path / "memory.max").write_text(f"{most}\n")
        (tmp_path / "memory.current").write_text(f"{used}\n")

    return limit


def test_a_container_that_has_less_than_the_machine_limits(container):
    container(10_000, 4_000)
    assert resources.free_memory() == 6_000
    assert resources.slots_for(1_000) == 3  # half of it
    assert resources.slots_for(3_001) == 0
    container(10_000, 12_000)
    assert resources.free_memory() == 0


def test_without_a_limit_it_is_what_the_machine_has(container):
    page = os.sysconf("SC_PAGE_SIZE")
    unused, all_of_it = (page * os.sysconf(name) for name in ("SC_AVPHYS_PAGES", "SC_PHYS_PAGES"))
    for most in (None, "max", 1 << 60):
        if most is not None:
            container(most, 0)
        # Caches can be given up, so more is free than unused; other processes come and go.
        assert 0.5 * unused < resources.free_memory() < all_of_it
        assert resources.slots_for(1 << 20) == pytest.approx(resources.free_memory() / 2**21, rel=0.5)
    assert resources.slots_for(0) > 0


def test_where_the_system_says_nothing_half_of_the_machine_counts(container, monkeypatch):
    def unreadable(*_):
        raise OSError("no such file")

    monkeypatch.setattr(Path, "read_text", unreadable)
    assert resources.free_memory() == os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def test_pace_is_the_median_of_the_first_batches_without_what_lies_between_epochs(monkeypatch):
    times = iter([0.0, 5.0, 6.0, 7.0, 20.0, *(21.0 + i for i in range(20))])
    monkeypatch.setattr(resources, "perf_counter", lambda: next(times))
    pace, told = StepTimer(), []
    for number in range(14):
        told.append(pace.batch_begins())
        if number == 3:
            pace.is_interrupted()  # before the batch at 20
    assert pace.seconds == 1.0
    assert told.index(True) == 11
    assert told.count(True) == 1


@pytest.mark.parametrize(("number", "words"), [(0, "0 B"), (999, "999 B"), (4200, "4.2 kB"), (3.2e12, "3.2 TB")])
def test_bytes_are_given_in_a_unit_that_reads_well(number, words):
    assert in_bytes(number) == words
