# SPDX-License-Identifier: Apache-2.0
"""What is said of a retrace: while it runs, when it is done, and on the page."""

import math
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import Any, Literal, TypeAlias

from torch import Tensor
from tqdm.auto import tqdm

from lightning_sgdclean.base.errors import printable, shown
from lightning_sgdclean.base.lightning import rich_columns
from lightning_sgdclean.ranking.ranking import Ranking
from lightning_sgdclean.replay.fidelity import Fidelity

_ENGINES = {
    "exact": "exact derivative of the recorded steps, by a double backward pass",
    "gauss-newton": "Gauss-Newton: exact gradients, and of the curvature that of the loss by the network's outputs",
    "finite": "central differences along each step, with first derivatives only",
    "none": "without the Hessian: a rough ranking, meant for comparison",
}
_NOISY = 0.9  # cosine below which influences of a run in 16 bits are mostly rounding


@dataclass(frozen=True)
class TrustLine:
    """One line: what is judged, what was found, and whether that is good, a warning, or neither."""

    term: str
    words: str
    state: Literal["good", "warning", "plain"] = "plain"


def trust_lines(summary: Mapping[str, Any]) -> list[TrustLine]:
    """What the summary says of the trust that a ranking deserves; what it lacks is left out."""
    makers = (_replay, _window, _end_point, _objective, _engine, _rates, _noise, _kept, _measured)
    return [line for maker in makers for line in maker(summary)]


def _replay(summary: Mapping[str, Any]) -> list[TrustLine]:
    replay = summary.get("replay")
    if not replay:
        return []
    complaints = [TrustLine("Replay", text, "warning") for text in replay.get("complaints", [])]
    return [TrustLine("Replay", replay["words"], "warning" if complaints else "good"), *complaints]


def _window(summary: Mapping[str, Any]) -> list[TrustLine]:
    window = summary.get("window")
    if not window:
        return []
    words = f"{window['words']}. What samples did in earlier steps is not in the numbers."
    state: Literal["warning", "plain"] = "warning" if window.get("partial") else "plain"
    return [TrustLine("Window", words if window.get("first_step") else window["words"], state)]


def _end_point(summary: Mapping[str, Any]) -> list[TrustLine]:
    return [TrustLine("Model", summary["end_point"])] if summary.get("end_point") else []


def _objective(summary: Mapping[str, Any]) -> list[TrustLine]:
    objective = summary.get("objective")
    if not objective or objective.get("recomputed") is None:
        return []
    words = f"{objective['name']} = {objective['recomputed']:.6g}, evaluated anew"
    if objective.get("logged") is not None:
        words += f"; {objective['logged']:.6g} was logged for the same weights"
    return [TrustLine("Objective", words)]


def _engine(summary: Mapping[str, Any]) -> list[TrustLine]:
    engine = summary.get("engine")
    words = f"“{engine}”: {_ENGINES.get(str(engine), 'another one')}; precision {summary.get('precision', 'unknown')}"
    return [TrustLine("Engine", words, "warning" if engine == "none" else "plain")] if engine else []


def _rates(summary: Mapping[str, Any]) -> list[TrustLine]:
    rates = summary.get("rates")
    return [] if not rates or rates["of_step_alone"] else [TrustLine("Learning rate", rates["words"], "warning")]


def _noise(summary: Mapping[str, Any]) -> list[TrustLine]:
    agreement = summary.get("float32_agreement")
    if not agreement:
        return []
    cosine = math.nan if agreement["cosine"] is None else agreement["cosine"]  # where all influences are zero
    words = f"cosine {cosine:.3f} with a retrace in float32 over the last {agreement['num_steps']} steps"
    return [TrustLine("Rounding", words, "good" if cosine >= _NOISY else "warning")]


def _kept(summary: Mapping[str, Any]) -> list[TrustLine]:
    batches = summary.get("batches")
    if not batches or not batches.get("kept"):
        return []
    words = (
        f"{batches['kept']} batches were stored as they were trained on ({batches['why']}); the samples on this page "
        "were fetched once more where they could be, and may look different"
    )
    return [TrustLine("Data", words)]


def _measured(summary: Mapping[str, Any]) -> list[TrustLine]:
    """Leave-one-out runs that were really made, where there were any."""
    trust = summary.get("trust")
    if not isinstance(trust, Mapping):
        return []
    if isinstance(trust.get("words"), str):
        return [TrustLine("Leave-one-out", trust["words"], "warning" if trust.get("doubts") else "plain")]
    values = [
        f"{name.replace('_', ' ')} {value}" for name, value in trust.items() if isinstance(value, int | float | str)
    ]
    return [TrustLine("Leave-one-out", "; ".join(values))] if values else []


def replay_in_words(error: Fidelity) -> str:
    """How far the replay was off, e.g. ``bit for bit in all 320 batches``."""
    if error.num_bitwise == error.num_batches:
        losses = f"losses bit for bit in all {error.num_batches} batches"
    else:
        losses = (
            f"losses off by at most {error.loss:.1e} ({error.num_bitwise} of {error.num_batches} batches bit for bit)"
        )
    return f"{losses}; updates off by at most {error.update:.1e} of their length"


def closing_text(ranking: Ranking, summary: dict[str, Any], folder: Path) -> str:
    """The last word on the terminal."""
    worst = ", ".join(map(shown, ranking.harmful(10))) or "none"
    name = shown(summary["objective"]["name"])
    lines = [
        f"SGD influence on {name} (negative: the objective would be lower without the sample)",
        f"  files    {printable(str(folder))}",
        f"  window   {summary['window']['words']}; {len(ranking)} samples, engine {summary['engine']}",
        f"  replay   {summary['replay']['words']}",
        f"  worst    {worst}",
    ]
    trust = summary.get("trust")
    if trust:  # figures where somebody asked for them, else one sentence
        is_asked = trust["verify"] != "auto" or trust["num_reranked"]
        lines.insert(-1, f"  trust    {trust['words' if is_asked else 'verdict']}")
    if (folder / "report.html").is_file():
        lines.insert(2, f"  page     {printable(str(folder / 'report.html'))}")
    return "\n".join(lines)


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
        with Progress(*rich_columns(style), console=console) as rich_bar:
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
    columns = [*rich_columns(style), harm]
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
