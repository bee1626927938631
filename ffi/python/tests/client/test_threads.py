"""Threads, forks, and a node that goes away."""

import gc
import select
import threading
import time

import kvtier
import pytest
from conftest import PATIENCE, content, eventually, in_child, key


def in_thread(call):
    """Starts `call` on another thread; its end, its result and its error."""

    class Call(threading.Thread):
        result = error = None

        def run(self):
            try:
                self.result = call()
            except Exception as error:
                self.error = error

    thread = Call(daemon=True)
    thread.start()
    return thread


def test_threads_share_a_client(client):
    data = {number: content(number, 20_000 + number) for number in range(64)}
    wrong = []

    def work(first):
        for number in range(first, 64, 8):
            client.put(key(number), data[number])
        for number in range(first, 64, 8):
            target = bytearray(len(data[number]))
            if not client.get_into(key(number), target) or target != data[number]:
                wrong.append(number)
            if bytes(client.get(key(number))) != data[number]:
                wrong.append(number)

    threads = [in_thread(lambda first=first: work(first)) for first in range(8)]
    for thread in threads:
        thread.join(PATIENCE)
        assert not thread.is_alive() and thread.error is None
    assert wrong == []


@pytest.mark.parametrize("name", ["get_into", "get", "put", "exists", "status", "close and get"])
def test_python_runs_while_a_call_waits_for_the_node(node, name):
    client = node.client(timeout=PATIENCE)
    client.put(key(1), b"abc")
    node.pause()
    target = bytearray(3)
    calls = {
        "get_into": lambda: client.get_into(key(1), target).status,
        "get": lambda: bytes(client.get(key(1))),
        "put": lambda: client.put(key(2), b"abc"),
        "exists": lambda: client.exists(key(1)),
        "status": lambda: "leases" in client.status(),
        "close and get": lambda: bytes(client.get(key(1))),
    }
    waiting = in_thread(calls[name])
    progress = 0
    # With the interpreter's lock held by the call this would stand still until the call gives up.
    until = time.monotonic() + 0.3
    while time.monotonic() < until:
        progress += 1
        time.sleep(0.001)
    assert waiting.is_alive() and progress > 10, "the call waits, this thread does not"
    if name == "close and get":
        client.close()
        assert waiting.is_alive(), "closing waits for no call"
    node.resume()
    waiting.join(PATIENCE)
    assert not waiting.is_alive() and waiting.error is None
    expected = {"get_into": "hit", "get": b"abc", "put": "published", "exists": True, "status": True}
    assert waiting.result == expected.get(name, b"abc")


def test_a_node_that_stands_still_is_unavailable_in_time(node):
    client = node.client(timeout=0.3)
    client.put(key(1), b"abc")
    node.pause()
    with pytest.raises(kvtier.Unavailable):
        client.get_into(key(1), bytearray(3))
    node.resume()
    assert client.get_into(key(1), bytearray(3)), "the next call connects again"


def test_a_killed_node_is_unavailable_and_its_successor_is_found(node):
    client = node.client()
    client.put(key(1), b"abc")
    block = client.get(key(1))
    view = memoryview(block)
    node.kill()
    with pytest.raises(kvtier.Unavailable):
        client.exists(key(1))
    assert view == b"abc", "what is mapped stays readable"
    with pytest.raises(kvtier.Closed):
        memoryview(block)
    node.start()
    assert not client.exists(key(1)), "it was never flushed"
    assert client.put(key(1), b"new") == "published"
    assert bytes(client.get(key(1))) == b"new"
    del view, block
    gc.collect()
    assert client.exists(key(1))


def collect(client, tickets):
    """All completions of `tickets`, told of by the descriptor."""
    completions = {}
    deadline = time.monotonic() + PATIENCE
    while len(completions) < len(tickets):
        ready, _, _ = select.select([client.event_fd()], [], [], deadline - time.monotonic())
        assert ready, f"{len(completions)} of {len(tickets)} completed"
        completions |= dict(client.completed())
    assert set(completions) == set(tickets)
    return completions


