"""Brings invalidations into LMCache's own memory: `--server-module '{"module_path":"kvtier.lmcache.purge"}'`."""

from __future__ import annotations

import os
import socket
import threading
import time

from lmcache.logging import init_logger
from lmcache.v1.distributed.internal_api import L1ManagerListener
from lmcache.v1.multiprocess.engine_module import DiscoverableModule

from kvtier.lmcache.adapter import KvtierL2Adapter

logger = init_logger(__name__)

# A locked object is tried again after this long: somebody reads or writes it, and its memory must not go under them.
_RETRY_SECONDS = 0.02


class _Tracker(L1ManagerListener):
    """Which objects L1 holds and which are being written, by salt. Called within L1's lock: it only notes."""

    def __init__(self):
        self._lock = threading.Lock()
        self._held: dict = {}
        self._writing: dict = {}
        self._doomed: set = set()
        self.on_doomed = lambda keys: None

    def _add(self, table, keys):
        for key in keys:
            table.setdefault(key.cache_salt, set()).add(key)

    def _drop(self, table, keys):
        for key in keys:
            held = table.get(key.cache_salt)
            if held is not None:
                held.discard(key)
                if not held:
                    del table[key.cache_salt]

    def on_l1_keys_reserved_write(self, keys):
        with self._lock:
            self._add(self._writing, keys)

    def on_l1_keys_write_finished(self, keys):
        with self._lock:
            self._drop(self._writing, keys)
            self._add(self._held, keys)
            doomed = [key for key in keys if key in self._doomed]
            self._doomed.difference_update(doomed)
        if doomed:
            self.on_doomed(doomed)

    def on_l1_keys_finish_write_and_reserve_read(self, keys):
        self.on_l1_keys_write_finished(keys)

    def on_l1_keys_deleted_by_manager(self, keys):
        with self._lock:
            self._drop(self._held, keys)
            self._drop(self._writing, keys)
            self._doomed.difference_update(keys)

    def on_l1_keys_reserved_read(self, keys):
        pass

    def on_l1_keys_read_finished(self, keys):
        pass

    def on_l1_keys_accessed(self, keys):
        pass

    def doom(self, salts):
        """Everything of these salts that L1 holds; what is being written is doomed once it is finished."""
        with self._lock:
            held = [key for salt in salts for key in self._held.get(salt, ())]
            writing = [key for salt in salts for key in self._writing.get(salt, ())]
            self._doomed.update(writing)
        return held, writing

    def remaining(self, keys):
        with self._lock:
            return [key for key in keys if key in self._held.get(key.cache_salt, ())]

    def count(self):
        with self._lock:
            return sum(len(keys) for keys in self._held.values())


class PurgeModule(DiscoverableModule):
    """Deletes a salt's objects from L1 when the node invalidates its namespace, and then confirms to the node.

    Until it has confirmed, stores of that namespace are refused, for their bytes may be older than the invalidation.
    """

    module_name = "kvtier_purge"

    @classmethod
    def create(cls, build_ctx):
        return cls(build_ctx.engine_context, dict(build_ctx.config_for(cls)))

    def __init__(self, ctx, config=None):
        config = config or {}
        self._ctx = ctx
        self._manager = ctx.storage_manager
        self._processor = config.get("processor") or f"lmcache@{socket.gethostname()}:{os.getpid()}"
        self._tracker = _Tracker()
        self._tracker.on_doomed = self._doomed
        self._pending: list = []
        self._waiting: set = set()
        self._condition = threading.Condition()
        self._stopped = False
        self._purges = 0
        self._purged_keys = 0
        for l1 in self._manager._l1_managers_by_id.values():
            l1.register_listener(self._tracker)
        self._adapters = [adapter for adapter in map(_inner, self._manager.l2_adapters()) if adapter is not None]
        self._thread = threading.Thread(target=self._run, name="kvtier-purge", daemon=True)
        self._thread.start()
        for adapter in self._adapters:
            adapter.core.expect_purger(self._processor)
            adapter.add_purge_listener(lambda *notice, adapter=adapter: self._invalidated(adapter, *notice))
        if not self._adapters:
            logger.warning("kvtier's purge module found no kvtier adapter: nothing will be purged")

    @property
    def context(self):
        return self._ctx

    def report_status(self) -> dict:
        return {
            "kvtier_purge": {
                "processor": self._processor,
                "adapters": len(self._adapters),
                "tracked_keys": self._tracker.count(),
                "purges": self._purges,
                "purged_keys": self._purged_keys,
                "waiting_keys": len(self._waiting),
            }
        }

    def close(self) -> None:
        with self._condition:
            self._stopped = True
            self._condition.notify_all()
        self._thread.join(timeout=5)

    def _doomed(self, keys):
        # Within L1's lock, before LMCache's own threads can hand these objects to an adapter.
        for adapter in self._adapters:
            adapter.core.refuse_stores(keys)
        with self._condition:
            self._waiting.update(keys)
            self._condition.notify_all()

    def _invalidated(self, adapter, namespace, salts, generation):
        with self._condition:
            self._pending.append((adapter, namespace, salts, generation))
            self._condition.notify_all()

    def _run(self):
        # Purges that wait for objects somebody still reads: (adapter, namespace, generation, keys).
        open_purges: list = []
        while True:
            with self._condition:
                if not self._pending and not self._waiting and not open_purges and not self._stopped:
                    self._condition.wait()
                elif not self._pending and not self._stopped and (self._waiting or open_purges):
                    self._condition.wait(_RETRY_SECONDS)
                if self._stopped:
                    return
                pending, self._pending = self._pending, []
            try:
                for adapter, namespace, salts, generation in pending:
                    held, writing = self._tracker.doom(salts)
                    with self._condition:
                        self._waiting.update(held)
                    self._purges += 1
                    open_purges.append((adapter, namespace, generation, set(held) | set(writing)))
                self._delete_waiting()
                open_purges = [purge for purge in open_purges if not self._confirm(*purge)]
            except Exception:
                logger.exception("kvtier: purging L1 failed; it is tried again")
                time.sleep(_RETRY_SECONDS)

    def _delete_waiting(self):
        with self._condition:
            keys = list(self._waiting)
        if not keys:
            return
        # Never by force: a locked object's memory is in use.
        self._manager.delete_l1_keys(keys)
        left = set(self._tracker.remaining(keys))
        with self._condition:
            self._waiting.difference_update(key for key in keys if key not in left)
        self._purged_keys += len(keys) - len(left)

    def _confirm(self, adapter, namespace, generation, keys) -> bool:
        if self._tracker.remaining(keys):
            return False
        adapter.core.purged(namespace, generation)
        return True


def _inner(described):
    adapter = described[1]
    # A serializer may be wrapped around it.
    while adapter is not None and not isinstance(adapter, KvtierL2Adapter):
        adapter = getattr(adapter, "_inner", None)
    return adapter
