# SPDX-License-Identifier: Apache-2.0
"""What there is of memory and time, which versions of what is installed, and what travels to another process."""

import copy
import importlib.metadata
import os
import pickle
import platform
from dataclasses import dataclass
from multiprocessing.context import get_spawning_popen
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    import torch


_SHARE = 0.5
_CGROUP = Path("/sys/fs/cgroup")


def slots_for(state_bytes: int, device: "torch.device | None" = None) -> int:
    """How many states may be held: as many as half of the free memory takes, by default that of the CPU."""
    return int(_SHARE * free_memory(device)) // max(1, state_bytes)


def free_memory(device: "torch.device | None" = None) -> int:
    """Bytes that this process may still take: what the machine has, or less where a container has less."""
    if device is not None and device.type == "cuda":
        import torch  # here, since the command line looks at runs without it

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


def in_bytes(number: float) -> str:
    """A number of bytes in a unit that reads well, e.g. ``12.5 MB``."""
    for unit in ("B", "kB", "MB", "GB"):
        if number < 1000:
            return f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:.3g} TB"


_ENOUGH = 10


class StepTimer:
    """Time from the beginning of a batch to that of the next one: loading, training and recording.

    The median of the first ten, since the very first prepares a lot, and a rehearsal falls between two of them.

    Attributes:
        seconds: That time, or None before it is known.
    """

    def __init__(self) -> None:
        self.seconds: float | None = None
        self._last: float | None = None
        self._found: list[float] = []

    def batch_begins(self) -> bool:
        """Take the time.

        Returns:
            Whether this was the last one needed.
        """
        if self.seconds is not None:
            return False
        now = perf_counter()
        if self._last is not None:
            self._found.append(now - self._last)
        self._last = now
        if len(self._found) < _ENOUGH:
            return False
        self.seconds = median(self._found)
        return True

    def is_interrupted(self) -> None:
        """More than loading happens before the next batch: validation, or another epoch."""
        self._last = None


def in_time(seconds: float) -> str:
    """A duration in the unit that reads well, e.g. ``3.2 min``."""
    for unit, size in (("h", 3600.0), ("min", 60.0), ("s", 1.0)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{1000 * seconds:.3g} ms"


def versions() -> dict[str, str]:
    """Versions of what computed the influences."""
    import torch

    found = {"python": platform.python_version(), "torch": torch.__version__}
    for name in ("lightning-sgdclean", "pytorch-lightning", "lightning"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def pyarrow() -> Any:
    """``pyarrow`` and ``pyarrow.parquet``.

    Raises:
        ImportError: If they are not installed.
    """
    try:
        import pyarrow as pa
        from pyarrow import parquet
    except ImportError as error:
        raise ImportError("Parquet needs pyarrow: pip install lightning-sgdclean[parquet]") from error
    return pa, parquet


class Portable:
    """Pickled and copied without what belongs to a running fit, its threads and hooks: what ``_forget`` makes anew."""

    def _forget(self) -> None:
        raise NotImplementedError

    def __getstate__(self) -> dict[str, Any]:
        fresh = object.__new__(type(self))
        fresh._forget()
        return {name: value for name, value in vars(self).items() if name not in vars(fresh)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()


@dataclass(frozen=True)
class Lost:
    """Stands for an option that could not be pickled.

    Attributes:
        name: The option's.
        why: What pickle said.
    """

    name: str
    why: str


class Travelling:
    """An option on its way into a pickle, where it arrives if it can be pickled; else there is a :class:`Lost`.

    A Trainer is pickled with its callbacks wherever workers are spawned that get a method of a datamodule. That must
    not fail for an option of ours which nobody needs there.
    """

    _under_way: ClassVar[set[int]] = set()  # an option may lead back to the callback

    def __init__(self, name: str, value: Any) -> None:
        self.name, self.value = name, value

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return copy.deepcopy(self.value, memo)

    def __reduce__(self) -> tuple[Any, ...]:
        if self.value is None or id(self.value) in self._under_way:
            return itself, (None if self.value is None else Lost(self.name, "it leads back to itself"),)
        self._under_way.add(id(self.value))
        try:
            dumps = pickle.dumps if get_spawning_popen() is None else ForkingPickler.dumps
            return pickle.loads, (bytes(dumps(self.value)),)
        except Exception as error:  # the user's objects raise what they like
            return Lost, (self.name, f"{type(error).__name__}: {error}")
        finally:
            self._under_way.discard(id(self.value))


def itself(value: Any) -> Any:
    """The value: what a copy is made by whose original stands for something else."""
    return value
