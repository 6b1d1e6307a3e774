# SPDX-License-Identifier: Apache-2.0
"""What the walk back needs besides the replay, what it carries and finds, and where it goes on after a kill."""

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import CodeType
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_sgdclean.adjoint.adjoints import Adjoint
from lightning_sgdclean.adjoint.curvature import Engine, Exact, Finite
from lightning_sgdclean.adjoint.gauss_newton import GaussNewton
from lightning_sgdclean.adjoint.gradcheck import DerivativeChecks
from lightning_sgdclean.adjoint.optimizers import update_of
from lightning_sgdclean.adjoint.updates import Update
from lightning_sgdclean.base.errors import RunDirectoryError, SGDInfluenceError
from lightning_sgdclean.base.files import appearing_whole, check_plain, checksum_of, naming, read_sealed, write_sealed
from lightning_sgdclean.base.options import Options, SampleId
from lightning_sgdclean.base.resources import versions
from lightning_sgdclean.losses.precision import in_float32, in_half, is_low
from lightning_sgdclean.losses.surroundings import Surroundings
from lightning_sgdclean.replay.fidelity import Fidelity
from lightning_sgdclean.replay.replay import Replay
from lightning_sgdclean.trajectory.flat_state import flatten, unflatten
from lightning_sgdclean.trajectory.records import MicroBatch, State, Step


@dataclass(frozen=True)
class Walk:
    """A replay whose steps can be transposed; see :func:`lightning_sgdclean.adjoint.backward.retrace_steps`.

    Attributes:
        replay: Runs the steps again.
        engine: Scores and Hessian's product.
        update: The optimizer's rule.
        widens: Whether derivatives of a run in 16 bits are taken in float32.
        labels_of: Gives labels that the samples could have had, ``(B,)``, where the influence of that is wanted.
        checks: Which steps' derivatives are held against differences of training's gradient; None: no step's.
    """

    replay: Replay
    engine: Engine
    update: Update
    widens: bool = False
    labels_of: Callable[[list[SampleId]], Tensor] | None = None
    checks: DerivativeChecks | None = None

    def pulling(self) -> AbstractContextManager[Surroundings]:
        """Context to take derivatives in, and what stands for the Trainer there."""
        own = self.replay.surroundings
        return in_float32(self.replay.module, own) if self.widens else nullcontext(own)


def walk_of(replay: Replay, optimizer: Optimizer, options: Options, steps: Sequence[Step] = ()) -> Walk:
    """The walk that the options ask for, over some steps.

    Raises:
        UnsupportedTrainingError: If there is no transpose of the optimizer's step.
    """
    return Walk(
        replay,
        _engine_named(options.curvature, options.finite_radius),
        update_of(optimizer),
        _widens(options.retrace_precision, replay.surroundings, replay.module),
        checks=DerivativeChecks(steps),
    )


def _engine_named(name: str, radius: float) -> Engine:
    if name == "finite":
        return Finite(radius)
    return GaussNewton() if name == "gauss-newton" else Exact(with_hessian=name == "exact")


def _widens(wanted: str, surroundings: Surroundings, module: nn.Module) -> bool:
    if not is_low(surroundings, module):
        return False
    return wanted == "float32" or (wanted == "auto" and in_half(surroundings))


