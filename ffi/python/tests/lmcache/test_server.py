"""`lmcache server` over kvtier, by the recipes of examples/lmcache, driven by LMCache's own simulated engine."""

import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import urllib.request

import pytest

from conftest import Daemon, until

RECIPES = pathlib.Path(__file__).resolve().parents[4] / "examples" / "lmcache"
PROGRAMS = pathlib.Path(sys.executable).parent
SHAPE = "(2,256,16,8,128):float16:16"
CHUNKS = 4


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


class Server:
    """A running `lmcache server`."""

    def __init__(self, recipe, daemon):
        self.recipe, self.daemon = recipe, daemon
        self.port, self.http = free_port(), free_port()
        self.log = daemon.directory / "lmcache.log"
        self.start()

    def start(self):
        environment = {
            **os.environ,
            "PATH": f"{PROGRAMS}:{os.environ['PATH']}",
            "KVTIER_SOCKET": self.daemon.socket,
            "LMCACHE_PORT": str(self.port),
            "LMCACHE_HTTP_PORT": str(self.http),
            "LMCACHE_L1_GB": "0.5",
        }
        arguments = ["--supported-transfer-mode", "auto", "--prometheus-port", str(free_port())]
        log = open(self.log, "ab")
        self.process = subprocess.Popen(
            [RECIPES / self.recipe, *arguments], env=environment, stdout=log, stderr=log, start_new_session=True
        )
        until("the server is up", self.is_up, 90)
        until("the adapter connects", lambda: self.adapter()["is_healthy"] or not self.daemon_runs())

    def daemon_runs(self):
        return self.daemon.process.poll() is None

    def get(self, path):
        with urllib.request.urlopen(f"http://127.0.0.1:{self.http}{path}", timeout=10) as answer:
            return answer.read().decode()

    def is_up(self):
        assert self.process.poll() is None, self.log.read_text()[-3000:]
        try:
            self.get("/healthcheck")
            return True
        except OSError:
            return False

    def status(self):
        return json.loads(self.get("/status"))

    def adapter(self):
        return find(self.status(), lambda node: node.get("type") == "KvtierL2Adapter")

    def clear_l1(self):
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.http}/cache/clear",
            data=json.dumps({"tier": "l1"}).encode(),
            headers={"content-type": "application/json"},
            method="POST",
        )
        with urllib.request.urlopen(request, timeout=10) as answer:
            assert json.load(answer)["status"] == "ok"

    def l2_hit_tokens(self):
        counted = re.findall(r"^lmcache_mp_lookup_hit_l2_tokens_total\S* (\S+)$", self.get("/metrics"), re.M)
        return sum(map(float, counted))

    def kill(self):
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def engine(self, start, end):
        """Runs the simulated engine over requests; what it found and the checksums of what it read."""
        command = [PROGRAMS / "lmcache", "bench", "server", "--rpc-url", f"tcp://127.0.0.1:{self.port}"]
        command += ["--mode", "cpu", "--transfer-mode", "engine_driven", "--num-tokens", str(CHUNKS * 256)]
        command += ["--num-blocks", "256", "--block-size", "16", "--kvcache-shape-spec", SHAPE]
        command += ["--start", str(start), "--end", str(end), "--interval", "0.1"]
        ran = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert ran.returncode == 0, ran.stdout[-3000:] + ran.stderr[-3000:]
        return Run(ran.stdout + ran.stderr)


class Run:
    def __init__(self, text):
        self.text = text
        lookups = re.findall(r"\[seq (\d+)/(cold|warm)\] LOOKUP: (\d+)/(\d+) chunks hit", text)
        self.cold = [int(hit) for _, kind, hit, _ in lookups if kind == "cold"]
        self.warm = [int(hit) for _, kind, hit, _ in lookups if kind == "warm"]
        self.read = re.findall(r"\[seq (\d+)/warm\] CHECKSUM: (\w+)", text)
        self.matches = len(re.findall(r"CHECKSUM MATCH OK", text))
        self.mismatches = int(re.search(r"Checksum FAIL:\s+(\d+)", text).group(1))


def find(node, wanted):
    if isinstance(node, dict):
        if wanted(node):
            return node
        node = list(node.values())
    if isinstance(node, list):
        for child in node:
            if (found := find(child, wanted)) is not None:
                return found
    return None


@pytest.fixture(params=["under-l1.sh", "kvtier-only.sh"])
def server(request):
    daemon = Daemon(host_mib=512, nvme_mib=4096)
    server = Server(request.param, daemon)
    yield server
    server.kill()
    daemon.remove()


def test_chunks_come_back_from_kvtier_after_a_clear_and_after_kill_9_of_both(server):
    first = server.engine(0, 2)
    assert first.cold == [0, 0] and first.warm == [CHUNKS, CHUNKS], first.text
    assert first.matches == 2 and first.mismatches == 0, first.text
    until("everything is stored", lambda: server.adapter()["stored_objects"] == 2 * CHUNKS)

    server.clear_l1()
    before = server.l2_hit_tokens()
    again = server.engine(0, 2)
    assert again.cold == [CHUNKS, CHUNKS] and again.mismatches == 0, again.text
    assert again.read == first.read, "the same bytes"
    assert server.l2_hit_tokens() - before >= 2 * CHUNKS * 256, "kvtier served them"
    assert server.adapter()["path"] == "copy"
    metric = re.search(r'^lmcache_mp_kvtier_loaded_bytes\S*path="copy"\S* (\S+)$', server.get("/metrics"), re.M)
    assert metric and float(metric[1]) > 0, "the path taken is a metric"

    flushed = server.daemon.kvctl("flush")
    assert flushed.returncode == 0, flushed.stderr
    server.daemon.kill()
    server.kill()
    server.daemon.start()
    server.start()
    restored = server.engine(0, 2)
    assert restored.cold == [CHUNKS, CHUNKS] and restored.mismatches == 0, restored.text
    assert restored.read == first.read, "the same bytes after both were killed"
    assert server.adapter()["loaded_objects"] >= 2 * CHUNKS


def test_without_the_daemon_the_server_serves_misses_and_recovers_by_itself(server):
    assert server.engine(0, 1).matches == 1
    server.daemon.kill()
    server.clear_l1()
    until("the adapter notices", lambda: not server.adapter()["is_healthy"])
    away = server.engine(10, 12)
    assert away.cold == [0, 0] and away.mismatches == 0, away.text
    assert server.is_up()
    assert server.adapter()["state"] == "down"
    if server.recipe == "kvtier-only.sh":
        used = server.status()["kvtier_purge"]["tracked_keys"]
        assert used == 0, "what could not be stored does not fill LMCache's memory"
    server.daemon.start()
    until("the adapter is back", lambda: server.adapter()["is_healthy"])
    back = server.engine(20, 22)
    assert back.cold == [0, 0] and back.matches == 2 and back.mismatches == 0, back.text
    server.clear_l1()
    assert server.engine(20, 22).cold == [CHUNKS, CHUNKS]


def test_an_invalidation_empties_both_memories_of_a_running_server(server):
    assert server.engine(0, 2).matches == 2
    until("everything is stored", lambda: server.adapter()["stored_objects"] == 2 * CHUNKS)
    assert server.daemon.kvctl("invalidate", "lmcache:").returncode == 0
    until("the purge ran", lambda: server.status()["kvtier_purge"]["purges"] == 1, 1.0)
    until("L1 is empty", lambda: server.status()["kvtier_purge"]["tracked_keys"] == 0)
    after = server.engine(0, 2)
    assert after.cold == [0, 0] and after.matches == 2, after.text
