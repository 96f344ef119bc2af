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
from collections import defaultdict
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from fastdeit.benchmarks import timing

OPS = ("attention", "layer_norm", "mlp")


class _OutOfTime(Exception):
    pass


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("op", choices=(*OPS, "all"), help="whose kernels")
    parser.add_argument(
        "--out", type=Path, default=Path("tuning"), metavar="DIR", help="of the results; default: tuning"
    )
    parser.add_argument(
        "--seconds",
        type=float,
        default=480,
        metavar="N",
        help="stop in time, to be continued by a later run; default: 480",
    )
    parser.add_argument(
        "--toy", action="store_true", help="tiny shapes on the CPU: shows that it runs, measures nothing"
    )


def run(args: argparse.Namespace) -> int:
    """Measures what is not measured yet, prints the tables and returns 0, also where time ran out.

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
    environment = timing.environment() | {"toy": args.toy}
    print(", ".join(f"{name} {value}" for name, value in environment.items() if value))
    left = 0
    for op in OPS if args.op == "all" else (args.op,):
        done, missing = _tune(op, args.out / f"tune_{op}.jsonl", environment, deadline, args.toy)
        left += missing
        print(f"\n{_table(op, done)}\n" if done else f"\n# {op}: nothing measured yet\n")
    if args.toy:
        print("# Toy shapes: these tables mean nothing.")
    if left:
        print(f"{args.seconds:g} seconds are over, {left} cases are left: the same command goes on with them.")
    return 0


def _tune(op: str, file: Path, environment: dict[str, Any], deadline: float, toy: bool) -> tuple[list[dict], int]:
    """The results of all cases that are done, and how many are not."""
    from fastdeit.benchmarks import tuning_cases

    known, done, left = _finished(file, environment), [], 0
    for case in tuning_cases.cases(op, toy):
        labels = [c.label for c in case.candidates]
        result = known.get(case.name)
        if result is None or result["labels"] != labels:
            try:
                rows = _measure(case, deadline, toy)
            except _OutOfTime:
                left += 1
                continue
            result = dict(
                case=case.name, group=case.group, tokens=case.tokens, call=case.call, labels=labels, rows=rows
            )
            with file.open("a", encoding="utf-8") as lines:
                lines.write(json.dumps(result | {"environment": environment}) + "\n")
        done.append(result)
        print(_summary(result))
    return done, left


def _finished(file: Path, environment: dict[str, Any]) -> dict[str, dict]:
    """What an earlier run measured in the same environment. A line that it was stopped in is cut off."""
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


def _measure(case, deadline: float, toy: bool) -> list[dict[str, Any]]:
    """Checks every candidate, which also compiles it, then times those that are right, with the peers among them."""
    refused, right = {}, {}
    if time.monotonic() >= deadline:
        raise _OutOfTime
    expected = _expected(case)
    for candidate in case.candidates:
        if time.monotonic() >= deadline:
            raise _OutOfTime
        try:
            _check(candidate, *expected)
            right[candidate.label] = torch.no_grad()(candidate.run)
        except AssertionError as error:
            refused[candidate.label] = f"wrong: {error}"
        except Exception as error:  # more shared memory than there is, say
            refused[candidate.label] = f"failed: {type(error).__name__}: {error}"
    before = timing.clocks()
    rows = timing.measure(right | case.peers, lambda: case.inputs(case.batch), turns=2 if toy else 20)
    rows += [timing.Row(label, status=status) for label, status in refused.items()]
    about = {c.label: dict(part=c.part, config=repr(c.config), present=c.present) for c in case.candidates}
    clocks = [before, timing.clocks()]
    return [asdict(row) | about.get(row.candidate, dict(part="peer")) | {"clocks": clocks} for row in rows]


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


def _ours(result: dict[str, Any]) -> list[dict[str, Any]]:
    return [row for row in result["rows"] if row["part"] != "peer" and row["median_us"]]


def _summary(result: dict[str, Any]) -> str:
    ours = _ours(result)
    if not ours:
        return f"{result['case']}: no candidate ran; {result['rows'][0]['status']}"
    best = min(ours, key=lambda row: row["median_us"])
    text = f"{result['case']}: {best['median_us']:.1f} us with {best['candidate']}"
    present = [row["median_us"] for row in ours if row["present"]]
    if present:
        text += f", {best['median_us'] / min(present):.2f}x the present choice's time"
    peers = [row for row in result["rows"] if row["part"] == "peer" and row["median_us"]]
    if peers:
        peer = min(peers, key=lambda row: row["median_us"])
        ratio = best["median_us"] / peer["median_us"]
        text += f", {ratio:.2f}x {peer['candidate']}'s" + (": hand over" if ratio > 1 else "")
    for part in dict.fromkeys(row["part"] for row in ours):
        first = min((row for row in ours if row["part"] == part), key=lambda row: row["median_us"])
        text += f"\n    {part}: {first['median_us']:.1f} us, {first['config']}"
    return text


def _table(op: str, results: list[dict[str, Any]]) -> str:
    from fastdeit.kernels.architecture import architecture
    from fastdeit.testing import kernel_device

    choices = _choices(results)
    if op == "layer_norm":
        entries = sorted((int(group), parts["config"]) for group, parts in choices.items())
        arch = architecture(torch.empty(0, device=kernel_device()))
        lines = [f"        {channels}: {config}," for channels, config in entries]
        return "\n".join(["# layer_norm.py", "CONFIGS = {", f"    {arch}: {{", *lines, "    },", "}"])
    if op == "mlp":
        return "\n".join(["# mlp.py, select_config", *(f"return {parts['config']}" for parts in choices.values())])
    lines = ["# attention_config.py", f"HANDED_OVER = {_hand_overs(results)}"]
    lines += [f"WHOLE_BACKWARD_TOKENS = {_whole_table(results)}"]
    for group, parts in choices.items():
        for form in ("pointers", "descriptors"):
            entries = [parts.get(f"{entry} {form}") for entry in ("forward", "dq", "dkv")]
            if all(entries):
                lines += [f"# _tiles, {group}, {form}", f"return {', '.join(entries)}"]
        if "whole" in parts:
            lines += [f"# whole_tiles, {group}", f"return {parts['whole']}"]
    return "\n".join(lines)


def _choices(results: list[dict[str, Any]]) -> dict[str, dict[str, str]]:
    """Group -> part -> the configuration with the least geometric mean of its times over the group's cases."""
    times: dict[str, Any] = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
    for result in results:
        for row in _ours(result):
            times[result["group"]][row["part"]][row["config"]].append(math.log(row["median_us"]))
    return {group: {part: _least(entries) for part, entries in parts.items()} for group, parts in times.items()}


