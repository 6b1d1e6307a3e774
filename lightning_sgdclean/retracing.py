# SPDX-License-Identifier: Apache-2.0
"""From a recorded run to a ranking: where its fit has just ended, or with :func:`retrace` on another day."""

import inspect
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from lightning_sgdclean.adjoint.adjoints import Adjoint, adjoint_of
from lightning_sgdclean.adjoint.backward import retrace_steps
from lightning_sgdclean.adjoint.curvature import Finite
from lightning_sgdclean.adjoint.gauss_newton import GaussNewton
from lightning_sgdclean.adjoint.objective import ObjectiveGradient, objectives_at
from lightning_sgdclean.adjoint.objective_check import check_at_end, compare_with_logged
from lightning_sgdclean.adjoint.rounding import float32_agreement
from lightning_sgdclean.adjoint.walk import Bookmark, Influences, Walk, key_of, walk_of
from lightning_sgdclean.base.errors import warn_of
from lightning_sgdclean.base.lightning import shown_bar
from lightning_sgdclean.base.options import THE_RUNS, Options
from lightning_sgdclean.base.resources import versions
from lightning_sgdclean.leave_out.trust import card_of, put_to_the_test, sizes_of
from lightning_sgdclean.leave_out.verdict import Sizes
from lightning_sgdclean.losses.precision import is_low
from lightning_sgdclean.losses.surroundings import Surroundings
from lightning_sgdclean.ranking.ranking import Ranking
from lightning_sgdclean.replay.inspection import predicted_labels, sample_columns
from lightning_sgdclean.replay.open import reopened
from lightning_sgdclean.replay.replay import OpenedRun, RecordedRun
from lightning_sgdclean.replay.sample_order import prove_ids
from lightning_sgdclean.report.words import replay_in_words, retrace_bar, runs_bar
from lightning_sgdclean.trajectory.records import MicroBatch, Step, window_in_words
from lightning_sgdclean.trajectory.store import options_for


def retrace(
    run_dir: str | Path,
    model: Any,
    *,
    train_dataloaders: Any = None,
    val_dataloaders: Any = None,
    datamodule: Any = None,
    monitor: str = THE_RUNS,
    mode: Literal["min", "max"] = THE_RUNS,
    objective: dict[str, Callable[[Any, Any], Any]] | Callable[[Any, Any], Any] | None = THE_RUNS,
    limit_val_batches: float | None = None,
    epochs: int | Literal["all"] = THE_RUNS,
    at: Literal["last", "best"] = THE_RUNS,
    curvature: Literal["exact", "gauss-newton", "finite", "none"] = THE_RUNS,
    finite_radius: float = THE_RUNS,
    sample_losses: Callable[[Any, Any], Tensor] | None = THE_RUNS,
    weighted_loss: Callable[[Any, Any, Tensor], Tensor] | None = THE_RUNS,
    on_mismatch: Literal["raise", "warn"] = THE_RUNS,
    tolerance: float | None = THE_RUNS,
    retrace_precision: Literal["auto", "run", "float32"] = THE_RUNS,
    verify: int | Literal["auto"] = THE_RUNS,
    rerank: int = THE_RUNS,
    columns: Sequence[Literal["label", "prediction", "loss", "source", "by_epoch", "relabel"]] = THE_RUNS,
    trainer: Any = None,
) -> Ranking:
    """Rank the samples of a run from its recorded trajectory: another objective, window or engine, no training.

    Where it is killed, the next call with the same arguments goes on from about there, to the same bits.

    Args:
        run_dir: The run directory, with its ``trajectory``.
        model: The LightningModule, made as for the run. Its trained weights do not matter and are left as they are;
            weights that the run did not train have to be those of the run.
        train_dataloaders: The training data, as ``fit`` got them.
        val_dataloaders: The data that the objective is the mean over. Where its value is not the one that the fit
            logged, a warning tells.
        datamodule: Instead of the two.
        monitor: Name of the value that ``validation_step`` logs. This option and those below are described in full at
            :class:`SGDInfluence`. Those that are not given are the run's; of an older run without options, the
            callback's defaults. A callable that the run had has to be given again.
        mode: Whether the value should be low (``"min"``) or high (``"max"``).
        objective: A callable, or several by name, instead of ``monitor``.
        limit_val_batches: How many validation batches of each loader count, or as a float which share; by default as
            many as the fit took.
        epochs: How many of the last epochs to retrace, or ``"all"``; no more than were kept.
        at: End point, ``"last"`` or ``"best"``; the latter needs a run that was recorded with it.
        curvature: Engine: ``"exact"``, ``"gauss-newton"``, ``"finite"`` or ``"none"``.
        finite_radius: Radius of ``"finite"``, relative to the parameters' length.
        sample_losses: Callable to the samples' losses, where these cannot be found.
        weighted_loss: Callable to the loss with weights on its samples, where it is no mean over them.
        on_mismatch: Whether a replay that differs from the record is an error (``"raise"``) or a warning.
        tolerance: Largest relative difference of a loss.
        retrace_precision: Precision of the derivatives of a run in 16 bits.
        verify: How many samples to really leave out; they get a column ``real``. ``"auto"``: 4, and up to 32 as a tenth
            of the time of the retrace allows, without a column; 0: none.
        rerank: How many of the worst samples to rank by what leaving them out really does.
        columns: Further columns.
        trainer: The Trainer to retrace under; it takes no step, and is afterwards as it was. By default a quiet one
            with the precision and the kind of device that the run had.

    Returns:
        The ranking, with its ``summary``, which says under ``unlike_the_run`` which options are not the run's; nothing
        is written. Where the fit of the run did not come to its end, a
        warning says so, and ``summary["window"]["partial"]`` is true.

    Raises:
        ValueError: If an option is wrong, or one that the run had as a callable is not given.
        RunDirectoryError: If the directory holds no whole trajectory, or that of another model or optimizer.
        SGDInfluenceError: One of its other subclasses, as from ``fit``.
    """
    given = {**locals(), "val_dataloaders": None}  # those given here are the run's
    options, others = options_for(run_dir, given)
    ranking, about, complaints = reopened(
        run_dir,
        model,
        options,
        lambda this: rank(this, bar=None if trainer is None else shown_bar(trainer)),
        train_dataloaders=train_dataloaders,
        val_dataloaders=val_dataloaders,
        datamodule=datamodule,
        limit_val_batches=limit_val_batches,
        trainer=trainer,
    )
    warn_of(complaints)
    return replace(ranking, summary=about | ({"unlike_the_run": others} if others else {}))


