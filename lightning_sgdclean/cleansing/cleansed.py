# SPDX-License-Identifier: Apache-2.0
"""The callback that trains without some samples, or with other labels for them, whatever loader they come from."""

import operator
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch.utils.data import DataLoader

from lightning_sgdclean.base.errors import UnsupportedTrainingError
from lightning_sgdclean.base.lightning import CALLBACK_BASES
from lightning_sgdclean.data.labels import RelabelledDataset
from lightning_sgdclean.data.samplers import DrawnSamples, over_dataset, without_samples


class Cleansed(*CALLBACK_BASES):  # type: ignore[misc]
    """Trains without some samples, or with other labels for them, and is otherwise the same training.

    It puts a changed copy in the place of the training loader as the Trainer takes it up, so that loaders of module,
    DataModule and ``fit`` are all served. Ids stay positions in the whole dataset. Beside
    :class:`SGDInfluence`, list it last.

    Example::

        ranking = Ranking.load(run_dir)
        trainer = Trainer(callbacks=[Cleansed(drop=ranking.harmful(100))])

    Args:
        drop: Positions in the training loader's dataset that are not drawn.
        labels: New labels by position.
        set_label: Callable ``(sample, label)`` to the sample with that label; by default
            :func:`lightning_sgdclean.relabelling.with_label`, which says what samples need none.
        expected: Labels by position that the samples have to have so far, if that is to be checked.

    Raises:
        TypeError: If something is given for a position that is no whole number: a name, or a mask of truth values;
            from ``fit``, if it is not clear where the label of a sample stands.
        ValueError: From ``fit``, if a new label does not fit the old one's type, or the old one is not as expected.
        UnsupportedTrainingError: From ``fit``, if the loader cannot be followed.
    """

    def __init__(
        self,
        drop: Iterable[int] = (),
        labels: Mapping[int, Any] | None = None,
        set_label: Callable[[Any, Any], Any] | None = None,
        expected: Mapping[int, Any] | None = None,
    ) -> None:
        super().__init__()
        self.drop = frozenset(_position(item) for item in drop)
        self.labels, self.set_label = {_position(key): value for key, value in (labels or {}).items()}, set_label
        self.expected = {_position(key): value for key, value in (expected or {}).items()}
        self._before: Any = None
        self._drawn: DrawnSamples | None = None

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """See every training loader from now on: no callback hook lies between its making and its first use."""
        if stage != "fit":
            return
        later = trainer.callbacks[trainer.callbacks.index(self) + 1 :]
        if any(base.__name__ == "SGDInfluence" for callback in later for base in type(callback).__mro__):
            raise ValueError("List Cleansed behind SGDInfluence: the samples that it notes are those of the last one.")
        self._before, self._drawn = trainer.strategy.process_dataloader, None

        def process_dataloader(loader: Any) -> Any:
            return self._before(self._changed(loader) if trainer.training else loader)

        trainer.strategy.process_dataloader = process_dataloader

    def _changed(self, loader: Any) -> "DataLoader[Any]":
        changed = without_samples(loader, self.drop)
        self._drawn = changed.batch_sampler or changed.sampler  # type: ignore[assignment]
        if self.labels:
            dataset = RelabelledDataset(changed.dataset, self.labels, self.set_label, self.expected)
            changed = over_dataset(changed, dataset)
        return changed

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Was the loader seen?"""
        if self._drawn is None:
            raise UnsupportedTrainingError(
                "The training loader was made before this callback was set up, so it could not be changed. "
                "Do not ask for trainer.estimated_stepping_batches in DataModule.setup."
            )

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Does the loader draw from the changed sampler?"""
        if self._drawn is not None and not self._drawn.num_draws:
            raise UnsupportedTrainingError(
                f"{type(trainer.train_dataloader).__name__} delivers batches that its sampler did not draw, so samples "
                "cannot be left out of them. Leave them out yourself, where the loader is made."
            )

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Leave a Trainer without our hook."""
        self.teardown(trainer, pl_module, "fit")

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Leave a Trainer without our hook."""
        if self._before is not None:
            trainer.strategy.__dict__.pop("process_dataloader", None)
            self._before = None


def _position(item: Any) -> int:
    plain = item.item() if hasattr(item, "item") else item
    if isinstance(plain, bool) or not hasattr(plain, "__index__"):
        raise TypeError(
            f"Expected positions in the training loader's dataset, found {plain!r}. Where the ids of a ranking are "
            "names (sample_ids=), find the positions of those samples yourself."
        )
    return operator.index(plain)
