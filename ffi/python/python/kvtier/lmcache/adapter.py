"""LMCache's `L2AdapterInterface` over `kvtier::adapter`."""

from __future__ import annotations

import json
import threading
import weakref

import torch  # noqa: F401  LMCache's native library needs it loaded first.
from lmcache.lmcache_native import Bitmap
from lmcache.logging import init_logger
from lmcache.utils import get_size_bytes
from lmcache.v1.distributed.api import (
    EncodedObjectKey,
    KeyEntry,
    KeyListPage,
    MemoryResidency,
    MemorySegment,
    MemoryTags,
    ObjectKey,
)
from lmcache.v1.distributed.internal_api import L2StoreResult
from lmcache.v1.distributed.l2_adapters.base import L2AdapterInterface
from lmcache.v1.distributed.l2_adapters.config import L2AdapterConfigBase
from lmcache.v1.mp_observability.otel_init import register_gauge

from kvtier._kvtier import LmcacheAdapter

logger = init_logger(__name__)

_NOTICE_WAIT_MS = 1000
# Loads whose listeners are told after LMCache has fetched the result, at once.
_LATE_MAX = 1024

_living: weakref.WeakSet = weakref.WeakSet()
_measured = False


def _measure(adapter) -> None:
    """Shows LMCache's metrics by which path bytes come; a gauge is registered once for a process."""
    global _measured
    _living.add(adapter)
    if _measured:
        return
    _measured = True
    for name in ("stored_bytes", "loaded_bytes"):
        register_gauge(
            "lmcache.kvtier",
            f"lmcache_mp.kvtier_{name}",
            f"{name.replace('_', ' ')} of kvtier's adapters, by the path that they took",
            lambda name=name: _observations(name),
        )


def _observations(name):
    sums: dict = {}
    for adapter in list(_living):
        status = adapter.report_status()
        sums[status["path"]] = sums.get(status["path"], 0) + status[name]
    return [(sum, {"path": path}) for path, sum in sums.items()]


class KvtierL2AdapterConfig(L2AdapterConfigBase):
    """`adapter_params`: the fields of `kvtier::adapter::AdapterSettings`."""

    def __init__(self, params: dict):
        self.params = params

    @classmethod
    def from_dict(cls, d: dict) -> "KvtierL2AdapterConfig":
        if not isinstance(d.get("socket"), str) or not d["socket"]:
            raise ValueError("adapter_params: socket: give the path of kv-daemon's socket")
        return cls(dict(d))

    @classmethod
    def help(cls) -> str:
        return (
            "kvtier adapter_params:\n"
            "- socket (str): path of kv-daemon's socket (required)\n"
            "- token (str): names a trust domain (default: the user id does)\n"
            "- namespace_prefix (str): before a salt in its namespace's name (default 'lmcache:')\n"
            "- namespaces (dict): names of certain salts' namespaces\n"
            "- hide_salts (bool): digest salts in names (default false)\n"
            "- label (str): what all stores are put under, for `kvctl purge --label` (default: nothing)\n"
            "- tokens_per_chunk, prompt_tokens, queue_wait_us (int): what LMCache does not tell (default 256, unknown)\n"
            "- copy_threads (int): default one for each core, at most 4\n"
            "- lookup_timeout_ms, load_timeout_ms, store_timeout_ms (int): default 1000, 5000, 30000\n"
            "- failed_stores ('report' or 'drop'): 'drop' with skip_l1 and noop (default 'report')\n"
            "- capacity_bytes (int): for LMCache's own eviction (default 0: none)\n"
        )


def _guarded(name):
    """Nothing raises into LMCache's threads: what cannot even be begun is logged."""
    logger.exception("kvtier: %s failed", name)


