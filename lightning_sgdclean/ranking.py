# SPDX-License-Identifier: Apache-2.0
"""The result: every sample of the window with its influence, most harmful first, in memory and as CSV."""

import csv
import io
import json
import math
import operator
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, TypeVar, cast

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, Subset

if TYPE_CHECKING:
    import pandas as pd

SampleId: TypeAlias = int | str
T_co = TypeVar("T_co", covariant=True)

CSV_NAME = "influence.csv"
COLUMNS = ("rank", "sample_id", "influence", "effect", "visits")

_INT64 = np.iinfo(np.int64)
_INTEGER = re.compile(r"0|-?[1-9][0-9]*")
_NUMBER = re.compile(r"-?[0-9]+(\.[0-9]+)?(e[-+]?[0-9]+)?")
_FORMULA_START = ("=", "+", "-", "@", "\t", "\r", "'")


@dataclass(frozen=True, eq=False, repr=False)
class Ranking:
    """Training samples ordered by influence, the most harmful one first, ties by sample id.

    The influence of a sample predicts ``F(trained without it) - F(trained with it)`` for the objective
    ``F``, by default the validation loss: **negative means harmful**. Build one with
    :meth:`from_influence` or :meth:`load`; the constructor itself neither sorts nor checks.

    Attributes:
        sample_id: Ids, shape ``(N,)``: int64, or an object array of str.
        influence: Influences in the objective's unit, float64, ascending, shape ``(N,)``.
        visits: How often the sample was drawn in the window, int64, shape ``(N,)``.

    Example:
        >>> ranking = Ranking.from_influence([7, 8, 9], [0.5, -0.25, 0.0], [1, 1, 2])
        >>> ranking
        Ranking(3 samples: 1 harmful, 1 helpful; worst 8 with -0.25)
        >>> ranking.harmful(2), ranking.helpful(2)
        ([8], [7])
    """

    sample_id: NDArray[Any]
    influence: NDArray[np.float64]
    visits: NDArray[np.int64]

    def __post_init__(self) -> None:
        for array in (self.sample_id, self.influence, self.visits):
            array.setflags(write=False)  # a changed value would no longer stand at its rank

    @classmethod
    def from_influence(
        cls,
        sample_id: "Iterable[SampleId] | NDArray[Any] | Tensor",
        influence: "Sequence[float] | NDArray[Any] | Tensor",
        visits: "Sequence[int] | NDArray[Any] | Tensor",
    ) -> "Ranking":
        """Sort samples by influence.

        Args:
            sample_id: ``N`` different ids, all integers (bool and NumPy's included) or all str.
            influence: ``N`` finite influences in the objective's unit; negative means harmful.
            visits: ``N`` counts of how often each sample was drawn.

        Raises:
            TypeError: If an id is neither an integer nor a str.
            ValueError: If an influence is not finite, ids repeat, mix integers and str, exceed 64 bits
                or cannot be written as UTF-8, a count is not a whole number from 0 on, or lengths differ.
        """
        ids = _checked_ids(sample_id)
        influences = _vector(influence, "influence", "fiub").astype(np.float64)
        counts = _vector(visits, "visits", "iub").astype(np.int64)
        if not len(ids) == len(influences) == len(counts):
            raise ValueError(
                f"Expected an influence and a number of visits for each sample id, found {len(ids)} ids, "
                f"{len(influences)} influences and {len(counts)} numbers of visits."
            )
        _check_values(ids, influences, counts)
        keys = list(zip(influences.tolist(), ids, strict=True))
        order = np.array(sorted(range(len(keys)), key=keys.__getitem__), dtype=np.intp)
        id_array = np.array(ids, dtype=object if ids and isinstance(ids[0], str) else np.int64)
        return cls(id_array[order], influences[order], counts[order])

    @property
    def rank(self) -> NDArray[np.int64]:
        """Ranks ``1..N``; 1 is the most harmful sample."""
        return np.arange(1, len(self) + 1, dtype=np.int64)

    @property
    def effect(self) -> list[str]:
        """The sign in words: ``harmful``, ``helpful``, or ``none`` where the influence is exactly 0."""
        return [_effect(influence) for influence in self.influence.tolist()]

    def __len__(self) -> int:
        return len(self.influence)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Ranking):
            return NotImplemented
        pairs = (
            (self.sample_id, other.sample_id),
            (self.influence, other.influence),
            (self.visits, other.visits),
        )
        return all(np.array_equal(mine, theirs) for mine, theirs in pairs)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        harmful, helpful = int((self.influence < 0).sum()), int((self.influence > 0).sum())
        text = f"{len(self)} samples: {harmful} harmful, {helpful} helpful"
        if harmful:
            text += f"; worst {self.sample_id.tolist()[0]!r:.40} with {self.influence[0]:.4g}"
        return f"Ranking({text})"

    def harmful(self, n: int) -> list[SampleId]:
        """Ids of the ``n`` most harmful samples, the worst first; fewer if fewer are harmful.

        Raises:
            ValueError: If ``n`` is negative.
        """
        count = min(_count(n, "n"), int((self.influence < 0).sum()))
        return cast(list[SampleId], self.sample_id[:count].tolist())

    def helpful(self, n: int) -> list[SampleId]:
        """Ids of the ``n`` most helpful samples, the best first; fewer if fewer are helpful.

        Raises:
            ValueError: If ``n`` is negative.
        """
        count = min(_count(n, "n"), int((self.influence > 0).sum()))
        best_first = np.argsort(-self.influence, kind="stable")  # stable: ties stay in the order of their ids
        return cast(list[SampleId], self.sample_id[best_first[:count]].tolist())

    def keep(self, dataset: Dataset[T_co], drop: int) -> Subset[T_co]:
        """The dataset without the ``drop`` samples that stand first in the ranking.

        Args:
            dataset: The dataset in which the sample ids are positions. Its samples that are not in the
                ranking are kept.
            drop: How many to leave out, by rank alone: beyond the harmful ones, helpful ones go too.

        Returns:
            A subset with the remaining positions in ascending order.

        Raises:
            TypeError: If the ids are str, or the dataset has no length and positions.
            IndexError: If an id of the ranking is no position in ``dataset``.
            ValueError: If ``drop`` is negative or more than the ranking holds.
        """
        if self.sample_id.dtype == object:
            raise TypeError("keep() needs sample ids that are positions in the dataset, found str ids.")
        if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
            raise TypeError(f"keep() needs a dataset with a length and positions, found {type(dataset).__name__}.")
        size = len(dataset)
        outside = self.sample_id[(self.sample_id < 0) | (self.sample_id >= size)]
        if len(outside):
            raise IndexError(
                f"Sample id {outside[0]} is no position in a dataset of {size} samples ({len(outside)} such "
                "ids). Expected the dataset that the ranked training drew from."
            )
        if _count(drop, "drop") > len(self):
            raise ValueError(f"Cannot drop {drop} samples: the ranking holds {len(self)}.")
        kept = np.delete(np.arange(size), self.sample_id[:drop])
        return Subset(dataset, kept.tolist())

    def by(self, groups: "Mapping[Any, Any] | Sequence[Any] | NDArray[Any] | Tensor") -> dict[Any, float]:
        """Influence summed over groups of samples (label, source, annotator), most harmful group first.

        Args:
            groups: The group of each sample id: a mapping (also a pandas Series indexed by sample id), or
                a sequence, array or tensor ``(M,)`` in which integer ids are positions.

        Returns:
            Group to sum, ascending by sum (negative: harmful together), ties by the group's name.

        Raises:
            KeyError: If ``groups`` has no entry for a sample id.
            TypeError: If ids are str and ``groups`` is not a mapping.
            ValueError: If a group is NaN, or an array of groups is not one-dimensional.
        """
        group_of = _group_lookup(groups)
        members: dict[Any, list[float]] = {}
        for sample, influence in zip(self.sample_id.tolist(), self.influence.tolist(), strict=True):
            members.setdefault(group_of(sample), []).append(influence)
        sums = [(math.fsum(influences), group) for group, influences in members.items()]
        return {group: total for total, group in sorted(sums, key=lambda item: (item[0], str(item[1])))}

    def to_pandas(self) -> "pd.DataFrame":
        """The table of the CSV as a pandas DataFrame.

        Raises:
            ImportError: If pandas is not installed.
        """
        try:
            import pandas as pd
        except ImportError as error:
            raise ImportError("to_pandas() needs pandas: pip install lightning-sgdclean[pandas]") from error
        columns = (self.rank, self.sample_id, self.influence, self.effect, self.visits)
        return pd.DataFrame(dict(zip(COLUMNS, columns, strict=True)))

    def save(self, path: "str | os.PathLike[str]") -> Path:
        r"""Write the ranking as CSV, under a temporary name until it is complete.

        UTF-8, one header line, ``\n`` line ends; :meth:`load` gives back every influence bit for bit. A str
        id that a spreadsheet could take for a formula is written with a leading apostrophe.

        Args:
            path: The file; its folder is made if missing, an older file is replaced.

        Returns:
            ``path``.
        """
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            with temporary.open("w", encoding="utf-8", newline="") as file:
                writer = csv.writer(_UnixLines(file), lineterminator="\r\n")
                writer.writerow(COLUMNS)
                writer.writerows(self._rows())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        return path

    def _rows(self) -> Iterator[tuple[int, SampleId, str, str, int]]:
        columns = (self.sample_id.tolist(), self.influence.tolist(), self.visits.tolist())
        for rank, (sample, influence, visits) in enumerate(zip(*columns, strict=True), start=1):
            yield rank, _escaped(sample), repr(influence), _effect(influence), visits

    @classmethod
    def load(cls, path: "str | os.PathLike[str]") -> "Ranking":
        """Read what :meth:`save` wrote; columns after the first five are skipped.

        Whether ids are integers or str says ``id_type`` in the ``summary.json`` beside the file. Without
        it they are integers if all of them look like ones (``7``, not ``007``).

        Args:
            path: The CSV, or a run directory that holds ``influence.csv``.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If the file is damaged; the message names file and line.
        """
        path = Path(path)
        if path.is_dir():
            path = path / CSV_NAME
        lines, cells, influences, visits = _read_table(path)
        return cls.from_influence(_read_ids(path, lines, cells), influences, visits)


