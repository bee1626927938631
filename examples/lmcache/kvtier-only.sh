#!/bin/sh
# kvtier keeps everything; LMCache's own memory is only a way through, from which an object goes once it is stored.
# Further arguments go to `lmcache server`. See README.md.
set -eu
socket="${KVTIER_SOCKET:?the path of kv-daemon's socket}"
exec lmcache server \
    --host "${LMCACHE_HOST:-127.0.0.1}" --port "${LMCACHE_PORT:-5555}" \
    --http-host "${LMCACHE_HOST:-127.0.0.1}" --http-port "${LMCACHE_HTTP_PORT:-8080}" \
    --l1-size-gb "${LMCACHE_L1_GB:-2}" --chunk-size "${LMCACHE_CHUNK:-256}" \
    --l2-store-policy skip_l1 --eviction-policy noop \
    --server-module '{"module_path":"kvtier.lmcache.purge"}' \
    --l2-adapter '{"type":"plugin","module_path":"kvtier.lmcache","class_name":"KvtierL2Adapter",
        "adapter_params":{"socket":"'"$socket"'","tokens_per_chunk":'"${LMCACHE_CHUNK:-256}"',"failed_stores":"drop"}}' \
    "$@"
