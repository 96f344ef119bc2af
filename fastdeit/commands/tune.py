"""`fastdeit tune`: which configuration of a kernel is the fastest on the GPU at hand, by the method of timing.py.

Every candidate is held to the numerics contract before it is timed. A case that is done is a line of DIR/tune_<op>.jsonl, and a
later run on the same machine and versions goes on after it. The tables printed at the end are Python, to be copied into the
kernel files. After a change of a kernel, tune into another folder.
"""

import argparse
import json
import math
import os
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from fastdeit.benchmarks import machine, timing
from fastdeit.benchmarks.tuning import tables as tuning_tables
from fastdeit.benchmarks.tuning.compile_ahead import compile_ahead
from fastdeit.benchmarks.tuning.journal import DEVICE_LOST, DeviceLostError, Journal

OPS = ("attention", "layer_norm", "mlp")


class _OutOfTime(Exception):
    pass


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("op", choices=(*OPS, "all"), help="op whose kernels to tune")
    parser.add_argument(
        "--out", type=Path, default=Path("tuning"), metavar="DIR", help="folder of the results (default: tuning)"
    )
    parser.add_argument(
        "--seconds",
        type=float,
        default=480,
        metavar="N",
        help="time limit in seconds; a later run continues (default: 480)",
    )
    parser.add_argument(
        "--toy", action="store_true", help="tiny shapes on the CPU, to check that it runs; times mean nothing"
    )


def run(args: argparse.Namespace) -> int:
    """Measures what is not measured yet, prints the tables and returns 0, also where time ran out; `DEVICE_LOST` where a candidate
    took the device down, after which the same command goes on without it.

    Raises:
        ValueError: there is no GPU and --toy was not asked for, or --seconds is not positive.
        OSError: --out cannot be written.
    """
    if not (math.isfinite(args.seconds) and args.seconds > 0):
        raise ValueError(f"--seconds: expected a positive number, got {args.seconds}")
    if not (args.toy or torch.cuda.is_available()):
        raise ValueError("tuning needs a CUDA device; --toy shows on a CPU that the command runs")
    if args.toy and not torch.cuda.is_available() and "triton" not in sys.modules:
        os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported
    args.out.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + args.seconds
    environment = machine.environment() | {"toy": args.toy}
    print(", ".join(f"{name} {value}" for name, value in environment.items() if value))
    left = 0
    for op in OPS if args.op == "all" else (args.op,):
        try:
            done, missing = _tune(op, args.out / f"tune_{op}.jsonl", environment, deadline, args.toy)
        except DeviceLostError as lost:
            print(f"{lost}. The same command goes on without it", file=sys.stderr, flush=True)
            return DEVICE_LOST
        left += missing
        print(f"\n{tuning_tables.table(op, done)}\n" if done else f"\n# {op}: nothing measured yet\n")
    if args.toy:
        print("# Toy shapes: these tables mean nothing.")
    if left:
        print(f"{args.seconds:g} seconds are over, {left} cases are left: the same command goes on with them.")
    return 0


def _tune(op: str, file: Path, environment: dict[str, Any], deadline: float, toy: bool) -> tuple[list[dict], int]:
    """The results of all cases that are done, and how many are not."""
    from fastdeit.benchmarks.tuning import cases as tuning_cases

    known, done, left, journal = _finished(file, environment), [], 0, Journal(file)
    cases = [(case, [c.label for c in case.candidates]) for case in tuning_cases.cases(op, toy)]
    if not toy:
        missing = [case.name for case, labels in cases if known.get(case.name, {}).get("labels") != labels]
        compile_ahead(op, missing, time.monotonic() + 0.4 * (deadline - time.monotonic()))
    for case, labels in cases:
        result = known.get(case.name)
        if result is None or result["labels"] != labels:
            try:
                rows = _measure(case, deadline, toy, journal)
            except _OutOfTime:
                left += 1
                continue
            result = dict(
                case=case.name, group=case.group, tokens=case.tokens, call=case.call, labels=labels, rows=rows
            )
            with file.open("a", encoding="utf-8") as lines:
                lines.write(json.dumps(result | {"environment": environment}) + "\n")
        done.append(result)
        print(_summary(result), flush=True)
    return done, left


