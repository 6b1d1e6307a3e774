# SPDX-License-Identifier: Apache-2.0
"""How much memory and disk there is, as far as the system says."""

import os
from pathlib import Path

import torch

_SHARE = 0.5
_CGROUP = Path("/sys/fs/cgroup")


def slots_for(state_bytes: int, device: torch.device | None = None) -> int:
    """How many states may be held: as many as half of the free memory takes, by default that of the CPU."""
    return int(_SHARE * free_memory(device)) // max(1, state_bytes)


def free_memory(device: torch.device | None = None) -> int:
    """Bytes that this process may still take: what the machine has, or less where a container has less."""
    if device is not None and device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return max(0, min(_free_on_machine(), _free_in_container()))


def _free_on_machine() -> int:
    try:
        fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        return int(fields["MemAvailable"].split()[0]) << 10
    except (OSError, KeyError, ValueError):  # not Linux
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def _free_in_container() -> int:
    try:
        limit, used = ((_CGROUP / name).read_text().strip() for name in ("memory.max", "memory.current"))
        return int(limit) - int(used)
    except (OSError, ValueError):  # none, or without a limit
        return 1 << 62
