"""Blocks of another node: kvtier's gets beside Mooncake Store's get_into over TCP, in turns on one machine.

    python3 -m venv env && env/bin/pip install mooncake-transfer-engine-non-cuda
    env/bin/python benches/rivals/peers/beside_mooncake.py --kvctl target/release/kvctl [--rounds 5] [--json]

Mooncake: one master, one process that holds the blocks, this process that reads them with batch_get_into; CPU is that of all three.
kvtier: `kvctl bench transfer --transports nodes`, two nodes and a client in one process; CPU is that process's. Both move 16 blocks at a
time over loopback TCP, every block once. Mooncake needs libibverbs.so.1 even for TCP (LD_LIBRARY_PATH).
"""

import argparse
import ctypes
import json
import os
import socket
import statistics
import subprocess
import sys
import time

BATCH = 16
MOVED = 96 << 20
SIZES = [16 << 10, 64 << 10, 1 << 20, 4 << 20]
TICKS = os.sysconf("SC_CLK_TCK")


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def cpu_seconds(pids):
    """User and system time of processes, all threads."""
    total = 0
    for pid in pids:
        with open(f"/proc/{pid}/stat") as stat:
            fields = stat.read().rsplit(")", 1)[1].split()
        total += int(fields[11]) + int(fields[12])
    return total / TICKS


def store(master, metadata, segment_bytes):
    from mooncake.store import MooncakeDistributedStore

    made = MooncakeDistributedStore()
    name = f"127.0.0.1:{free_port()}"
    code = made.setup(name, metadata, segment_bytes, 64 << 20, "tcp", "", master)
    if code != 0:
        sys.exit(f"mooncake: setup answers {code}")
    return made


def pattern(number, size):
    return (number.to_bytes(8, "little") * (size // 8 + 1))[:size]


def hold(master, metadata):
    """The process that holds the blocks: puts what each line asks for."""
    # Removed objects keep their place for some seconds.
    holder = store(master, metadata, 3 << 30)
    print("ready", flush=True)
    for line in sys.stdin:
        stream, count, size = (int(word) for word in line.split())
        for number in range(count):
            code = holder.put(f"{stream}/{number}", pattern(number, size))
            if code != 0:
                sys.exit(f"mooncake: put answers {code}")
        print("put", flush=True)


class Mooncake:
    def __init__(self):
        import mooncake

        directory = os.path.dirname(mooncake.__file__)
        port, http = free_port(), free_port()
        self.master_address = f"127.0.0.1:{port}"
        self.metadata = f"http://127.0.0.1:{http}/metadata"
        quiet = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        self.master = subprocess.Popen(
            [
                os.path.join(directory, "mooncake_master"),
                f"--rpc_port={port}",
                "--enable_http_metadata_server=true",
                f"--http_metadata_server_port={http}",
                "--http_metadata_server_host=127.0.0.1",
                "--metrics_port=" + str(free_port()),
            ],
            **quiet,
        )
        for _ in range(100):
            try:
                socket.create_connection(("127.0.0.1", http), 0.1).close()
                break
            except OSError:
                time.sleep(0.1)
        self.holder = subprocess.Popen(
            [sys.executable, __file__, "--hold", self.master_address, self.metadata],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        self.said("ready")
        # This process lends no memory: every block lies with the holder.
        self.reader = store(self.master_address, self.metadata, 0)
        self.memory = ctypes.create_string_buffer(MOVED)
        self.base = ctypes.addressof(self.memory)
        self.reader.register_buffer(self.base, MOVED)
        self.streams = 0

    def said(self, word):
        line = self.holder.stdout.readline().strip()
        while line and line != word:
            line = self.holder.stdout.readline().strip()
        if line != word:
            sys.exit(f"mooncake: the holder ended before it said {word}")

    def round(self, size):
        self.streams += 1
        count = max(BATCH, min(MOVED // size, 2048) // BATCH * BATCH)
        self.holder.stdin.write(f"{self.streams} {count} {size}\n")
        self.holder.stdin.flush()
        self.said("put")
        pids = [self.master.pid, self.holder.pid, os.getpid()]
        before, begun, times = cpu_seconds(pids), time.monotonic(), []
        for first in range(0, count, BATCH):
            numbers = range(first, first + BATCH)
            at = [self.base + number * size % (MOVED - BATCH * size + 1) for number in numbers]
            asked = time.monotonic()
            got = self.reader.batch_get_into([f"{self.streams}/{number}" for number in numbers], at, [size] * BATCH)
            times.append(time.monotonic() - asked)
            if list(got) != [size] * BATCH:
                sys.exit(f"mooncake: batch_get_into answers {got}")
        seconds = time.monotonic() - begun
        cpu = cpu_seconds(pids) - before
        # What is left in memory is the last batch's; it is compared outside the measured time.
        last = count - 1
        offset = last * size % (MOVED - BATCH * size + 1)
        if self.memory.raw[offset : offset + size] != pattern(last, size):
            sys.exit("mooncake: wrong bytes")
        self.reader.remove_by_regex(f"^{self.streams}/")
        gigabytes = count * size / 1e9
        return gigabytes / seconds, cpu / gigabytes, statistics.median(times) * 1e6

    def close(self):
        self.holder.stdin.close()
        self.holder.kill()
        self.master.kill()


def ours(kvctl, size):
    command = [kvctl, "--json", "bench", "transfer", "--transports", "nodes", "--bytes", str(size), "--rounds", "2"]
    row = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)[0]
    return row["gbps"], row["cpu_s_per_gb"], row["p50_us"]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kvctl", default="target/release/kvctl")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--bytes", type=int, nargs="*", default=SIZES)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--hold", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.hold:
        return hold(*options.hold)
    mooncake = Mooncake()
    rows = []
    for size in options.bytes:
        mooncake.round(size)
        pairs = [(ours(options.kvctl, size), mooncake.round(size)) for _ in range(options.rounds)]
        middle = lambda side, figure: statistics.median(pair[side][figure] for pair in pairs)
        row = {
            "bytes": size,
            "batch": BATCH,
            "gbps": middle(0, 0),
            "mooncake_gbps": middle(1, 0),
            "rate_ratio": statistics.median(pair[0][0] / pair[1][0] for pair in pairs),
            "cpu_s_per_gb": middle(0, 1),
            "mooncake_cpu_s_per_gb": middle(1, 1),
            "cpu_ratio": statistics.median(pair[0][1] / pair[1][1] for pair in pairs),
            "p50_us": middle(0, 2),
            "mooncake_p50_us": middle(1, 2),
            "rounds": options.rounds,
            "load": os.getloadavg()[0],
        }
        rows.append(row)
        print(
            f"{size:>8} bytes: {row['gbps']:.2f} GB/s beside {row['mooncake_gbps']:.2f}: {row['rate_ratio']:.2f} times;"
            f" CPU {row['cpu_s_per_gb']:.2f} s/GB beside {row['mooncake_cpu_s_per_gb']:.2f}: {row['cpu_ratio']:.2f} times",
            file=sys.stderr,
        )
    mooncake.close()
    if options.json:
        print(json.dumps(rows, indent=2))


if __name__ == "__main__":
    main()
