"""Requests to a network, gathered: what waits while the network is busy goes through it together.

Not by `serve.batch`: that closes a batch after its wait although the batch before still runs, so where a batch takes longer than the wait, which it
does here, most hold one video.
"""

from __future__ import annotations

import asyncio
import heapq
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Generic, TypeVar

Item = TypeVar("Item")
Answer = TypeVar("Answer")


class Batches(Generic[Item, Answer]):
    """`work` on items that come one by one.

    On a GPU one batch after the other, of at most `size` items, for which the first waits at most `wait_s` seconds. On a CPU, which gains nothing
    by batches, up to `threads` items side by side, each in a lane with a thread of its own: `threads` are shared out among the items in hand, since all
    of them on one item after the other would do a third less. `compiled` work has one lane everywhere, for it is compiled anew for each number of threads.
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
        # the lowest idle lane works: a thread keeps as many helpers as it ever had, and only the first lanes are ever given many
        self.idle = list(range(self.lanes))
        self.free = asyncio.Semaphore(self.lanes)
        self.dispatcher: asyncio.Task[None] | None = None
        self.rounds: set[asyncio.Task[None]] = set()
        self.in_hand = 0

    async def __call__(self, item: Item) -> Answer:
        """The answer to one item. Raises what `work` raised for it."""
        if self.dispatcher is None:
            self.dispatcher = asyncio.create_task(self._dispatch())
        answer: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self.in_hand += 1
        try:
            self.waiting.put_nowait((item, answer))
            return await answer
        finally:
            self.in_hand -= 1

    async def _dispatch(self) -> None:
        while True:
            await self.free.acquire()
            batch = await self._next()
            task = asyncio.create_task(self._round(heapq.heappop(self.idle), batch))
            del batch  # the items go with the round
            self.rounds.add(task)
            task.add_done_callback(self.rounds.discard)

    async def _round(self, lane: int, batch: list[tuple[Item, asyncio.Future[Answer]]]) -> None:
        # done already: the request was given up
        batch = [(item, waiting) for item, waiting in batch if not waiting.done()]
        try:
            if batch:
                threads = self.threads // min(self.lanes, max(1, self.in_hand))
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
        except Exception as error:  # noqa: BLE001  handed to those who wait
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
                    batch.append(
                        await self.waiting.get()
                    )  # of what waits already, also past the deadline
            except TimeoutError:
                break
        return batch

    def _run(self, items: list[Item], threads: int) -> list[Answer | Exception]:
        import torch

        torch.set_num_threads(threads)  # a setting of the thread that calls
        try:
            return [*self.work(items)]
        except Exception as error:  # noqa: BLE001  handed to who waits for it
            if len(items) == 1:
                return [error]
            return [
                answer for item in items for answer in self._run([item], threads)
            ]  # one must not cost the others their answers


def _settle_threads() -> None:
    import torch

    torch.get_num_threads()  # the first time a thread takes over what any other one set last
