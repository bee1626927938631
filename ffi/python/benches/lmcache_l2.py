"""`cargo xtask bench lmcache`: LMCache's own `lmcache bench l2` over kvtier's adapter and LMCache's, in turn.

Every figure is a median of the runs' medians; a run is five rounds after one that warms up, its last round verified byte by
byte. Runs of different adapters alternate, so that what else the machine does falls on all of them. Ratios are what counts.
"""

import argparse
import json
import os
import pathlib
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time

BIN = pathlib.Path(os.environ["KVTIER_BIN"])
LMCACHE = pathlib.Path(sys.executable).parent / "lmcache"
# Keys in a round, KiB of an object.
SIZES = [(32, 2048), (32, 4096), (8, 32768)]
ROUNDS = 5


class Daemon:
    def __init__(self, directory, *flags, settings=""):
        self.directory = directory
        directory.mkdir()
        # What has no flag.
        (directory / "settings.toml").write_text(settings)
        flags = ["--config", directory / "settings.toml", *flags]
        self.socket = str(directory / "kvtier.sock")
        self.log = open(directory / "log", "wb")
        command = [BIN / "kv-daemon", "--state-dir", directory, "--socket", self.socket, "--http", "127.0.0.1:0", *flags]
        self.process = subprocess.Popen(command, stdout=self.log, stderr=self.log)
        deadline = time.monotonic() + 120
        while self.kvctl("status").returncode != 0:
            assert time.monotonic() < deadline and self.process.poll() is None, (directory / "log").read_text()
            time.sleep(0.2)

    def kvctl(self, *arguments):
        return subprocess.run([BIN / "kvctl", "--socket", self.socket, "--json", *arguments], capture_output=True, text=True)

    def status(self):
        return json.loads(self.kvctl("status").stdout)

    def stop(self):
        self.process.kill()
        self.process.wait()
        shutil.rmtree(self.directory, ignore_errors=True)


def kvtier(daemon):
    return {
        "type": "plugin",
        "module_path": "kvtier.lmcache",
        "class_name": "KvtierL2Adapter",
        "adapter_params": {"socket": daemon.socket},
    }


def bench(spec, keys, kib, *more):
    """Medians of one run: milliseconds of a round, by operation."""
    command = [LMCACHE, "bench", "l2", "--l2-adapter", json.dumps(spec), "--num-keys", str(keys)]
    command += ["--data-size-kb", str(kib), "--rounds", str(ROUNDS), *more]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=900)
    text = ran.stdout + ran.stderr
    if ran.returncode != 0 or "MISMATCH" in text or "TIMEOUT" in text:
        raise RuntimeError(text[-2000:])
    results, operation = {}, None
    for line in ran.stdout.splitlines():
        if match := re.match(r"Operation:\s+(\w+)", line):
            operation = match[1]
        elif match := re.match(r"Total success:\s+(\d+)", line):
            if operation != "Lookup" and int(match[1]) != ROUNDS * keys:
                raise RuntimeError(f"{operation}: {match[1]} of {ROUNDS * keys} objects\n{text[-2000:]}")
        elif match := re.match(r"Duration p50 \(ms\):\s+([\d.]+)", line):
            results[operation] = float(match[1])
    return results


def load():
    return os.getloadavg()[0]


def host(directory, runs, sizes):
    """From host memory, beside LMCache's file adapters with a warm page cache."""
    print(f"\nfrom host memory: MB/s put and get, ms of a lookup; {runs} runs in turn, load {load():.1f}")
    daemon = Daemon(directory / "kvtier", "--host-bytes", "6GiB")
    try:
        for keys, kib in sizes:
            files = directory / "files"

            def path(name):
                (files / name).mkdir(parents=True, exist_ok=True)
                return str(files / name)

            slot = (kib << 10) + 4096
            adapters = {
                "kvtier": lambda: kvtier(daemon),
                "fs_native": lambda: {"type": "fs_native", "base_path": path("fs_native"), "num_workers": 4},
                "fs_native O_DIRECT": lambda: {
                    "type": "fs_native",
                    "base_path": path("direct"),
                    "num_workers": 4,
                    "use_odirect": True,
                },
                "fs": lambda: {"type": "fs", "base_path": path("fs")},
                "raw_block": lambda: raw_block(path("raw"), slot, keys),
            }
            if redis := os.environ.get("KVTIER_REDIS_PORT"):
                adapters["resp"] = lambda: {"type": "resp", "host": "127.0.0.1", "port": int(redis)}
            figures = {name: [] for name in adapters}
            for _ in range(runs):
                for name, spec in adapters.items():
                    arguments = ["--no-skip-verify"]
                    if name in ("fs_native O_DIRECT", "raw_block"):
                        arguments += ["--l1-align-bytes", "4096"]
                    try:
                        figures[name].append(bench(spec(), keys, kib, *arguments))
                    except RuntimeError as error:
                        print(f"  {name}: not measured: {str(error).splitlines()[-1] if str(error) else error}")
                    shutil.rmtree(files, ignore_errors=True)
                forget(daemon)
            table(figures, keys, kib)
    finally:
        daemon.stop()


