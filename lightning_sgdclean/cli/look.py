# SPDX-License-Identifier: Apache-2.0
"""The commands that look at finished runs: ``show``, ``report``, ``clean``, ``compare``."""

import argparse
import json
import math
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_sgdclean.base.errors import printable
from lightning_sgdclean.base.files import appearing_whole, without_nan
from lightning_sgdclean.base.options import SampleId
from lightning_sgdclean.base.resources import pyarrow
from lightning_sgdclean.base.summary import read_summary
from lightning_sgdclean.cli.terminal import FinishedRun, facts, read_run, table, wrapped
from lightning_sgdclean.ranking.columns import SUFFIX
from lightning_sgdclean.ranking.csv_files import write_rows, written

if TYPE_CHECKING:
    from lightning_sgdclean.ranking.comparison import Comparison


def show(arguments: argparse.Namespace) -> int:
    """Print."""
    found = read_run(arguments.run_dir)
    samples = found.records(0, arguments.top)
    if arguments.json:
        content = {"run": str(found.file.parent), "summary": found.summary, "samples": samples}
        print(json.dumps(without_nan(content), indent=2, allow_nan=False))
        return 0
    print(facts(_facts(found)))
    if samples:
        print()
        print(table(list(samples[0]), [list(sample.values()) for sample in samples]))
    return 0


def _facts(found: FinishedRun) -> list[tuple[str, str]]:
    num, harmful = len(found.table.sample_id), found.num_harmful
    helpful = int((found.table.influence > 0).sum())
    summary = found.summary
    pairs: list[tuple[str, Callable[[], str]]] = [
        ("objective", lambda: _objective(summary["objective"])),
        ("window", lambda: summary["window"]["words"]),
        ("end point", lambda: summary["end_point"]),
        ("replay", lambda: summary["replay"]["words"]),
    ]
    lines = [("run", str(found.file.parent))]
    for name, value in pairs:
        try:
            lines.append((name, value()))
        except (KeyError, TypeError):  # another version's summary, or none
            continue
    return [*lines, ("samples", f"{num}: {harmful} harmful, {helpful} helpful")]


def _objective(objective: dict[str, Any]) -> str:
    return f"{objective['name']} = {objective['recomputed']:.6g}, should be {_WANTED[objective['mode']]}"


_WANTED = {"min": "low", "max": "high"}
_DATA = re.compile(r'<script type="application/json" id="data">(.*?)</script>', re.DOTALL)
_IN_WORDS = {
    "picture": "pictures",
    "text": "texts",
    "features": "values",
    "label": "labels",
    "prediction": "predictions",
    "loss": "losses",
}


def report(arguments: argparse.Namespace) -> int:
    """Write."""
    if not arguments.run_dir.is_dir():
        raise FileNotFoundError(f"There is no run directory at {arguments.run_dir}.")
    from lightning_sgdclean.report.page import PAGE_NAME, write_report

    dataset = _dataset(arguments)
    if dataset is not None:
        _check_ids(arguments.run_dir)
    before = _shown_on(arguments.run_dir / PAGE_NAME)
    page = write_report(arguments.run_dir, dataset)
    lost = before - _shown_on(page)
    if lost:
        *most, last = [words for name, words in _IN_WORDS.items() if name in lost]
        print(
            f"note: the page that was here also showed {', '.join(most)}{' and ' if most else ''}{last} of samples. "
            "--config or --dataset brings samples back; predictions and losses are those of columns= of the run.",
            file=sys.stderr,
        )
    print(printable(str(page)))
    return 0


def _check_ids(run_dir: Path) -> None:
    """Names lead to samples only by a mapping, for which there is no word on a command line."""
    if read_summary(run_dir).get("dataset_size", 0) is None:
        raise ValueError(
            "The run's sample ids are names, not positions in its dataset. In Python: lightning_sgdclean.write_report("
            f"{str(run_dir)!r}, dataset, positions={{id: position, ...}}). Or call this without --dataset and --config."
        )


def _shown_on(page: Path) -> set[str]:
    """What a page shows of samples, as keys of the words above; nothing where it cannot be read."""
    try:
        found = _DATA.search(page.read_text(encoding="utf-8", errors="replace"))
        samples = json.loads(found[1])["samples"].values() if found else []
        return {name for sample in samples for name in sample} & set(_IN_WORDS)
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return set()


