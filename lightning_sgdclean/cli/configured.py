# SPDX-License-Identifier: Apache-2.0
"""A training as a LightningCLI configuration file describes it, made as often as it is wanted."""

import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from lightning_sgdclean.base.lightning import package_of, silent_logger
from lightning_sgdclean.base.options import PLAIN_OPTIONS, checked
from lightning_sgdclean.cleansing.training import Training

_CALLBACKS = ("lightning_sgdclean.SGDInfluence", "lightning_sgdclean.callback.SGDInfluence")


@dataclass(frozen=True)
class ConfiguredTraining:
    """What a LightningCLI would train.

    Attributes:
        path: The configuration, with ``class_path`` for what is a class's choice.
        model: Import path of the LightningModule's class, for files that hold its arguments alone.
        data: Likewise of the DataModule's.
    """

    path: Path
    model: str | None = None
    data: str | None = None

    def make(self, trainer: Mapping[str, Any] | None = None, *, seeded: bool = True) -> tuple[Any, Any, Any]:
        """Make Trainer, module and DataModule (or None), as the file says.

        Args:
            trainer: Options of the Trainer that are to be others than the file's; a callable makes one of the file's.
            seeded: Whether to seed as the file says.

        Raises:
            ImportError: If jsonargparse, or a class of the file's, cannot be imported.
            ValueError: If the file does not fit the classes.
        """
        self._check_options()
        with _own_arguments():
            module_class = imported(self.model or self._class_path("model"))
            cli_class = _cli_class(package_of(module_class).__name__, dict(trainer or {}), seeded)
            given = {
                "model_class": module_class if self.model else None,
                "datamodule_class": imported(self.data) if self.data else None,
            }
            try:
                cli = cli_class(
                    **given,
                    args=["--config", str(self.path)],
                    run=False,
                    save_config_callback=None,
                    parser_kwargs={"exit_on_error": False},
                )
            except import_module("jsonargparse").ArgumentError as error:
                raise ValueError(f"{self.path}: {error}") from error
        return cli.trainer, cli.model, cli.datamodule

    @property
    def config(self) -> dict[str, Any]:
        """What tells this training from others, fit for JSON."""
        return {"file": self.path.read_text(encoding="utf-8"), "model": self.model, "data": self.data}

    def __call__(self, seed: int) -> Training:
        """A fresh training for :func:`lightning_sgdclean.cleanse`, which has seeded it; without loggers and bars."""
        quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
        made, module, datamodule = self.make(quiet, seeded=False)
        made.loggers = [silent_logger(made)]  # some callbacks want one
        return Training(made, module, datamodule)

    def dataset(self) -> Any:
        """The training data.

        Raises:
            ImportError: As :meth:`make`.
            ValueError: As :meth:`make`, or if there is no training loader with a dataset.
        """
        _, module, datamodule = self.make({"logger": False})
        source = module if datamodule is None else datamodule
        source.prepare_data()
        source.setup("fit")
        loader = source.train_dataloader()
        if not hasattr(loader, "dataset"):
            raise ValueError(f"{self.path}: no dataset can be seen in a training loader of {type(loader).__name__}.")
        return loader.dataset

    def _check_options(self) -> None:
        """Check the callback's options as the callback does: jsonargparse would say it in other words, or let it pass.

        What stands for a callable or a loader is an import path here, which jsonargparse resolves.
        """
        trainer = self._content().get("trainer")
        callbacks = trainer.get("callbacks") if isinstance(trainer, dict) else None
        for callback in callbacks if isinstance(callbacks, list) else [callbacks]:
            if not isinstance(callback, dict) or callback.get("class_path") not in _CALLBACKS:
                continue
            for name, value in (callback.get("init_args") or {}).items():
                if name in PLAIN_OPTIONS:
                    checked(name, _number(value))

    def _class_path(self, key: str) -> str:
        found = self._content().get(key)
        path = found.get("class_path") if isinstance(found, dict) else found
        if not isinstance(path, str):
            raise ValueError(f"{self.path} names no class of the {key}: no class_path. Give --{key} its import path.")
        return path

    def _content(self) -> dict[str, Any]:
        import yaml

        try:
            content = yaml.safe_load(self.path.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ValueError(f"{self.path} is no YAML: {error}") from error
        if not isinstance(content, dict):
            raise ValueError(f"{self.path} is no configuration of a LightningCLI: {type(content).__name__}.")
        return content


def _number(value: Any) -> Any:
    """``1e-5`` as the number that jsonargparse takes it for; to YAML 1.1 it is text, as it has no dot."""
    if isinstance(value, str) and "e" in value:
        try:
            return float(value)
        except ValueError:
            return value
    return value


def imported(path: str) -> Any:
    """The object of an import path such as ``package.module.Class``.

    Raises:
        ImportError: If there is none.
    """
    module, _, name = path.rpartition(".")
    try:
        return getattr(import_module(module), name)
    except (AttributeError, ValueError) as error:
        raise ImportError(f"There is no {path!r} to import.") from error


def _cli_class(package: str, options: dict[str, Any], seeded: bool) -> Any:
    """A LightningCLI that takes what a file for ``fit`` holds, and these options of the Trainer instead of its own."""
    try:
        base: Any = import_module(f"{package}.cli").LightningCLI
        import_module("jsonargparse")
    except ImportError as error:
        raise ImportError("Configurations need jsonargparse: pip install lightning-sgdclean[cli]") from error

    class Maker(base):  # type: ignore[misc]
        def add_arguments_to_parser(self, parser: Any) -> None:
            """Those of ``fit`` itself, which a saved configuration holds."""
            parser.add_method_arguments(self.trainer_class, "fit", skip=set(self.subcommands()["fit"]))

        def before_instantiate_classes(self) -> None:
            """Before, so that no logger is made which is not wanted."""
            for name, value in options.items():
                given = self.config["trainer"]
                given[name] = value(given[name]) if callable(value) else value

        def _set_seed(self) -> None:
            if seeded:
                super()._set_seed()

    return Maker


@contextmanager
def _own_arguments() -> Iterator[None]:
    """Nobody mistakes our arguments for a LightningCLI's."""
    argv = sys.argv
    sys.argv = argv[:1]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of jsonargparse, for Lightning's authors
            yield
    finally:
        sys.argv = argv
