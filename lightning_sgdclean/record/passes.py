# SPDX-License-Identifier: Apache-2.0
"""The passes over training loaders: may they be followed, and what several loaders give together."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, Subset

from lightning_sgdclean.base.errors import NAME_THEM, SampleIdError, UnsupportedTrainingError
from lightning_sgdclean.base.lightning import combined_loader, transfer_hooks
from lightning_sgdclean.base.options import Positions
from lightning_sgdclean.data.batches import attributes_of, tensor_shapes
from lightning_sgdclean.data.fetching import has_own_collate
from lightning_sgdclean.data.parts import loader_parts
from lightning_sgdclean.data.samplers import NotingSampler, note_samples

# What an iterator of torch's delivers by: each draw once, in the order of the draws.
_DELIVERING = ("__next__", "_next_data", "_next_index", "_process_data", "_try_put_index", "_get_data", "_try_get_data")


def check_pass(iterator: Any, dataset: Any) -> None:
    """Does each batch of the pass come straight from torch's DataLoader, as the sampler drew it?

    Raises:
        SampleIdError: If code of somebody else's stands between.
    """
    methods = {name: getattr(iterator, name) for name in _DELIVERING if hasattr(iterator, name)}
    foreign = [name for name, method in methods.items() if not _is_torchs(method)]
    if foreign or not methods:
        # A generator has the name of the function that made it, say MyLoader.__iter__.
        name = getattr(iterator, "__qualname__", type(iterator).__qualname__)
        name = f"{name}, with another {foreign[0]}" if "_next_data" in methods else name
        raise SampleIdError(
            f"The training batches come out of {name}, not straight from torch's DataLoader: it may pass over, repeat, "
            f"buffer or shuffle batches, so which samples a batch holds is not known. {NAME_THEM}"
        )
    if iterator._dataset is not dataset:
        raise SampleIdError(
            "The loader goes over another dataset than it had when training began, so positions are no names. "
            f"{NAME_THEM}"
        )


def _is_torchs(method: Any) -> bool:
    home = getattr(getattr(method, "__func__", method), "__globals__", {}).get("__name__", "")
    return str(home).startswith(("torch.", "torchdata."))


class RowCheck:
    """Can a batch hold the samples that were drawn for it?"""

    def __init__(self) -> None:
        self._led = False  # whether all tensors of a batch were once as long as its draw

    def check(self, batch: Any, num: int) -> None:
        """Refuse a batch that surely does not.

        All its tensors have another length than ``num``, and it is none of several views of each sample. Either no
        other dimension is as long as the draw, or earlier batches had a row a sample.

        Raises:
            SampleIdError: With both numbers.
        """
        shapes = _shapes(batch)
        rows = num_rows(batch)
        if rows == num:
            self._led = True
        elif rows is not None and rows % num:
            # Time may come first, then samples; not so in a tensor of one dimension.
            seems_time_first = any(num in shape for shape in shapes)
            shows = not seems_time_first or (self._led and any(len(shape) == 1 for shape in shapes))
            if shows and not _may_list_samples(batch, num):
                raise SampleIdError(
                    f"A training batch has {rows} rows, but {num} samples were drawn for it: the collate function (or "
                    f"a transfer hook) drops or adds samples, so which row is whose is not known. {NAME_THEM}"
                )


def _may_list_samples(value: Any, num: int, above: tuple[int, ...] = ()) -> bool:
    """Whether there is a sequence in a batch that may have one entry a sample."""
    if isinstance(value, Tensor | str) or id(value) in above:
        return False
    if isinstance(value, list | tuple):
        if len(value) == num or not any(isinstance(item, Tensor) for item in value):
            return True
        parts = list(value)
    else:
        parts = list((value if isinstance(value, Mapping) else attributes_of(value)).values())
    return any(_may_list_samples(part, num, (*above, id(value))) for part in parts)


def _shapes(batch: Any) -> list[tuple[int, ...]]:
    return [shape for shape in tensor_shapes(batch) if shape]


def num_rows(batch: Any) -> int | None:
    """The length of all the batch's tensors; None where they differ."""
    lengths = {shape[0] for shape in _shapes(batch)}
    return lengths.pop() if len(lengths) == 1 else None


LEAVE_AT_AUTO = 'Leave it at "auto".'


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
            f"only be kept, but keep_batches=False. {LEAVE_AT_AUTO}"
        )
    if not isinstance(loader, DataLoader):
        if has_sample_ids:
            return
        raise SampleIdError(
            f"The training data come from a {type(loader).__name__}, not a torch DataLoader, so samples have no "
            f"positions. {NAME_THEM}"
        )
    if isinstance(loader.dataset, IterableDataset) and not has_sample_ids:
        raise SampleIdError(
            f"{type(loader.dataset).__name__} is an IterableDataset, whose samples have no positions. {NAME_THEM}"
        )
    if not getattr(loader, "in_order", True):
        raise UnsupportedTrainingError(
            "The training loader has in_order=False: batches arrive in another order than they are drawn. "
            "Use in_order=True."
        )


