"""Batches of requests to a network.

What runs together, with how many threads, and who gets which result when work fails or a request is
given up.
"""

from __future__ import annotations

import asyncio
import gc
import os
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tsq_ray.serving.microbatching import Microbatches


@pytest.fixture(autouse=True)
def same_threads_after() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


class Network:
    """Doubles numbers once released; records its batches and its threads.

    Negative numbers fail the batch that they are in.
    """

    def __init__(self) -> None:
        self.open = threading.Event()
        self.seen: list[list[int]] = []
        self.threads: list[int] = []
        self.inside = self.most_inside = 0
        self.lock = threading.Lock()

    def __call__(self, items: list[int]) -> list[int]:
        with self.lock:
            self.seen.append(items)
            self.threads.append(torch.get_num_threads())
            self.inside += 1
            self.most_inside = max(self.most_inside, self.inside)
        assert self.open.wait(20)
        with self.lock:
            self.inside -= 1
        if min(items) < 0:
            raise ValueError(f"negative: {items}")
        return [2 * item for item in items]


async def until_seen(network: Network, batches: int) -> None:
    async with asyncio.timeout(20):
        while len(network.seen) < batches:
            await asyncio.sleep(0.005)


def test_what_waits_for_a_gpu_goes_through_together() -> None:
    network = Network()

    async def run() -> list[int]:
        batches = Microbatches(network, size=4, wait_s=0.0, threads=3, on_gpu=True)
        first = asyncio.create_task(batches(0))
        await until_seen(network, 1)
        rest = [asyncio.create_task(batches(number)) for number in range(1, 8)]
        await asyncio.sleep(0.05)
        assert network.seen == [[0]]  # one batch at a time
        network.open.set()
        return [await task for task in (first, *rest)]

    assert asyncio.run(run()) == [0, 2, 4, 6, 8, 10, 12, 14]
    assert network.seen == [[0], [1, 2, 3, 4], [5, 6, 7]]
    assert set(network.threads) == {3}


def test_the_first_of_a_batch_waits_for_others() -> None:
    network = Network()
    network.open.set()

    async def run() -> list[int]:
        batches = Microbatches(network, size=2, wait_s=20.0, threads=1, on_gpu=True)
        first = asyncio.create_task(batches(1))
        await asyncio.sleep(0.05)
        assert network.seen == []
        async with asyncio.timeout(10):  # a full batch does not wait
            return await asyncio.gather(first, batches(2))

    assert asyncio.run(run()) == [2, 4]
    assert network.seen == [[1, 2]]


def test_a_cpu_runs_one_item_per_thread_in_parallel() -> None:
    network = Network()

    async def run() -> list[int]:
        batches = Microbatches(network, size=8, wait_s=20.0, threads=3, on_gpu=False)
        tasks = [asyncio.create_task(batches(number)) for number in range(5)]
        await until_seen(network, 3)
        await asyncio.sleep(0.05)
        assert network.inside == 3
        network.open.set()
        return await asyncio.gather(*tasks)

    assert asyncio.run(run()) == [0, 2, 4, 6, 8]
    assert sorted(network.seen) == [[0], [1], [2], [3], [4]]
    assert network.most_inside == 3


@pytest.mark.parametrize(("others", "threads"), [(0, 4), (1, 2), (2, 1), (9, 1)])
def test_the_items_in_hand_share_the_threads_of_a_cpu(others: int, threads: int) -> None:
    network = Network()
    network.open.set()

    async def run() -> None:
        batches = Microbatches(network, size=8, wait_s=0.0, threads=4, on_gpu=False)
        await asyncio.gather(*(batches(number) for number in range(others + 1)))

    asyncio.run(run())
    assert network.threads[0] == threads


def test_a_failing_item_does_not_affect_its_batch() -> None:
    network = Network()
    network.open.set()

    async def run() -> list[int | BaseException]:
        batches = Microbatches(network, size=2, wait_s=0.05, threads=1, on_gpu=True)
        numbers = [1, -1, 2, 3, 4]
        return await asyncio.gather(
            *(batches(number) for number in numbers), return_exceptions=True
        )

    answers = asyncio.run(run())
    assert [str(answer) for answer in answers] == ["2", "negative: [-1]", "4", "6", "8"]


def test_an_abandoned_request_is_not_worked_on() -> None:
    network = Network()

    async def run() -> int:
        batches = Microbatches(network, size=1, wait_s=0.0, threads=1, on_gpu=True)
        running, given_up, kept = (asyncio.create_task(batches(number)) for number in (1, 2, 3))
        await until_seen(network, 1)
        running.cancel()
        given_up.cancel()
        await asyncio.gather(running, given_up, return_exceptions=True)
        network.open.set()
        return await kept

    assert asyncio.run(run()) == 6
    assert network.seen == [[1], [3]]


@pytest.mark.skipif(
    not Path("/proc/self/task").exists(),
    reason="counts the threads of a process as Linux shows them",
)
def test_threads_do_not_multiply() -> None:
    """A thread keeps all the helper threads it ever had.

    If any thread could run single items, each would end up with all the helpers.
    """
    threads, picture = 16, torch.rand(64, 3, 32, 32)
    weights = torch.rand(8, 3, 3, 3)

    def network(items: list[int]) -> list[int]:
        torch.nn.functional.conv2d(picture, weights).relu().sum().item()
        return items

    async def run() -> None:
        batches = Microbatches(network, size=1, wait_s=0.0, threads=threads, on_gpu=False)
        for _ in range(2):
            await asyncio.gather(*(batches(number) for number in range(threads)))
            for number in range(3 * threads):
                await batches(number)

    before = len(os.listdir("/proc/self/task"))
    asyncio.run(run())
    assert len(os.listdir("/proc/self/task")) - before < threads * threads / 2


def test_compiled_work_keeps_to_one_lane_and_one_thread_count() -> None:
    network = Network()
    network.open.set()

    async def run() -> list[int]:
        batches = Microbatches(network, size=8, wait_s=0.0, threads=4, on_gpu=False, compiled=True)
        return await asyncio.gather(*(batches(number) for number in range(5)))

    assert asyncio.run(run()) == [0, 2, 4, 6, 8]
    assert (network.most_inside, network.seen, network.threads) == (
        1,
        [[0], [1], [2], [3], [4]],
        [4] * 5,
    )


def test_an_idle_network_keeps_no_item() -> None:
    class Frames:
        pass

    kept: list[weakref.ref[Frames]] = []

    async def run() -> None:
        batches: Microbatches[Frames, int] = Microbatches(
            lambda items: [0] * len(items), size=1, wait_s=0.0, threads=2, on_gpu=False
        )
        for _ in range(3):
            item = Frames()
            kept.append(weakref.ref(item))
            await batches(item)
        del item
        async with asyncio.timeout(10):
            while any(one() for one in kept):
                gc.collect()
                await asyncio.sleep(0.01)

    asyncio.run(run())
