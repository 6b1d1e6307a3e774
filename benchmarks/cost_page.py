# SPDX-License-Identifier: Apache-2.0
"""The page of what it costs, from what was measured."""

import textwrap

TARGETS = (  # words, bound, sign of "at most", figure of a row
    ('step of 3 ms (batch 4), "every", a core free', 1.10, 1, lambda row: row["record_small_free"]["ratio"]),
    ("no core free: on its thread", 1.10, 1, lambda row: on_its_thread(row["record_small"])),
    ("no core free: with what the writer holds up", 1.10, 1, lambda row: row["record_small"]["ratio"]),
    ('step of batch 64, "every", no core free', 1.10, 1, lambda row: row["record"]["ratio"]),
    ('step of batch 64, "sqrt", a core free', 1.03, 1, lambda row: row["record_sqrt_free"]["ratio"]),
    ("no core free: on its thread", 1.03, 1, lambda row: on_its_thread(row["record_sqrt"])),
    ("no core free: with what the writer holds up", 1.03, 1, lambda row: row["record_sqrt"]["ratio"]),
    ("exact, at most", 3.5, 1, lambda row: row["exact"]),
    ("gauss-newton, at most", 1.9, 1, lambda row: row["gauss-newton"]),
    ("finite, at most", 2.5, 1, lambda row: row["finite"]),
    ("the paper's way over exact, at least", 2, -1, lambda row: row["paper"] / row["exact"]),
    ("the paper's way over finite, at least", 3, -1, lambda row: row["paper"] / row["finite"]),
)
ENGINES = ("exact", "gauss-newton", "finite", "none")
RECORDED = {  # and whether a core is free meanwhile
    "record_small_free": "yes",
    "record_small": "no",
    "record": "no",
    "record_sqrt_free": "yes",
    "record_sqrt": "no",
}


def on_its_thread(one):
    """A recorded step over a bare one, as the training sees it where the writer finds a core free."""
    return 1 + one["added_ms"] / one["bare_ms"]


def _table(header, rows):
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *rows))


def _recorded(row, name):
    one = row[name]
    times = (
        f"{one['bare_ms']:.2f} ms",
        f"{one['added_ms']:.3f} ± {one['error_ms']:.3f} ms",
        f"{one['held_up_ms']:.3f} ms",
        f"{one['writing_ms']:.3f} ms",
    )
    return [
        row["optimizer"],
        str(one["batch"]),
        f'"{one["snapshots"]}"',
        RECORDED[name],
        *times,
        f"{one['ratio']:.3f}",
        f"{one['bytes']:,.0f}",
    ]


def _retraced(row):
    paper = f"{row['paper']:.2f}" if "paper" in row else "-"
    return [
        row["optimizer"],
        f"{row['training_step_ms']:.2f} ms",
        *(f"{row[name]:.2f}" for name in ENGINES),
        paper,
    ]


def _target(words, bound, sign, figure, rows):
    cells = []
    for row in rows:
        try:
            value = figure(row)
        except KeyError:
            cells.append("-")
            continue
        cells.append(f"{value:.3f}" + ("" if sign * value <= sign * bound else " **!**"))
    return [words, str(bound), *cells]


def markdown(result):
    """The whole page."""
    rows = result["rows"]
    plain = rows[0]
    parts = [
        "# What it costs",
        f"""Measured on the 2019 paper's MNIST CNN (two 5x5 convolutions of 20 channels, one linear layer:
        {result["num_params"]:,} parameters) inside `Trainer.fit`. Times are in units of one training
        step of the same run without the callback, from one batch's start to the next's.""",
        "    python benchmarks/cost.py --write-docs",
        f"""{result["machine"]}, Python {result["python"]}, torch {result["torch"]}, {result["threads"]} threads,
        pytorch-lightning {result["lightning"]}, {result["date"]}.""",
        "## Recording",
        _table(
            [
                "optimizer",
                "batch",
                "snapshots",
                "core free",
                "bare step",
                "on its thread",
                "held up",
                "writer's",
                "ratio",
                "bytes a step",
            ],
            [_recorded(row, name) for row in rows for name in RECORDED],
        ),
        """Of one fit every other step is recorded and compared with its neighbours, since a machine's speed changes
        from second to second by more than recording takes. *On its thread*: what a recorded step takes
        longer than a bare one, over blocks of 64 steps, from the second epoch on (in the first one a step is
        proved and rehearsed), with its standard error. *Held up*: by how much steps take longer, bare
        or recorded ones, while the thread that writes is at work. *Ratio*: a step with both over a bare step.
        *Core free*: whether training leaves a core to that thread, or computes on all of them itself.
        *Writer's*: processor time of that thread, for comparison.""",
        """On the training's own thread it is Python that runs once a step, by when the processor's caches hold
        nothing of it; that does not grow with the model. What does, with `"every"`, is the copy of the
        state and its way to the disk: with Adam three times the parameters.""",
        "## Retracing",
        _table(["optimizer", "training step", *ENGINES, "the paper's way"], map(_retraced, rows)),
        f"""*Exact*, *gauss-newton*, *finite*, *none*: one step walked backwards with that `curvature=`, batch 64,
        medians over interleaved fits of {result["retraced_steps"]} steps; fetching its batch, checking it against the
        record and scoring its samples are included. *The paper's way*: Algorithm 2 of Hara et al. as it
        stands, one backward a sample, then a Hessian product, on the same steps; it checks nothing, and
        reading the steps from disk is not counted.""",
        f"""Against the paper's way, exact is {plain["paper"] / plain["exact"]:.1f} times and finite {
            plain["paper"] / plain["finite"]:.1f} times as fast; its scores and those of `exact` differ by at most
        {plain["agreement_with_paper"]:.1e} of the largest.""",
        """Retracing has a floor of about two training steps. Adam's transpose needs the gradient's value, so
        `finite` makes a third pass there; with plain SGD it does without and checks the update in full
        every 32 steps. `gauss-newton` does so with Adam, too: it has the gradient from the recorded moments.""",
        "## Targets",
        _table(
            ["target", "bound", *(row["optimizer"] for row in rows)], [_target(*target, rows) for target in TARGETS]
        ),
        "A target that this run missed is marked with an exclamation mark.",
        """Disk: with `snapshots="every"` each step keeps parameters, optimizer state and buffers, and with any
        policy the random states that changed (torch's is 5 kB). Files are written on a thread of their
        own. Only what the window can still reach stays.""",
    ]
    return "\n\n".join(part if part[0] in "#|" or part.startswith("    ") else _filled(part) for part in parts) + "\n"


def _filled(text):
    return textwrap.fill(" ".join(text.split()), 112, break_on_hyphens=False)
