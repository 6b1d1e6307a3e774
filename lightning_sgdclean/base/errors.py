# SPDX-License-Identifier: Apache-2.0
"""What can go wrong, as types. Every message says what was found, what was expected and what to do."""

import warnings
from collections.abc import Iterable

# The way out where positions in the dataset do not tell which samples a batch holds.
NAME_THEM = "Give sample_ids=, a callable from the batch to its samples' ids."
# The same where the loss is no mean over samples.
WEIGH_THEM = (
    "Give weighted_loss=, a callable (pl_module, batch, weights) -> the training loss with weights (B,) on its "
    "samples, as the recipe 'Losses that mix samples' of the documentation shows it for the usual losses."
)


class SGDInfluenceError(RuntimeError):
    """Base of all refusals: the influences cannot be computed right, so they are not computed."""


class UnsupportedTrainingError(SGDInfluenceError):
    """The training loop, its optimizer or its data loader cannot be followed backwards."""


class SampleIdError(SGDInfluenceError):
    """The samples of a training batch cannot be named, or their names do not fit the batch."""


class LossSplitError(SGDInfluenceError):
    """The training loss is not a weighted sum of one loss per sample, as far as can be seen."""


class ObjectiveError(SGDInfluenceError):
    """There is no validation value of the wanted name that can be differentiated."""


class UnsupportedOperationError(SGDInfluenceError):
    """The chosen engine cannot differentiate an operation of the model."""


class ReplayMismatchError(SGDInfluenceError):
    """A recorded step, run again, did not give what was recorded."""


class NonFiniteError(SGDInfluenceError):
    """A NaN or an infinity stands where a ranking needs a number."""


class RunDirectoryError(SGDInfluenceError):
    """The run directory holds another run, or not what a run directory should hold."""


class DamagedFileError(RunDirectoryError, ValueError):
    """A file does not hold what this package writes there; the message names the file and, in a table, the line."""


class BudgetError(SGDInfluenceError):
    """The trajectory would take, or takes, more disk than it may."""


class SGDInfluenceWarning(UserWarning):
    """Something worth knowing that does not make the influences wrong."""


def warn_of(texts: Iterable[str]) -> None:
    """One warning for each text, as from the caller of the function that asks for it.

    Where warnings are errors the first is raised, with the others as its notes.
    """
    raised: SGDInfluenceWarning | None = None
    for text in texts:
        try:
            warnings.warn(text, SGDInfluenceWarning, stacklevel=3)
        except SGDInfluenceWarning as error:
            if raised is None:
                raised = error
            else:
                raised.add_note(text)
    if raised is not None:
        raise raised


_LONGEST = 60  # characters of a value that is shown


def printable(text: str) -> str:
    """Text of somebody else's with all that a terminal would obey, or hide, written out."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def shown(value: object) -> str:
    """A value of somebody else's, an id say, in one line of bounded length; see :func:`printable`."""
    text = str(value)
    return printable(text if len(text) <= _LONGEST else f"{text[: _LONGEST - 1]}\N{HORIZONTAL ELLIPSIS}")
