"""A kv-daemon that stops answering: every load ends by its deadline, and no page is written once its load has ended."""

import random
import threading
import time

from conftest import Daemon, until
from objects import Driver, adapter, bits, keys, pages, patterned, same, wait

SIZE = 1 << 20
COUNT = 16
DEADLINE = 1.0
GRACE = 0.1
STALL = 10.0


class Loads:
    """Loads into pages that are used for something else as soon as each has ended."""

    def __init__(self, adapter, truth):
        self.adapter = adapter
        self.truth = truth
        self.longest = 0.0
        self.ended = self.hits = 0
        self.reused = []

    def begin(self):
        target = pages(COUNT, SIZE, 0xEE)
        return self.adapter.submit_load_task(keys(range(COUNT)), target), target, time.monotonic()

    def end(self, task, target, begun, stamp):
        fd = self.adapter.get_load_event_fd()
        result = bits(wait(fd, lambda: self.adapter.query_load_result(task)), COUNT)
        self.longest = max(self.longest, time.monotonic() - begun)
        self.ended += 1
        for at, hit in enumerate(result):
            if hit:
                self.hits += 1
                assert same([target[at]], [self.truth[at]]), "a hit with wrong bytes"
        # From here on the pages are somebody else's.
        for object in target:
            object.raw_data.fill_(stamp)
        self.reused.append((target, stamp))

    def check_reused(self):
        for target, stamp in self.reused:
            for object in target:
                assert bool((object.raw_data == stamp).all()), "a page was written after its load had ended"


def test_a_stall_of_ten_seconds_outlives_no_deadline_and_writes_no_page():
    daemon = Daemon()
    made = adapter(daemon, load_timeout_ms=int(DEADLINE * 1000), lookup_timeout_ms=int(DEADLINE * 1000))
    try:
        driver = Driver(made)
        truth = patterned(range(COUNT), SIZE)
        assert driver.store(keys(range(COUNT)), truth).is_successful()
        loads = Loads(made, truth)
        # Some loads are under way when it stops, others begin while it stands still.
        first = [loads.begin() for _ in range(4)]
        daemon.pause()
        stalled = time.monotonic()
        for number, (task, target, begun) in enumerate(first):
            loads.end(task, target, begun, number)
        number = len(first)
        while time.monotonic() - stalled < STALL:
            loads.end(*loads.begin(), number)
            number = (number + 1) % 200
            assert not any(driver.lookup(keys(range(100, 104))))
            time.sleep(0.2)
        assert loads.longest <= DEADLINE + GRACE, f"a load took {loads.longest:.3f} s"
        assert made.report_status()["state"] == "stalled"
        daemon.resume()
        until("the adapter is back", made.core.is_healthy)
        # Late answers come in now.
        time.sleep(0.5)
        loads.check_reused()
        target = pages(COUNT, SIZE)
        assert all(driver.load(keys(range(COUNT)), target)) and same(truth, target)
        assert driver.store(keys(range(50, 60)), pages(10, SIZE)).is_successful()
        until("late answers gave their leases back", lambda: leases(daemon) == 0)
        print(f"longest load {loads.longest:.3f} s of {loads.ended}, {loads.hits} hits")
    finally:
        daemon.remove()
        made.close()


def leases(daemon):
    return sum(domain["leases"] for domain in daemon.status()["domains"])


def test_closing_while_the_daemon_stands_still_waits_for_no_answer():
    daemon = Daemon()
    made = adapter(daemon, load_timeout_ms=60_000, lookup_timeout_ms=60_000, store_timeout_ms=60_000)
    try:
        driver = Driver(made)
        assert driver.store(keys(range(COUNT)), pages(COUNT, SIZE, 1)).is_successful()
        daemon.pause()
        made.submit_lookup_and_lock_task(keys(range(COUNT)), {})
        made.submit_touch(keys(range(COUNT)))
        loading, storing = pages(COUNT, SIZE), pages(COUNT, SIZE, 2)
        load = made.submit_load_task(keys(range(COUNT)), loading)
        made.submit_store_task(keys(range(100, 100 + COUNT)), storing)
        time.sleep(0.1)
        begun = time.monotonic()
        made.close()
        assert time.monotonic() - begun < 5.0, "far less than any of its deadlines"
        assert not any(bits(made.query_load_result(load), COUNT))
    finally:
        daemon.remove()
        made.close()


def test_short_stalls_at_any_moment_corrupt_nothing():
    daemon = Daemon()
    made = adapter(daemon, load_timeout_ms=60, lookup_timeout_ms=60)
    try:
        driver = Driver(made)
        truth = patterned(range(COUNT), SIZE)
        assert driver.store(keys(range(COUNT)), truth).is_successful()
        loads = Loads(made, truth)
        moments = random.Random(7)
        for number in range(30):
            begun = loads.begin()
            time.sleep(moments.random() * 0.006)
            daemon.pause()
            timer = threading.Timer(0.1, daemon.resume)
            timer.start()
            loads.end(*begun, number)
            timer.join()
            until("the adapter is back", made.core.is_healthy)
        loads.check_reused()
        assert loads.longest <= 0.06 + GRACE, f"a load took {loads.longest:.3f} s"
        assert 0 < loads.hits, "no load was ever in time"
        until("late answers gave their leases back", lambda: leases(daemon) == 0)
    finally:
        daemon.remove()
        made.close()