@dataclass
class Influences:
    """Influence of every sample drawn in a window on each objective.

    Attributes:
        ids: The ``N`` samples drawn.
        visits: How often each was drawn, ``(N,)``.
        values: Influences in the objective's unit, ``(K, N)``, one row an objective; negative: harmful.
        by_epoch: What each epoch adds to the first row, ``(N,)`` by epoch.
        relabelled: What the first objective would change by if the samples had other labels, ``(N,)``; NaN: not known.
        norms: Length of the first objective's adjoint before the first step of each epoch, by epoch.
    """

    ids: list[SampleId]
    visits: Tensor
    values: Tensor
    by_epoch: dict[int, Tensor]
    relabelled: Tensor
    norms: dict[int, float] = field(default_factory=dict)

    @classmethod
    def none_yet(cls, steps: list[Step], num_objectives: int) -> "Influences":
        """Zeros for all that is drawn in ``steps``."""
        drawn = [micro for step in steps if step.is_update for micro in step.micro]
        ids = list(dict.fromkeys(name for micro in drawn for name in micro.ids))
        by_epoch = {epoch: torch.zeros(len(ids), dtype=torch.float64) for epoch in sorted({m.epoch for m in drawn})}
        values = torch.zeros(num_objectives, len(ids), dtype=torch.float64)
        none = torch.zeros(len(ids), dtype=torch.float64)
        return cls(ids, none.long(), values, by_epoch, none)

    def __post_init__(self) -> None:
        self._rows = {name: row for row, name in enumerate(self.ids)}

    def complaints(self) -> list[str]:
        """That nothing is ranked where every influence is zero, if so."""
        if not len(self.ids) or bool(self.values[0].any()):
            return []
        return [
            "Every influence is exactly zero: to first order no sample moves the objective, and the ranking says "
            "nothing. Likely causes: an optimizer whose steps follow the signs of gradients, a learning rate of zero, "
            "an objective without a gradient at the end point, or averages of the weights that no step of the window "
            "is part of (StochasticWeightAveraging averages what epochs begin with). Train with another optimizer or "
            "rate, or ask for another objective or more epochs."
        ]

    def add(self, micro: MicroBatch, scores: Tensor) -> None:
        """Take in a micro-batch's ``scores``, ``(K, B)`` or with other labels ``(K, 2 B)``: what more of each does."""
        rows = torch.tensor([self._rows[name] for name in micro.ids])
        scores = scores.double().cpu()
        if scores.shape[1] > len(rows):
            self.relabelled.index_add_(0, rows, scores[0, len(rows) :])
        moved = -scores[:, : len(rows)]
        self.values.index_add_(1, rows, moved)
        self.by_epoch[micro.epoch].index_add_(0, rows, moved[0])
        self.visits.index_add_(0, rows, torch.ones_like(rows))


_SECONDS = 30.0  # between two marks at least
_SHARE = 0.02  # of the time, at most, goes into marking
_COUNTERS = ("loss", "update", "num_bitwise", "num_batches", "segments_bitwise", "num_segments", "complaints")


@dataclass
class Carried:
    """What a walk carries from step to step; restored in place.

    Attributes:
        adjoints: One an objective.
        found: The influences so far.
        fidelity: How far the replay was off so far.
    """

    adjoints: list[Adjoint]
    found: Influences
    fidelity: Fidelity


class Bookmark:
    """Writes now and then how far a walk is, and reads it back.

    As a context around the walk it removes what was written if the walk is refused: whatever is mended then, data or
    module, the part that was gone over was not of it. After a kill, an interrupt or a lack of memory it stays.

    Args:
        folder: Where its two files lie while the walk goes on. Where they cannot be written, it goes on without.
        key: What tells this walk from others; see :func:`key_of`.
    """

    def __init__(self, folder: Path, key: str) -> None:
        self._folder, self._key = folder, key
        self._name = f"retracing-{key[:12]}"
        self._last, self._took = time.monotonic(), 0.0
        self._number = 0

    def __enter__(self) -> "Bookmark":
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, SGDInfluenceError):
            self.remove()

    def restore(self, carried: Carried) -> int:
        """Put back what was written last; how many steps had been gone over then, 0 where nothing can be used."""
        path = self._folder / f"{self._name}.json"
        try:
            content = read_sealed(path, dict[str, Any])
            held = self._tensors(content["number"])
            if content["file"] != held.name or content["key"] != self._key:
                return 0
            check_plain(held)
            if checksum_of(held) != content["checksum_of_file"]:
                return 0
            tensors = load_file(held)
        except (RunDirectoryError, OSError, KeyError):
            return 0  # a walk from the start is right, too
        with naming(path):
            done: int = content["done"]
            self._number = content["number"]
            carried.found.norms = {int(epoch): norm for epoch, norm in content["norms"].items()}
            for row, adjoint in enumerate(carried.adjoints):
                flat = {dtype: tensors[f"{row}/{dtype}"] for dtype in content["dtypes"][row]}
                _put_back(adjoint, unflatten(content["layouts"][row], flat))
            for name in ("values", "visits", "relabelled"):
                setattr(carried.found, name, tensors[name])
            carried.found.by_epoch = dict(zip(carried.found.by_epoch, tensors["by_epoch"], strict=True))
            for name in _COUNTERS:
                setattr(carried.fidelity, name, content["fidelity"][name])
        return done

    def pass_by(self, done: int, carried: Carried) -> None:
        """``done`` steps have been gone over: write that down, if it is time to."""
        now = time.monotonic()
        if now - self._last < max(_SECONDS, self._took / _SHARE):
            return
        with suppress(OSError, SafetensorError):  # the latter where the disk is full
            self._write(done, carried)
        self._last = time.monotonic()
        self._took = self._last - now

    def _write(self, done: int, carried: Carried) -> None:
        """Tensors under a new name first; once the JSON names them, the old ones go."""
        states = [flatten(State(one.params, one.buffers, one.optimizer)) for one in carried.adjoints]
        tensors = {f"{row}/{dtype}": tensor for row, (_, flat) in enumerate(states) for dtype, tensor in flat.items()}
        found = carried.found
        tensors |= {"values": found.values, "visits": found.visits, "relabelled": found.relabelled}
        tensors["by_epoch"] = torch.stack([*found.by_epoch.values()])
        old, self._number = self._number, self._number + 1
        path = self._tensors(self._number)
        with appearing_whole(path) as temporary:
            save_file(tensors, temporary)
            checksum = checksum_of(temporary)
        content = {
            "key": self._key,
            "done": done,
            "number": self._number,
            "file": path.name,
            "checksum_of_file": checksum,
            "layouts": [layout for layout, _ in states],
            "dtypes": [list(flat) for _, flat in states],
            "fidelity": {name: getattr(carried.fidelity, name) for name in _COUNTERS},
            "norms": found.norms,
        }
        write_sealed(self._folder / f"{self._name}.json", content)
        self._tensors(old).unlink(missing_ok=True)

    def _tensors(self, number: int) -> Path:
        return self._folder / f"{self._name}-{number}.safetensors"

    def remove(self) -> None:
        """The walk has come to its end."""
        with suppress(OSError):
            for pattern in (f"{self._name}[.-]*", f".{self._name}*.tmp"):
                for path in self._folder.glob(pattern):
                    path.unlink(missing_ok=True)