def _dataset(arguments: argparse.Namespace) -> Any:
    if arguments.dataset is None and arguments.config is None:
        return None
    from lightning_sgdclean.base.lightning import without_chatter
    from lightning_sgdclean.cli.configured import ConfiguredTraining, imported

    if arguments.config is not None:
        with without_chatter():
            return ConfiguredTraining(arguments.config, arguments.model, arguments.data).dataset()
    found = imported(arguments.dataset)
    return found() if callable(found) and not hasattr(found, "__getitem__") else found


def clean(arguments: argparse.Namespace) -> int:
    """Write."""
    found = read_run(arguments.run_dir)
    if arguments.output.resolve() == found.file.resolve():
        raise ValueError(f"{arguments.output} is the ranking itself; give another file.")
    num = len(found.table.sample_id)
    if arguments.drop > num:
        raise ValueError(f"Cannot drop {arguments.drop} samples: the ranking holds {num}.")
    size = found.summary.get("dataset_size") if arguments.of is None else arguments.of
    kept = _kept(found, arguments.drop, size)
    _write(arguments.output, kept)
    _notes(found, arguments.drop, size)
    print(f"{printable(str(arguments.output))}: {len(kept)} samples kept, the {arguments.drop} most harmful dropped")
    return 0


def _kept(found: FinishedRun, drop: int, size: int | None) -> list[SampleId]:
    """Ids in ascending order; with the data set's size, of all its positions that were not dropped."""
    ids = found.table.sample_id
    if size is None:
        return sorted(ids[drop:].tolist())
    outside = [name for name in ids.tolist() if isinstance(name, str) or not 0 <= name < size]
    if outside:
        raise ValueError(f"Sample id {outside[0]!r} is no position in a data set of {size} samples.")
    dropped = set(ids[:drop].tolist())
    return [position for position in range(size) if position not in dropped]


def _write(path: Path, kept: list[SampleId]) -> None:
    if path.suffix != SUFFIX:
        write_rows(path, ["sample_id"], ([written(name)] for name in kept))
        return
    pa, parquet = pyarrow()
    kind = pa.string() if kept and isinstance(kept[0], str) else pa.int64()
    path.parent.mkdir(parents=True, exist_ok=True)
    with appearing_whole(path) as temporary:
        parquet.write_table(pa.table({"sample_id": pa.array(kept, kind)}), temporary)


def _notes(found: FinishedRun, drop: int, size: int | None) -> None:
    """What the caller may not have meant."""
    if drop > found.num_harmful:
        print(f"note: only {found.num_harmful} of the {drop} dropped samples are ranked as harmful", file=sys.stderr)
    if size is None:
        print("note: samples that were not drawn in the run's window are not in the file (see --of)", file=sys.stderr)


_COLUMNS = ("sample_id", "worst_share", "mean_influence", "mean_rank", "noise", "num_runs")


def compare(arguments: argparse.Namespace) -> int:
    """Compare, and print."""
    from lightning_sgdclean.ranking.compare import compare as compare_runs

    found = compare_runs([arguments.first, *arguments.others], worst=arguments.worst)
    if arguments.output is not None:
        found.save(arguments.output)
    rows = _compared_rows(found, arguments.top)
    if arguments.json:
        print(json.dumps(_as_json(found, rows), indent=2))
        return 0
    print(wrapped(str(found)))
    if rows:
        print()
        print(table(_COLUMNS, rows))
    return 0


def _compared_rows(found: "Comparison", top: int) -> list[list[Any]]:
    columns = (getattr(found, name)[:top].tolist() for name in _COLUMNS)
    return [list(row) for row in zip(*columns, strict=True)]


def _as_json(found: "Comparison", rows: list[list[Any]]) -> dict[str, Any]:
    samples = [dict(zip(_COLUMNS, map(_known, row), strict=True)) for row in rows]
    agreement = {
        name: [[_known(value) for value in row] for row in values.tolist()] for name, values in found.agreement.items()
    }
    return {"runs": list(found.names), "agreement": agreement, "samples": samples}


def _known(value: Any) -> Any:
    """JSON has no NaN."""
    return None if isinstance(value, float) and math.isnan(value) else value
