"""kvtier: a tier manager for KV caches. `Client` asks a kv-daemon on this machine; `kvtier.lmcache` is its LMCache adapter.

    with kvtier.Client("/run/kvtier.sock", namespace="tenant-a", realization={"model": "m", "dtype": "bf16"}) as client:
        client.put(key, data, parent="root", tokens=256)
        got = client.get_into(key, target)

Outcomes such as a miss are returned; what went wrong is raised, as one subclass of `Error` for each remedy.
"""

from kvtier._kvtier import (
    Block,
    Busy,
    Client,
    Closed,
    Corrupt,
    Denied,
    Device,
    DeviceCache,
    DeviceGet,
    DevicePut,
    Error,
    Flushed,
    Found,
    Got,
    Internal,
    Invalid,
    IpcArray,
    KvLayout,
    Stale,
    Unavailable,
)

__all__ = [
    "Block",
    "Busy",
    "Client",
    "Closed",
    "Corrupt",
    "Denied",
    "Device",
    "DeviceCache",
    "DeviceGet",
    "DevicePut",
    "Error",
    "Flushed",
    "Found",
    "Got",
    "Internal",
    "Invalid",
    "IpcArray",
    "KvLayout",
    "Stale",
    "Unavailable",
]