class SeveralLoaders:
    """Training loaders that are drawn from at the same time: which samples each batch has.

    Batches of several are kept as they were trained on, and their samples named ``loader:position``.

    Args:
        trainer: The Trainer.
        noted: A loader to the dataset that it had when it was prepared; None where it was not seen.
        named: Whether ``sample_ids=`` names the samples.
        may_keep: Whether batches may be kept.
        checks_rows: Whether to look if batches can hold the samples that were drawn for them.
        before: Those that these replace, where loaders were made anew.

    Raises:
        SampleIdError: If samples have no positions, or it is not known which row is whose.
        UnsupportedTrainingError: If they are nested, or cannot be followed.
    """

    def __init__(
        self,
        trainer: Any,
        noted: Callable[[Any], Any],
        named: bool,
        may_keep: bool,
        checks_rows: bool,
        before: "SeveralLoaders | None" = None,
    ) -> None:
        self.combined = combined_loader(trainer)
        self._rows = [RowCheck() if checks_rows else None for _ in self.combined.flattened]
        self._names, self._noting = _names_of(self.combined), list[NotingSampler]()
        if not may_keep:
            raise SampleIdError(
                f"There are {len(self._names)} training loaders, whose batches can only be kept, but "
                f"keep_batches=False. {LEAVE_AT_AUTO}"
            )
        self._datasets = [noted(loader) for loader in self.combined.flattened]
        for loader, dataset in zip(self.combined.flattened, self._datasets, strict=True):
            check_train_loader(loader, has_sample_ids=False, may_keep=True)
            if dataset is None:
                raise SampleIdError(
                    "A training loader was made before this callback was set up, so its samples were not seen."
                )
            if not named:
                _check_order(loader)
            self._noting.append(note_samples(loader))
        hooks = transfer_hooks(trainer)
        if hooks and not named:
            raise SampleIdError(
                f"{', '.join(hooks)} may move samples, and of several training loaders it is not looked into whether "
                f"rows keep their order. {NAME_THEM}"
            )
        if before is not None and not named and list(map(id, before._datasets)) != list(map(id, self._datasets)):
            raise SampleIdError(
                "The training loaders were made anew over other datasets, so positions are no names. Make the datasets "
                f"once. Or: {NAME_THEM}"
            )

    def drawn(self, trainer: Any, batch: Any) -> list[Positions | None]:
        """What each loader drew for a batch; None where it gave nothing.

        Args:
            trainer: The Trainer.
            batch: The batch that it goes on with.

        Raises:
            SampleIdError: If a loader's batches need not be those that were drawn.
        """
        passes = self.combined._iterator
        if len(getattr(trainer.fit_loop._data_fetcher, "batches", ())):
            raise SampleIdError(
                "Lightning fetches a batch ahead, since a training loader has no length, so which of several loaders "
                "gave a batch is not known. Give all of them a length (__len__ of the batch sampler)."
            )
        found: list[Positions | None] = [None] * len(self._names)
        for number, (part, iterator) in enumerate(zip(loader_parts(batch), passes.iterators, strict=True)):
            if part is None:  # it is at its end
                continue
            check_pass(iterator, self._datasets[number])
            num_waiting = len(getattr(iterator, "_task_info", ()))
            found[number] = self._noting[number].next_positions(iterator._sampler_iter, num_waiting)
        return found

    def names_and_sizes(self, batch: Any, drawn: list[Positions | None]) -> tuple[list[str], list[int]]:
        """The samples' names, in the loaders' order, and how many each loader gave.

        Args:
            batch: As ``training_step`` gets it.
            drawn: See :meth:`drawn`.

        Raises:
            SampleIdError: If a loader's part cannot hold the samples that were drawn for it.
        """
        lists = [[] if one is None else one if isinstance(one, list) else [one] for one in drawn]
        for rows, part, positions in zip(self._rows, loader_parts(batch), drawn, strict=True):
            if rows is not None and isinstance(positions, list):
                rows.check(part, len(positions))
        names = [f"{name}:{position}" for name, one in zip(self._names, lists, strict=True) for position in one]
        return names, [len(one) for one in lists]


def _names_of(combined: Any) -> list[str]:
    """Of each loader: its key in a mapping, else its number.

    Raises:
        UnsupportedTrainingError: If loaders are nested, or a name has a colon.
    """
    given = combined.iterables
    names = [str(name) for name in (given if isinstance(given, Mapping) else range(len(loader_parts(given))))]
    if len(names) != len(combined.flattened):
        raise UnsupportedTrainingError(
            f"The {len(combined.flattened)} training loaders are nested; give them in one dict or one list."
        )
    if any(":" in name for name in names) or len({*names}) != len(names):
        raise UnsupportedTrainingError(
            f"The training loaders have the names {names}, which are to stand before the positions of their samples, "
            "as in name:17. Expected names without a colon, no two alike."
        )
    return names


def _check_order(loader: Any) -> None:
    """Is it sure without a proof that a batch has its samples in the order in which they were drawn?"""
    dataset = loader.dataset
    while isinstance(dataset, Subset):
        dataset = dataset.dataset
    fetch = getattr(type(dataset), "__getitems__", None)
    foreign = "collate_fn" if has_own_collate(loader) else "__getitems__"
    if foreign == "collate_fn" or not (fetch is None or fetch.__module__.startswith("torch.")):
        raise SampleIdError(
            f"Of several training loaders one has a {foreign} of its own, and it is not looked into whether that keeps "
            f"the samples in their order. {NAME_THEM}"
        )
