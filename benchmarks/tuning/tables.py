"""The tables that `fastdeit tune` prints of what it measured, in the Python of the kernel files that they are for."""

import math
from collections import defaultdict
from typing import Any

import torch

from fastdeit.kernels.attention.config import ONE_PROGRAM_BACKWARD_TOKENS, around
from fastdeit.kernels.gemm import config as gemm_config
from fastdeit.kernels.gemm import fused_mlp
from fastdeit.kernels.gemm.config import CUBLAS
from fastdeit.kernels.runtime.architecture import architecture, has_descriptors
from fastdeit.testing import kernel_device


def timed(result: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of a case's candidates that ran."""
    return [row for row in result["rows"] if row["part"] != "baseline" and row["median_us"]]


def table(op: str, results: list[dict[str, Any]]) -> str:
    """What to put into the kernel files of an op after these cases."""
    if op == "mlp":
        pointwise = [result for result in results if not result["call"]]
        products = [result for result in results if "epilogue" in result["call"]]
        fused = [result for result in results if "form" in result["call"]]
        lines = [f"return {parts['config']}" for parts in choices(pointwise).values()]
        lines = ["# kernels/mlp/activation.py, select_config", *lines, ""] if lines else []
        lines += ["# kernels/gemm/config.py", *_measured("GEMMS", gemm_config.GEMMS, products, CUBLAS), ""]
        return "\n".join(
            [*lines, "# kernels/gemm/fused_mlp.py", *_measured("FUSED_MLPS", fused_mlp.FUSED_MLPS, fused, None)]
        )
    chosen = choices(results)
    if op == "layer_norm":
        entries = sorted((int(group), parts["config"]) for group, parts in chosen.items())
        lines = [f"        {channels}: {config}," for channels, config in entries]
        return "\n".join(
            ["# kernels/norm/layer_norm.py", "CONFIGS = {", f"    {_architecture()}: {{", *lines, "    },", "}"]
        )
    lines = ["# kernels/attention/config.py", f"SDPA_PREFERRED = {hand_overs(results)}"]
    lines += [f"ONE_PROGRAM_BACKWARD_TOKENS = {_one_program_table(results)}"]
    for group, parts in chosen.items():
        for form in ("pointers", "descriptors"):
            entries = [parts.get(f"{entry} {form}") for entry in ("forward", "dq", "dkv")]
            if all(entries):
                lines += [f"# _tiles, {group}, {form}", f"return {', '.join(entries)}"]
        if "whole" in parts:
            lines += [f"# one_program_tiles, {group}", f"return {parts['whole']}"]
    return "\n".join(lines)


def choices(results: list[dict[str, Any]]) -> dict[str, dict[str, str]]:
    """Group -> part -> the configuration with the least geometric mean of its times over the group's cases."""
    times: dict[str, Any] = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
    for result in results:
        for row in timed(result):
            times[result["group"]][row["part"]][row["config"]].append(math.log(row["median_us"]))
    return {group: {part: _least(entries) for part, entries in parts.items()} for group, parts in times.items()}


def _least(entries: dict[str, list[float]]) -> str:
    """Only what ran in as many cases as any is comparable."""
    most = max(map(len, entries.values()))
    return min((config for config, logs in entries.items() if len(logs) == most), key=lambda c: sum(entries[c]))


def one_program_tokens(results: list[dict[str, Any]]) -> int:
    """Up to how many tokens backward in one kernel was faster, in every case, than the best of two kernels."""
    longest = 0
    for result in sorted(results, key=lambda result: result["tokens"]):
        parts = defaultdict(list)
        for row in timed(result):
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


def _one_program_table(results: list[dict[str, Any]]) -> dict[int, int]:
    arch = _architecture()
    return ONE_PROGRAM_BACKWARD_TOKENS | ({arch: one_program_tokens(results)} if has_descriptors(arch) else {})


def hand_overs(results: list[dict[str, Any]]) -> dict[int, tuple]:
    """Where the fastest baseline beat the best of ours, in forward alone or in forward and backward together."""
    calls: dict[tuple, list[tuple[float, float]]] = defaultdict(
        list
    )  # a call's cases, its forward first: ours, the baseline's
    for result in sorted(results, key=lambda result: "backward" in result["case"]):
        ours = [row["median_us"] for row in timed(result)]
        baselines = [row["median_us"] for row in result["rows"] if row["part"] == "baseline" and row["median_us"]]
        if ours and baselines:
            calls[tuple(result["call"].values())].append((min(ours), min(baselines)))
    found = []
    for call, directions in calls.items():
        for gradients, measured in ((False, directions[:1]), (True, directions if len(directions) == 2 else [])):
            if sum(baseline - mine for mine, baseline in measured) < 0:
                found.append(around(*call, gradients))
    return {_architecture(): tuple(found)} if found else {}


def _measured(name: str, present: dict[int, tuple], results: list[dict[str, Any]], library: Any) -> list[str]:
    """A whole table of `Measured` entries, which have rows first, the choice last, and what it is for in between: what was measured
    now, where `library` stands for the library's way, and what the present table says about the rest and other architectures."""
    here, groups = _architecture(), defaultdict(list)
    for result in results:
        groups[tuple(result["call"].values())].append(result)
    tables = {arch: {} for arch in (*present, here)}  # what for -> ranges of rows, each with the choice
    for arch, entries in present.items():
        for entry in entries:
            rows, *use, choice = vars(entry).values()
            tables[arch].setdefault(tuple(map(_source, use)), []).append((rows, repr(choice)))
    for (M, *use, cases), group in groups.items():
        if len(group) == cases:
            rows, found = gemm_config.around(M), tables[here].setdefault(tuple(map(_source, use)), [])
            found[:] = [(part, choice) for old, choice in found for part in _without(old, rows)]
            faster = faster_than(library, group)
            found += [] if faster is None else [(rows, faster)]
    lines = [f"{name}: dict[int, tuple[Measured, ...]] = {{"]
    for arch, uses in sorted(tables.items()):
        entries = [
            f"        Measured({rows}, {', '.join(use)}, {choice}),"
            for use, found in uses.items()
            for rows, choice in _joined(found)
        ]
        lines += [f"    {arch}: (", *entries, "    ),"] if entries else []
    return [*lines, "}"]


def _source(value: int | str | torch.dtype) -> str:
    """A number, a name or a dtype, which results have as text, in Python."""
    text = str(value)
    return text if isinstance(value, int) or text.startswith("torch.") else f'"{text}"'


def faster_than(library: Any, group: list[dict[str, Any]]) -> str | None:
    """The choice of ours with the least geometric mean of its times over a group's cases, among those whose interquartile range
    lies below the library's in each; None where there is none."""
    times: dict[str, list[float]] = defaultdict(list)
    for result in group:
        rows = timed(result)
        library_us = [row["first_quartile_us"] for row in rows if row["config"] == repr(library)]
        for row in rows:
            if library_us and row["third_quartile_us"] < library_us[0]:
                times[row["config"]].append(math.log(row["median_us"]))
    times = {config: logs for config, logs in times.items() if len(logs) == len(group)}
    return min(times, key=lambda config: sum(times[config]), default=None)


def _without(rows: range, cut: range) -> list[range]:
    parts = range(rows.start, min(rows.stop, cut.start)), range(max(rows.start, cut.stop), rows.stop)
    return [part for part in parts if part]


def _joined(found: list[tuple[range, str]]) -> list[tuple[range, str]]:
    """In order, neighbours with the same kernel as one."""
    joined: list[tuple[range, str]] = []
    for rows, gemm in sorted(found, key=lambda entry: entry[0].start):
        if joined and joined[-1][0].stop == rows.start and joined[-1][1] == gemm:
            rows = range(joined.pop()[0].start, rows.stop)
        joined.append((rows, gemm))
    return joined


def _architecture() -> int:
    return architecture(torch.empty(0, device=kernel_device()))
