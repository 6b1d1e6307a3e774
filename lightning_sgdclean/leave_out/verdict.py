# SPDX-License-Identifier: Apache-2.0
"""What is to be said of a ranking's trust: one plain sentence first, then the figures.

The thresholds were tried on trainings of known outcome: ``benchmarks/trust.py``, figures in ``docs/trust.md``.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

_LOW_TAU = 0.3  # an order by chance gets there about once in a hundred times, 32 samples given
_LOW_TAU_OF_FEW = 0.1  # of four samples in weak order (tau 0.3 among all), one set in twenty stays below
_FEW = 12  # samples
_FEW_RANDOM = 4  # samples: a tau among fewer says nothing
_FACTOR = 10.0  # what is off by more is wrong in size
_LARGE = 0.5  # of the largest real difference: a smaller one hardly moves the order
_GROWTH = 30.0  # of the adjoint: where it grew by 10 no order held, and where orders held it grew by 5 at most
_CALM = 3.0  # up to which most windows of such a training are worth it
_NUM_NAMED = 3


@dataclass(frozen=True)
class Sizes:
    """How large the influences are, and what they are to be compared with; None where that is not finite or not known.

    Attributes:
        influence_sum: The sum of all influences: to first order, what leaving out everything would do.
        influence_largest: The largest influence by its absolute value, with its sign.
        objective_before: The objective before the window.
        objective_at_end: The objective at the end point.
        adjoint_growth: Norm of the adjoint before the first step of each epoch, relative to that at the end point, in
            the order of the epochs: ``{"epoch": [...], "factor": [...]}``.
        doubtful_batches: Whose differences could not be trusted, of ``curvature="finite"``.
    """

    influence_sum: float | None
    influence_largest: float | None
    objective_before: float | None
    objective_at_end: float | None
    adjoint_growth: dict[str, list[Any]]
    doubtful_batches: int = 0


def worth_retracing(growth: Mapping[str, list[Any]]) -> int | None:
    """How many of the window's last epochs come before the adjoint explodes on the way back; None: it does not."""
    factors = growth["factor"]
    if not any(factor is not None and factor > _GROWTH for factor in factors):
        return None
    return sum(1 for _ in takewhile(lambda factor: factor is not None and factor <= _CALM, reversed(factors)))


def low_tau(num: int) -> float:
    """Below which tau the order of so many samples is doubted; for few, only one that chance would give as well."""
    return _LOW_TAU if num >= _FEW else _LOW_TAU_OF_FEW


def doubts(card: Mapping[str, Any]) -> list[str]:
    """What speaks against trusting a ranking, each in words; see ``docs/outputs.md`` for the keys of the card."""
    return [*_against_the_order(card), *_wrong_sizes(card)]


def _against_the_order(card: Mapping[str, Any]) -> list[str]:
    return [*_doubts_of_sizes(card), *(_doubts_of_runs(card) if card["samples"]["id"] else ())]


def _doubts_of_sizes(card: Mapping[str, Any]) -> Iterator[str]:
    values = [card["objective_before"], card["objective_at_end"]]
    total, largest = card["influence_sum"], card["influence_largest"]
    if None not in (*values, total, largest):
        before, at_end = values
        most = _FACTOR * max(abs(before), abs(at_end), abs(before - at_end))
        was = f"which was {before:.3g} before the window and is {at_end:.3g} after it"
        if abs(largest) > most:
            yield f"one sample alone is to change the objective by {largest:.3g}, {was}"
        elif abs(total) > most:
            yield f"the influences add up to {total:.3g}, far more than the objective could change, {was}"
    if card["doubtful_batches"]:
        yield f"differences along a move cannot be trusted in {card['doubtful_batches']} batches"
    if card["worth_epochs"] is not None:
        yield _exploded(card["adjoint_growth"], card["worth_epochs"])


def _exploded(growth: Mapping[str, list[Any]], worth: int) -> str:
    factor, epoch = max(pair for pair in zip(growth["factor"], growth["epoch"], strict=True) if pair[0] is not None)
    words = f"training is chaotic: on the way back to epoch {epoch} the derivative grows by a factor of {factor:.2g}"
    if not worth:
        return f"{words}, so that not even the last epoch is worth retracing"
    return f"{words}; a window is worth retracing from epoch {growth['epoch'][-worth]} on: epochs={worth}"


def _doubts_of_runs(card: Mapping[str, Any]) -> Iterator[str]:
    tau, low = card["kendall_tau"], low_tau(card["num_verified"])
    if tau is not None and tau < low:
        yield f"tau is below {low} among {card['num_verified']} samples really left out"
    ratio = _size_ratio(card)
    if ratio > _FACTOR:
        yield f"the influences are {ratio:.0f} times as large as what leaving the samples out really does"
    elif ratio * _FACTOR < 1:
        yield f"leaving the samples out really does {1 / ratio:.0f} times as much as their influences say"
    for name, key in (("all of them", "together"), ("the worst", "worst_together")):
        if card[key] is not None and _is_far_off(card[key], card):
            yield f"{name} together {_sum(card[key])}"
    if card["num_diverged"]:
        yield "where training diverges, no derivative says so"
    noise, largest = card["noise_floor"], card["influence_largest"]
    if noise is None:
        yield "rounding alone makes training diverge, so that no order of its samples means anything"
    elif 2 * card["num_within_noise"] > card["num_verified"]:
        yield "most differences are within the noise, so that no order of them can be told right or wrong"
    elif largest is not None and abs(largest) <= 2 * noise:
        yield f"the largest influence ({largest:.1g}) is within what rounding alone does ({noise:.1g})"


