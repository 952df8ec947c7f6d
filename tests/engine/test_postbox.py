"""Results reach their queues in order, with one wake-up for many."""

import asyncio
import threading

import pytest

from greenroom.engine.postbox import Postbox


def test_items_come_in_order_with_one_wake_up_for_many() -> None:
    async def main() -> tuple[list[list[int]], int]:
        loop = asyncio.get_running_loop()
        wakes, wake = 0, loop.call_soon_threadsafe

        def counted(*args: object) -> None:
            nonlocal wakes
            wakes += 1
            wake(*args)

        loop.call_soon_threadsafe = counted
        box, queues = Postbox(loop), [asyncio.Queue() for _ in range(8)]

        def post() -> None:
            for number in range(100):
                box.post(queues[number % 8], number)

        post()  # the loop has no turn in between
        alone = wakes
        other = threading.Thread(target=lambda: [post() for _ in range(50)])
        other.start()
        found = [[await queue.get() for _ in range(51 * len(range(n, 100, 8)))]
                 for n, queue in enumerate(queues)]  # fmt: skip
        await asyncio.to_thread(other.join)
        return found, alone

    found, alone = asyncio.run(main())
    assert alone == 1
    assert found == [list(range(n, 100, 8)) * 51 for n in range(8)]


def test_a_closed_loop_is_told_of_every_time() -> None:
    loop = asyncio.new_event_loop()
    box, queue = Postbox(loop), asyncio.Queue()
    loop.close()
    for _ in range(2):
        with pytest.raises(RuntimeError, match="closed"):
            box.post(queue, 1)
