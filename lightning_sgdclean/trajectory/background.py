# SPDX-License-Identifier: Apache-2.0
"""Work off the training thread: jobs in order on one thread, whose errors reach those who hand jobs over."""

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

_MOST_WAITING = 2


class Background:
    """Runs jobs one after another. After one that failed none is run any more.

    Each method raises the error of a job that failed before, once.
    """

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="sgd-influence")
        self._waiting: deque[Future[None]] = deque()
        self._has_failed = False

    def submit(self, job: Callable[[], None]) -> None:
        """Hand over a job; waits while too many are waiting, so that memory stays bounded."""
        self.check()
        while len(self._waiting) >= _MOST_WAITING:
            self._waiting.popleft().result()
        self._waiting.append(self._pool.submit(self._run, job))

    def check(self) -> None:
        """Raise what has gone wrong by now."""
        while self._waiting and self._waiting[0].done():
            self._waiting.popleft().result()

    def wait(self) -> None:
        """Until all jobs are done."""
        while self._waiting:
            self._waiting.popleft().result()

    def _run(self, job: Callable[[], None]) -> None:
        if self._has_failed:
            return
        try:
            job()
        except BaseException:  # whatever it was, nothing may be written after it
            self._has_failed = True
            raise