def _effect(influence: float) -> str:
    return "harmful" if influence < 0 else "helpful" if influence > 0 else "none"


def _count(value: int, name: str) -> int:
    count = operator.index(value)
    if count < 0:
        raise ValueError(f"Expected {name} to be 0 or more, found {count}.")
    return count


def _checked_ids(sample_id: "Iterable[SampleId] | NDArray[Any] | Tensor") -> list[Any]:
    found = sample_id.tolist() if isinstance(sample_id, Tensor) else list(sample_id)
    ids = [_plain_id(value) for value in found]
    texts = sum(isinstance(value, str) for value in ids)
    if 0 < texts < len(ids):
        raise ValueError(f"Expected sample ids of one type, found {len(ids) - texts} integers and {texts} str.")
    return ids


def _plain_id(value: object) -> SampleId:
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"Sample id {value!r} cannot be written as UTF-8.") from error
        return str(value)
    if not isinstance(value, int | np.integer | np.bool_):
        raise TypeError(f"Expected sample ids of type int or str, found {value!r} of type {type(value).__name__}.")
    number = int(value)
    if not _INT64.min <= number <= _INT64.max:
        raise ValueError(f"Sample id {number} does not fit into 64 bits.")
    return number


def _vector(values: Any, name: str, kinds: str) -> NDArray[Any]:
    if isinstance(values, Tensor):
        values = values.detach().cpu()
        values = values.double() if values.is_floating_point() else values  # NumPy has no bfloat16
    array = np.asarray(values)
    if array.ndim != 1:
        raise ValueError(f"Expected {name} as one row of numbers, found shape {array.shape}.")
    if array.size and array.dtype.kind not in kinds:
        raise ValueError(f"Expected {name} as {'whole ' * ('f' not in kinds)}numbers, found {array.dtype}.")
    return array


