# SPDX-License-Identifier: Apache-2.0
"""Write the ids of the samples that are left when the most harmful ones of a run are dropped."""

import argparse
import sys
from pathlib import Path

from lightning_sgdclean.base.files import appearing_whole, pyarrow
from lightning_sgdclean.cli.look import whole_number
from lightning_sgdclean.cli.terminal import RUN_HELP, FinishedRun, read_run
from lightning_sgdclean.ranking.parquet import SUFFIX
from lightning_sgdclean.ranking.table import SampleId, write_rows

NAME = "clean"
HELP = "write the ids of the samples to keep"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("run_dir", metavar="RUN", help=RUN_HELP)
    parser.add_argument("--drop", type=whole_number, required=True, metavar="N", help="how many, by rank")
    parser.add_argument("-o", "--output", type=_table_file, required=True, metavar="FILE", help="a .csv or .parquet")
    parser.add_argument(
        "--of",
        type=whole_number,
        metavar="M",
        help="size of the data set, if the run's summary does not say: what was not drawn in the window is kept, too",
    )


def run(arguments: argparse.Namespace) -> int:
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
    print(f"{arguments.output}: {len(kept)} samples kept, the {arguments.drop} most harmful dropped")
    return 0


def _table_file(text: str) -> Path:
    if Path(text).suffix not in (".csv", SUFFIX):
        raise argparse.ArgumentTypeError(f"{text} ends neither in .csv nor in {SUFFIX}")
    return Path(text)


def _kept(found: FinishedRun, drop: int, size: int | None) -> list[SampleId]:
    """Ids in ascending order; with the data set's size, of all its positions that were not dropped."""
    ids = found.table.sample_id
    if size is None:
        return sorted(ids[drop:])
    outside = [name for name in ids if isinstance(name, str) or not 0 <= name < size]
    if outside:
        raise ValueError(f"Sample id {outside[0]!r} is no position in a data set of {size} samples.")
    dropped = set(ids[:drop])
    return [position for position in range(size) if position not in dropped]


def _write(path: Path, kept: list[SampleId]) -> None:
    if path.suffix != SUFFIX:
        write_rows(path, ["sample_id"], ([name] for name in kept))
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
