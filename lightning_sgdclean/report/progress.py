# SPDX-License-Identifier: Apache-2.0
"""A bar for the retrace that looks like the Trainer's own, and shows the harm found so far."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import monotonic
from typing import Any, TypeAlias

from torch import Tensor
from tqdm.auto import tqdm

Advance: TypeAlias = Callable[[Tensor], None]

_DESCRIPTION = "Retracing"
_VERIFYING = "Verifying"
_SECONDS_BETWEEN = 0.1  # sums of the influences, which of a million samples takes a millisecond


def harm_of(influence: Tensor) -> float:
    """What the harmful samples add up to: the sum of the negative influences."""
    return float(influence.clamp(max=0.0).sum())


@contextmanager
def retrace_bar(style: Any, num_steps: int) -> Iterator[Advance]:
    """A bar over the steps of a walk: steps, elapsed time, time left, harm so far.

    The time left takes the mean speed so far, since steps come in bursts where states are recomputed.

    Args:
        style: The Trainer's progress bar, a Rich or tqdm one (others are followed by a tqdm one), or None to show none.
        num_steps: How many steps there are.

    Yields:
        What to call after every step with the influences so far.
    """
    if style is None:
        yield lambda influence: None
    elif _is_rich(style):
        with _rich_bar(style, num_steps) as advance:
            yield advance
    else:
        with _tqdm_bar(style, num_steps) as advance:
            yield advance


@contextmanager
def runs_bar(style: Any) -> Iterator[Callable[[int, int], None]]:
    """A bar over runs that are made to verify a ranking, in the style of :func:`retrace_bar`.

    Yields:
        What to call with the number of steps done, and of all that there are; both may change their minds.
    """
    if style is None:
        yield lambda done, total: None
    elif _is_rich(style):
        from rich.progress import Progress

        if style.progress is not None:
            style.progress.stop()  # see below
        console = style.progress and style.progress.console
        with Progress(*style.configure_columns(style.trainer), console=console) as rich_bar:
            task = rich_bar.add_task(_VERIFYING, total=1)
            yield lambda done, total: rich_bar.update(task, completed=done, total=total)
    else:
        with tqdm(desc=_VERIFYING, dynamic_ncols=True, file=sys.stdout, smoothing=0.1) as bar:

            def show(done: int, total: int) -> None:
                if done < bar.n:  # begun anew
                    bar.reset()
                bar.total = total
                bar.update(done - bar.n)

            yield show


def _is_rich(style: Any) -> bool:
    # By name: the classes of both Lightning packages, and the user's subclasses of them.
    return any(base.__name__ == "RichProgressBar" for base in type(style).__mro__)


@contextmanager
def _tqdm_bar(style: Any, num_steps: int) -> Iterator[Advance]:
    with tqdm(
        total=num_steps,
        desc=_DESCRIPTION,
        dynamic_ncols=True,
        file=sys.stdout,  # where Lightning's bars go
        smoothing=0,
        bar_format=getattr(style, "BAR_FORMAT", None),
    ) as bar:

        def show(influence: Tensor) -> None:
            bar.set_postfix_str(_in_words(influence), refresh=False)

        yield _now_and_then(show, num_steps, bar.update)


@contextmanager
def _rich_bar(style: Any, num_steps: int) -> Iterator[Advance]:
    from rich.progress import Progress, TextColumn

    if style.progress is not None:
        style.progress.stop()  # it lives on until teardown, and one terminal has room for one
    harm = TextColumn("{task.fields[harm]}", style=style.theme.metrics)
    columns = [*style.configure_columns(style.trainer), harm]
    console = style.progress and style.progress.console
    with Progress(*columns, console=console, speed_estimate_period=float("inf")) as bar:
        task = bar.add_task(_DESCRIPTION, total=num_steps, harm="")

        def show(influence: Tensor) -> None:
            bar.update(task, harm=_in_words(influence))

        yield _now_and_then(show, num_steps, lambda: bar.advance(task))


def _in_words(influence: Tensor) -> str:
    return f"harm so far {harm_of(influence):.3g}"


def _now_and_then(show: Callable[[Tensor], None], num_steps: int, advance: Callable[[], object]) -> Advance:
    """Advance at every step, but show the harm a few times a second only, and at the end."""
    done, shown = 0, -_SECONDS_BETWEEN

    def after_step(influence: Tensor) -> None:
        nonlocal done, shown
        done += 1
        now = monotonic()
        if now - shown >= _SECONDS_BETWEEN or done == num_steps:
            show(influence)
            shown = now
        advance()

    return after_step
