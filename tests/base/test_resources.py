# SPDX-License-Identifier: Apache-2.0
"""How many states fit in memory: half of what is free on the machine, or in a container that has less."""

import os
from pathlib import Path

import pytest

from lightning_sgdclean.base import resources as memory


@pytest.fixture
def container(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "_CGROUP", tmp_path)

    def limit(most, used):
        (tmp_path / "memory.max").write_text(f"{most}\n")
        (tmp_path / "memory.current").write_text(f"{used}\n")

    return limit


def test_a_container_that_has_less_than_the_machine_limits(container):
    container(10_000, 4_000)
    assert memory.free_memory() == 6_000
    assert memory.slots_for(1_000) == 3  # half of it
    assert memory.slots_for(3_001) == 0
    container(10_000, 12_000)
    assert memory.free_memory() == 0


def test_without_a_limit_it_is_what_the_machine_has(container):
    page = os.sysconf("SC_PAGE_SIZE")
    unused, all_of_it = (page * os.sysconf(name) for name in ("SC_AVPHYS_PAGES", "SC_PHYS_PAGES"))
    for most in (None, "max", 1 << 60):
        if most is not None:
            container(most, 0)
        # Caches can be given up, so more is free than unused; other processes come and go.
        assert 0.5 * unused < memory.free_memory() < all_of_it
        assert memory.slots_for(1 << 20) == pytest.approx(memory.free_memory() / 2**21, rel=0.5)
    assert memory.slots_for(0) > 0


def test_where_the_system_says_nothing_half_of_the_machine_counts(container, monkeypatch):
    def unreadable(*_):
        raise OSError("no such file")

    monkeypatch.setattr(Path, "read_text", unreadable)
    assert memory.free_memory() == os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