def call_of(run_dir: Path | None, options: Options) -> str:
    """The call of :func:`retrace` that ranks a run as its fit would have; ``...`` stands for what the fit was given."""
    taken = inspect.signature(retrace).parameters
    others = [one for one in fields(options) if one.name in taken and one.name != "val_dataloaders"]
    given = {one.name: getattr(options, one.name) for one in others}
    differing = [f"{one.name}={_as_written(given[one.name])}" for one in others if given[one.name] != one.default]
    arguments = [repr(str(run_dir)), "model", "train_dataloaders=...", "val_dataloaders=...", *differing]
    return f"lightning_sgdclean.retrace({', '.join(arguments)})"


def _as_written(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{name!r}: ..." for name in value) + "}"
    return "..." if callable(value) else repr(value)


def rank(this: OpenedRun, *, bar: Any, seconds: float | None = None) -> tuple[Ranking, dict[str, Any], list[str]]:
    """Rank the samples of an opened run, under a bar in the style of ``bar``.

    Args:
        this: The run.
        bar: The Trainer's progress bar, or None to show none.
        seconds: How long the fit took; None where that is not known. The walk's own time stands for it then.

    Returns:
        The ranking, the summary's entries about it, and complaints to warn of.
    """
    replay, steps, run, options = this.replay, this.steps, this.run, this.options
    walk = walk_of(replay, run.optimizer, options, steps)

    manners: dict[Any, int] = {}  # of validation batches

    def objectives_within(surroundings: Surroundings) -> list[ObjectiveGradient]:
        return objectives_at(this.end_point, replay, this.validation, options, surroundings, manners)

    objectives = objectives_within(replay.surroundings)
    rates, of_rates = this.rates()
    complaints = [f"{text} So only what was kept is ranked." for text in this.complaints]
    complaints = [*this.partial_in_words(), *of_rates, *complaints]
    complaints += compare_with_logged(objectives[0], this)
    complaints += [*check_at_end(this, manners), *_of_clipping(steps)]
    named = options.sample_ids is not None
    complaints += prove_ids(replay, steps, loader_of=this.loader_of, prepare=this.prepare, has_names=named)

    def start(walk: Walk) -> list[Adjoint]:
        """The objectives' gradients, in the precision that the walk takes derivatives in."""
        with walk.pulling() as wide:
            at_end = objectives if wide is replay.surroundings else objectives_within(wide)
        sign = 1.0 if options.mode == "min" else -1.0
        return [adjoint_of(one, replay.params, sign, this.averages) for one in at_end]

    with replay.surroundings.as_stage("train"), retrace_bar(bar, len(steps)) as advance:
        agreement = None
        if is_low(replay.surroundings, replay.module) and not walk.widens:
            agreement = float32_agreement(this.states, steps, walk, start)
            if agreement.is_noise:
                complaints.append(agreement.complaint(replay.surroundings.precision))
        if "relabel" in options.columns:
            drawn = (name for step in steps for micro in step.micro for name in micro.ids)
            labels_of, problems = predicted_labels(this, drawn)
            walk = replace(walk, labels_of=labels_of)
            complaints += problems
        adjoints = start(walk)
        norm_at_end, began = (adjoints[0].entering or adjoints[0]).norm, time.perf_counter()
        with Bookmark(this.trajectory.folder, _key(this, walk, adjoints)) as bookmark:
            found = retrace_steps(this.states, steps, adjoints, walk, lambda found: advance(found.values[0]), bookmark)
        seconds = time.perf_counter() - began if seconds is None else seconds
        columns, gaps = sample_columns(this, found.ids, options.columns)
    about = _about(objectives, this)
    about["derivative"], about["finite"] = _derivative(walk), _finite(walk)
    complaints += [*filter(None, [walk.update.caveat]), *found.complaints()]
    complaints += walk.checks.complaints() if walk.checks else []
    complaints += walk.engine.complaints() if isinstance(walk.engine, Finite | GaussNewton) else []
    about |= {"rates": rates, "float32_agreement": agreement and asdict(agreement)}
    ranking = Ranking.from_influence(found.ids, found.values[0], found.visits, _columns(found, walk, options) | columns)
    num_doubtful = walk.engine.num_doubtful if isinstance(walk.engine, Finite) else 0
    sizes = sizes_of(ranking, objectives[0].value, found.norms, norm_at_end, num_doubtful)
    ranking, about["trust"], doubts = _tested(this, ranking, sizes, _SHARE * seconds, bar)
    return ranking, _of_ranking(ranking) | about, [*replay.fidelity.complaints[:3], *complaints, *gaps, *doubts]


