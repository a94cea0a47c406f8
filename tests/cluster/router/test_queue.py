"""Order and bounds of the admission queue, the batching window, and Retry-After."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.cluster.router.queue import AdmissionQueue, BatchWindow, DepartureRate
from shoal.cluster.wire.errors import QueueFull


@dataclass(eq=False)
class Item:
    priority: int
    arrival: int
    num_tokens: int = 1


@given(st.lists(st.one_of(st.tuples(st.just("push"), st.integers(-2, 2)), st.tuples(st.just("drop"), st.integers(0)))))
def test_order_is_priority_then_arrival_whatever_is_removed(moves: list[tuple[str, int]]) -> None:
    queue: AdmissionQueue[Item] = AdmissionQueue(1000, 1000)
    model: list[Item] = []
    for arrival, (move, value) in enumerate(moves):
        if move == "push":
            model.append(Item(value, arrival))
            queue.push(model[-1], retry_after=1.0)
        elif model:
            item = model.pop(value % len(model))
            assert queue.remove(item)
            assert not queue.remove(item)
        assert (len(queue), queue.num_tokens) == (len(model), len(model))
    order = []
    while (item := queue.peek()) is not None:
        assert queue.remove(item)
        order.append(item)
    assert order == sorted(model, key=lambda item: (item.priority, item.arrival))


def test_bounds() -> None:
    queue: AdmissionQueue[Item] = AdmissionQueue(max_requests=2, max_tokens=10)
    queue.push(Item(0, 1, num_tokens=50), retry_after=1.0)  # alone, any size goes
    with pytest.raises(QueueFull, match="50 tokens are queued") as caught:
        queue.push(Item(0, 2), retry_after=7.0)
    assert caught.value.retry_after == 7.0
    first = queue.peek()
    assert first is not None
    queue.remove(first)
    queue.push(Item(0, 3), retry_after=1.0)
    queue.push(Item(0, 4), retry_after=1.0)
    with pytest.raises(QueueFull, match="2 requests"):
        queue.push(Item(0, 5), retry_after=1.0)
    queue.push_accepted(Item(0, 0))
    assert (len(queue), queue.num_tokens) == (3, 3)
    first = queue.peek()
    assert first is not None
    assert first.arrival == 0


def test_removed_items_are_let_go() -> None:
    queue: AdmissionQueue[Item] = AdmissionQueue(1000, 1000)
    items = [Item(0, i) for i in range(500)]
    for item in items:
        queue.push(item, retry_after=1.0)
    for item in items[1:]:
        queue.remove(item)
    assert len(queue._heap) < 100
    assert queue.peek() is items[0]


def test_a_quiet_window_is_open_and_a_dispatch_closes_it_for_a_while() -> None:
    window = BatchWindow(0.002)
    assert window.delay(now=100.0) == 0.0
    window.open(now=100.0)
    assert window.delay(now=100.0005) == pytest.approx(0.0015)
    assert window.delay(now=100.002) == pytest.approx(0.0)
    assert window.delay(now=200.0) == 0.0


def test_retry_after_follows_the_rate_and_stays_in_bounds() -> None:
    rate = DepartureRate()
    assert rate.retry_after(1000) == 1.0
    for second in range(1, 60):
        rate.add(20, now=float(second))
    assert rate.retry_after(100) == pytest.approx(5.0, rel=0.05)
    assert rate.retry_after(1) == 1.0
    assert rate.retry_after(10**6) == 30.0
