"""An invalidation at the node reaches LMCache's own memory, against LMCache's own storage manager."""

import argparse
import json
import time
import types

import pytest
import torch
from lmcache.v1.distributed.api import GroupedObjectKeys, MemoryLayoutDesc, ObjectKey, PrefetchTaskSpec
from lmcache.v1.distributed.config import (
    EvictionConfig,
    L1ManagerConfig,
    L1MemoryManagerConfig,
    StorageManagerConfig,
)
from lmcache.v1.distributed.l2_adapters.config import parse_args_to_l2_adapters_config
from lmcache.v1.distributed.storage_manager import StorageManager

from conftest import until
from kvtier.lmcache import PurgeModule

LAYOUT = MemoryLayoutDesc(shapes=[torch.Size([1 << 20])], dtypes=[torch.uint8])


class Server:
    """What `lmcache server` builds around its storage manager, as far as the purge module sees it."""

    def __init__(self, daemon):
        spec = {
            "type": "plugin",
            "module_path": "kvtier.lmcache",
            "class_name": "KvtierL2Adapter",
            "adapter_params": {"socket": daemon.socket},
        }
        l2 = parse_args_to_l2_adapters_config(argparse.Namespace(l2_adapter=[json.dumps(spec)]))
        memory = L1MemoryManagerConfig(size_in_bytes=256 << 20, use_lazy=False, align_bytes=4096, shm_name="")
        self.manager = StorageManager(
            StorageManagerConfig(
                l1_manager_config=L1ManagerConfig(memory_config=memory, write_ttl_seconds=600, read_ttl_seconds=300),
                eviction_config=EvictionConfig(eviction_policy="LRU"),
                l2_adapter_config=l2,
            )
        )
        self.adapter = self.manager.l2_adapters()[0][1]
        until("the adapter connects", self.adapter.core.is_healthy)
        self.module = PurgeModule(types.SimpleNamespace(storage_manager=self.manager), {"processor": "lmcache-test"})

    def begin(self, keys, fill):
        objects = self.manager.reserve_write(keys, LAYOUT)
        for key in keys:
            objects[key].tensor.fill_(fill)

    def write(self, keys, fill):
        self.begin(keys, fill)
        self.manager.finish_write(keys)

    def hits(self, keys):
        """Hits in L1 and in kvtier, and the first byte of each object."""
        row = GroupedObjectKeys(keys=keys, object_group_id=0, layout_desc=LAYOUT)
        handle = self.manager.submit_prefetch_task(PrefetchTaskSpec(key_groups=[row]))
        assert self.manager.wait_prefetch_status(handle, 10.0)
        result = self.manager.query_prefetch_status(handle)
        count = result.l1_hit_count + result.l2_hit_count
        bytes_read = []
        if count:
            with self.manager.read_prefetched_results(keys[:count]) as objects:
                bytes_read = [int(object.tensor[0]) for object in objects]
            self.manager.finish_read_prefetched(keys[:count])
        return result.l1_hit_count, result.l2_hit_count, bytes_read

    def close(self):
        self.module.close()
        self.manager.close()


@pytest.fixture
def server(daemon):
    server = Server(daemon)
    yield server
    server.close()


def keys(salt, numbers=range(4)):
    return [ObjectKey(bytes([number]) * 32, "model", 0, cache_salt=salt) for number in numbers]


def stored(server, salt, objects):
    return server.adapter.get_usage().bytes_by_cache_salt.get(salt, 0) == objects << 20


def test_one_salt_is_purged_everywhere_within_a_second_and_the_other_stays(daemon, server):
    server.write(keys("a"), 1)
    server.write(keys("b"), 2)
    until("both are stored", lambda: stored(server, "a", 4) and stored(server, "b", 4))
    assert server.hits(keys("a")) == (4, 0, [1] * 4)
    assert server.hits(keys("never")) == (0, 0, []), "the same tokens under another salt"
    assert daemon.kvctl("invalidate", "lmcache:a").returncode == 0
    invalidated = time.monotonic()
    while server.hits(keys("a"))[:2] != (0, 0):
        assert time.monotonic() - invalidated < 1.0, "older bytes were served a second after the invalidation"
    assert server.hits(keys("b")) == (4, 0, [2] * 4)
    server.manager.clear(force=True)
    assert server.hits(keys("a"))[:2] == (0, 0)
    assert server.hits(keys("b")) == (0, 4, [2] * 4), "the other salt is in kvtier still"
    assert dict(server.adapter.get_usage().bytes_by_cache_salt) == {"b": 4 << 20}

    def confirmed():
        listed = [entry for domain in daemon.status()["domains"] for entry in domain["processors"]]
        return any(
            entry["processor"] == "lmcache-test"
            and entry["namespace"] == "lmcache:a"
            and entry["confirmed_generation"] == entry["generation"]
            and entry["generation"] > 0
            for entry in listed
        )

    until("the purge is confirmed to the node", confirmed)
    server.write(keys("a"), 3)
    until("new objects are stored again", lambda: stored(server, "a", 4))
    server.manager.clear(force=True)
    assert server.hits(keys("a")) == (0, 4, [3] * 4)


def test_what_was_being_written_at_the_invalidation_is_neither_kept_nor_stored(daemon, server):
    server.write(keys("a", range(1)), 1)
    until("it is stored", lambda: stored(server, "a", 1))
    server.begin(keys("a", range(1, 4)), 1)
    assert daemon.kvctl("invalidate", "lmcache:a").returncode == 0
    until("the purge ran", lambda: server.module.report_status()["kvtier_purge"]["purges"] == 1)
    server.manager.finish_write(keys("a", range(1, 4)))
    until("it is gone from L1", lambda: server.hits(keys("a", range(1, 4)))[0] == 0)
    time.sleep(0.5)
    assert server.hits(keys("a"))[:2] == (0, 0)
    assert not server.adapter.get_usage().bytes_by_cache_salt.get("a")


def test_an_object_that_is_being_read_goes_once_the_reader_is_done(daemon, server):
    server.write(keys("a"), 1)
    until("it is stored", lambda: stored(server, "a", 4))
    row = GroupedObjectKeys(keys=keys("a"), object_group_id=0, layout_desc=LAYOUT)
    handle = server.manager.submit_prefetch_task(PrefetchTaskSpec(key_groups=[row]))
    assert server.manager.wait_prefetch_status(handle, 10.0)
    assert server.manager.query_prefetch_status(handle).l1_hit_count == 4
    assert daemon.kvctl("invalidate", "lmcache:a").returncode == 0
    until("the purge ran", lambda: server.module.report_status()["kvtier_purge"]["purges"] == 1)
    with server.manager.read_prefetched_results(keys("a")) as objects:
        assert [int(object.tensor[0]) for object in objects] == [1] * 4, "never freed under a reader"
    assert server.module.report_status()["kvtier_purge"]["waiting_keys"] == 4
    server.manager.finish_read_prefetched(keys("a"))
    until("it is gone", lambda: server.hits(keys("a"))[:2] == (0, 0))
    until("nothing waits", lambda: server.module.report_status()["kvtier_purge"]["waiting_keys"] == 0)
