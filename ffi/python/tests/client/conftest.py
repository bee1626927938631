"""A kv-daemon of its own for each test that asks for one."""

import os
import signal
import subprocess
import tempfile
import time
from pathlib import Path

import kvtier
import pytest

# How long anything may take that must happen at all.
PATIENCE = 60.0
REALIZATION = {"model": "m", "dtype": "bf16"}


class Node:
    """A running `kv-daemon serve` with small tiers."""

    def __init__(self, directory: Path, **settings):
        self.directory = directory
        self.settings = {f"KVTIER_{name.upper()}": str(value) for name, value in settings.items()}
        self.socket = directory / "s"
        self.process = None
        self.start()

    def start(self):
        program = Path(os.environ["KVTIER_BIN_DIR"]) / "kv-daemon"
        environment = {name: value for name, value in os.environ.items() if not name.startswith("KVTIER_")}
        flags = ["--state-dir", self.directory / "state", "--socket", self.socket, "--http", "off"]
        sizes = ["--host-bytes", "64MiB", "--nvme-bytes", "128MiB"]
        with open(self.directory / "log", "ab") as log:
            self.process = subprocess.Popen(
                [program, "serve", *flags, *sizes],
                env=environment | {"KVTIER_CONFIG": "/dev/null"} | self.settings,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=log,
            )
        deadline = time.monotonic() + PATIENCE
        while True:
            try:
                self.client().close()
                return
            except kvtier.Unavailable:
                log = (self.directory / "log").read_text()
                assert self.process.poll() is None, f"kv-daemon ended before it was ready:\n{log}"
                assert time.monotonic() < deadline, f"kv-daemon does not become ready:\n{log}"
                time.sleep(0.02)

    def kill(self):
        self.process.kill()
        self.process.wait()

    def pause(self):
        """Returns once every thread stands still."""
        self.process.send_signal(signal.SIGSTOP)
        tasks = Path(f"/proc/{self.process.pid}/task")
        states = lambda: {(task / "stat").read_text().rsplit(")", 1)[1].split()[0] for task in tasks.iterdir()}
        eventually(lambda: states() == {"T"}, "the node stands still")

    def resume(self):
        self.process.send_signal(signal.SIGCONT)

    def client(self, namespace="tenant", realization=REALIZATION, **options) -> kvtier.Client:
        return kvtier.Client(self.socket, namespace=namespace, realization=realization, **options)


@pytest.fixture
def node():
    with tempfile.TemporaryDirectory(prefix="kvp-") as directory:
        node = Node(Path(directory))
        try:
            yield node
        finally:
            node.resume()
            node.kill()


@pytest.fixture
def client(node):
    with node.client() as client:
        yield client


def key(number: int) -> bytes:
    return number.to_bytes(16, "little")


def content(number: int, length: int) -> bytes:
    word = (number * 2654435761 % 2**64).to_bytes(8, "little")
    return (word * (length // 8 + 1))[:length]


def eventually(condition, what: str):
    """Waits until `condition()` holds."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, f"never: {what}"
        time.sleep(0.01)


def in_child(check):
    """Runs `check` in a forked child; what it raises or returns falsely fails here."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.close(reading)
            check()
            status = 0
        except BaseException as error:
            os.write(writing, repr(error).encode())
        finally:
            os._exit(status)
    os.close(writing)
    with os.fdopen(reading, "rb") as words:
        said = words.read().decode()
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0, f"in the child: {said}"
