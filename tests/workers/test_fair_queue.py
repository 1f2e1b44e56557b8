"""The order in which groups get the engine, and the bound on what may wait: laws of the queue, without an engine."""

from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from workers.admission import CLIENT_SHARE, Load, Rate, check_room
from workers.fair_queue import FairQueue
from workers.jobs import Forecast, Job, QueueFullError


def job(client: str, rows: int = 10, samples: int = 1) -> Job:
    return Job([SimpleNamespace(num_inference_steps=4)] * samples, Forecast(rows, 2), client=client)


def drain(queue: FairQueue) -> list[Job]:
    served = []
    while (head := queue.head()) is not None:
        queue.charge(head, head.forecast.rows)
        queue.remove(head)
        served.append(head)
    return served


def test_one_client_is_served_in_order():
    queue, jobs = FairQueue(), [job("a") for _ in range(5)]
    for one in jobs:
        queue.push(one)
    assert drain(queue) == jobs
    assert len(queue) == 0


def test_a_client_with_one_request_does_not_wait_behind_anothers_twenty():
    queue = FairQueue()
    for _ in range(20):
        queue.push(job("greedy"))
    queue.push(job("modest"))
    assert [one.client for one in drain(queue)[:3]].count("modest") == 1


def test_who_was_away_has_saved_nothing_up():
    queue = FairQueue()
    for _ in range(10):
        queue.push(job("busy"))
    for _ in range(8):
        head = queue.head()
        queue.charge(head, 10)
        queue.remove(head)
    for _ in range(4):
        queue.push(job("back"))
    assert [one.client for one in drain(queue)] != ["back"] * 4 + ["busy"] * 2


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 50)), min_size=1, max_size=40))
def test_shares_of_waiting_clients_differ_by_less_than_two_requests(arrivals):
    queue = FairQueue()
    for client, rows in arrivals:
        queue.push(job(client, rows))
    left = {client: sum(rows for name, rows in arrivals if name == client) for client in "abc"}
    given_to = dict.fromkeys("abc", 0)
    largest = max(rows for _, rows in arrivals)
    while (head := queue.head()) is not None:
        waiting = [client for client in "abc" if left[client]]
        spread = [given_to[client] for client in waiting]
        assert max(spread) - min(spread) <= 2 * largest
        queue.charge(head, head.forecast.rows)
        given_to[head.client] += head.forecast.rows
        left[head.client] -= head.forecast.rows
        queue.remove(head)
    assert sum(left.values()) == 0


def test_a_group_can_be_taken_out_from_the_middle_and_twice():
    queue, jobs = FairQueue(), [job("a"), job("b"), job("a")]
    for one in jobs:
        queue.push(one)
    queue.remove(jobs[0])
    queue.remove(jobs[0])
    assert set(drain(queue)) == set(jobs[1:])


def test_clients_that_left_are_forgotten():
    queue = FairQueue()
    for number in range(1_000):
        queue.push(job(f"client-{number}"))
        drain(queue)
    assert len(queue._clocks) < 10


def test_previews_are_spread_and_never_the_last_step():
    watched = job("a")
    watched.previews = 3
    due = {step: watched.preview_at(step, 20) for step in range(21)}
    assert {step: index for step, index in due.items() if index is not None} == {5: 0, 10: 1, 15: 2}
    watched.previews = 10
    assert watched.preview_at(1, 2) is not None
    assert watched.preview_at(2, 2) is None


@given(
    st.integers(1, 10_000), st.floats(0, 1e5), st.floats(0, 1), st.floats(1, 1e4), st.floats(0.5, 100),
    st.none() | st.floats(0.1, 100),
)  # fmt: skip
def test_what_is_let_in_keeps_the_bounds(rows, waiting, own_part, rate, bound, deadline):
    load = Load(waiting, waiting * own_part, rate)
    refused = refusal(rows, load, bound, deadline)
    if refused is not None:
        assert waiting > 0, "whoever finds nothing waiting is let in"
        assert refused.retry_after_s >= 1
        return
    total = (waiting + rows) / rate
    assert waiting == 0 or total <= bound
    assert waiting == 0 or deadline is None or total <= deadline
    assert load.own_rows == 0 or (load.own_rows + rows) / rate <= bound * CLIENT_SHARE


def refusal(rows: int, load: Load, bound: float, deadline: float | None) -> QueueFullError | None:
    try:
        check_room(rows, load, max_queue_s=bound, deadline_s=deadline)
    except QueueFullError as error:
        return error
    return None


@pytest.mark.parametrize(
    ("load", "deadline", "words"),
    [
        (Load(900, 0, 100), None, "the queue is full"),
        (Load(500, 450, 100), None, "this client's share"),
        (Load(400, 0, 100), 2.0, "the deadline cannot be met"),
    ],
)
def test_a_refusal_says_which_bound_it_was_and_when_to_come_back(load, deadline, words):
    with pytest.raises(QueueFullError, match=words) as caught:
        check_room(200, load, max_queue_s=10.0, deadline_s=deadline)
    assert f"try again in about {caught.value.retry_after_s} s" in str(caught.value)


def test_the_row_rate_is_that_of_full_batches_once_there_are_any():
    rate = Rate()
    for _ in range(20):
        rate.observe(2, 0.1, weight=2 / 64)
    assert 15 < rate.rows_per_s < 40
    for _ in range(60):
        rate.observe(64, 0.16, weight=1.0)
    assert 380 < rate.rows_per_s < 401
    for _ in range(5):
        rate.observe(2, 0.1, weight=2 / 64)
    assert rate.rows_per_s > 350, "a few lone samples do not make a fast machine slow"