def _check_values(ids: list[Any], influence: NDArray[np.float64], visits: NDArray[np.int64]) -> None:
    bad = np.flatnonzero(~np.isfinite(influence))
    if len(bad):
        raise ValueError(
            f"Expected finite influences, found {influence[bad[0]]} for sample {ids[bad[0]]!r} "
            f"({len(bad)} of {len(ids)} samples)."
        )
    negative = np.flatnonzero(visits < 0)
    if len(negative):
        raise ValueError(f"Sample {ids[negative[0]]!r} has {visits[negative[0]]} visits, expected 0 or more.")
    seen: set[Any] = set()
    for sample in ids:
        if sample in seen:
            raise ValueError(f"Expected every sample id once, found {sample!r} twice or more.")
        seen.add(sample)


class _Lookup(Protocol):
    def __call__(self, sample: SampleId, /) -> Any: ...


def _group_lookup(groups: Any) -> _Lookup:
    is_mapping = hasattr(groups, "keys")  # a pandas Series too: it is indexed by label, not by position
    if not is_mapping and isinstance(groups, Tensor | np.ndarray):
        if groups.ndim != 1:
            raise ValueError(f"Expected one group per sample, found an array of shape {tuple(groups.shape)}.")
        groups = groups.tolist()

    def group_of(sample: SampleId, /) -> Any:
        if not is_mapping and isinstance(sample, str):
            raise TypeError(f"Sample ids are str ({sample!r}), so groups must be a mapping from id to group.")
        if not is_mapping and not 0 <= cast(int, sample) < len(groups):
            raise KeyError(sample)
        group = groups[sample]
        group = group.item() if isinstance(group, Tensor | np.generic) else group  # tensors hash by identity
        if isinstance(group, float) and math.isnan(group):
            raise ValueError(f"The group of sample {sample!r} is NaN, which equals no other group.")
        return group

    return group_of


