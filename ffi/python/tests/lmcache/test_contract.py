"""What LMCache expects of an adapter and its own tests do not ask, against a real kv-daemon."""

import time

import pytest
from lmcache.v1.distributed.internal_api import L2AdapterListener

from conftest import until
from objects import Driver, adapter, key, keys, layout, page, pages, patterned, same

SIZE = 256 << 10


@pytest.fixture
def driver(daemon):
    made = adapter(daemon)
    yield Driver(made)
    made.close()


class Listener(L2AdapterListener):
    def __init__(self):
        self.stored, self.accessed, self.deleted = [], [], []

    def on_l2_keys_stored(self, keys, sizes):
        self.stored += zip(keys, sizes)

    def on_l2_keys_accessed(self, keys):
        self.accessed += keys

    def on_l2_keys_deleted(self, keys):
        self.deleted += keys


@pytest.mark.parametrize("size", [4096, 100_001, 2 << 20, 32 << 20])
def test_every_byte_comes_back_in_every_size(driver, size):
    count = max(1, min(16, (64 << 20) // size))
    stored = patterned(range(count), size)
    result = driver.store(keys(range(count)), stored)
    assert result.is_successful() and result.bytes_transferred() == count * size
    assert all(driver.lookup(keys(range(count)), {0: layout(size)}))
    loaded = pages(count, size, 0xEE)
    assert all(driver.load(keys(range(count)), loaded))
    assert same(stored, loaded)


def test_the_same_tokens_under_another_salt_never_hit(driver):
    assert driver.store(keys(range(4), salt="alice"), patterned(range(4), SIZE)).is_successful()
    for salt in ("bob", "", "alic", "alicee"):
        assert not any(driver.lookup(keys(range(4), salt=salt), {0: layout(SIZE)})), salt
        target = pages(4, SIZE, 7)
        assert not any(driver.load(keys(range(4), salt=salt), target)), salt
        assert same(target, pages(4, SIZE, 7)), "the page of a miss is not touched"


def test_another_layout_rank_group_or_model_is_a_miss(driver):
    assert driver.store([key(1)], [page(SIZE, 3)]).is_successful()
    assert driver.lookup([key(1)], {0: layout(SIZE)}) == [True]
    assert driver.lookup([key(1)], {0: layout(SIZE * 2)}) == [False]
    for size in (SIZE // 2, SIZE * 2):
        assert driver.load([key(1)], [page(size)]) == [False]
    for other in (key(1, rank=1), key(1, group=1), key(1, model="other")):
        assert driver.load([other], [page(SIZE)]) == [False]
    assert driver.store([key(1)], [page(SIZE * 2, 4)]).is_successful(), "both layouts are kept"
    target = [page(SIZE), page(SIZE * 2)]
    assert driver.load([key(1), key(1)], target) == [True, True]
    assert same(target, [page(SIZE, 3), page(SIZE * 2, 4)])


def test_many_tasks_at_once_all_complete(driver):
    adapter = driver.adapter
    stored = patterned(range(64), SIZE)
    tasks = [adapter.submit_store_task([key(at)], [stored[at]]) for at in range(64)]
    done = {}
    until("all stores complete", lambda: done.update(adapter.pop_completed_store_tasks()) or len(done) == 64)
    assert all(done[task].is_successful() for task in tasks)
    targets = pages(64, SIZE)
    loads = [adapter.submit_load_task([key(at)], [targets[at]]) for at in range(64)]
    results = {}

    def collect():
        for task in loads:
            if task not in results and (bitmap := adapter.query_load_result(task)) is not None:
                results[task] = bitmap.test(0)
        return len(results) == 64

    until("all loads complete", collect)
    assert all(results.values()) and same(stored, targets)


def test_listeners_and_usage_follow_stores_loads_deletes_and_evictions(driver):
    listener = Listener()
    driver.adapter.register_listener(listener)
    driver.store(keys(range(3), salt="a"), pages(3, SIZE))
    driver.store(keys(range(3), salt="a"), pages(3, SIZE))
    assert listener.stored == [(key, SIZE) for key in keys(range(3), salt="a")], "each once"
    assert dict(driver.adapter.get_usage().bytes_by_cache_salt) == {"a": 3 * SIZE}
    driver.load(keys(range(4), salt="a"), pages(4, SIZE))
    assert listener.accessed == keys(range(3), salt="a")
    driver.adapter.delete(keys([0], salt="a"))
    assert listener.deleted == keys([0], salt="a")
    other = Driver(adapter_beside(driver))
    other.adapter.delete(keys([1], salt="a"))
    assert driver.lookup(keys([1], salt="a"), {0: layout(SIZE)}) == [False]
    until("what the node no longer has is told", lambda: keys([1], salt="a")[0] in listener.deleted)
    assert dict(driver.adapter.get_usage().bytes_by_cache_salt) == {"a": SIZE}
    other.adapter.close()


def test_a_slow_listener_holds_no_load_up_and_still_hears_of_it(daemon, driver):
    class Slow(Listener):
        def on_l2_keys_stored(self, keys, sizes):
            time.sleep(0.5)
            super().on_l2_keys_stored(keys, sizes)

    other = Driver(adapter(daemon))
    assert other.store(keys(range(2), salt="a"), pages(2, SIZE)).is_successful()
    other.adapter.close()
    listener = Slow()
    driver.adapter.register_listener(listener)
    assert all(driver.load(keys(range(2), salt="a"), pages(2, SIZE)))
    assert not listener.stored, "bytes wait for no listener"
    # Its result is fetched while the listener is still at the first.
    assert all(driver.load(keys(range(2), salt="a"), pages(2, SIZE)))
    assert not listener.stored
    until("the listener heard of both", lambda: listener.accessed == 2 * keys(range(2), salt="a"))
    assert dict(driver.adapter.get_usage().bytes_by_cache_salt) == {"a": 2 * SIZE}
    assert not driver.adapter._loads and not driver.adapter._late and not driver.adapter._told


def adapter_beside(driver):
    """A second LMCache over the same node."""
    from kvtier.lmcache import KvtierL2Adapter, KvtierL2AdapterConfig

    socket = driver.adapter.report_status()["socket"]
    made = KvtierL2Adapter(KvtierL2AdapterConfig.from_dict({"socket": socket}))
    until("the second adapter connects", made.core.is_healthy)
    driver_beside = Driver(made)
    driver_beside.load(keys([1], salt="a"), [page(SIZE)])
    return made


def test_listing_pages_through_every_key_once(driver):
    driver.store(keys(range(25)), pages(25, 4096))
    driver.store([key(1, model="other")], [page(4096)])
    seen, cursor = [], None
    while True:
        listed = driver.adapter.list_l2_keys("model", 10, cursor)
        seen += [entry.key.to_object_key() for entry in listed.entries]
        assert all(entry.size_bytes == 4096 for entry in listed.entries)
        cursor = listed.next_page_token
        if cursor is None:
            break
    assert sorted(seen, key=lambda key: key.chunk_hash) == keys(range(25))
    for wrong in (dict(page_size=0), dict(cursor="nonsense")):
        with pytest.raises(ValueError):
            driver.adapter.list_l2_keys(**wrong)


def test_nothing_raises_into_lmcache(driver):
    adapter = driver.adapter
    broken = [object()]
    task = adapter.submit_store_task(broken, broken)
    assert not adapter.pop_completed_store_tasks()[task].is_successful()
    task = adapter.submit_lookup_and_lock_task(broken, None)
    assert adapter.query_lookup_and_lock_result(task).test(0) is False
    task = adapter.submit_load_task(keys([1]), [])
    assert adapter.query_load_result(task).test(0) is False
    adapter.submit_unlock(broken)
    adapter.submit_touch(broken)
    adapter.delete(broken)


def test_while_the_daemon_is_away_everything_misses_at_once(daemon, driver):
    stored = patterned(range(4), SIZE)
    driver.store(keys(range(4)), stored)
    daemon.kill()
    until("the adapter notices", lambda: not driver.lookup(keys(range(1)))[0])
    begun = time.monotonic()
    assert not driver.store(keys(range(4, 8)), pages(4, SIZE)).is_successful()
    assert not any(driver.load(keys(range(4)), pages(4, SIZE)))
    assert time.monotonic() - begun < 1.0, "far less than any deadline"
    status = driver.adapter.report_status()
    assert status["is_healthy"] is False and status["state"] == "down" and status["why"]
    daemon.start()
    until("the adapter is back", driver.adapter.core.is_healthy)
    assert driver.store(keys(range(4)), stored).is_successful()
    target = pages(4, SIZE)
    assert all(driver.load(keys(range(4)), target)) and same(stored, target)


def test_what_was_flushed_survives_kill_9(daemon, driver):
    stored = patterned(range(8), SIZE)
    driver.store(keys(range(8), salt="a"), stored)
    assert daemon.kvctl("flush").returncode == 0
    daemon.kill()
    daemon.start()
    until("the adapter is back", driver.adapter.core.is_healthy)
    assert all(driver.lookup(keys(range(8), salt="a"), {0: layout(SIZE)}))
    target = pages(8, SIZE)
    assert all(driver.load(keys(range(8), salt="a"), target)) and same(stored, target)
    fresh = Driver(adapter(daemon))
    assert all(fresh.load(keys(range(8), salt="a"), pages(8, SIZE))), "a new LMCache finds it too"
    fresh.adapter.close()


def test_closing_with_tasks_in_flight_ends_them(daemon):
    made = adapter(daemon)
    driver = Driver(made)
    driver.store(keys(range(16)), pages(16, 4 << 20, 1))
    targets = pages(16, 4 << 20)
    for _ in range(4):
        made.submit_load_task(keys(range(16)), targets)
    made.close()
    for target in targets:
        target.raw_data.fill_(9)
    time.sleep(0.2)
    assert all(bool((target.raw_data == 9).all()) for target in targets)
    made.close()
