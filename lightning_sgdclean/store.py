# SPDX-License-Identifier: Apache-2.0
"""The trajectory on disk: segments of steps (safetensors) and a manifest (JSON), each appearing whole."""

import json
import os
from bisect import bisect_left
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Size, Tensor

from lightning_sgdclean.errors import RunDirectoryError
from lightning_sgdclean.options import packed, unpacked
from lightning_sgdclean.packing import PackedBatch
from lightning_sgdclean.schedule import is_snapshot
from lightning_sgdclean.trajectory import MicroBatch, State, Step

FORMAT = 1
_SEGMENT_BYTES = 32 << 20
_SEGMENT_STEPS = 256
_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in (
    torch.float64, torch.float32, torch.float16, torch.bfloat16,
    torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool,
)}  # fmt: skip

Layout = list[list[Any]]  # rows of: kind, name, key, dtype, shape


@contextmanager
def appearing_whole(path: Path) -> Iterator[Path]:
    """A temporary path beside ``path`` that takes its name once the block is through."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, content: Any) -> None:
    """Write JSON under a temporary name, then rename."""
    with appearing_whole(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def flatten(state: State) -> tuple[Layout, dict[str, Tensor]]:
    """Copy a state into one flat tensor a dtype, and say what lies where."""
    rows: Layout = []
    by_dtype: dict[str, list[Tensor]] = {}

    def add(kind: str, name: str, key: str, tensor: Tensor) -> None:
        dtype = str(tensor.dtype).removeprefix("torch.")
        rows.append([kind, name, key, dtype, list(tensor.shape)])
        by_dtype.setdefault(dtype, []).append(tensor.detach().reshape(-1))

    for name, tensor in state.params.items():
        add("param", name, "", tensor)
    for name, tensor in state.buffers.items():
        add("buffer", name, "", tensor)
    for name, entries in state.optimizer.items():
        for key, tensor in entries.items():
            add("optimizer", name, key, tensor.to(state.params[name].device))
    return rows, {dtype: torch.cat(tensors).cpu() for dtype, tensors in by_dtype.items()}


def unflatten(layout: Layout, flat: dict[str, Tensor]) -> State:
    """Undo :func:`flatten`; the tensors are views into ``flat``."""
    state, offset = State(), dict.fromkeys(flat, 0)
    for kind, name, key, dtype, shape in layout:
        size = Size(shape).numel()
        tensor = flat[dtype][offset[dtype] : offset[dtype] + size].reshape(shape)
        offset[dtype] += size
        if kind == "optimizer":
            state.optimizer.setdefault(name, {})[key] = tensor
        else:
            (state.params if kind == "param" else state.buffers)[name] = tensor
    return state


class TrajectoryWriter:
    """Appends steps; keeps a few in memory and writes them a segment at a time.

    Of the states between the steps only snapshots are written, each with the step that it lies before,
    and at the end the last one. Older segments can go while those that a window reaches stay.

    Args:
        folder: Where the files go; made if need be.
        interval: Steps from one snapshot to the next; see :func:`~lightning_sgdclean.schedule.is_snapshot`.
    """

    def __init__(self, folder: Path, interval: int | None = 1) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.interval = interval
        self.bytes_written = 0
        self._layouts: list[Layout] = []
        self._segments: list[dict[str, Any]] = []
        self._num_segments = 0
        self._num_steps = 0
        self._current: tuple[int, dict[str, Tensor]] | None = None  # the state after the last step, where it is wanted
        self._forget()

    def _forget(self) -> None:
        """Hold nothing in memory."""
        self._tensors: dict[str, Tensor] = {}
        self._steps: list[dict[str, Any]] = []
        self._states: list[tuple[int, int]] = []
        self._held = 0

    def begin(self, state: State) -> None:
        """Take the state before the first step."""
        self._current = self._flat(state)
        self._write_manifest()

    def append(self, step: Step, after: State, is_last: bool = False) -> None:
        """Add one step and the state after it, which is copied where it is a snapshot or may be the last one."""
        if not self._num_steps and self._current is None:
            raise RunDirectoryError("A step came before the first state; begin() must be called first.")
        if self._steps and (self._is_full() or self._steps[-1]["ends_epoch"]):
            self.flush()
        if is_snapshot(self._num_steps, self.interval):
            self._keep_current(step.index)
        self._steps.append(self._keep_step(step))
        self._num_steps += 1
        wanted = is_snapshot(self._num_steps, self.interval) or step.ends_epoch or is_last
        self._current = self._flat(after) if wanted else None

    def close(self) -> None:
        """Write what is held in memory, and the state after the last step if it is known."""
        if self._current is not None and self._num_steps:
            self._keep_current(self._next_index())
            self._current = None
        self.flush()

    def flush(self) -> None:
        """Write what is held in memory as one segment."""
        if not self._steps and not self._states:
            return
        name = f"segment-{self._num_segments:06d}.safetensors"
        self._num_segments += 1
        with appearing_whole(self._folder / name) as temporary:
            save_file(self._tensors, temporary, metadata={"steps": json.dumps(self._steps)})
        size = (self._folder / name).stat().st_size
        self.bytes_written += size
        following = self._next_index()
        self._segments.append(
            {
                "file": name,
                "first": self._steps[0]["index"] if self._steps else following,
                "last": following - 1,
                "epoch": self._steps[-1]["epoch"] if self._steps else self._segments[-1]["epoch"],
                "states": self._states,
                "bytes": size,
            }
        )
        self._forget()
        self._write_manifest()

    def drop_before(self, epoch: int) -> None:
        """Forget what no window will reach any more: all before the last snapshot at or before this epoch."""
        firsts = [segment["first"] for segment in self._segments if segment["epoch"] >= epoch]
        firsts += [step["index"] for step in self._steps if step["epoch"] >= epoch]
        states = [index for segment in self._segments for index, _ in segment["states"]]
        states += [index for index, _ in self._states]
        needed = max((index for index in states if firsts and index <= firsts[0]), default=0)
        gone = [segment for segment in self._segments if segment["last"] < needed]
        if gone:
            self._segments = [segment for segment in self._segments if segment["last"] >= needed]
            self._write_manifest()
            for segment in gone:
                (self._folder / segment["file"]).unlink(missing_ok=True)

    def _is_full(self) -> bool:
        return self._held >= _SEGMENT_BYTES or len(self._steps) >= _SEGMENT_STEPS

    def _next_index(self) -> int:
        last: int = self._steps[-1]["index"] if self._steps else self._segments[-1]["last"]
        return last + 1

    def _hold(self, key: str, tensor: Tensor) -> None:
        self._tensors[key] = tensor
        self._held += tensor.nbytes

    def _flat(self, state: State) -> tuple[int, dict[str, Tensor]]:
        layout, flat = flatten(state)
        if not self._layouts or self._layouts[-1] != layout:
            self._layouts.append(layout)
        return len(self._layouts) - 1, flat

    def _keep_current(self, index: int) -> None:
        assert self._current is not None
        layout, flat = self._current
        self._states.append((index, layout))
        for dtype, tensor in flat.items():
            self._hold(f"state/{index}/{dtype}", tensor)

    def _keep_step(self, step: Step) -> dict[str, Any]:
        return {
            "index": step.index,
            "epoch": step.epoch,
            "ends_epoch": step.ends_epoch,
            "groups": packed(step.groups),
            "clip": step.clip,
            "divisor": step.divisor,
            "unused": step.unused,
            "micro": [self._keep_micro(f"{step.index}/{i}", micro) for i, micro in enumerate(step.micro)],
        }

    def _keep_micro(self, key: str, micro: MicroBatch) -> dict[str, Any]:
        for name, tensor in micro.random.items():
            self._hold(f"random/{key}/{name}", tensor)
        self._hold(f"digest/{key}", micro.digest)
        assert micro.loss is not None
        self._hold(f"loss/{key}", micro.loss.detach().cpu().clone())
        kept = micro.batch or PackedBatch(None, [])
        for i, tensor in enumerate(kept.tensors):
            self._hold(f"batch/{key}/{i}", tensor)
        return {
            "ids": micro.ids,
            "positions": micro.positions,
            "epoch": micro.epoch,
            "batch_idx": micro.batch_idx,
            "scale": micro.scale,
            "loader": micro.loader,
            "random": list(micro.random),
            "batch": kept.skeleton,
            "num_tensors": len(kept.tensors),
        }

    def _write_manifest(self) -> None:
        manifest = {"format": FORMAT, "layouts": self._layouts, "segments": self._segments}
        write_json(self._folder / "manifest.json", manifest)


class Trajectory:
    """A recorded run, read back. Steps are light and held in memory; states are read when asked for.

    Attributes:
        steps: In order; their positions in this list are those that states are asked for by.
        kept: Positions of the states on disk, ascending: state ``p`` lies before ``steps[p]``, and
            state ``len(steps)`` after the last.

    Raises:
        RunDirectoryError: If the folder holds no trajectory, or one of another format.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        try:
            manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        except (OSError, json.JSONDecodeError) as error:
            raise RunDirectoryError(f"{folder} holds no readable trajectory: {error}") from error
        if manifest.get("format") != FORMAT:
            raise RunDirectoryError(
                f"{folder} is a trajectory of format {manifest.get('format')!r}; this version reads format {FORMAT}. "
                "Retrace it with the version that recorded it."
            )
        self._layouts: list[Layout] = manifest["layouts"]
        self._open: tuple[str, Any] | None = None
        self._files: list[str] = []  # of each step
        self._states: dict[int, tuple[str, int, int]] = {}  # file, index, layout of each state kept
        self.steps: list[Step] = []
        self._num_tensors: dict[str, int] = {}
        for segment in manifest["segments"]:
            self._read_steps(segment)
        self.kept = sorted(self._states)

    def _read_steps(self, segment: dict[str, Any]) -> None:
        handle = self._handle(segment["file"])
        for row in json.loads(handle.metadata()["steps"]):
            index = row["index"]
            row["micro"] = [self._micro(handle, f"{index}/{i}", micro) for i, micro in enumerate(row["micro"])]
            row["groups"] = unpacked(row["groups"])
            row["clip"] = tuple(row["clip"]) if row["clip"] else None
            self._files.append(segment["file"])
            self.steps.append(Step(**row))
        for index, layout in segment["states"]:
            self._states[self.position(index)] = segment["file"], index, layout

    def _micro(self, handle: Any, key: str, row: dict[str, Any]) -> MicroBatch:
        # Of batches and random states the skeletons and names only: the rest is large, and wanted a step at a time.
        kept, num = row.pop("batch"), row.pop("num_tensors")
        self._num_tensors[key] = num
        kept = None if kept is None else PackedBatch(kept, [])
        row["random"] = dict.fromkeys(row["random"], torch.empty(0))
        digest, loss = handle.get_tensor(f"digest/{key}"), handle.get_tensor(f"loss/{key}")
        return MicroBatch(**row, digest=digest, loss=loss, batch=kept)

    @property
    def state_bytes(self) -> int:
        """Bytes of the largest state."""
        sizes = (sum(_DTYPES[row[3]].itemsize * Size(row[4]).numel() for row in layout) for layout in self._layouts)
        return max(sizes, default=0)

    def position(self, index: int) -> int:
        """Where in ``steps`` the step ``index`` stands, or would stand."""
        return bisect_left(self.steps, index, key=lambda step: step.index)

    def random(self, step: Step, micro: int) -> dict[str, Tensor]:
        """Random state before micro-batch ``micro`` of a step."""
        handle = self._handle(self._files[self.position(step.index)])
        names = step.micro[micro].random
        return {name: handle.get_tensor(f"random/{step.index}/{micro}/{name}") for name in names}

    def batch(self, step: Step, micro: int) -> PackedBatch | None:
        """Micro-batch ``micro`` of a step, if it was kept."""
        handle, kept = self._handle(self._files[self.position(step.index)]), step.micro[micro].batch
        key = f"{step.index}/{micro}"
        names = [f"batch/{key}/{i}" for i in range(self._num_tensors[key])]
        return None if kept is None else PackedBatch(kept.skeleton, [handle.get_tensor(name) for name in names])

    def state(self, index: int) -> State:
        """The state before step ``index`` (after the last step, for the end point).

        Raises:
            RunDirectoryError: If it is none of those that were kept.
        """
        position = self.position(index)
        if position not in self._states:
            raise RunDirectoryError(f"{self._folder} keeps no state before step {index}.")
        file, number, layout = self._states[position]
        handle, dtypes = self._handle(file), dict.fromkeys(row[3] for row in self._layouts[layout])
        flat = {dtype: handle.get_tensor(f"state/{number}/{dtype}") for dtype in dtypes}
        return unflatten(self._layouts[layout], flat)

    def _handle(self, file: str) -> Any:
        if self._open is None or self._open[0] != file:
            try:
                self._open = file, safe_open(self._folder / file, "pt")
            except Exception as error:  # safetensors raises its own class, and OSError
                raise RunDirectoryError(f"{self._folder / file} cannot be read: {error}") from error
        return self._open[1]
