# SPDX-License-Identifier: Apache-2.0
"""The training loaders as Lightning prepares them: may they be followed, and the names of their samples."""

import weakref
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from lightning_sgdclean.base.errors import NAME_THEM, SampleIdError
from lightning_sgdclean.base.lightning import combined_loader, training_loader
from lightning_sgdclean.base.options import Options, Positions, SampleId
from lightning_sgdclean.base.resources import itself
from lightning_sgdclean.data.packing import content_ids
from lightning_sgdclean.data.parts import loader_parts
from lightning_sgdclean.data.samplers import NotingSampler, note_samples, stop_noting
from lightning_sgdclean.record.passes import (
    LEAVE_AT_AUTO,
    RowCheck,
    SeveralLoaders,
    check_pass,
    check_train_loader,
    num_rows,
)


class TrainLoaders:
    """Shadows the strategy's hook that every loader passes, and notes what their samplers draw.

    The training loader is the one that the fit loop draws from. While tuners look for a batch size or a learning rate,
    others are prepared, too.

    Args:
        options: The callback's.

    Attributes:
        loaders: All of the fit; several if they were made anew on the way.
        as_delivered: What makes a loader's batch what ``training_step`` gets.
        sizes: How many samples of the latest batch each of several loaders gave; empty where there is one.
    """

    def __init__(self, options: Options) -> None:
        self._may_keep = options.keep_batches is not False
        self._sample_ids = content_ids if options.sample_ids == "content" else options.sample_ids
        self._ids = _IdCheck()
        self._rows = RowCheck() if options.finds_split else None
        self._noting: NotingSampler | None = None
        self._dataset: Any = None  # of the latest loader, when it was last prepared
        self._noted: list[tuple[weakref.ref[Any], Any]] = []  # loaders, with the datasets that they had then
        self.loaders: list[Any] = []
        self._first_used: dict[int, int] = {}  # epoch -> number of the loader that it began with
        self.as_delivered: Callable[[Any], Any] = lambda batch: batch
        self._several: SeveralLoaders | None = None
        self._drawn: list[Positions | None] = []  # of several loaders, for the latest batch
        self.sizes: list[int] = []

    def watch(self, trainer: Any) -> None:
        """See every loader from now on: no callback hook lies between its making and its first use."""
        trainer.strategy.process_dataloader = _Seeing(self._see, trainer)

    def _see(self, loader: Any) -> None:
        """Note what it draws; whether the training draws from it shows later: a tuner prepares loaders, too."""
        if isinstance(loader, DataLoader) and not isinstance(loader.dataset, IterableDataset):
            note_samples(loader)
            alive = [each for each in self._noted if each[0]() not in (None, loader)]
            self._noted = [*alive, (weakref.ref(loader), loader.dataset)]

    def check(self, trainer: Any) -> None:
        """Once training starts: may its loader be followed, and was it seen when it was made?

        Raises:
            SampleIdError: If it was not, or its samples have no positions; see :func:`check_train_loader`.
            UnsupportedTrainingError: If several loaders are nested.
        """
        self._take_up(trainer)

    def _take_up(self, trainer: Any) -> None:
        """Go over to the loader that the fit loop draws from by now, if it is another one."""
        loader, as_delivered = training_loader(trainer)
        if self.loaders and loader is self.loaders[-1]:
            return
        self.as_delivered = as_delivered
        if loader is combined_loader(trainer):
            named, before = self._sample_ids is not None, self._several
            checks = self._rows is not None and not named
            self._several = SeveralLoaders(trainer, self._dataset_of, named, self._may_keep, checks, before)
            self.loaders.append(loader)
            return
        check_train_loader(loader, self._sample_ids is not None, self._may_keep)
        self._noting = None
        if isinstance(loader, DataLoader) and not isinstance(loader.dataset, IterableDataset):
            found = self._dataset_of(loader)
            if found is None:
                raise SampleIdError(
                    "The training loader was made before this callback was set up, so its samples were not seen. "
                    "Do not ask for trainer.estimated_stepping_batches in DataModule.setup."
                )
            self._noting, self._dataset = note_samples(loader), found
        self.loaders.append(loader)

    def _dataset_of(self, loader: Any) -> Any:
        """What a loader went over when it was prepared; None where it was not seen."""
        return next((dataset for noted, dataset in self._noted if noted() is loader), None)

    def number(self, epoch: int) -> int:
        """Which of the loaders delivers now."""
        latest = len(self.loaders) - 1
        self._first_used.setdefault(epoch, latest)
        return latest

    def let_go(self, epoch: int) -> None:
        """Forget the loaders, and with them their datasets, that only epochs before this one used."""
        needed = min((number for used, number in self._first_used.items() if used >= epoch), default=None)
        for number in range(needed or 0):
            self.loaders[number] = None
        self._first_used = {used: number for used, number in self._first_used.items() if used >= epoch}

    def unwatch(self, trainer: Any) -> None:
        """Give strategy and loaders back what they had."""
        seeing = vars(trainer.strategy).get("process_dataloader")
        if isinstance(seeing, _Seeing):
            seeing.leave()
        for noted, _ in self._noted:
            if (loader := noted()) is not None:
                stop_noting(loader)

    def next_positions(self, trainer: Any, batch: Any) -> Positions | None:
        """Dataset positions of the batch that the Trainer goes on with; None where samples have none.

        Args:
            trainer: The Trainer.
            batch: The batch, as ``training_step`` gets it.

        Raises:
            SampleIdError: If a batch need not be the one that was drawn, and the user does not name its samples, or
                does not let it be kept. Or its loader was made anew and cannot be followed.
        """
        self._take_up(trainer)
        if self._several is not None:
            self._drawn = self._several.drawn(trainer, batch)
            return None
        if self._noting is None:
            return None
        iterator, num_ahead = _pass_of(trainer)
        try:
            check_pass(iterator, self._dataset)
            num_waiting = num_ahead + len(getattr(iterator, "_task_info", ()))  # those that workers have at hand
            return self._noting.next_positions(iterator._sampler_iter, num_waiting)
        except SampleIdError as error:
            if self._sample_ids is None:
                raise
            if not self._may_keep:
                found = str(error).removesuffix(NAME_THEM)
                raise SampleIdError(
                    f"{found}Its batches can only be kept, but keep_batches=False. {LEAVE_AT_AUTO}"
                ) from error
            return None

    def names(self, batch: Any, positions: Positions | None) -> list[SampleId]:
        """The samples' ids: those that the user gives, else their positions.

        Raises:
            SampleIdError: If the user's are no ids, or the batch has another number of samples.
        """
        drawn: Sequence[SampleId] | None = positions if isinstance(positions, list | None) else [positions]
        if self._several is not None:
            drawn, self.sizes = self._several.names_and_sizes(batch, self._drawn)
        if self._sample_ids is None:
            assert drawn is not None  # else the loader would have been refused
            if isinstance(positions, list) and self._rows is not None:
                self._rows.check(batch, len(positions))
            return self._ids.checked(drawn)
        if self.sizes and self._sample_ids is content_ids:
            given = [name for part in loader_parts(batch) if part is not None for name in content_ids(part)]
        else:
            given = self._sample_ids(batch)
        names = [_plain_id(name) for name in (given.tolist() if isinstance(given, Tensor) else given)]
        rows = None if self.sizes else num_rows(batch)
        if drawn is not None and len(names) not in (len(drawn), rows):
            raise SampleIdError(f"sample_ids= gave {len(names)} ids for a batch of {len(drawn)} samples.")
        return self._ids.checked(names)


