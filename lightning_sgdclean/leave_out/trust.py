# SPDX-License-Identifier: Apache-2.0
"""How far a ranking can be trusted: some of its samples really left out, and what came of it in words."""

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightning_sgdclean.base.options import SampleId
from lightning_sgdclean.leave_out.leave_out import LeftOut, Progress, leave_out
from lightning_sgdclean.ranking.agreement import kendall_tau, spearman, top_k_jaccard
from lightning_sgdclean.ranking.ranking import Ranking
from lightning_sgdclean.replay.replay import OpenedRun

_LOW_TAU = 0.3  # an order by chance gets there about once in a hundred times, 32 samples given
_NUM_NAMED = 3


def doubts(card: Mapping[str, Any]) -> list[str]:
    """What speaks against trusting the order, each in words; see ``docs/outputs.md`` for the keys of the card."""
    found = []
    tau = card["kendall_tau"]
    if tau is not None and tau < _LOW_TAU:
        found.append(f"the order is not to be trusted: tau is below {_LOW_TAU}")
    if card["num_diverged"]:
        found.append("where training diverges, no derivative says so")
    if card["noise_floor"] is None:
        found.append("rounding alone makes training diverge, so that no order of its samples means anything")
    elif 2 * card["num_within_noise"] > card["num_verified"]:
        found.append("most differences are within the noise, so that no order of them can be told right or wrong")
    return found


def in_words(card: Mapping[str, Any]) -> str:
    """The outcome as one line: what was run, how far the order and the sums agree, the noise, and the doubts."""
    return "; ".join([*_parts(card), *doubts(card)])


def _parts(card: Mapping[str, Any]) -> Iterator[str]:
    if card["num_verified"]:
        strata = card["samples"]["stratum"]
        counts = ", ".join(f"{strata.count(kind)} {kind}" for kind in ("worst", "best", "random"))
        yield f"{card['num_verified']} samples really left out ({counts})"
        yield _order(card)
        for name, key in (("all of them", "together"), ("the worst", "worst_together")):
            if card[key] is not None:
                yield f"{name} together {_sum(card[key])}"
    if card["num_reranked"]:
        yield f"the {card['num_reranked']} worst ranked by what leaving them out really does"
    if card["num_diverged"]:
        yield _diverged(card)
    if card["num_verified"]:
        yield f"{card['num_within_noise']} of {card['num_verified']} within noise"
    if card["noise_floor"] is not None:
        yield f"rounding alone {card['noise_floor']:.1g}"


def _diverged(card: Mapping[str, Any]) -> str:
    samples = card["samples"]
    names = [str(name) for name, real in zip(samples["id"], samples["real"], strict=True) if real is None]
    listed = ", ".join(names[:_NUM_NAMED]) + (", ..." if len(names) > _NUM_NAMED else "")
    stay = " and keep the predicted value" if card["num_reranked"] else ""
    return f"without {len(names)} of them training diverges ({listed}): they count for no agreement{stay}"


def _order(card: Mapping[str, Any]) -> str:
    tau, random = card["kendall_tau"], card["kendall_tau_random"]
    if tau is None:
        return "no order to compare"
    among = "" if random is None else f" ({random:.2f} among the random ones)"
    others = (("Spearman", card["spearman"]), ("Jaccard", card["jaccard"]))
    return ", ".join([f"tau {tau:.2f}{among}", *(f"{name} {value:.2f}" for name, value in others if value is not None)])


def _sum(together: Mapping[str, Any]) -> str:
    predicted, real, error = together["predicted"], together["real"], together["error"]
    if real is None:
        return f"diverging, predicted {predicted:.3g}"
    words = f"{real:.3g}, predicted {predicted:.3g}"
    if error is None:
        return words
    return f"{words}, off by {error:.0%}" if error < 10 else f"{words}, off by {error:.0f} times as much"


_NUM_NUDGED = 4


@dataclass(frozen=True)
class Together:
    """Samples left out together: the sum of their influences beside what really happened.

    Attributes:
        predicted: The sum.
        real: The difference that leaving all of them out made; None if training diverged.
        error: How far the sum is off, relative to the difference; None if that is zero, or none.
    """

    predicted: float
    real: float | None
    error: float | None


