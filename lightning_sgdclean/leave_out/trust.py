# SPDX-License-Identifier: Apache-2.0
"""How far a ranking can be trusted: some of its samples really left out, as many as asked for or as time allows."""

import math
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any, Literal

import numpy as np
from torch import Tensor

from lightning_sgdclean.adjoint.objective import objective_values
from lightning_sgdclean.base.options import SampleId
from lightning_sgdclean.base.resources import in_time
from lightning_sgdclean.leave_out.leave_out import LeftOut, Progress, leave_out
from lightning_sgdclean.leave_out.outcome import NOTHING_RUN, Agreement, Outcome, agreement_of, row_by_row
from lightning_sgdclean.leave_out.verdict import Sizes, doubts, if_finite, in_words, verdict, worth_retracing
from lightning_sgdclean.ranking.ranking import Ranking
from lightning_sgdclean.replay.replay import OpenedRun

_NUM_NUDGED, _NUM_NUDGED_AUTO = 4, 1
_NUM_AT_LEAST, _NUM_AT_MOST = 4, 32  # samples that "auto" leaves out
_SHARE_PLANNED = 0.8  # of the time left: runs that are not done when it is up are lost
_AT_LEAST, _TIMES = 30.0, 5  # the first few: half a minute, or so many times what "auto" may take
_PACE_KNOWN = 5.0  # seconds after which it is known how long they will take


def sizes_of(
    ranking: Ranking, at_end: float, norms: dict[int, float], norm_at_end: float, num_doubtful: int = 0
) -> Sizes:
    """What can be said of the influences' sizes without running anything.

    Args:
        ranking: The ranking.
        at_end: The objective at the end point.
        norms: Norm of the adjoint before the first step of each epoch.
        norm_at_end: Norm of the adjoint that the walk started with.
        num_doubtful: Batches whose differences could not be trusted, of ``curvature="finite"``.
    """
    influence, epochs = ranking.influence, sorted(norms)
    largest = float(influence[np.abs(influence).argmax()]) if len(influence) else 0.0
    factors = [if_finite(norms[epoch] / norm_at_end) if norm_at_end else None for epoch in epochs]
    growth: dict[str, list[Any]] = {"epoch": epochs, "factor": factors}
    return Sizes(if_finite(float(influence.sum())), if_finite(largest), None, if_finite(at_end), growth, num_doubtful)


def put_to_the_test(
    this: OpenedRun, ranking: Ranking, sizes: Sizes, seconds: float, progress: Progress
) -> tuple[Ranking, dict[str, Any]]:
    """Really leave samples out, as the options ``verify`` and ``rerank`` say.

    Args:
        this: The run that was ranked.
        ranking: Its ranking.
        sizes: Those of its influences.
        seconds: What ``verify="auto"`` may take, its first few samples aside.
        progress: Gets how much is done, of how much.

    Returns:
        The ranking, with a column ``real`` where an option asked for a number of samples, and with ``rerank`` ordered
        by what is known; and the summary's ``trust``.
    """
    before = math.nan if this.averages is not None else _objective_before(this)  # then that of averages is not known
    sizes = replace(sizes, objective_before=if_finite(before))
    try:
        outcome = _run(this, ranking, seconds, progress)
    except _TimeIsUp as late:
        return ranking, card_of(this.options.verify, sizes, failure=str(late))
    card = card_of(this.options.verify, sizes, outcome)
    reranked = ranking.sample_id[: this.options.rerank].tolist()
    # How many "auto" leaves out depends on the clock; a ranking must not.
    shown = reranked if this.options.verify == "auto" else [*outcome.real]
    if shown:
        ranking = _with_real(ranking, {name: outcome.real[name] for name in shown}, is_reranked=bool(reranked))
    return ranking, card


def _run(this: OpenedRun, ranking: Ranking, seconds: float, progress: Progress) -> Outcome:
    """Leave out what the options ask for, and with ``verify="auto"`` more of it while time allows."""
    began = time.perf_counter()
    is_auto = this.options.verify == "auto"
    strata = stratified(ranking, _NUM_AT_LEAST if is_auto else int(this.options.verify))
    reranked = ranking.sample_id[: this.options.rerank].tolist()
    singles = list(dict.fromkeys([*strata, *reranked]))
    if not singles:
        return NOTHING_RUN
    worst = [name for name, stratum in strata.items() if stratum == "worst"]
    groups = [] if is_auto else [group for group in ([*strata], worst) if group]
    num_nudged = _NUM_NUDGED_AUTO if is_auto and not reranked else _NUM_NUDGED
    found = leave_out(
        this,
        [frozenset(group) for group in ([[name] for name in singles] + groups)],
        num_nudged=num_nudged,
        progress=_within(max(_AT_LEAST, _TIMES * seconds), progress) if is_auto and not reranked else progress,
    )
    sign = 1.0 if this.options.mode == "min" else -1.0
    differences = [_signed(sign, difference) for difference in found.differences]
    real = dict(zip(singles, differences, strict=False))
    if is_auto:
        pace = (time.perf_counter() - began) / (1 + num_nudged + len(singles))
        more = _chosen_for(began + seconds, pace, ranking, real)
        extra = _while_there_is_time(this, [*more], began + seconds, progress) if more else None
        if extra is not None:
            strata |= more
            real |= {name: _signed(sign, value) for name, value in zip(more, extra.differences, strict=True)}
    by_name = dict(zip(ranking.sample_id.tolist(), ranking.influence.tolist(), strict=True))
    predicted = {name: by_name[name] for name in real}
    took = round(time.perf_counter() - began, 3)
    together = differences[len(singles) :]
    return Outcome(strata, predicted, real, together, noise_floor(found), len(reranked), found.words, took)


