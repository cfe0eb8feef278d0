"""Asks about many items at once, in an event loop of its own thread, and yields the replies as they come."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Generator, Sequence
from contextlib import AbstractAsyncContextManager, suppress
from queue import SimpleQueue
from threading import Thread
from typing import TypeVar

_END_SECONDS = 5.0

Client = TypeVar("Client")
Item = TypeVar("Item")
Reply = TypeVar("Reply")


def ask_at_once(
    connect: Callable[[], AbstractAsyncContextManager[Client]],
    items: Sequence[Item],
    ask: Callable[[Client, Item], Awaitable[Reply]],
    at_once: int,
) -> Generator[Reply, None, None]:
    """Ask about all items and yield each reply as it comes; works inside of another event loop, as notebooks have one.

    Close it to stop early: what is under way is cancelled.

    Args:
        connect: makes the client, which belongs to the loop.
        items: what to ask about.
        ask: asks about one item; what it raises ends everything, after the replies that came before.
        at_once: how many are asked about at the same time at most.
    """
    replies: SimpleQueue[Reply | BaseException | None] = SimpleQueue()
    loop = asyncio.new_event_loop()
    task = loop.create_task(_ask_all(connect, items, ask, at_once, replies))
    thread = Thread(target=_run, args=(loop, task, replies), name="expo-ask", daemon=True)
    thread.start()
    try:
        while (reply := replies.get()) is not None:
            if isinstance(reply, BaseException):
                raise reply
            yield reply
    finally:  # also when the caller stops early, as on Ctrl-C
        with suppress(RuntimeError):  # the loop may have been closed just now
            loop.call_soon_threadsafe(task.cancel)
        thread.join(_END_SECONDS)


async def _ask_all(
    connect: Callable[[], AbstractAsyncContextManager[Client]],
    items: Sequence[Item],
    ask: Callable[[Client, Item], Awaitable[Reply]],
    at_once: int,
    replies: SimpleQueue[Reply | BaseException | None],
) -> None:
    turn = asyncio.Semaphore(at_once)

    async def one(client: Client, item: Item) -> None:
        async with turn:
            replies.put(await ask(client, item))

    async with connect() as client, asyncio.TaskGroup() as group:
        for item in items:
            group.create_task(one(client, item))


def _run(
    loop: asyncio.AbstractEventLoop, task: asyncio.Task[None], replies: SimpleQueue[Reply | BaseException | None]
) -> None:
    try:
        loop.run_until_complete(task)
        replies.put(None)
    except BaseExceptionGroup as several:
        replies.put(several.exceptions[0])
    except BaseException as error:  # noqa: BLE001 - the caller raises it
        replies.put(error)
    finally:
        loop.close()