@dataclass(frozen=True)
class Agreement:
    """How predicted and real differences agree over the chosen samples; what is not defined is None.

    Samples without which training diverged have no difference, and are left aside.

    Attributes:
        kendall_tau: Kendall's rank correlation.
        kendall_tau_random: The same among the random ones alone. The ends of a ranking are easier to tell apart, so
            that this is nearer to what holds for any two samples.
        spearman: Spearman's.
        jaccard: Jaccard index of both ends, ``jaccard_k`` samples each.
        jaccard_k: See there.
        together: All of them left out together.
        worst_together: Those that rank first, left out together.
    """

    kendall_tau: float | None
    kendall_tau_random: float | None
    spearman: float | None
    jaccard: float | None
    jaccard_k: int
    together: Together
    worst_together: Together | None


def put_to_the_test(this: OpenedRun, ranking: Ranking, progress: Progress) -> tuple[Ranking, dict[str, Any]]:
    """Really leave samples out, as the options ``verify`` and ``rerank`` say.

    Args:
        this: The run that was ranked.
        ranking: Its ranking.
        progress: Gets how much is done, of how much.

    Returns:
        The ranking, with a column ``real``, and with ``rerank`` ordered by what is known; and the summary's ``trust``.
    """
    began = time.perf_counter()
    strata = stratified(ranking, this.options.verify)
    reranked = ranking.sample_id[: this.options.rerank].tolist()
    singles = list(dict.fromkeys([*strata, *reranked]))
    worst = [name for name, stratum in strata.items() if stratum == "worst"]
    groups = [[name] for name in singles] + [group for group in ([*strata], worst) if group]
    found = leave_out(this, [frozenset(group) for group in groups], num_nudged=_NUM_NUDGED, progress=progress)
    sign = 1.0 if this.options.mode == "min" else -1.0
    differences = [sign * difference if math.isfinite(difference) else None for difference in found.differences]
    real = dict(zip(singles, differences, strict=False))
    predicted = dict(zip(ranking.sample_id.tolist(), ranking.influence.tolist(), strict=True))
    agreement = _agreement(strata, predicted, real, differences[len(singles) :]) if strata else None
    noise = noise_floor(found)
    ended = [abs(value) for name in strata if (value := real[name]) is not None]
    card = {
        "num_verified": len(strata),
        "num_reranked": len(reranked),
        **(asdict(agreement) if agreement is not None else dict.fromkeys(Agreement.__dataclass_fields__)),
        "num_diverged": sum(value is None for value in real.values()),
        "noise_floor": noise if math.isfinite(noise) else None,
        "num_within_noise": sum(value <= 2 * noise for value in ended),
        "runs": found.words,
        "seconds": round(time.perf_counter() - began, 3),
        "samples": _row_by_row(singles, strata, predicted, real),
    }
    said = {"words": in_words(card), "doubts": doubts(card)}
    return _with_real(ranking, real, is_reranked=bool(reranked)), said | card


def _row_by_row(
    singles: list[SampleId],
    strata: dict[SampleId, str],
    predicted: dict[SampleId, float],
    real: dict[SampleId, float | None],
) -> dict[str, list[Any]]:
    return {
        "id": singles,
        "stratum": [strata.get(name, "reranked") for name in singles],
        "predicted": [predicted[name] for name in singles],
        "real": [real[name] for name in singles],
    }


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


def _agreement(
    strata: dict[SampleId, str],
    predicted: dict[SampleId, float],
    real: dict[SampleId, float | None],
    together: list[float | None],
) -> Agreement:
    def columns(*wanted: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        ended = [name for name, stratum in strata.items() if stratum in wanted and real[name] is not None]
        return np.array([predicted[name] for name in ended]), np.array([real[name] for name in ended], dtype=np.float64)

    def sum_over(*wanted: str) -> float:
        return sum(predicted[name] for name, stratum in strata.items() if stratum in wanted)

    kinds = ("worst", "best", "random")
    both = columns(*kinds)
    k = max(1, len(both[0]) // 3)
    return Agreement(
        kendall_tau=_if_defined(kendall_tau, *both),
        kendall_tau_random=_if_defined(kendall_tau, *columns("random")),
        spearman=_if_defined(spearman, *both),
        jaccard=_if_defined(lambda a, b: top_k_jaccard(a, b, k), *both),
        jaccard_k=k,
        together=_together(sum_over(*kinds), together[0]),
        worst_together=_together(sum_over("worst"), together[1]) if len(together) > 1 else None,
    )


def _if_defined(
    measure: Callable[[NDArray[np.float64], NDArray[np.float64]], float],
    a: NDArray[np.float64],
    b: NDArray[np.float64],
) -> float | None:
    try:
        return measure(a, b)
    except ValueError:  # too few samples, or all alike
        return None


def _together(predicted: float, real: float | None) -> Together:
    return Together(predicted, real, abs(predicted - real) / abs(real) if real else None)


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
