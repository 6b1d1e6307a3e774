# SPDX-License-Identifier: Apache-2.0
"""What docs/limits.md and docs/reliability.md say of the check of the derivative, from what was measured."""

import textwrap

BINS = (1e-5, 1e-4, 1e-3, 1e-2, 0.1)
WORDS = ("below 1e-5", "1e-5 to 1e-4", "1e-4 to 1e-3", "1e-3 to 1e-2", "1e-2 to 0.1", "above 0.1")
WRONG = 1e-4  # of the largest influence: what is off by more counts as wrong
ITS_OWN = {"derivative", "objective", "untold"}  # what the check itself refuses or warns of
CAUGHT = {"derivative", "objective", "record"}
SAME = ", by the same operations"
KINDS = {  # of faults: which trials, the first that fits
    "in 32 or 16 bits": lambda row: row["precision"] != "64-true",
    "rounded outside of torch": lambda row: "float32" in row["fault"] or "digits" in row["fault"],
    "in a term beside larger ones, Adam": lambda row: "beside one" in row["fault"],
    "in odd micro-batches, or behind two validation batches": lambda row: (
        "micro" in row["begins"] or "behind" in row["fault"]
    ),
    "in one batch, by the same operations": lambda row: row["begins"] == f"in one batch{SAME}",
    "in one batch": lambda row: row["begins"] == "in one batch",
    "from an epoch on": lambda row: row["begins"].startswith("from"),
    "at once": lambda row: True,
}
ORDER = [*reversed(KINDS)]


def kind_of(row):
    return next(kind for kind, fits in KINDS.items() if fits(row))


def bin_of(row):
    """Number of the row's bin."""
    return sum(row["error"] >= bound for bound in BINS)


def is_caught(row):
    return bool(CAUGHT & {*row["said"]})


def faults(result):
    return [row for row in result["faulty"] if not row["is_right"]]


def silent(result):
    """Faults that make influences wrong and of which nothing was said."""
    return [row for row in faults(result) if row["error"] is not None and row["error"] >= WRONG and not row["said"]]


def right(result):
    """Trainings whose derivative is right, hooks that are followed among them."""
    hooks = [
        row | {"group": "hooks and Functions that are followed, in every strength", "name": row["fault"]}
        for row in result["faulty"]
        if row["is_right"]
    ]
    return result["right"] + hooks


def table(header, rows):
    return "\n".join(f"| {' | '.join(map(str, cells))} |" for cells in (header, ["---"] * len(header), *rows))


def power(result):
    def cell(rows):
        return f"{sum(map(is_caught, rows))} of {len(rows)}" if rows else "-"

    measured = [row for row in faults(result) if row["error"] is not None]
    rows = []
    for number, words in enumerate(WORDS):
        of_bin = [row for row in measured if bin_of(row) == number]
        rows.append([words, *(cell([row for row in of_bin if kind_of(row) == kind]) for kind in ORDER), cell(of_bin)])
    return table(["influences off by", *ORDER, "all"], rows)


def untold(result):
    num = sum(row["error"] is None for row in faults(result))
    return [f"Of {num} more there were no influences, or none that whole fits could be held against."] if num else []


def passed(result):
    """Each fault that passed, with its largest error."""
    worst = {}
    for row in silent(result):
        begins = "" if row["begins"] == "at once" else f", {row['begins']}"
        engine = "" if row["curvature"] == "exact" else ', "finite"'
        key = f"{row['fault']}{begins}{engine}"
        worst[key] = max(worst.get(key, 0.0), row["error"])
    return table(["passed in silence", "off by"], [[key, f"{error:.1e}"] for key, error in worst.items()])


def alarms(result):
    def numbers(rows):
        by_check = [row for row in rows if ITS_OWN & {*row["said"]}]
        by_others = [row for row in rows if not ITS_OWN & {*row["said"]} and "record" in row["said"]]
        errors = [row["error"] for row in rows if row.get("error") is not None]
        return [len(rows), len(by_check), len(by_others), f"{max(errors):.0e}" if errors else "-"]

    rows = right(result)
    groups = dict.fromkeys(row["group"] for row in rows)
    cells = [[group, *numbers([row for row in rows if row["group"] == group])] for group in groups]
    header = ["trainings whose derivative is right", "tried", "false alarms", "refused by another check", "off by"]
    return table(header, [*cells, ["all", *numbers(rows)]])


def alarmed(result):
    """Names of the trainings with a false alarm, by what was said."""
    names = {}
    for row in right(result):
        for about in row["said"]:
            names.setdefault(about, {}).setdefault(row["name"], set()).add(row["precision"])
    words = {
        "objective": "The objective's gradient was called wrong for",
        "derivative": "The step's gradient was called wrong for",
        "untold": "That nothing could be told was said of",
        "record": "As steps that differ from the record, by another check, were refused",
    }
    listed = {
        about: "; ".join(f"{name} ({', '.join(sorted(bits))})" for name, bits in names[about].items())
        for about in words
        if about in names
    }
    return [f"{words[about]}: {text}." for about, text in listed.items()]


