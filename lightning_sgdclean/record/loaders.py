# SPDX-License-Identifier: Apache-2.0
"""The training loaders as Lightning prepares them: may they be followed, and the names of their samples."""

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from lightning_sgdclean.base.errors import SampleIdError, UnsupportedTrainingError
from lightning_sgdclean.base.lightning import combined_loader, one_loader
from lightning_sgdclean.base.options import Positions, SampleId
from lightning_sgdclean.data.samplers import NotingSampler, note_samples, stop_noting


class TrainLoaders:
    """Shadows the strategy's hook that every loader passes, and notes what their samplers draw.

    Args:
        sample_ids: The user's own names, a callable from a batch.
        may_keep: Whether batches may be kept, so that they need not be fetched again.

    Attributes:
        loaders: All of the fit; several if they were made anew on the way.
        as_delivered: What makes a loader's batch what ``training_step`` gets.
    """

    def __init__(self, sample_ids: Callable[[Any], Any] | None, may_keep: bool) -> None:
        self._sample_ids, self._may_keep = sample_ids, may_keep
        self._noting: NotingSampler | None = None
        self.loaders: list[Any] = []
        self._first_used: dict[int, int] = {}  # epoch -> number of the loader that it began with
        self.as_delivered: Callable[[Any], Any] = lambda batch: batch

    def watch(self, trainer: Any) -> None:
        """See every training loader from now on: no callback hook lies between its making and its first use."""
        process = trainer.strategy.process_dataloader

        def process_dataloader(loader: Any) -> Any:
            if trainer.training:
                self._see(loader)
            return process(loader)

        trainer.strategy.process_dataloader = process_dataloader

    def _see(self, loader: Any) -> None:
        check_train_loader(loader, self._sample_ids is not None, self._may_keep)
        if isinstance(loader, DataLoader) and not isinstance(loader.dataset, IterableDataset):
            self._noting = note_samples(loader)
        if not self.loaders or loader is not self.loaders[-1]:
            self.loaders.append(loader)

    def check(self, trainer: Any) -> None:
        """Once training starts: was exactly one loader seen?

        Raises:
            SampleIdError: If none was.
            UnsupportedTrainingError: If there are several.
        """
        if not self.loaders:
            raise SampleIdError(
                "The training loader was made before this callback was set up, so its samples were not seen. "
                "Do not ask for trainer.estimated_stepping_batches in DataModule.setup."
            )
        self.as_delivered = one_loader(trainer)

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
        trainer.strategy.__dict__.pop("process_dataloader", None)
        for loader in self.loaders:
            if isinstance(loader, DataLoader):
                stop_noting(loader)

    def next_positions(self, trainer: Any) -> Positions | None:
        """Dataset positions of the batch that the Trainer goes on with; None where samples have none."""
        return None if self._noting is None else self._noting.next_positions(_sampler_iterator(trainer))

    def names(self, batch: Any, positions: Positions | None) -> list[SampleId]:
        """The samples' ids: those that the user gives, else their positions.

        Raises:
            SampleIdError: If the user's are no ids, or of another number.
        """
        positions = positions if isinstance(positions, list | None) else [positions]
        if self._sample_ids is None:
            assert positions is not None  # else the loader would have been refused
            return list(positions)
        given = self._sample_ids(batch)
        names = [_plain_id(name) for name in (given.tolist() if isinstance(given, Tensor) else given)]
        if positions is not None and len(names) != len(positions):
            raise SampleIdError(f"sample_ids= gave {len(names)} ids for a batch of {len(positions)} samples.")
        return names


def _sampler_iterator(trainer: Any) -> Any:
    """The iterator that Lightning's own pass over the loader draws from; others may go through the loader, too."""
    passes = getattr(combined_loader(trainer), "_iterator", None)
    first = next(iter(getattr(passes, "iterators", [])), None)
    return getattr(first, "_sampler_iter", None)


def _plain_id(name: Any) -> SampleId:
    value = name.item() if hasattr(name, "item") else name
    if isinstance(value, str) or (isinstance(value, int) and not isinstance(value, bool)):
        return value
    raise SampleIdError(f"sample_ids= gave {value!r} of type {type(value).__name__}; expected int or str.")


def check_train_loader(loader: Any, has_sample_ids: bool, may_keep: bool) -> None:
    """Once the training loader exists.

    Raises:
        SampleIdError: Its samples have no positions, and no ``sample_ids`` names them or they may not be kept.
        UnsupportedTrainingError: Batches arrive in another order than they are drawn, or it is no DataLoader.
    """
    is_stream = not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset)
    if is_stream and has_sample_ids and not may_keep:
        raise SampleIdError(
            f"The training data are a stream ({type(getattr(loader, 'dataset', loader)).__name__}), whose batches can "
            'only be kept, but keep_batches=False. Leave it at "auto".'
        )
    if not isinstance(loader, DataLoader):
        if has_sample_ids:
            return
        raise SampleIdError(
            f"The training data come from a {type(loader).__name__}, not a torch DataLoader, so samples have no "
            "positions. Give sample_ids=, a callable from the batch to its samples' ids."
        )
    if isinstance(loader.dataset, IterableDataset) and not has_sample_ids:
        raise SampleIdError(
            f"{type(loader.dataset).__name__} is an IterableDataset, whose samples have no positions. "
            "Give sample_ids=, a callable from the batch to its samples' ids."
        )
    if not getattr(loader, "in_order", True):
        raise UnsupportedTrainingError(
            "The training loader has in_order=False: batches arrive in another order than they are drawn. "
            "Use in_order=True."
        )
