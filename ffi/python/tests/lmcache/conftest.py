"""A real kv-daemon for each test session; `KVTIER_BIN` is where its programs are."""

import json
import os
import pathlib
import shutil
import signal
import subprocess
import tempfile
import time

import pytest

BIN = pathlib.Path(os.environ["KVTIER_BIN"])


class Daemon:
    """A kv-daemon process over a directory of its own, which outlives it."""

    def __init__(self, host_mib=256, nvme_mib=2048, **more):
        self.directory = pathlib.Path(tempfile.mkdtemp(prefix="kvtier-lmcache-", dir=os.environ.get("KVTIER_TEST_DIR")))
        self.socket = str(self.directory / "kvtier.sock")
        settings = {
            "state_dir": str(self.directory),
            "host_bytes": host_mib << 20,
            "nvme_bytes": nvme_mib << 20,
            "lock_memory": False,
            **more,
        }
        lines = [f"{name} = {json.dumps(value)}" for name, value in settings.items()]
        self.config = self.directory / "kv-daemon.toml"
        self.config.write_text("\n".join(lines) + "\n")
        self.process = None
        self.start()

    def start(self):
        log = open(self.directory / "log", "ab")
        self.process = subprocess.Popen(
            [BIN / "kv-daemon", "--config", self.config], stdout=log, stderr=log, stdin=subprocess.DEVNULL
        )
        until("kv-daemon listens", lambda: self.kvctl("status").returncode == 0)

    def kvctl(self, *arguments):
        command = [BIN / "kvctl", "--socket", self.socket, *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=60)

    def status(self):
        answer = self.kvctl("status", "--json")
        assert answer.returncode == 0, answer.stderr
        return json.loads(answer.stdout)

    def kill(self):
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def pause(self):
        self.process.send_signal(signal.SIGSTOP)

    def resume(self):
        self.process.send_signal(signal.SIGCONT)

    def remove(self):
        if self.process.poll() is None:
            self.resume()
            self.kill()
        shutil.rmtree(self.directory, ignore_errors=True)


def until(what, condition, seconds=30.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not in time: {what}"
        time.sleep(0.02)


@pytest.fixture
def daemon():
    daemon = Daemon()
    yield daemon
    daemon.remove()


@pytest.fixture(scope="session")
def shared_daemon():
    daemon = Daemon()
    yield daemon
    daemon.remove()