class _UnixLines:
    # Before Python 3.13 csv quotes a carriage return in a field only if it is part of the line end.
    # So csv writes \r\n, of which the file gets \n.
    def __init__(self, file: io.TextIOWrapper) -> None:
        self._file = file

    def write(self, row: str) -> None:
        self._file.write(row.removesuffix("\r\n") + "\n")


def _escaped(sample: SampleId) -> SampleId:
    return f"'{sample}" if isinstance(sample, str) and sample.startswith(_FORMULA_START) else sample


def _read_lines(path: Path) -> Iterator[tuple[int, list[str]]]:
    data = path.read_bytes()
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{path}, line {line}: expected UTF-8, found {error.reason}.") from error
    if not text.endswith("\n"):
        last = text.count("\n") + 1
        raise ValueError(f"{path}, line {last}: the line does not end; the file seems cut off.")
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    while True:
        line = reader.line_num + 1
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise ValueError(f"{path}, line {line}: {error}.") from error
        yield line, row


def _read_table(path: Path) -> tuple[list[int], list[str], list[float], list[int]]:
    table = _read_lines(path)
    _, header = next(table)
    if tuple(header[: len(COLUMNS)]) != COLUMNS:
        raise ValueError(f"{path}, line 1: expected {','.join(COLUMNS)}, found {','.join(header)}.")
    lines: list[int] = []
    cells: list[str] = []
    influences: list[float] = []
    visits: list[int] = []
    for line, row in table:
        try:
            influence, count = _read_row(row, len(header), rank=len(lines) + 1)
            if influences and influence < influences[-1]:
                raise ValueError(f"influence {influence} is below that of the rank before")
        except ValueError as error:
            raise ValueError(f"{path}, line {line}: {error}.") from error
        lines.append(line)
        cells.append(row[1])
        influences.append(influence)
        visits.append(count)
    return lines, cells, influences, visits


def _read_row(row: list[str], width: int, rank: int) -> tuple[float, int]:
    if len(row) != width:
        raise ValueError(f"expected {width} fields, found {len(row)}")
    if row[0] != str(rank):
        raise ValueError(f"expected rank {rank}, found {row[0]!r}")
    influence = float(row[2]) if _NUMBER.fullmatch(row[2]) else math.nan
    if not math.isfinite(influence):
        raise ValueError(f"expected a finite number as influence, found {row[2]!r}")
    if row[3] != _effect(influence):
        raise ValueError(f"expected effect {_effect(influence)!r} of influence {row[2]}, found {row[3]!r}")
    if not _is_int64(row[4]) or int(row[4]) < 0:
        raise ValueError(f"expected a number of visits, found {row[4]!r}")
    return influence, int(row[4])


def _is_int64(text: str) -> bool:
    # Length first: Python refuses to convert thousands of digits.
    return bool(_INTEGER.fullmatch(text)) and len(text) <= 20 and _INT64.min <= int(text) <= _INT64.max


def _id_type_of(summary: Path) -> str | None:
    if not summary.is_file():
        return None
    try:
        content = json.loads(summary.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{summary}: expected JSON ({error}). Mend or remove it.") from error
    id_type = content.get("id_type") if isinstance(content, dict) else None
    if id_type not in (None, "int", "str"):
        raise ValueError(f"{summary}: expected id_type 'int' or 'str', found {id_type!r}.")
    return id_type


def _read_ids(path: Path, lines: list[int], cells: list[str]) -> list[SampleId]:
    id_type = _id_type_of(path.with_name("summary.json"))
    as_int = id_type == "int" or (id_type is None and all(map(_is_int64, cells)))
    first_line: dict[SampleId, int] = {}
    for line, cell in zip(lines, cells, strict=True):
        if as_int and not _is_int64(cell):
            raise ValueError(f"{path}, line {line}: expected an integer sample id, found {cell!r}.")
        sample = int(cell) if as_int else cell.removeprefix("'")
        if first_line.setdefault(sample, line) != line:
            raise ValueError(f"{path}, line {line}: sample id {sample!r} stands in line {first_line[sample]} too.")
    return list(first_line)
