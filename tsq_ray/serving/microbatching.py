"""Batches of requests to a network: requests that arrive while it is busy form the next batch.

`serve.batch` does not fit: it closes a batch after its wait even if the previous batch is still
running, and since a batch takes longer than the wait here, most batches would hold one video.
"""

from __future__ import annotations

import asyncio
import heapq
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Generic, TypeVar

Item = TypeVar("Item")
Answer = TypeVar("Answer")


class Microbatches(Generic[Item, Answer]):
    """Run `work` on items that arrive one by one.

    On a GPU, batches of at most `size` items run one after the other; the first item of a batch
    waits at most `wait_s` seconds. On a CPU, where batching gains nothing, up to `threads` items
    run in parallel, each in a lane with its own thread. The lanes share `threads`: giving all of
    them to one item at a time would reduce throughput by a third. `compiled` work always has one
    lane, because it is recompiled for each thread count.
    """

    def __init__(
        self,
        work: Callable[[list[Item]], list[Answer]],
        size: int,
        wait_s: float,
        threads: int,
        on_gpu: bool,
        compiled: bool = False,
    ) -> None:
        self.work, self.threads = work, threads
        self.size, self.wait_s = (size, wait_s) if on_gpu else (1, 0.0)
        self.lanes = 1 if on_gpu or compiled else threads
        self.pools = [ThreadPoolExecutor(1, initializer=_settle_threads) for _ in range(self.lanes)]
        self.waiting: asyncio.Queue[tuple[Item, asyncio.Future[Answer]]] = asyncio.Queue()
        # the lowest idle lane is used first, because a lane's thread never releases helper threads:
        # this way only the first lanes ever have many
        self.idle = list(range(self.lanes))
        self.free = asyncio.Semaphore(self.lanes)
        self.dispatcher: asyncio.Task[None] | None = None
        self.rounds: set[asyncio.Task[None]] = set()
        self.in_flight = 0

    async def __call__(self, item: Item) -> Answer:
        """Return the answer to one item. Raises what `work` raised for it."""
        if self.dispatcher is None:
            self.dispatcher = asyncio.create_task(self._dispatch())
        answer: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self.in_flight += 1
        try:
            self.waiting.put_nowait((item, answer))
            return await answer
        finally:
            self.in_flight -= 1

    async def _dispatch(self) -> None:
        while True:
            await self.free.acquire()
            batch = await self._next()
            task = asyncio.create_task(self._round(heapq.heappop(self.idle), batch))
            del batch  # the round owns the items, so that they are freed when it ends
            self.rounds.add(task)
            task.add_done_callback(self.rounds.discard)

    async def _round(self, lane: int, batch: list[tuple[Item, asyncio.Future[Answer]]]) -> None:
        # a future that is already done belongs to an abandoned request
        batch = [(item, waiting) for item, waiting in batch if not waiting.done()]
        try:
            if batch:
                threads = self.threads // min(self.lanes, max(1, self.in_flight))
                answers = await asyncio.wrap_future(
                    self.pools[lane].submit(self._run, [item for item, _ in batch], threads)
                )
                for (_, waiting), answer in zip(batch, answers, strict=True):
                    if waiting.done():
                        continue
                    if isinstance(answer, Exception):
                        waiting.set_exception(answer)
                    else:
                        waiting.set_result(answer)
        except Exception as error:  # noqa: BLE001  passed on to the waiting requests
            for _, waiting in batch:
                if not waiting.done():
                    waiting.set_exception(error)
        finally:
            heapq.heappush(self.idle, lane)
            self.free.release()

    async def _next(self) -> list[tuple[Item, asyncio.Future[Answer]]]:
        batch = [await self.waiting.get()]
        deadline = asyncio.get_running_loop().time() + self.wait_s
        while len(batch) < self.size:
            try:
                async with asyncio.timeout_at(deadline):
                    # takes items that are already waiting, even after the deadline
                    batch.append(await self.waiting.get())
            except TimeoutError:
                break
        return batch

    def _run(self, items: list[Item], threads: int) -> list[Answer | Exception]:
        import torch

        torch.set_num_threads(threads)  # applies to the calling thread only
        try:
            return [*self.work(items)]
        except Exception as error:  # noqa: BLE001  passed on to the waiting request
            if len(items) == 1:
                return [error]
            # one failing item must not cost the others their answers
            return [answer for item in items for answer in self._run([item], threads)]


def _settle_threads() -> None:
    import torch

    # the first call makes a thread adopt the count that any other thread set last
    torch.get_num_threads()
