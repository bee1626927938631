"""The wheel's client beside memcpy and a Unix socket's echo, in interleaved rounds of one process.

Run by `cargo xtask bench python [--json]`, which starts the daemon.
"""

import argparse
import ctypes
import json
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import kvtier

MIB = 1 << 20
BATCH = 16
KEYS = 256
ECHO_BYTES = 64
ROUNDS = 15
COPIES_PER_ROUND = 8
CALLS_PER_ROUND = 300
# What the project promises.
RATIO_MIN = 0.80
EXISTS_OVER_ECHO_US_MAX = 120.0


def main():
    parser = argparse.ArgumentParser(prog="cargo xtask bench python")
    parser.add_argument("--socket", required=True, help=argparse.SUPPRESS)
    parser.add_argument("--echo-server", required=True, help=argparse.SUPPRESS)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="interleaved rounds (default %(default)s)")
    arguments = parser.parse_args()
    form = {"bench": "python"}
    with kvtier.Client(arguments.socket, namespace="bench", realization=form) as client:
        result = copies(client, arguments.rounds) | calls(client, arguments.echo_server, arguments.rounds)
    if arguments.json:
        print(json.dumps(result))
    else:
        show(result)
    met = result["get_into_ratio"] >= RATIO_MIN and result["exists_over_echo_us"] <= EXISTS_OVER_ECHO_US_MAX
    sys.exit(0 if met else 1)


def copies(client, rounds):
    """Batches of blocks from host memory into the caller's buffers, beside memcpy between as large buffers."""
    keys = [number.to_bytes(16, "little") for number in range(BATCH)]
    blocks = [bytearray(bytes([number + 1]) * MIB) for number in range(BATCH)]
    assert set(client.put_batch(keys, blocks, parent="root")) <= {"published", "present"}
    targets = [bytearray(MIB) for _ in range(BATCH)]
    outcomes = client.get_into_batch(keys, targets)
    assert all(outcomes) and targets == blocks

    # As the client does it: one call, the interpreter's lock released, sources and targets as far apart as its.
    memcpy = ctypes.CDLL(None).memcpy
    memcpy.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]
    address = lambda buffer: ctypes.addressof(ctypes.c_char.from_buffer(buffer))
    pairs = [(address(target), address(block)) for target, block in zip(targets, blocks)]

    def copy():
        for target, source in pairs:
            memcpy(target, source, MIB)

    def get():
        client.get_into_batch(keys, targets)

    def put():
        client.delete_batch(keys)
        begun = time.perf_counter()
        client.put_batch(keys, blocks, parent="root")
        return time.perf_counter() - begun

    memcpy_gbps, get_gbps, put_gbps, ratios = [], [], [], []
    for _ in range(rounds):
        rates = {copy: [], get: []}
        for _ in range(COPIES_PER_ROUND):
            for work in (copy, get):
                begun = time.perf_counter()
                work()
                rates[work].append(BATCH * MIB / (time.perf_counter() - begun) / 1e9)
        memcpy_gbps.append(statistics.median(rates[copy]))
        get_gbps.append(statistics.median(rates[get]))
        ratios.append(get_gbps[-1] / memcpy_gbps[-1])
        put_gbps.append(BATCH * MIB / put() / 1e9)
    return {
        "memcpy_gbps": statistics.median(memcpy_gbps),
        "get_into_gbps": statistics.median(get_gbps),
        "get_into_ratio": statistics.median(ratios),
        "put_gbps": statistics.median(put_gbps),
    }


def calls(client, echo_server, rounds):
    """`exists` of many keys, half of them present, beside one echo of a small message with another process."""
    keys = [number.to_bytes(16, "little") for number in range(KEYS)]
    present = keys[: KEYS // 2]
    client.put_batch(present, [b"x" * 4096] * len(present), parent="independent")
    assert client.exists_batch(keys) == [True] * len(present) + [False] * (KEYS - len(present))
    with tempfile.TemporaryDirectory(prefix="kvp-") as directory:
        path = Path(directory) / "echo"
        server = subprocess.Popen([echo_server, "echo-server", path], stdin=subprocess.DEVNULL)
        near = socket.socket(socket.AF_UNIX)
        try:
            while near.connect_ex(str(path)) != 0:
                assert server.poll() is None, "the echo server ended"
                time.sleep(0.01)
            message, answer = bytes(ECHO_BYTES), bytearray(ECHO_BYTES)

            def echo():
                near.sendall(message)
                near.recv_into(answer, ECHO_BYTES, socket.MSG_WAITALL)

            def exists():
                client.exists_batch(keys)

            echo_us, exists_us, over_us = [], [], []
            for _ in range(rounds):
                times = {echo: [], exists: []}
                for _ in range(CALLS_PER_ROUND):
                    for work in (echo, exists):
                        begun = time.perf_counter()
                        work()
                        times[work].append((time.perf_counter() - begun) * 1e6)
                echo_us.append(statistics.median(times[echo]))
                exists_us.append(statistics.median(times[exists]))
                over_us.append(exists_us[-1] - echo_us[-1])
        finally:
            near.close()
            server.wait(timeout=10)
    return {
        "echo_p50_us": statistics.median(echo_us),
        "exists_256_p50_us": statistics.median(exists_us),
        "exists_over_echo_us": statistics.median(over_us),
    }


def show(result):
    print(f"get_into, {BATCH} x 1 MiB   {result['get_into_gbps']:.2f} GB/s")
    print(f"memcpy of as much     {result['memcpy_gbps']:.2f} GB/s: a ratio of {result['get_into_ratio']:.2f}")
    print(f"  (promised: {RATIO_MIN:.2f})")
    print(f"put, {BATCH} x 1 MiB        {result['put_gbps']:.2f} GB/s")
    print(f"exists, {KEYS} keys      p50 {result['exists_256_p50_us']:.0f} µs")
    print(f"echo                  p50 {result['echo_p50_us']:.0f} µs: {result['exists_over_echo_us']:.0f} µs less")
    print(f"  (promised: at most {EXISTS_OVER_ECHO_US_MAX:.0f})")


if __name__ == "__main__":
    main()