def _least(entries: dict[str, list[float]]) -> str:
    """Only what ran in as many cases as any is comparable."""
    most = max(map(len, entries.values()))
    return min((config for config, logs in entries.items() if len(logs) == most), key=lambda c: sum(entries[c]))


def _whole_tokens(results: list[dict[str, Any]]) -> int:
    """Up to how many tokens backward in one kernel was faster, in every case, than the best of two kernels."""
    longest = 0
    for result in sorted(results, key=lambda result: result["tokens"]):
        parts = defaultdict(list)
        for row in _ours(result):
            parts[row["part"]].append(row["median_us"])
        # dq and dkv are varied one at a time, from the same pair, which is the first of each: what both save adds up.
        two_kernels = [
            min(parts[f"dq {form}"]) + min(parts[f"dkv {form}"]) - parts[f"dq {form}"][0]
            for form in ("pointers", "descriptors")
            if f"dq {form}" in parts and f"dkv {form}" in parts
        ]
        if "whole" not in parts or not two_kernels:
            continue
        if min(parts["whole"]) >= min(two_kernels):
            break
        longest = result["tokens"]
    return longest


def _whole_table(results: list[dict[str, Any]]) -> dict[int, int]:
    from fastdeit.kernels.architecture import architecture
    from fastdeit.kernels.attention_config import WHOLE_BACKWARD_TOKENS, has_descriptors
    from fastdeit.testing import kernel_device

    arch = architecture(torch.empty(0, device=kernel_device()))
    return WHOLE_BACKWARD_TOKENS | ({arch: _whole_tokens(results)} if has_descriptors(arch) else {})


def _hand_overs(results: list[dict[str, Any]]) -> dict[int, tuple]:
    """Where the fastest peer beat the best of ours, in forward alone or in forward and backward together."""
    from fastdeit.kernels.architecture import architecture
    from fastdeit.kernels.attention_config import around
    from fastdeit.testing import kernel_device

    calls: dict[tuple, list[tuple[float, float]]] = defaultdict(
        list
    )  # a call's cases, its forward first: ours, the peer's
    for result in sorted(results, key=lambda result: "backward" in result["case"]):
        ours = [row["median_us"] for row in _ours(result)]
        peers = [row["median_us"] for row in result["rows"] if row["part"] == "peer" and row["median_us"]]
        if ours and peers:
            calls[tuple(result["call"].values())].append((min(ours), min(peers)))
    found = []
    for call, directions in calls.items():
        for gradients, measured in ((False, directions[:1]), (True, directions if len(directions) == 2 else [])):
            if sum(peer - mine for mine, peer in measured) < 0:
                found.append(around(*call, gradients))
    arch = architecture(torch.empty(0, device=kernel_device()))
    return {arch: tuple(found)} if found else {}
