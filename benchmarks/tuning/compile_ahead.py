"""Compiles what `fastdeit tune` is about to measure, in many processes at a time: Triton keeps what it compiled on disk.

One candidate after the other, as they are measured, compiling would take most of a tuning run, with the GPU idle.
"""

import contextlib
import json
import os
import subprocess
import sys
import time

PROCESSES = 12  # at most; each holds a context of the GPU


def compile_ahead(op: str, cases: list[str], deadline: float) -> None:
    """Runs every candidate of these cases of an op once, on little data, and returns when all ran or the time is over.

    What fails here fails again, and is told of, where it is measured.

    Args:
        deadline: of time.monotonic().
    """
    number = min(PROCESSES, len(os.sched_getaffinity(0)) - 1)
    if number < 2 or not cases:
        return
    began = time.monotonic()
    command = [sys.executable, "-m", __name__, op]
    children = [
        subprocess.Popen(
            [*command, str(share), str(number)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for share in range(number)
    ]
    try:
        for child in children:
            with contextlib.suppress(BrokenPipeError):
                child.stdin.write(json.dumps(cases).encode())
                child.stdin.close()
        for child in children:
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(max(deadline - time.monotonic(), 0.0))
    finally:
        for child in children:
            child.kill()
            child.wait()
    print(f"{op}: candidates compiled by {number} processes in {time.monotonic() - began:.0f} s", flush=True)


def run_share(op: str, share: int, of: int, cases: list[str], toy: bool = False) -> None:
    """Runs each of-th candidate, from number `share` on."""
    import torch

    from fastdeit.benchmarks.tuning import cases as tuning_cases

    number = 0
    for case in tuning_cases.cases(op, toy):
        if case.name not in cases:
            continue
        inputs = None
        for candidate in case.candidates:
            number += 1
            if number % of != share:
                continue
            with contextlib.suppress(Exception), torch.no_grad():
                inputs = inputs or case.inputs(1)
                candidate.run(*inputs)


if __name__ == "__main__":
    run_share(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), json.load(sys.stdin))
