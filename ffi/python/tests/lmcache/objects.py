"""LMCache objects and what LMCache's controllers do with an adapter."""

import select
import time

import torch
from lmcache.v1.distributed.api import MemoryLayoutDesc, ObjectKey
from lmcache.v1.memory_management import MemoryFormat, MemoryObjMetadata, TensorMemoryObj
from lmcache.v1.platform import consume_fd

from conftest import until
from kvtier.lmcache import KvtierL2Adapter, KvtierL2AdapterConfig

NO_LAYOUT = {0: MemoryLayoutDesc(shapes=[], dtypes=[])}


def layout(size):
    return MemoryLayoutDesc(shapes=[torch.Size([size])], dtypes=[torch.uint8])


def key(number, salt="", model="model", rank=0, group=0):
    return ObjectKey(number.to_bytes(32, "big"), model, rank, group, salt)


def keys(numbers, **more):
    return [key(number, **more) for number in numbers]


def page(size, fill=0):
    raw = torch.full((size,), fill, dtype=torch.uint8)
    meta = MemoryObjMetadata(
        shape=torch.Size([size]), dtype=torch.uint8, address=0, phy_size=size, fmt=MemoryFormat.KV_2LTD, ref_count=1
    )
    return TensorMemoryObj(raw, meta, parent_allocator=None)


def pages(count, size, fill=0):
    return [page(size, fill) for _ in range(count)]


def patterned(numbers, size, seed=0):
    """Each differs from every other in most bytes."""
    made = pages(len(numbers), size)
    for number, object in zip(numbers, made):
        generator = torch.Generator().manual_seed(number * 1000 + seed)
        object.raw_data.copy_(torch.randint(0, 256, (size,), dtype=torch.uint8, generator=generator))
    return made


def adapter(daemon, **params):
    made = KvtierL2Adapter(KvtierL2AdapterConfig.from_dict({"socket": daemon.socket, **params}))
    until("the adapter connects", made.core.is_healthy)
    return made


def wait(fd, query, seconds=60.0):
    """The result of `query`, asked again whenever `fd` says so; and when it came."""
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    deadline = time.monotonic() + seconds
    while True:
        result = query()
        if result is not None:
            return result
        assert time.monotonic() < deadline, "no completion"
        if poll.poll(100):
            consume_fd(fd)


class Driver:
    """One adapter, as LMCache's controllers use it."""

    def __init__(self, adapter):
        self.adapter = adapter
        self._stored = {}

    def store(self, keys, objects):
        task = self.adapter.submit_store_task(keys, objects)

        def query():
            self._stored.update(self.adapter.pop_completed_store_tasks())
            return self._stored.pop(task, None)

        return wait(self.adapter.get_store_event_fd(), query)

    def lookup(self, keys, layouts=NO_LAYOUT):
        task = self.adapter.submit_lookup_and_lock_task(keys, layouts)
        fd = self.adapter.get_lookup_and_lock_event_fd()
        return bits(wait(fd, lambda: self.adapter.query_lookup_and_lock_result(task)), len(keys))

    def load(self, keys, objects):
        task = self.adapter.submit_load_task(keys, objects)
        fd = self.adapter.get_load_event_fd()
        return bits(wait(fd, lambda: self.adapter.query_load_result(task)), len(keys))


def bits(bitmap, count):
    return [bitmap.test(at) for at in range(count)]


def same(objects, others):
    return all(torch.equal(one.raw_data, other.raw_data) for one, other in zip(objects, others, strict=True))