def _verified(card: Mapping[str, Any]) -> list[tuple[Any, float, float]]:
    """Id, predicted and real difference of each sample that was left out and had one."""
    columns = (card["samples"][name] for name in ("id", "predicted", "real"))
    return [(name, predicted, real) for name, predicted, real in zip(*columns, strict=True) if real is not None]


def _size_ratio(card: Mapping[str, Any]) -> float:
    """Length of the predicted differences over that of the real ones, what rounding does counted; 1: not known."""
    rows, noise = _verified(card), card["noise_floor"]
    if not rows or noise is None:
        return 1.0
    predicted, real = (math.hypot(*(row[at] for row in rows)) for at in (1, 2))
    floor = 2 * noise * math.sqrt(len(rows))
    lengths = max(predicted, floor), max(real, floor)
    return lengths[0] / lengths[1] if all(lengths) else 1.0


def _wrong_sizes(card: Mapping[str, Any]) -> Iterator[str]:
    """A sample whose influence is wrong by a factor of ten where that matters.

    It matters where the larger of both is beyond the noise, and at least half of the largest real difference: near
    zero, a factor moves no sample far.
    """
    rows, noise = _verified(card), card["noise_floor"]
    most = max((abs(real) for _, _, real in rows), default=0.0)
    wrong = []
    for name, predicted, real in rows if noise is not None else ():
        smaller, larger = sorted((abs(predicted), abs(real)))
        if larger > _FACTOR * max(smaller, 2 * noise) and larger >= _LARGE * most:
            wrong.append((larger, name, predicted, real))
    if wrong:
        _, name, predicted, real = max(wrong, key=lambda row: row[0])
        some = "1 influence is" if len(wrong) == 1 else f"{len(wrong)} influences are"
        example = f"sample {name}: predicted {predicted:.3g}, really {real:.3g}"
        yield f"{some} wrong by a factor of {_FACTOR:.0f} or more ({example})"


def _is_far_off(together: Mapping[str, Any], card: Mapping[str, Any]) -> bool:
    """Whether a sum is off by ten times and more, and by more than its samples did one by one: it may cancel out."""
    predicted, real, noise = together["predicted"], together["real"], card["noise_floor"]
    if real is None or noise is None:
        return False
    one_by_one = sum(abs(one) for _, _, one in _verified(card))
    return bool(abs(predicted - real) > max(_FACTOR * max(abs(real), 2 * noise), one_by_one))


def verdict(card: Mapping[str, Any]) -> str:
    """One plain sentence: whether samples that were really left out agree with the ranking, or why not to trust it."""
    num, tau = card["num_verified"], card["kendall_tau"]
    if _against_the_order(card):
        return f"Do not trust the order: {'; '.join(card['doubts'])}."
    if card["failure"]:
        return f"No sample could be left out for real, so the order is untested: {card['failure']}"
    if not num:
        return "No sample was left out for real to test the order (verify=0)."
    if tau is None:
        return f"Leaving out {num} samples for real gave no order to compare the ranking with."
    pairs = f", {card['pairs_in_order']} of {card['pairs']} pairs in order"
    rough = "; of so few samples, a rough check" if num < _FEW else ""
    but = "".join(f"; but {doubt}" for doubt in card["doubts"])
    return f"Leaving out {num} samples for real agreed with the ranking: tau {tau:.2f}{pairs}{rough}{but}."


def in_words(card: Mapping[str, Any]) -> str:
    """The verdict, then what was run, how far the order and the sums agree, and the noise."""
    details = "; ".join(_parts(card))
    return f"{card['verdict']} {details[:1].upper()}{details[1:]}".rstrip()


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
    is_known = random is not None and card["samples"]["stratum"].count("random") >= _FEW_RANDOM
    among = f" ({random:.2f} among the random ones)" if is_known else ""
    others = (("Spearman", card["spearman"]), ("Jaccard", card["jaccard"]))
    shown = others if card["num_verified"] >= _FEW else ()
    return ", ".join([f"tau {tau:.2f}{among}", *(f"{name} {value:.2f}" for name, value in shown if value is not None)])


def _sum(together: Mapping[str, Any]) -> str:
    predicted, real, error = together["predicted"], together["real"], together["error"]
    if real is None:
        return f"diverging, predicted {predicted:.3g}"
    words = f"{real:.3g}, predicted {predicted:.3g}"
    if error is None:
        return words
    return f"{words}, off by {error:.0%}" if error < _FACTOR else f"{words}, off by {error:.0f} times as much"


def if_finite(value: float) -> float | None:
    """The value, or None, since a summary has no other word for it."""
    return value if math.isfinite(value) else None