class _IdCheck:
    """Can ids be written as they are, and stand in one ranking?"""

    def __init__(self) -> None:
        self._kind: type | None = None
        self._escaped: dict[str, str] = {}  # what looks escaped -> what it stands for

    def checked(self, ids: Sequence[SampleId]) -> list[SampleId]:
        """The ids, with escapes for what is no UTF-8, as file names may have it.

        Raises:
            SampleIdError: If they are of both types, or do not fit into 64 bits, or one looks like another one escaped.
        """
        kinds = {str if isinstance(name, str) else int for name in ids}
        self._kind = self._kind or next(iter(kinds), None)
        if kinds - {self._kind}:
            raise SampleIdError("The ids of the samples are int here and str there. Expected one type for all samples.")
        if self._kind is str:
            return [self._written(str(name)) for name in ids]
        large = next((name for name in ids if not -_INT64 <= int(name) < _INT64), None)
        if large is not None:
            raise SampleIdError(f"The sample id {large} does not fit into 64 bits. Give it as text: str(id).")
        return list(ids)

    def _written(self, name: str) -> str:
        written = name.encode("utf-8", "backslashreplace").decode()
        if "\\ud" in written and self._escaped.setdefault(written, name) != name:
            raise SampleIdError(
                f"Two samples have the ids {name!r} and {self._escaped[written]!r}, which are written alike in UTF-8. "
                "Expected ids that can be told apart."
            )
        return written


_INT64 = 1 << 63


class _Seeing:
    """Stands for a strategy's ``process_dataloader``; a copy of the strategy has the one that it had before."""

    def __init__(self, see: Callable[[Any], None], trainer: Any) -> None:
        self._see, self._trainer, self._strategy = see, trainer, trainer.strategy
        self._own = vars(self._strategy).get("process_dataloader")
        self._process = self._strategy.process_dataloader

    def __call__(self, loader: Any) -> Any:
        if self._trainer.training:
            self._see(loader)
        return self._process(loader)

    def __reduce__(self) -> tuple[Any, ...]:
        # The copy of the strategy is empty by then, so that its class is asked.
        return (itself, (self._own,)) if self._own else (getattr, (self._strategy, "process_dataloader"))

    def leave(self) -> None:
        """Give the strategy back what it had."""
        del self._strategy.process_dataloader
        if self._own is not None:
            self._strategy.process_dataloader = self._own


def _pass_of(trainer: Any) -> tuple[Any, int]:
    """The iterator of Lightning's own pass over the loader, and how many batches it has fetched ahead.

    Others may go through the loader, too.
    """
    passes = getattr(combined_loader(trainer), "_iterator", None)
    ahead = getattr(getattr(trainer.fit_loop, "_data_fetcher", None), "batches", ())
    return next(iter(getattr(passes, "iterators", [])), None), len(ahead)


def _plain_id(name: Any) -> SampleId:
    value = name.item() if hasattr(name, "item") else name
    if isinstance(value, str) or (isinstance(value, int) and not isinstance(value, bool)):
        return value
    raise SampleIdError(f"sample_ids= gave {value!r} of type {type(value).__name__}; expected int or str.")
