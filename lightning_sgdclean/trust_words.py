# SPDX-License-Identifier: Apache-2.0
"""What really leaving samples out says of a ranking, in words, and what in it speaks against trusting the ranking."""

from collections.abc import Iterator, Mapping
from typing import Any

_LOW_TAU = 0.3  # an order by chance gets there about once in a hundred times, 32 samples given


def doubts(card: Mapping[str, Any]) -> list[str]:
    """What speaks against trusting the order, each in words; see ``docs/outputs.md`` for the keys of the card."""
    found = []
    tau = card["kendall_tau"]
    if tau is not None and tau < _LOW_TAU:
        found.append(f"the order is not to be trusted: tau is below {_LOW_TAU}")
    if 2 * card["num_within_noise"] > card["num_verified"]:
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
    if card["num_verified"]:
        yield f"{card['num_within_noise']} of {card['num_verified']} within noise"
    yield f"rounding alone {card['noise_floor']:.1g}"


def _order(card: Mapping[str, Any]) -> str:
    tau, random = card["kendall_tau"], card["kendall_tau_random"]
    if tau is None:
        return "no order to compare"
    among = "" if random is None else f" ({random:.2f} among the random ones)"
    others = (("Spearman", card["spearman"]), ("Jaccard", card["jaccard"]))
    return ", ".join([f"tau {tau:.2f}{among}", *(f"{name} {value:.2f}" for name, value in others if value is not None)])


def _sum(together: Mapping[str, Any]) -> str:
    words = f"{together['real']:.3g}, predicted {together['predicted']:.3g}"
    error = together["error"]
    if error is None:
        return words
    return f"{words}, off by {error:.0%}" if error < 10 else f"{words}, off by {error:.0f} times as much"
