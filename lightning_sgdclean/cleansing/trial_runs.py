# SPDX-License-Identifier: Apache-2.0
"""The trainings of a cleansing carried out: those that are not done yet, one after another or in processes."""

import multiprocessing
import pickle
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch

from lightning_sgdclean.base.lightning import without_chatter
from lightning_sgdclean.cleansing.training import Build
from lightning_sgdclean.cleansing.trial_store import TrialStore
from lightning_sgdclean.cleansing.trials import Settings, Trial, run_trial

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
