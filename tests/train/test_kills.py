"""A few of the kills that `kills.py` makes by the hundred."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.long
def test_killed_runs_end_with_the_same_bits():
    command = [sys.executable, Path(__file__).with_name("kills.py"), "--kills", "5", "--seed", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout[done.stdout.index("{\n") :])
    assert found["kills"] >= 5 and found["runs"] >= 3
    assert {way.partition(":")[0] for way in found["ways"]} == {"one process", "workers", "two processes"}