def raw_block(directory, slot, keys):
    device = pathlib.Path(directory) / "device"
    size = slot * keys * (ROUNDS + 2) + (256 << 20)
    with open(device, "wb") as file:
        file.truncate(size)
    return {
        "type": "raw_block",
        "device_path": str(device),
        "slot_bytes": slot,
        "capacity_bytes": size,
        "io_engine": "posix",
    }


def forget(daemon):
    """The keys of a run are those of the next: without this its stores would find them present."""
    daemon.kvctl("invalidate", "lmcache:")


def table(figures, keys, kib):
    megabytes = keys * kib / 1024
    print(f"{keys} objects of {kib // 1024} MiB")
    medians = {}
    for name, runs in figures.items():
        if not runs:
            continue
        median = {operation: statistics.median(run[operation] for run in runs) for operation in runs[0]}
        medians[name] = median
        put, get = (1000 * megabytes / median[operation] for operation in ("Store", "Load"))
        print(f"  {name:<20} put {put:8.0f}  get {get:8.0f}  lookup {median['Lookup']:.3f}")
    ours = medians["kvtier"]
    for name, median in medians.items():
        if name == "kvtier":
            continue
        put, get, lookup = (median[operation] / ours[operation] for operation in ("Store", "Load", "Lookup"))
        print(f"  kvtier / {name:<20} put {put:.2f}  get {get:.2f}  lookup {1 / lookup:.2f}")
    return medians


def host_segment(host_bytes, kib):
    """Four objects to a segment, or what the node chooses by itself where that is enough."""
    wanted = 4 * kib << 10
    return wanted if wanted > host_bytes // 64 and wanted <= host_bytes // 2 else 0


def nvme(directory, runs, sizes):
    """On NVMe, sealed, host memory a quarter of the working set; the closing flush counts as put."""
    print(f"\non NVMe, host memory a quarter of the working set; {runs} runs in turn, load {load():.1f}")
    for keys, kib in sizes:
        total = keys * kib * (ROUNDS + 1) << 10
        host_bytes = max(total // 4, 256 << 20)
        figures = {"kvtier": [], "fs_native O_DIRECT": []}
        for _ in range(runs):
            daemon = Daemon(
                directory / "kvtier",
                "--host-bytes",
                str(host_bytes),
                "--nvme-bytes",
                str(max(4 * total, 4 << 30)),
                # As for the users of large objects: several fit a segment (examples/lmcache/README.md).
                settings=f"nvme_segment_bytes = {256 << 20}\nhost_segment_bytes = {host_segment(host_bytes, kib)}\n",
            )
            try:
                stored = bench(kvtier(daemon), keys, kib, "--only", "store")
                begun = time.monotonic()
                flushed = daemon.kvctl("flush")
                assert flushed.returncode == 0, flushed.stderr
                # The flush closes all rounds: each bears its share.
                stored["Store"] += 1000 * (time.monotonic() - begun) / (ROUNDS + 1)
                before = daemon.status()
                loaded = bench(kvtier(daemon), keys, kib, "--only", "load")
                after = daemon.status()
                read = after["promoted_bytes"] - before["promoted_bytes"]
                share = read / total
                figures["kvtier"].append({**stored, **loaded, "Read": share})
            finally:
                daemon.stop()
            files = directory / "files"
            files.mkdir()
            spec = {"type": "fs_native", "base_path": str(files), "num_workers": 4, "use_odirect": True}
            align = ["--l1-align-bytes", "4096"]
            stored = bench(spec, keys, kib, "--only", "store", *align)
            loaded = bench(spec, keys, kib, "--only", "load", *align)
            figures["fs_native O_DIRECT"].append({**stored, **loaded, "Read": 1.0})
            shutil.rmtree(files)
        medians = {
            name: {what: statistics.median(run[what] for run in taken) for what in taken[0]} for name, taken in figures.items()
        }
        print(f"{keys} objects of {kib // 1024} MiB")
        for name, median in medians.items():
            put, get = (1000 * keys * kib / 1024 / median[what] for what in ("Store", "Load"))
            print(f"  {name:<20} put {put:8.0f}  get {get:8.0f}  read from the device / returned {median['Read']:.2f}")
        ours, theirs = medians["kvtier"], medians["fs_native O_DIRECT"]
        print(f"  ratio{'':<15} put {theirs['Store'] / ours['Store']:8.2f}  get {theirs['Load'] / ours['Load']:8.2f}")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=["host", "nvme"])
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--mib", type=int, choices=[kib // 1024 for _, kib in SIZES], help="objects of this size only")
    parser.add_argument("--directory", help="where files and segments lie: on the device to measure")
    arguments = parser.parse_args()
    sizes = [size for size in SIZES if arguments.mib in (None, size[1] // 1024)]
    directory = pathlib.Path(tempfile.mkdtemp(prefix="kvtier-bench-", dir=arguments.directory))
    try:
        if arguments.only != "nvme":
            host(directory, arguments.runs, sizes)
        if arguments.only != "host":
            nvme(directory, arguments.runs, sizes)
    finally:
        shutil.rmtree(directory, ignore_errors=True)


if __name__ == "__main__":
    main()
