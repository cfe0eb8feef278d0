"""Work that several threads do and one takes in order, with a bound on what is under way."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from expo_serve.load.threads import all_cores

Item = TypeVar("Item")
Result = TypeVar("Result")
_AHEAD = 2
"""Results that wait for their turn, for each thread."""


def in_order(
    work: Callable[[Item], Result], items: Iterable[Item], threads: int | None = None
) -> Iterator[tuple[Item, Result]]:
    """Do the work of each item in a thread; give items and results in their order.

    Args:
        work: done in a thread.
        items: taken as they are needed.
        threads: how many; by default one for each core. At most twice as many results and one are in memory.

    Raises:
        BaseException: what the work has raised; what is under way is waited for.
    """
    threads = threads or all_cores()
    with ThreadPoolExecutor(threads, thread_name_prefix="expo-work") as pool:
        pending: deque[tuple[Item, Future[Result]]] = deque()
        try:
            for item in items:
                pending.append((item, pool.submit(work, item)))
                if len(pending) > _AHEAD * threads:
                    yield _take(pending)
            while pending:
                yield _take(pending)
        finally:
            for _, future in pending:
                future.cancel()


def _take(pending: deque[tuple[Item, Future[Result]]]) -> tuple[Item, Result]:
    item, future = pending.popleft()
    return item, future.result()
