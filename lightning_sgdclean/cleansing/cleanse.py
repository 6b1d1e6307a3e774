# SPDX-License-Identifier: Apache-2.0
"""`cleanse`: does a training gain from going without the samples that rank first?"""

import multiprocessing
import os
import pickle
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch

from lightning_sgdclean.base.errors import SGDInfluenceWarning
from lightning_sgdclean.base.lightning import without_chatter
from lightning_sgdclean.base.options import check_choice
from lightning_sgdclean.base.randomness import untouched_randomness
from lightning_sgdclean.cleansing.plan import CleansingPlan, Question, Settings, Trial, measured
from lightning_sgdclean.cleansing.result import Cleansing, judge
from lightning_sgdclean.cleansing.training import Build, run_trial, takes_without
from lightning_sgdclean.cleansing.trials import TrialStore, identity_of

Result: TypeAlias = dict[str, Any]
Followers: TypeAlias = Callable[[Trial, Result], Iterable[Trial]]


class TrialRuns:
    """Carries out trials, and those that follow from the result of each.

    Args:
        build: Makes a training from a seed.
        settings: Common to all.
        store: Where results are looked up and kept.
        followers: What is to be done after a trial; raises where its result does not do.
        say: Told of each trial that was carried out, with its result.
    """

    def __init__(
        self,
        build: Build,
        settings: Settings,
        store: TrialStore,
        followers: Followers,
        say: Callable[[Trial, Result], None],
    ) -> None:
        self._build, self._settings, self._store = build, settings, store
        self._followers, self._say = followers, say

    def in_turn(self, trials: Iterable[Trial]) -> dict[Trial, Result]:
        """One after another in this process, followers first."""
        results: dict[Trial, Result] = {}
        waiting = list(trials)
        while waiting:
            trial = waiting.pop(0)
            result = self._store.result(trial)
            if result is None:
                with _noting(trial):
                    result = _carry_out(self._build, trial, self._settings, self._store)
                self._say(trial, result)
            results[trial] = result
            waiting[:0] = self._followers(trial, result)
        return results

    def in_processes(self, trials: Iterable[Trial], processes: int) -> dict[Trial, Result]:
        """So many at a time, each in a process of its own that shares this one's threads with the others.

        Raises:
            ValueError: If ``build`` or the options cannot be sent to another process.
        """
        _check_can_be_sent(self._build, self._settings)
        results: dict[Trial, Result] = {}
        running: dict[Future[Result], Trial] = {}
        threads = max(1, torch.get_num_threads() // processes)
        context = multiprocessing.get_context("spawn")
        pool = ProcessPoolExecutor(processes, context, initializer=torch.set_num_threads, initargs=(threads,))

        def begin(trials: Iterable[Trial]) -> None:
            waiting = list(trials)
            while waiting:
                trial = waiting.pop(0)
                result = self._store.result(trial)
                if result is None:
                    job = pool.submit(_carry_out, self._build, trial, self._settings, self._store)
                    running[job] = trial
                else:
                    results[trial] = result
                    waiting[:0] = self._followers(trial, result)

        try:
            begin(trials)
            while running:
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    trial = running.pop(future)
                    with _noting(trial):
                        results[trial] = future.result()
                    self._say(trial, results[trial])
                    begin(self._followers(trial, results[trial]))
        finally:
            pool.shutdown(cancel_futures=True)
        return results


def _carry_out(build: Build, trial: Trial, settings: Settings, store: TrialStore) -> Result:
    """Keeps its own result, so that it is not lost when another training fails meanwhile."""
    with without_chatter():
        result = run_trial(build, trial, settings)
    store.save(trial, result)
    return result


@contextmanager
def _noting(trial: Trial) -> Iterator[None]:
    """Say which training an error comes from."""
    try:
        yield
    except Exception as error:
        if isinstance(error, BrokenProcessPool):
            error.add_note(
                "A process ended before its training did. Is there enough memory? And a script that starts processes "
                'needs its main part behind `if __name__ == "__main__":`.'
            )
        error.add_note(
            f"This was the training with {trial}. Those that were finished are kept: call again with the same dirpath= "
            "to go on."
        )
        raise


def _check_can_be_sent(*things: Any) -> None:
    try:
        pickle.dumps(things)
    except Exception as error:  # of any type, as the objects' own code likes
        raise ValueError(
            f"build and influence= must be picklable to run in processes: {error}. Expected functions and classes of a "
            "module; with processes=1 anything will do."
        ) from error


_SEED_VARIABLES = ("PL_GLOBAL_SEED", "PL_SEED_WORKERS")


def cleanse(
    build: Build,
    *,
    metric: str,
    mode: Literal["min", "max"] = "min",
    drop: Sequence[float] = (0.01, 0.02, 0.05, 0.1),
    seeds: int | Iterable[int] = 5,
    random_draws: int = 2,
    select: str | None = None,
    select_mode: Literal["min", "max"] | None = None,
    influence: Mapping[str, Any] | None = None,
    action: Literal["drop", "relabel"] = "drop",
    set_label: Callable[[Any, Any], Any] | None = None,
    on: Literal["test", "val"] = "test",
    ckpt_path: str | None = None,
    level: float = 0.95,
    dirpath: str | Path = "cleansing",
    processes: int = 1,
    verbose: bool = True,
) -> Cleansing:
    """Find out whether a training gains from going without the samples that rank first.

    For each seed: train on everything and rank; then train again from the same seed without the worst samples, several
    numbers of them, and without as many random ones. How many to remove is chosen on validation data; what that
    gains is measured on test data, which the ranking has not seen. See
    :func:`lightning_sgdclean.gains.judge`.

    Args:
        build: Callable ``(seed)`` that makes a fresh :class:`lightning_sgdclean.Training` each time, after
            ``seed_everything``. Its training loader is made to leave samples out; a callable ``(seed, without)`` is
            given their ids, and leaves them out itself.
        metric: Name of the value that the test logs.
        mode: Whether it should be low or high.
        drop: How many of the worst to remove: shares of the dataset below 1, or numbers.
        seeds: How many, from 0 on, or which ones; two at least.
        random_draws: Trainings without random samples for each seed and number.
        select: Name of a value that validation logs, by which the number is chosen; by default what the ranking is by.
        select_mode: Whether that should be low or high; to be given with ``select``, unless that is the metric or what
            the ranking is by.
        influence: Options of :class:`SGDInfluence`, if the Trainer that ``build`` makes has none among its callbacks.
        action: ``"relabel"`` gives samples the class that the ranked model predicts, instead of leaving them out.
        set_label: Callable ``(sample, label)`` to the sample with that label; by default
            :func:`lightning_sgdclean.relabelling.with_label`, which says what samples need none.
        on: ``"val"`` measures on validation data. Where they are those of the ranking, there is no verdict.
        ckpt_path: Weights that are measured: None for those after ``fit``, ``"best"`` for those of the checkpoint. Each
            training writes checkpoints to a folder of its own, whatever ``dirpath`` they were to have, which is removed
            once it is measured.
        level: Of the confidence intervals, which are over seeds.
        dirpath: Where trainings, table and figure go. What is finished there is not done again, so that a call that
            was interrupted goes on, and one with more seeds or numbers adds to it.
        processes: How many trainings at a time.
        verbose: Whether to print a line for each training.

    Returns:
        Table, figure and verdict, which are also written to ``dirpath``.

    Raises:
        ValueError: If the trainings cannot be measured, or ``build`` begins otherwise each time.
        RunDirectoryError: If ``dirpath`` holds trainings of something else.
        SGDInfluenceError: If the training cannot be followed.
    """
    chosen = tuple(range(seeds)) if isinstance(seeds, int) else tuple(dict.fromkeys(int(seed) for seed in seeds))
    _check_numbers(chosen, drop, random_draws, processes, level)
    _check_choices(build, mode, on, action)
    settings = Settings(Path(dirpath), influence, on, ckpt_path, action, set_label)
    plan = CleansingPlan(
        tuple(drop), random_draws, Question(metric, mode, select, select_mode, level, action), settings
    )
    say = _narrator(len(chosen) * (1 + len(drop) * (1 + random_draws)), on, metric) if verbose else lambda *_: None
    store = TrialStore(settings.folder, identity_of(build, settings))
    runs = TrialRuns(build, settings, store, plan.followers, say)
    trials = [Trial(seed) for seed in chosen]
    with _untouched_seeds():
        results = runs.in_turn(trials) if processes == 1 else runs.in_processes(trials, processes)
    found = _judged(results, plan, chosen)
    found.save()
    return found


def _check_choices(build: Build, mode: str, on: str, action: str) -> None:
    check_choice("mode", mode, ("min", "max"))
    check_choice("on", on, ("test", "val"))
    check_choice("action", action, ("drop", "relabel"))
    if action == "relabel" and takes_without(build):
        raise ValueError("A build that leaves samples out itself cannot relabel them. Expected build(seed).")


def _check_numbers(
    seeds: tuple[int, ...], drop: Sequence[float], random_draws: int, processes: int, level: float
) -> None:
    if len(seeds) < 2 or min(seeds) < 0:
        raise ValueError(f"Expected two or more seeds from 0 on, since intervals are over seeds, found {list(seeds)}.")
    odd = [amount for amount in drop if not amount > 0 or (amount >= 1 and amount != int(amount))]
    if not drop or odd:
        raise ValueError(f"Expected drop= as shares below 1 or whole numbers, found {odd[0] if odd else 'none'}.")
    if random_draws < 1 or processes < 1 or not 0 < level < 1:
        raise ValueError(
            "Expected random_draws and processes of 1 or more and a level between 0 and 1, found "
            f"{random_draws}, {processes} and {level}."
        )


def _judged(results: dict[Trial, Result], plan: CleansingPlan, seeds: tuple[int, ...]) -> Cleansing:
    question = plan.question.completed(results[Trial(seeds[0])])
    assert question.select is not None and question.select_mode is not None  # noqa: PT018 - the plan has seen to it
    on = plan.settings.on
    metric = measured(results, plan, seeds, on, question.metric, question.mode)
    selection = measured(results, plan, seeds, "val", question.select, question.select_mode)
    biased = any(results[Trial(seed)]["on_ranking_data"] for seed in seeds)
    notes = tuple(_notes(results, plan.counts, seeds, on, question.metric, biased))
    if biased:
        warnings.warn(notes[0], SGDInfluenceWarning, stacklevel=3)
    verdict = judge(plan.counts, metric, selection, question.level, biased)
    return Cleansing(plan.settings.folder, seeds, plan.counts, question, metric, selection, verdict, notes)


def _notes(
    results: dict[Trial, Result], counts: tuple[int, ...], seeds: tuple[int, ...], on: str, metric: str, biased: bool
) -> Iterator[str]:
    if biased:
        yield f"{metric} was measured on data that the ranking is by, so that a gain on them shows nothing."
    lost = [trial for trial, result in results.items() if result["metrics"][on][metric] is None]
    if lost:
        yield f"{len(lost)} trainings gave no finite {metric}; the first is that with {lost[0]}."
    fewest = min(seeds, key=lambda seed: results[Trial(seed)]["num_harmful"])
    harmful = results[Trial(fewest)]["num_harmful"]
    if harmful < counts[-1]:
        yield f"With seed {fewest} only {harmful} samples are harmful; beyond these, helpful ones were changed."


def _narrator(total: int, on: str, metric: str) -> Any:
    """Prints a line for each training that was carried out."""
    number = 0

    def say(trial: Trial, result: Result) -> None:
        nonlocal number
        number += 1
        value = result["metrics"][on].get(metric)
        print(f"training {number} (of {total} at most): {trial}: {metric} {value} ({result['seconds']} s)", flush=True)

    return say


@contextmanager
def _untouched_seeds() -> Iterator[None]:
    """Leave random states, and the variables by which Lightning remembers its seed, as they were."""
    before = {name: os.environ.get(name) for name in _SEED_VARIABLES}
    with untouched_randomness(torch.device("cuda" if torch.cuda.is_available() else "cpu")):
        try:
            yield
        finally:
            for name, value in before.items():
                if value is None:
                    os.environ.pop(name, None)
                else:
                    os.environ[name] = value