def _put_back(adjoint: Adjoint, state: State) -> None:
    device = next(iter(adjoint.params.values())).device
    adjoint.params = {name: tensor.to(device) for name, tensor in state.params.items()}
    adjoint.buffers = {name: tensor.to(device) for name, tensor in state.buffers.items()}
    adjoint.optimizer = {
        name: {key: tensor.to(device) for key, tensor in entries.items()} for name, entries in state.optimizer.items()
    }


def key_of(run: str, steps: list[int], options: dict[str, Any], adjoints: list[Adjoint]) -> str:
    """A name that two walks share only if they compute the same bits: same steps, start, engine, threads and versions.

    Args:
        run: The trajectory's.
        steps: Numbers of the steps of the window.
        options: What else matters, as JSON or callables.
        adjoints: Those that the walk starts with.
    """
    around = {"run": run, "steps": steps, "versions": versions(), "threads": torch.get_num_threads()}
    digest = hashlib.sha256(json.dumps({**around, **options}, default=_named).encode())
    for adjoint in adjoints:
        start = adjoint.entering or adjoint
        for name, tensor in (*start.params.items(), *start.buffers.items()):
            digest.update(f"{name} {tensor.device.type}".encode())
            digest.update(_bytes(tensor))
    return digest.hexdigest()


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _named(value: Any, depth: int = 8) -> str:
    """Plain values and tensors by what they hold, a function by its code and what it holds on to, others by type."""
    if isinstance(value, Tensor):
        return hashlib.sha256(_bytes(value)).hexdigest()
    if value is None or isinstance(value, bool | int | float | str | bytes):
        return repr(value)
    parts = _parts_of(value) if depth else ()
    return f"{type(value).__qualname__} {[_named(part, depth - 1) for part in parts]}"


def _parts_of(value: Any) -> Iterable[Any]:
    if isinstance(value, CodeType):
        return value.co_code, value.co_names, value.co_consts
    if isinstance(value, list | tuple):
        return value
    if isinstance(value, dict):
        return value.items()
    if isinstance(value, partial):
        return value.func, value.args, value.keywords
    if not hasattr(value, "__code__"):
        return ()
    parts = [value.__qualname__, value.__code__, value.__defaults__, value.__kwdefaults__]
    for cell in value.__closure__ or ():
        with suppress(ValueError):  # an empty one
            parts.append(cell.cell_contents)
    return parts
