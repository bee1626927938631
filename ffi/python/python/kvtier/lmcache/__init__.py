"""kvtier as a tier of LMCache.

`KvtierL2Adapter` is an adapter of type "plugin" for LMCache's multiprocess server; `PurgeModule` (for `--server-module`,
module path `kvtier.lmcache.purge`) brings invalidations into LMCache's own memory. This package translates types and
orders calls; the state machine is `kvtier::adapter` in Rust.
"""

from kvtier.lmcache.adapter import KvtierL2Adapter, KvtierL2AdapterConfig

__all__ = ["KvtierL2Adapter", "KvtierL2AdapterConfig", "PurgeModule"]


def __getattr__(name):
    # It needs LMCache's server, which an adapter alone does not.
    if name == "PurgeModule":
        from kvtier.lmcache.purge import PurgeModule

        return PurgeModule
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
