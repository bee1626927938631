"""LMCache's acceptance run for an adapter, as its documentation has it."""

import json
import pathlib
import re
import subprocess
import sys


def run(daemon, *arguments):
    spec = {
        "type": "plugin",
        "module_path": "kvtier.lmcache",
        "class_name": "KvtierL2Adapter",
        "adapter_params": {"socket": daemon.socket},
    }
    command = [pathlib.Path(sys.executable).parent / "lmcache", "bench", "l2", "--l2-adapter", json.dumps(spec)]
    ran = subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stdout[-3000:] + ran.stderr[-3000:]
    return ran.stdout


def successes(text):
    return [int(count) for count in re.findall(r"Total success:\s+(\d+)", text)]


def test_the_acceptance_run_as_written(daemon):
    text = run(daemon, "--no-skip-verify")
    assert "keys data verified OK" in text and "MISMATCH" not in text, text
    assert "TIMEOUT" not in text, text
    stored, found, loaded = successes(text)
    assert stored == loaded > 0 and found == 0, "its lookups ask for keys that were never stored"


def test_lookups_hit_what_another_process_stored(daemon):
    same = ["--num-keys", "16", "--data-size-kb", "1024", "--rounds", "2"]
    assert successes(run(daemon, *same, "--only", "store")) == [32]
    assert successes(run(daemon, *same, "--only", "load")) == [32]
    found = successes(run(daemon, *same, "--no-skip-verify", "--lookup-max-hit-rate", "1.0"))
    assert found == [32, 32, 32]
