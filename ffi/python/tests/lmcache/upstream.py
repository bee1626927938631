"""`pytest -p upstream`: LMCache's own tests of its mock adapter, with ours in its place."""

import atexit
import itertools

import lmcache.v1.distributed.l2_adapters.mock_l2_adapter as mock

from conftest import Daemon, until
from kvtier.lmcache import KvtierL2Adapter, KvtierL2AdapterConfig

_daemon = None
_numbers = itertools.count()


class Adapter(KvtierL2Adapter):
    """Each is empty at first, as a mock is: it has namespaces of its own."""

    def __init__(self, config, *_arguments, **_more):
        global _daemon
        if _daemon is None:
            _daemon = Daemon()
            atexit.register(_daemon.remove)
        params = {
            "socket": _daemon.socket,
            "namespace_prefix": f"upstream-{next(_numbers)}:",
            "capacity_bytes": int(config.max_size_gb * (1 << 30)),
        }
        super().__init__(KvtierL2AdapterConfig.from_dict(params))
        until("the adapter connects", self._core.is_healthy)


mock.MockL2Adapter = Adapter