_SHARE = 0.1  # of the fit's time, for verify="auto"


def _tested(
    this: OpenedRun, ranking: Ranking, sizes: Sizes, seconds: float, bar: Any
) -> tuple[Ranking, dict[str, Any] | None, list[str]]:
    """The ranking put to the test, if that is wanted; what came of it, and why it could not be."""
    if not len(ranking):
        return ranking, None, []
    verify, rerank = this.options.verify, this.options.rerank
    try:
        with runs_bar(bar if verify or rerank else None) as progress:
            return *put_to_the_test(this, ranking, sizes, seconds, progress), []
    except (Exception, KeyboardInterrupt) as error:  # the ranking is there, and right: nothing here may cost it
        cause = "it was interrupted." if isinstance(error, KeyboardInterrupt) else f"{type(error).__name__}: {error}"
        text = f"The ranking is there, but could not be put to the test (verify=, rerank=): {cause}"
        # What nobody asked for warns nobody; the summary says it.
        was_asked = rerank or verify not in ("auto", 0)
        return ranking, card_of(verify, sizes, failure=cause), [text] if was_asked else []


def _key(this: OpenedRun, walk: Walk, adjoints: list[Adjoint]) -> str:
    """What tells this walk from others over the same run."""
    options = this.options
    matters = {
        "curvature": [options.curvature, options.finite_radius],
        "widens": walk.widens,
        "sample_losses": options.sample_losses,
        "weighted_loss": options.weighted_loss,
        "relabel": "relabel" in options.columns,
        # A bookmark made under "warn" must not be resumed under "raise".
        "refuses": [options.on_mismatch, walk.replay.fidelity.tolerance],
    }
    return key_of(this.trajectory.run, [step.index for step in this.steps], matters, adjoints)