def _finished(file: Path, environment: dict[str, Any]) -> dict[str, dict]:
    """The measurements of an earlier run in the same environment. An incomplete last line is removed."""
    if not file.exists():
        return {}
    text = file.read_text(encoding="utf-8")
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        file.write_text(whole, encoding="utf-8")
    try:
        results = [json.loads(line) for line in whole.splitlines()]
        return {result["case"]: result for result in results if result["environment"] == environment}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file}: expected what fastdeit tune wrote ({error!r})") from error


def _measure(case, deadline: float, toy: bool, journal: Journal) -> list[dict[str, Any]]:
    """Checks every candidate, which also compiles it, then times the accepted ones together with the baselines.

    Raises:
        DeviceLostError: a candidate made the device unusable.
    """
    refused, right = {}, {}
    if time.monotonic() >= deadline:
        raise _OutOfTime
    expected = _expected(case)
    for candidate in case.candidates:
        if time.monotonic() >= deadline:
            raise _OutOfTime
        at = case.name, candidate.label
        if at in journal.lost:
            refused[candidate.label] = "failed: an earlier run ended at it"
            continue
        try:
            with journal.at(*at):
                _check(candidate, *expected)
            right[candidate.label] = torch.no_grad()(candidate.run)
        except AssertionError as error:
            refused[candidate.label] = f"wrong: {error}"
        except Exception as error:  # more shared memory than there is, say
            refused[candidate.label] = f"failed: {type(error).__name__}: {error}"
            journal.check_device(*at)
    before = machine.clocks()
    rows = _timed(case, right, 2 if toy else 20, journal)
    rows += [timing.Row(label, status=status) for label, status in refused.items()]
    about = {c.label: dict(part=c.part, config=repr(c.config), present=c.present) for c in case.candidates}
    clocks = [before, machine.clocks()]
    return [asdict(row) | about.get(row.candidate, dict(part="baseline")) | {"clocks": clocks} for row in rows]


def _timed(case, right: dict[str, Any], turns: int, journal: Journal) -> list[timing.Row]:
    """The rows of the accepted candidates and of the baselines. At full size a candidate may fail that passed on little data."""
    last = ["its inputs"]  # whose launches were accepted; what is wrong with them shows when the device is waited for

    def noted(label, run):
        def candidate(*arguments):
            result = run(*arguments)
            last[:] = [label]
            return result

        return candidate

    candidates = {label: noted(label, run) for label, run in (right | case.baselines).items()}
    try:
        return timing.measure(candidates, lambda: case.inputs(case.batch), turns=turns, profiled=False)
    finally:
        journal.check_device(case.name, *last)


def _expected(case) -> tuple[tuple, tuple, tuple, float]:
    """Inputs of two samples at most, the reference's results in float64 and in the inputs' dtypes, and the largest number."""
    inputs = case.inputs(min(case.batch, 2))
    oracle, eager = case.reference(*(t.double() for t in inputs)), case.reference(*inputs)
    return inputs, oracle, eager, max(t.abs().max().item() for t in (*inputs, *oracle))


def _check(candidate, inputs, oracle, eager, largest) -> None:
    from fastdeit.testing import assert_close_to_oracle, poisoned_memory

    with poisoned_memory(), torch.no_grad():
        got = candidate.run(*inputs)
    for index, (mine, exact, plain) in enumerate(zip(got, oracle, eager, strict=True)):
        assert_close_to_oracle(f"result {index}", mine, exact, plain, largest)


def _summary(result: dict[str, Any]) -> str:
    ours = tuning_tables.timed(result)
    if not ours:
        return f"{result['case']}: no candidate ran; {result['rows'][0]['status']}"
    best = min(ours, key=lambda row: row["median_us"])
    text = f"{result['case']}: {best['median_us']:.1f} us with {best['candidate']}"
    present = [row["median_us"] for row in ours if row["present"]]
    if present:
        text += f", {best['median_us'] / min(present):.2f}x the present choice's time"
    baselines = [row for row in result["rows"] if row["part"] == "baseline" and row["median_us"]]
    if baselines:
        baseline = min(baselines, key=lambda row: row["median_us"])
        ratio = best["median_us"] / baseline["median_us"]
        text += f", {ratio:.2f}x {baseline['candidate']}'s" + (": hand over" if ratio > 1 else "")
    for part in dict.fromkeys(row["part"] for row in ours):
        first = min((row for row in ours if row["part"] == part), key=lambda row: row["median_us"])
        text += f"\n    {part}: {first['median_us']:.1f} us, {first['config']}"
    return text
