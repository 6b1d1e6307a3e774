# SPDX-License-Identifier: Apache-2.0
"""`Ranking`: samples in the order of the harm they did; what to keep of a dataset; what groups did together."""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar, cast

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, Subset

from lightning_sgdclean.base.options import SampleId
from lightning_sgdclean.base.summary import note_saved, summary_beside
from lightning_sgdclean.ranking.columns import (
    Columns,
    as_columns,
    data_frame,
    ranked,
    read_ranking,
    same_columns,
    write_ranking,
)
from lightning_sgdclean.ranking.figures import exhibits
from lightning_sgdclean.ranking.groups import Groups, effects_by_group, groups_of, labels_if_few
from lightning_sgdclean.ranking.table import (
    CSV_NAME,
    Table,
    as_vector,
    check_values,
    checked_count,
    checked_ids,
    counts_of,
    effects_of,
)

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

T_co = TypeVar("T_co", covariant=True)


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
        columns: Further columns by name, each ``(N,)``: int64, float64 (NaN: unknown) or an object array of str.
        summary: Of a fit, of :func:`retrace` or a run directory: what ``summary.json`` says (objective, window, replay,
            trust, ...); else None. It has no part in comparisons.

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
    columns: dict[str, NDArray[Any]] = field(default_factory=dict)
    summary: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        for array in (self.sample_id, self.influence, self.visits, *self.columns.values()):
            array.setflags(write=False)  # a changed value would no longer stand at its rank

    @classmethod
    def from_influence(
        cls,
        sample_id: "Iterable[SampleId] | NDArray[Any] | Tensor",
        influence: "Sequence[float] | NDArray[Any] | Tensor",
        visits: "Sequence[int] | NDArray[Any] | Tensor",
        columns: Columns | None = None,
    ) -> "Ranking":
        """Sort samples by influence.

        Args:
            sample_id: ``N`` different ids, all integers (bool and NumPy's included) or all str.
            influence: ``N`` finite influences in the objective's unit; negative means harmful.
            visits: ``N`` counts of how often each sample was drawn.
            columns: Further columns by name, each of ``N`` numbers or texts, None or NaN where unknown. Text that
                looks like numbers throughout becomes numbers, since a CSV has no types.

        Raises:
            TypeError: If an id is neither an integer nor a str, or a value of a column neither number nor text.
            ValueError: If an influence is not finite, ids repeat, mix integers and str, exceed 64 bits
                or cannot be written as UTF-8, a count is not a whole number from 0 on, or lengths differ.
        """
        ids = checked_ids(sample_id)
        influences = as_vector(influence, "influence", "fiub").astype(np.float64)
        counts = as_vector(visits, "visits", "iub").astype(np.int64)
        if not len(ids) == len(influences) == len(counts):
            raise ValueError(
                f"Expected an influence and a number of visits for each sample id, found {len(ids)} ids, "
                f"{len(influences)} influences and {len(counts)} numbers of visits."
            )
        check_values(ids, influences, counts)
        order = ranked(ids, influences)
        sorted_columns = {name: column[order] for name, column in as_columns(columns, len(ids)).items()}
        return cls(ids[order], influences[order], counts[order], sorted_columns)

    def with_columns(self, columns: Columns) -> "Ranking":
        """The ranking with further columns, each of ``N`` values in the order of the ranks.

        Raises:
            TypeError, ValueError: As :meth:`from_influence`.
        """
        return replace(self, columns=self.columns | as_columns(columns, len(self)))

    @property
    def rank(self) -> NDArray[np.int64]:
        """Ranks ``1..N``; 1 is the most harmful sample."""
        return np.arange(1, len(self) + 1, dtype=np.int64)

    @property
    def effect(self) -> list[str]:
        """The sign in words, ``harmful`` or ``helpful``, and ``none`` where the influence is exactly 0."""
        return effects_of(self.influence)

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
        same = all(np.array_equal(mine, theirs) for mine, theirs in pairs)
        return same and same_columns(self.columns, other.columns)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        harmful, helpful = int((self.influence < 0).sum()), int((self.influence > 0).sum())
        text = f"{len(self)} samples: {harmful} harmful, {helpful} helpful"
        if harmful:
            text += f"; worst {self.sample_id[:1].tolist()[0]!r:.40} with {self.influence[0]:.4g}"
        return f"Ranking({text})"

    def harmful(self, n: int) -> list[SampleId]:
        """Ids of the ``n`` most harmful samples, the worst first; fewer if fewer are harmful.

        Raises:
            ValueError: If ``n`` is negative.
        """
        return cast(list[SampleId], self.sample_id[self._places(n, "harmful")].tolist())

    def helpful(self, n: int) -> list[SampleId]:
        """Ids of the ``n`` most helpful samples, the best first; fewer if fewer are helpful.

        Raises:
            ValueError: If ``n`` is negative.
        """
        return cast(list[SampleId], self.sample_id[self._places(n, "helpful")].tolist())

    def _places(self, n: int, effect: str) -> list[int]:
        """Ranks, counted from 0, of the ``n`` most harmful or most helpful samples; fewer if there are fewer."""
        if effect == "harmful":
            return list(range(min(checked_count(n, "n"), int((self.influence < 0).sum()))))
        count = min(checked_count(n, "n"), int((self.influence > 0).sum()))
        return cast(list[int], np.argsort(-self.influence, kind="stable")[:count].tolist())  # ties by their ids

    def keep(self, dataset: Dataset[T_co], drop: int) -> Subset[T_co]:
        """The dataset without the ``drop`` samples that stand first in the ranking.

        Args:
            dataset: The dataset in which the sample ids are positions. Samples that are not in the ranking are kept.
            drop: How many to leave out, by rank alone: beyond the harmful ones, helpful ones go too.

        Returns:
            A subset with the remaining positions in ascending order.

        Raises:
            TypeError: If the ids are str, or the dataset has no length and positions.
            IndexError: If an id of the ranking is no position in ``dataset``.
            ValueError: If ``drop`` is negative or more than the ranking holds.
        """
        if self.sample_id.dtype == object:
            raise TypeError(
                "keep() needs sample ids that are positions in the dataset, found str ids. Of one of several loaders: "
                'drop = [int(i.split(":")[1]) for i in ranking.harmful(20) if i.startswith("name:")].'
            )
        if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
            raise TypeError(f"keep() needs a dataset with a length and positions, found {type(dataset).__name__}.")
        size = len(dataset)
        outside = self.sample_id[(self.sample_id < 0) | (self.sample_id >= size)]
        if len(outside):
            raise IndexError(
                f"Sample id {outside[0]} is no position in a dataset of {size} samples ({len(outside)} such "
                "ids). Expected the dataset that the ranked training drew from."
            )
        if checked_count(drop, "drop") > len(self):
            raise ValueError(f"Cannot drop {drop} samples: the ranking holds {len(self)}.")
        return Subset(dataset, np.delete(np.arange(size), self.sample_id[:drop]).tolist())

    def by(self, groups: Groups) -> dict[Any, float]:
        """Influence summed over groups of samples (label, source, annotator), most harmful group first.

        Args:
            groups: The group of each sample id: a mapping (also a pandas Series indexed by sample id), or
                a sequence, array or tensor ``(M,)`` in which integer ids are positions.

        Returns:
            Group to sum, ascending by sum (negative means harmful together), ties by the group's name.

        Raises:
            KeyError: If ``groups`` has no entry for a sample id.
            TypeError: If ids are str and ``groups`` is not a mapping.
            ValueError: If a group is NaN, or an array of groups is not one-dimensional.
        """
        members = groups_of(self.sample_id.tolist(), groups)
        return {effect.group: effect.total for effect in effects_by_group(members, self.influence.tolist())}

    def plot(self, unit: str = "the objective", *, groups: Groups | None = None) -> "Figure":
        """Draw how the influences are spread, what they add up to, and what groups of samples did together.

        Args:
            unit: Name of the objective, for the axes.
            groups: As for :meth:`by`. By default the column ``label`` where the ranking has one with few values;
                without it the third part is left out.

        Returns:
            A matplotlib figure; save it with ``savefig``.

        Raises:
            ImportError: If matplotlib is not installed.
            KeyError, TypeError, ValueError: As :meth:`by`.
        """
        from lightning_sgdclean.ranking.figures import plot_influences

        if groups is not None:
            members: Sequence[Any] | None = groups_of(self.sample_id.tolist(), groups)
        else:
            members = labels_if_few(self.columns.get("label"))
        return plot_influences(self.influence, unit, members)

    def plot_samples(
        self,
        dataset: Dataset[Any],
        n: int = 16,
        *,
        effect: Literal["harmful", "helpful"] = "harmful",
        render: Callable[[Any], Any] | None = None,
    ) -> "Figure":
        """Draw the pictures of the most harmful (or most helpful) samples, each with rank, id and influence.

        The columns ``label`` and ``prediction`` are written under the pictures where the ranking has them.

        Args:
            dataset: The dataset in which the sample ids are positions.
            n: How many samples; fewer are drawn if fewer are harmful.
            effect: Which end of the ranking.
            render: Callable from ``dataset[id]`` to an image: a PIL image, or a tensor or array of grey values or
                colours. By default the first one in the sample.

        Returns:
            A matplotlib figure.

        Raises:
            ImportError: If matplotlib is not installed.
            ValueError: If there is no picture in a sample.
        """
        from lightning_sgdclean.ranking.figures import plot_samples

        if effect not in ("harmful", "helpful"):
            raise ValueError(f'effect must be "harmful" or "helpful", got {effect!r}.')
        return plot_samples(exhibits(self, self._places(n, effect), dataset, render))

    def to_pandas(self) -> "pd.DataFrame":
        """The table of the CSV as a pandas DataFrame.

        Raises:
            ImportError: If pandas is not installed.
        """
        return data_frame(self._table().whole())

    def save(self, path: "str | os.PathLike[str]") -> Path:
        r"""Write the ranking as CSV or Parquet, under a temporary name until it is complete.

        The CSV: UTF-8, one header line, ``\n`` line ends; :meth:`load` gives back every influence bit for bit. Text
        that a spreadsheet could take for a formula is written with a leading apostrophe.

        Args:
            path: The file, Parquet if it ends in ``.parquet``, else CSV; its folder is made if missing, an older file
                is replaced. Where that is a run's own, the checksum in its ``summary.json`` is, too.

        Returns:
            ``path``.

        Raises:
            ImportError: If pyarrow is not installed, which Parquet needs.
        """
        write_ranking(Path(path), self._table())
        note_saved(Path(path), (self.summary or {}) | counts_of(self._table()))
        return Path(path)

    def _table(self) -> Table:
        return Table(self.sample_id, self.influence, self.visits, self.columns)

    @classmethod
    def load(cls, path: "str | os.PathLike[str]") -> "Ranking":
        """Read what :meth:`save` wrote.

        Whether ids are integers or str says ``id_type`` in the ``summary.json`` beside the file. Without
        it they are integers if all of them look like ones (``7``, not ``007``). A Parquet file knows by itself.

        Args:
            path: The file, Parquet if it ends in ``.parquet``, or a run directory that holds ``influence.csv``.

        Raises:
            FileNotFoundError: If there is no such file.
            ImportError: If pyarrow is not installed, which Parquet needs.
            DamagedFileError: If it is damaged, or not what the ``summary.json`` beside it has the checksum of.
        """
        path = Path(path) / CSV_NAME if Path(path).is_dir() else Path(path)
        table = read_ranking(path)
        order = ranked(table.sample_id, table.influence)  # others may have written ties otherwise
        columns = {name: column[order] for name, column in table.columns.items()}
        ranking = cls(table.sample_id[order], table.influence[order], table.visits[order], columns)
        return replace(ranking, summary=summary_beside(path) or None) if path.stem == "influence" else ranking


def run_id(ranking: Ranking) -> str:
    """``run-`` and sixteen hexadecimal digits of a SHA-256 over ids, influences (bit for bit) and visits.

    The same for a ranking and for what :meth:`~lightning_sgdclean.Ranking.load` reads of it; further columns do
    not count.
    """
    digest = hashlib.sha256(json.dumps(ranking.sample_id.tolist()).encode())
    digest.update(ranking.influence.astype("<f8").tobytes())
    digest.update(ranking.visits.astype("<i8").tobytes())
    return f"run-{digest.hexdigest()[:16]}"  # with letters in front no spreadsheet takes it for a number
