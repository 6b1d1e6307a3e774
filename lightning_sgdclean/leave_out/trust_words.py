# SPDX-License-Identifier: Apache-2.0
"""What really leaving samples out says of a ranking, in words, and what in it speaks against trusting the ranking."""

from collections.abc import Iterator, Mapping
from typing import Any

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