def _signed(sign: float, difference: float) -> float | None:
    return sign * difference if math.isfinite(difference) else None


def _chosen_for(
    deadline: float, pace: float, ranking: Ranking, known: dict[SampleId, float | None]
) -> dict[SampleId, str]:
    """Which samples to leave out besides until the deadline, at ``pace`` seconds a run; none if it is not worth it."""
    fit = int(_SHARE_PLANNED * (deadline - time.perf_counter()) / pace) - 1  # that of the run with nobody left out
    if fit < _NUM_AT_LEAST:
        return {}
    chosen = stratified(ranking, min(_NUM_AT_MOST, len(known) + fit))
    return dict([(name, stratum) for name, stratum in chosen.items() if name not in known][:fit])


class _TimeIsUp(Exception):
    """The runs that are being made are given up."""


def _within(limit: float, progress: Progress) -> Progress:
    """Give up as soon as it is known that runs will take longer.

    Raises:
        _TimeIsUp: Says how long.
    """
    began = time.perf_counter()

    def watched(done: int, total: int) -> None:
        progress(done, total)
        elapsed = time.perf_counter() - began
        expected = elapsed / done * total
        if elapsed > _PACE_KNOWN and expected > limit:
            raise _TimeIsUp(f"it would take about {in_time(expected)}; verify={_NUM_AT_LEAST} takes that time")

    return watched


def _while_there_is_time(this: OpenedRun, names: list[SampleId], deadline: float, progress: Progress) -> LeftOut | None:
    """What leaving each out led to; None if time was up, or the user's patience."""

    def watched(done: int, total: int) -> None:
        progress(done, total)
        if time.perf_counter() > deadline:
            raise _TimeIsUp

    try:
        return leave_out(this, [frozenset([name]) for name in names], progress=watched)
    except (_TimeIsUp, KeyboardInterrupt):
        return None


def _objective_before(this: OpenedRun) -> float:
    """The objective at the window's first state."""
    start = this.states.state(this.steps[0].index)

    def at_start(value: Callable[[], Tensor]) -> Tensor:
        this.replay.load(start)
        return value()[None]

    with this.replay.surroundings.as_stage("train"):
        (found,) = objective_values(this.replay, *this.validation(), this.options, at_start)
    return found


def card_of(
    verify: int | Literal["auto"], sizes: Sizes, outcome: Outcome = NOTHING_RUN, failure: str = ""
) -> dict[str, Any]:
    """The summary's ``trust``; see ``docs/outputs.md``.

    Args:
        verify: What was asked for.
        sizes: Those of the influences.
        outcome: What came of leaving samples out.
        failure: Why samples could not be left out, in words.
    """
    strata, real, noise = outcome.strata, outcome.real, outcome.noise
    agreement = agreement_of(outcome) if strata else None
    ended = [abs(value) for name in strata if (value := real[name]) is not None]
    figures: dict[str, Any] = {
        "verify": verify,
        "num_verified": len(strata),
        "num_reranked": outcome.num_reranked,
        **(asdict(agreement) if agreement is not None else dict.fromkeys(Agreement.__dataclass_fields__)),
        "num_diverged": sum(value is None for value in real.values()),
        "noise_floor": if_finite(noise),
        "num_within_noise": sum(value <= 2 * noise for value in ended),
        "runs": outcome.runs,
        "seconds": outcome.seconds,
        "samples": row_by_row(outcome),
        **asdict(sizes),
        "worth_epochs": worth_retracing(sizes.adjoint_growth),
        "failure": failure,
    }
    figures = {"doubts": doubts(figures), **figures}
    figures = {"verdict": verdict(figures), **figures}
    return {"words": in_words(figures), **figures}


def stratified(ranking: Ranking, num: int) -> dict[SampleId, str]:
    """Samples to verify: a third from each end of the ranking, the rest anywhere between, the same ones each time.

    Args:
        ranking: The ranking.
        num: How many.

    Returns:
        ``"worst"``, ``"best"`` or ``"random"`` by sample id.
    """
    num = min(num, len(ranking))
    third = num // 3
    between = np.arange(third, len(ranking) - third)
    drawn = np.sort(np.random.default_rng(0).choice(between, num - 2 * third, replace=False))
    ids = ranking.sample_id
    chosen = {"worst": ids[:third], "best": ids[len(ids) - third :], "random": ids[drawn]}
    return {name: stratum for stratum, some in chosen.items() for name in some.tolist()}


def noise_floor(found: LeftOut) -> float:
    """What rounding alone does: root mean square difference of runs that began off by rounding errors.

    Infinite where one of them diverged.
    """
    if not all(map(math.isfinite, found.nudged)):
        return math.inf
    return math.hypot(*found.nudged) / math.sqrt(len(found.nudged))


def _with_real(ranking: Ranking, real: dict[SampleId, float | None], is_reranked: bool) -> Ranking:
    """The ranking beside what really happened; reranked, what is known takes the place of what was predicted."""
    ids = ranking.sample_id.tolist()
    column = np.array([real.get(name) for name in ids], dtype=np.float64)
    columns: dict[str, Any] = {"real": column}
    if None in real.values():
        columns["diverged"] = ["yes" if name in real and real[name] is None else "" for name in ids]
    if not is_reranked:
        return ranking.with_columns(columns)
    influence = np.where(np.isnan(column), ranking.influence, column)
    reordered = ranking.with_columns({"predicted": ranking.influence, **columns})
    return Ranking.from_influence(ranking.sample_id, influence, ranking.visits, reordered.columns)