class KvtierL2Adapter(L2AdapterInterface):
    """Stores and loads objects at a kv-daemon on this machine.

    Objects are kept from a task's submission to its completion, so that their memory is there as long as a thread of the
    adapter may touch it.
    """

    def __init__(self, config: KvtierL2AdapterConfig, l1_memory_desc=None, **_kwargs):
        self._core = LmcacheAdapter(json.dumps(config.params))
        super().__init__(max_capacity_bytes=self._core.capacity_bytes())
        self._lock = threading.Lock()
        self._stores: dict = {}
        self._loads: dict = {}
        # Keys of loads that LMCache has fetched before its listeners were told; and loads of which they were told first.
        self._late: dict = {}
        self._told: set = set()
        self._purge_listeners: list = []
        self._closed = False
        self._listening = threading.Thread(target=self._listen, name="kvtier-notices", daemon=True)
        self._listening.start()
        _measure(self)

    # Descriptors

    def get_store_event_fd(self) -> int:
        return self._core.store_fd()

    def get_lookup_and_lock_event_fd(self) -> int:
        return self._core.lookup_fd()

    def get_load_event_fd(self) -> int:
        return self._core.load_fd()

    # Stores

    def submit_store_task(self, keys, objects) -> int:
        try:
            with self._lock:
                task = self._core.submit_store(keys, objects)
                self._stores[task] = (keys, objects)
            return task
        except Exception:
            _guarded("a store")
            return self._core.fail_store()

    def pop_completed_store_tasks(self) -> dict:
        completed = self._core.completed_stores()
        with self._lock:
            for task, _, _ in completed:
                self._stores.pop(task, None)
        return {task: L2StoreResult(success, transferred) for task, success, transferred in completed}

    # Lookups

    def submit_lookup_and_lock_task(self, keys, group_layout_descs) -> int:
        try:
            sizes = {
                group: get_size_bytes(layout.shapes, layout.dtypes)
                for group, layout in (group_layout_descs or {}).items()
                if layout is not None and layout.shapes
            }
            return self._core.submit_lookup(keys, sizes)
        except Exception:
            _guarded("a lookup")
            return self._core.fail_lookup(len(keys))

    def query_lookup_and_lock_result(self, task_id: int):
        return _bitmap(self._core.lookup_result(task_id))

    def submit_unlock(self, keys) -> None:
        try:
            self._core.unlock(keys)
        except Exception:
            _guarded("an unlock")

    # Loads

    def submit_load_task(self, keys, objects) -> int:
        try:
            with self._lock:
                task = self._core.submit_load(keys, objects)
                self._loads[task] = (keys, objects)
            return task
        except Exception:
            _guarded("a load")
            return self._core.fail_load(len(keys))

    def query_load_result(self, task_id: int):
        result = self._core.load_result(task_id)
        if result is not None:
            with self._lock:
                entry = self._loads.pop(task_id, None)
                if task_id in self._told:
                    self._told.remove(task_id)
                elif entry is not None and any(result) and len(self._late) < _LATE_MAX:
                    # The keys only: the objects are LMCache's again.
                    self._late[task_id] = entry[0]
        return _bitmap(result)

    # Keys

    def get_memory_tags(self) -> MemoryTags:
        return MemoryTags(MemorySegment.STORAGE, MemoryResidency.LOCAL)

    def delete(self, keys) -> None:
        try:
            removed = self._core.delete(list(keys))
            if removed:
                self._notify_keys_deleted([keys[at] for at, _ in removed], [size for _, size in removed])
        except Exception:
            _guarded("a delete")

    def submit_touch(self, keys) -> None:
        try:
            self._core.touch(list(keys))
            self._notify_keys_accessed(keys)
        except Exception:
            _guarded("a touch")

    def list_l2_keys(self, model_name=None, page_size=500, cursor=None) -> KeyListPage:
        """Objects that this process has stored or found; the node itself knows digests only."""
        if page_size <= 0:
            raise ValueError("page_size must be positive")
        after = _key_of_cursor(cursor) if cursor is not None else None
        listed = self._core.list(model_name, page_size, after)
        entries = tuple(KeyEntry(_key(fields).to_encoded_object_key(), size) for fields, size in listed)
        more = len(entries) == page_size
        return KeyListPage(entries, _cursor_of(entries[-1].key) if more else None)

    # Notices

    def add_purge_listener(self, listener) -> None:
        """`listener(namespace, salts, generation)` is told of invalidations, on the adapter's thread."""
        self._purge_listeners.append(listener)

    @property
    def core(self) -> LmcacheAdapter:
        return self._core

    def _listen(self) -> None:
        while True:
            try:
                notices = self._core.take_notices(_NOTICE_WAIT_MS)
            except Exception:
                _guarded("taking notices")
                continue
            if notices is None:
                return
            for notice in notices:
                try:
                    self._tell(notice)
                except Exception:
                    _guarded("telling a listener")
                finally:
                    if notice[0] in ("stored", "loaded"):
                        self._core.publish(notice[1])

    def _tell(self, notice) -> None:
        kind = notice[0]
        if kind == "stored":
            _, task, known = notice
            # The lock is held from before the submission until the task is noted.
            with self._lock:
                keys, _ = self._stores[task]
            self._tell_known(keys, known)
        elif kind == "loaded":
            _, task, loaded, known = notice
            with self._lock:
                if task in self._loads:
                    keys, _ = self._loads[task]
                    self._told.add(task)
                else:
                    keys = self._late.pop(task)
            self._tell_known(keys, known)
            self._notify_keys_accessed([keys[at] for at in loaded])
        elif kind == "gone":
            _, objects = notice
            self._notify_keys_deleted([_key(fields) for fields, _ in objects], [size for _, size in objects])
        elif kind == "invalidated":
            _, namespace, salts, generation = notice
            for listener in self._purge_listeners:
                listener(namespace, salts, generation)

    def _tell_known(self, keys, known) -> None:
        if known:
            self._notify_keys_stored([keys[at] for at, _ in known], [size for _, size in known])

    # The end

    def report_status(self) -> dict:
        return {"type": type(self).__name__, **json.loads(self._core.report())}

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._core.close()
        self._listening.join(timeout=5)


def _bitmap(result):
    if result is None:
        return None
    bitmap = Bitmap(len(result))
    for at, hit in enumerate(result):
        if hit:
            bitmap.set(at)
    return bitmap


def _key(fields) -> ObjectKey:
    chunk_hash, model, rank, group, salt = fields
    return ObjectKey(chunk_hash, model, rank, group, salt)


def _cursor_of(key: EncodedObjectKey) -> str:
    return json.dumps([key.chunk_hash_hex, key.model_name, key.kv_rank, key.object_group_id, key.cache_salt])


def _key_of_cursor(cursor: str) -> ObjectKey:
    try:
        chunk_hash, model, rank, group, salt = json.loads(cursor)
        return ObjectKey(bytes.fromhex(chunk_hash), model, rank, group, salt)
    except (TypeError, ValueError) as error:
        raise ValueError(f"not a cursor of this adapter: {cursor!r}") from error
