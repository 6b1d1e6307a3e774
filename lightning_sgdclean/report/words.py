# SPDX-License-Identifier: Apache-2.0
"""How far a ranking can be trusted, in words."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lightning_sgdclean.ranking.ranking import Ranking
from lightning_sgdclean.replay.fidelity import Fidelity

_ENGINES = {
    "exact": "exact derivative of the recorded steps, by a double backward pass",
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
    makers = (_replay, _window, _end_point, _objective, _engine, _noise, _kept, _measured)
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
    return [TrustLine("Window", words if window.get("first_step") else window["words"])]


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
    worst = ", ".join(map(str, ranking.harmful(10))) or "none"
    lines = [
        f"SGD influence on {summary['objective']['name']} (negative: the objective would be lower without the sample)",
        f"  files    {folder}",
        f"  window   {summary['window']['words']}; {len(ranking)} samples, engine {summary['engine']}",
        f"  replay   {summary['replay']['words']}",
        f"  worst    {worst}",
    ]
    if summary.get("trust"):
        lines.insert(-1, f"  trust    {summary['trust']['words']}")
    if (folder / "report.html").is_file():
        lines.insert(2, f"  page     {folder / 'report.html'}")
    return "\n".join(lines)