def _columns(found: Influences, walk: Walk, options: Options) -> dict[str, Any]:
    """Influences on the further objectives, and what each epoch and another label did, where that was asked for."""
    wanted, others = options.columns, list(options.objectives)[1:]
    columns: dict[str, Any] = {
        f"influence:{name}": values for name, values in zip(others, found.values[1:], strict=True)
    }
    by_epoch = {f"by_epoch:{epoch}": values for epoch, values in found.by_epoch.items()}
    columns |= by_epoch if "by_epoch" in wanted else {}
    changes = [None] * len(found.ids) if walk.labels_of is None else found.relabelled
    return columns | ({"relabel": changes} if "relabel" in wanted else {})


def _of_clipping(steps: list[Step]) -> list[str]:
    """That gradients were clipped at values that changed, if so."""
    values = list(dict.fromkeys(step.clip for step in steps if step.is_update))
    if len(values) < 2:
        return []
    return [
        f"Gradients were clipped at {len(values)} different values. They count as constants: what a sample does "
        "through a value that follows losses or gradients is left out."
    ]


def _derivative(walk: Walk) -> dict[str, Any]:
    """What came of holding the engine's derivative against the training's own gradient."""
    checks = walk.checks
    assert checks is not None
    return {
        "words": checks.words,
        "steps": checks.num_checked,
        "unknown": len(checks.unknown),
        "largest": checks.largest,
    }


def _finite(walk: Walk) -> dict[str, Any] | None:
    """How far differences along a move could be trusted; None for another engine."""
    engine = walk.engine
    if not isinstance(engine, Finite):
        return None
    return {"batches": engine.num_pulled, "by_exact": engine.num_replaced, "doubtful": engine.num_doubtful}


def _of_ranking(ranking: Ranking) -> dict[str, Any]:
    return {
        "format": 1,
        "versions": versions(),
        "id_type": "int" if ranking.sample_id.dtype != object else "str",
        "num_samples": len(ranking),
        "num_harmful": int((ranking.influence < 0).sum()),
    }


def _about(objectives: list[ObjectiveGradient], this: OpenedRun) -> dict[str, Any]:
    run, options, steps, fidelity = this.run, this.options, this.steps, this.replay.fidelity
    last = steps[-1]
    names = list(options.objectives)
    window = window_in_words(steps[0], last, sum(step.epoch == last.epoch for step in steps))
    return {
        "optimizer": this.trajectory.trained["optimizer"],
        "precision": this.trajectory.trained["precision"],
        "engine": options.curvature,
        "options": {name: getattr(options, name) for name in ("epochs", "finite_radius", "tolerance")},
        "objective": {
            "name": names[0],
            "mode": options.mode,
            "recomputed": objectives[0].value,
            "logged": run.ending.logged_at(options.monitor, last.index + 1),
            "others": {name: one.value for name, one in zip(names[1:], objectives[1:], strict=True)},
        },
        "end_point": _end_point_in_words(last, this),
        "dataset_size": _dataset_size([micro for step in steps for micro in step.micro], run),
        "window": {
            "words": f"{window}; the fit did not come to its end" if this.is_partial else window,
            "partial": this.is_partial,
            "first_step": steps[0].index,
            "last_step": last.index,
            "num_steps": sum(step.is_update for step in steps),
            "num_without_update": sum(not step.is_update for step in steps),
        },
        "replay": {
            "words": replay_in_words(fidelity),
            "loss_error": fidelity.loss,
            "update_error": fidelity.update,
            "batches": fidelity.num_batches,
            "batches_bit_for_bit": fidelity.num_bitwise,
            "segments": fidelity.num_segments,
            "segments_bit_for_bit": fidelity.segments_bitwise,
            "complaints": fidelity.complaints,
        },
    }


def _dataset_size(batches: list[MicroBatch], run: RecordedRun) -> int | None:
    """How many positions the ids could be of; None where they are names."""
    dataset: Any = getattr(run.loaders[batches[-1].loader], "dataset", None)  # any iterable may be a loader
    # A name may equal a position by chance, hence all batches are asked.
    are_positions = all(micro.ids == micro.positions for micro in batches)
    return len(dataset) if are_positions and hasattr(dataset, "__len__") else None


def _end_point_in_words(last: Step, this: OpenedRun) -> str:
    """Which weights the objective is of, e.g. ``after step 811, weights averaged by EMAWeightAveraging``."""
    if this.averages is not None:
        return f"after step {last.index}, weights averaged by {this.averages.by}"
    where = "the last" if this.options.at == "last" else "at which the best model was saved"
    missed = f"; the averaged weights of {this.unfollowed} are not what is ranked" if this.unfollowed else ""
    return f"after step {last.index}, {where}{missed}"