def cost(result):
    header = ["network", "weights", "steps, checks", "a check, in retraced steps", "share side by side", "by the clock"]
    header += ["of 1,000 steps and as many epochs as give all checks", "checks that 3% allow there"]
    rows = [
        [
            name,
            f"{row['num_params']:,}",
            f"{row['num_steps']}, {row['num_checks']}",
            f"{row['check_in_steps']:.1f}",
            f"{row['share']:.1%}",
            f"{row['share_by_clock']:.1%}",
            f"{row['share_of_window']:.1%} ({row['checks_of_window']} checks)",
            row["checks_allowed"],
        ]
        for name, row in result["cost"].items()
    ]
    return table(header, rows)


def limits(result):
    """The section of docs/limits.md, under its title."""
    num = len(faults(result))
    met = all(row["share_of_window"] <= 0.03 for row in result["cost"].values())
    parts = [
        """The engine's derivative is held against difference quotients of the gradient that training really used, in
        float64: at the early step that is rehearsed, and in the retrace at the first and last steps of epochs and at
        those whose loss is made by operations not seen before, 3 and one more for each 1,024 steps of either kind at
        most. The objective's gradient is held against differences of its value on the first validation batch of each
        such kind, four at most.
        Parameters, running statistics and the samples' weights are moved at random, along the gradient and along the
        adjoint. So whatever edits or stops a gradient shows, if it shows in these steps and directions.""",
        "It cannot see:",
        bullets(
            """faults in steps that are not checked, if these are made by the same operations as others, or if there are
            more kinds of steps than checks""",
            """faults in the other batches of a step that accumulates several: one of them is checked, another one each
            time. Likewise, faults in a validation batch that is made by the same operations as an earlier one""",
            """what is off by less than about 1e-5 of the gradient's change in the directions tried. Where a term of the
            loss is many times as large as another and Adam makes steps alike of both, a fault in the small one hides
            behind the large one""",
            """what code rounds outside of torch. Numbers that leave torch by `item`, `tolist`, `numpy` or `float()` are
            moved by 1e-5 of their size, so that a float32 hides nothing. It does where a value is detached first, or
            taken under `no_grad`; and so does what is rounded more coarsely than that""",
            """what code of your own computes in float32, a kernel say: where it refuses float64, a warning says that
            nothing could be told""",
        ),
        f"""What it finds was tried on {num} small trainings with a fault, scaled from 1 down to 1e-4. They were ranked
        with `on_mismatch="warn"`; central differences of whole fits in float64 say how wrong the influences are, as a
        share of the largest (in 32 and 16 bits: those of the same training in 64). A cell says how many were refused or
        warned of by name, of how many that were tried. `"finite"` had a radius of 1e-4, so that its own error does not
        count.""",
        power(result),
        *untold(result),
        f"Those above 1e-4 that passed, each with its largest error ({len(silent(result))} trainings):",
        passed(result),
        """Right trainings of which the check says otherwise; *off by*: in 64 bits with `"exact"`, against central
        differences of whole fits.""",
        alarms(result),
        *alarmed(result),
        """What it costs, measured by retracing one recorded run with the check and without it, alternately, least CPU
        time of the rounds, one thread. A window of one epoch has two checks whatever its length.""",
        cost(result),
        f"The target of at most 3% of a window of 1,000 steps is {'met' if met else 'missed'}.",
        "    python benchmarks/gradcheck.py --write-docs",
        f"""{result["machine"]}, Python {result["python"]}, torch {result["torch"]}, pytorch-lightning {
            result["lightning"]
        }, one thread, {result["date"]}.""",
    ]
    return "\n\n".join(part if part[0] in "|-" or part.startswith("    ") else filled(part) for part in parts) + "\n"


def reliability(result):
    """The table of docs/reliability.md, under its title."""
    parts, rows = [], []
    of_right = right(result)
    refused = sum(bool((ITS_OWN | {"record"}) & {*row["said"]}) for row in of_right)
    rows.append(["none: their derivative is right", len(of_right), len(of_right) - refused, refused, 0])
    for kind in ORDER:
        of_kind = [row for row in faults(result) if kind_of(row) == kind and row["error"] is not None]
        caught, wrong = sum(map(is_caught, of_kind)), [row for row in of_kind if row["error"] >= WRONG]
        passed_by = sum(not is_caught(row) for row in wrong)
        rows.append([kind, len(of_kind), len(of_kind) - caught - passed_by, caught, passed_by])
    total = [sum(row[i] for row in rows) for i in range(1, 5)]
    parts.append(
        """Small trainings whose gradient, or whose objective's, is not the derivative of what it is called the gradient
        of; *wrong*: nothing was said, and influences are off by more than 1e-4 of the largest; *right*: nothing was
        said, and they are off by less. [Limits](limits.md#how-the-derivative-is-checked) says what was tried, and what
        passed."""
    )
    header = ["fault", "tried", "right", "refused or warned by name", "wrong"]
    return filled(parts[0]) + "\n\n" + table(header, [*rows, ["all", *total]]) + "\n"


def bullets(*items):
    """A list, each item of which is one sentence or more."""
    return "\n".join(filled(f"- {item}.", "  ") for item in items)


def filled(text, indent=""):
    return textwrap.fill(" ".join(text.split()), 118, break_on_hyphens=False, subsequent_indent=indent)