def test_submitted_gets_complete_by_the_descriptor(client):
    data = [content(number, 30_000) for number in range(40)]
    client.put_batch([key(number) for number in range(40)], data)
    assert client.completed() == []
    assert select.select([client.event_fd()], [], [], 0)[0] == []
    targets = {}
    for first in range(0, 40, 4):
        buffers = [bytearray(30_000) for _ in range(5)]
        keys = [key(number) for number in range(first, first + 4)] + [key(999)]
        targets[client.submit_get_into(keys, buffers)] = (first, buffers)
    for ticket, outcomes in collect(client, targets).items():
        first, buffers = targets[ticket]
        assert [got.status for got in outcomes] == ["hit"] * 4 + ["miss"]
        assert buffers[:4] == data[first : first + 4]
    assert select.select([client.event_fd()], [], [], 0)[0] == [], "it is quiet when all is collected"


def test_submissions_are_bounded_and_fail_as_completions(node):
    client = node.client(timeout=0.5, threads=1, gets_max=3)
    client.put(key(1), b"abc")
    with pytest.raises(kvtier.Invalid):
        client.submit_get_into([key(1)], [])
    node.pause()
    tickets = [client.submit_get_into([key(1)], [bytearray(3)]) for _ in range(3)]
    with pytest.raises(kvtier.Busy):
        client.submit_get_into([key(1)], [bytearray(3)])
    completions = collect(client, tickets)
    assert all(isinstance(outcome, kvtier.Unavailable) for outcome in completions.values())
    node.resume()
    target = bytearray(3)
    ticket = client.submit_get_into([key(1)], [target])
    assert collect(client, [ticket])[ticket][0].status == "hit" and target == b"abc"


def test_closing_takes_targets_back_before_anything_lands(node):
    client = node.client(timeout=PATIENCE)
    client.put(key(1), b"abc")
    warm = client.submit_get_into([key(1)], [bytearray(3)])
    collect(client, [warm])
    node.pause()
    target = bytearray(b"...")
    client.submit_get_into([key(1)], [target])
    time.sleep(0.1)
    with pytest.raises(BufferError):
        target.clear()
    begun = time.monotonic()
    client.close()
    assert time.monotonic() - begun < PATIENCE / 2, "closing waits for no node"
    target.clear()
    target.extend(b"mine")
    node.resume()
    with node.client() as other:
        for _ in range(50):
            assert other.exists(key(1))
    time.sleep(0.2)
    assert target == b"mine"


def test_a_forked_child_is_refused_and_takes_nothing_from_its_parent(node, client):
    client.put(key(1), b"abc")
    block = client.get(key(1))
    outcome = client.submit_get_into([key(1)], [bytearray(3)])
    collect(client, [outcome])
    with node.client() as onlooker:
        leases = lambda: onlooker.status()["leases"]
        eventually(lambda: leases() == 1, "the submitted get's lease is released")

        def check():
            for call in (
                lambda: client.exists(key(1)),
                lambda: client.get(key(1)),
                lambda: client.get_into(key(1), bytearray(3)),
                lambda: client.put(key(2), b"a"),
                lambda: client.submit_get_into([key(1)], [bytearray(3)]),
                client.completed,
                client.event_fd,
                client.status,
                lambda: memoryview(block),
                lambda: bytes(block),
                lambda: len(block),
            ):
                with pytest.raises(kvtier.Closed):
                    call()
            with node.client() as mine:
                assert bytes(mine.get(key(1))) == b"abc", "a client of its own works"
            # The last of both: what they hold at the node is the parent's.
            block.release()
            client.close()

        in_child(check)
        time.sleep(0.1)
        assert leases() == 1
        assert bytes(block) == b"abc" and client.exists(key(1)), "the parent goes on"
        del block
        gc.collect()
        eventually(lambda: leases() == 0, "the parent releases")


def test_children_forked_while_threads_call_are_not_stuck(node):
    client = node.client()
    client.put(key(1), bytes(200_000))
    stop = threading.Event()

    def work():
        while not stop.is_set():
            client.get_into(key(1), bytearray(200_000))
            client.get(key(1))

    threads = [in_thread(work) for _ in range(3)]

    def check():
        with pytest.raises(kvtier.Closed):
            client.exists(key(1))
        client.close()

    try:
        for _ in range(40):
            in_child(check)
    finally:
        stop.set()
    for thread in threads:
        thread.join(PATIENCE)
        assert not thread.is_alive() and thread.error is None
