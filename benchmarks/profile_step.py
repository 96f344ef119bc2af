"""`fastdeit bench profile`: what a forward pass and a training step spend their time on, kernel by kernel."""

import argparse
import functools
import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fastdeit.aot import catalog
from fastdeit.benchmarks.full_model import Model
from fastdeit.benchmarks.report.roofline_table import table
from fastdeit.benchmarks.timing import device_events

WARM_UP = 3
# What a kernel belongs to, by its name; the first match counts. Of the CPU it is the operation's name.
_LIBRARY_KINDS = {
    "matrix product": r"gemm|nvjet|cutlass|cublas|xmma|addmm|aten::mm|aten::bmm|mkldnn_linear|splitK",
    "attention, PyTorch's": r"flash|fmha|attention|sdpa",
    "convolution": r"conv|cudnn",
    "optimizer": r"adam|foreach|multi_tensor",
    "copy or fill": r"memcpy|memset|copy|fill|zero",
}
OURS, LEFT = "fastdeit", "left to fuse"


class Entry(NamedTuple):
    """One kernel, over all its launches in one call."""

    kernel: str
    kind: str
    count: int
    microseconds: float


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", default="deit_base_distilled_patch16_224", metavar="NAME", help="timm's, DeiT-B by default"
    )
    parser.add_argument("--batch-size", type=int, default=64, metavar="N", help="images, default: 64")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="write profile.md, profile.json and traces for Perfetto there"
    )
    parser.add_argument("--top", type=int, default=25, metavar="N", help="kernels a table, default: 25")
    parser.add_argument("--toy", action="store_true", help="a tiny model on the CPU: shows that it runs")


def run(args: argparse.Namespace) -> int:
    """Prints both tables.

    Raises:
        ValueError: there is no GPU and --toy was not asked for, or there is no such model.
    """
    if not (args.toy or torch.cuda.is_available()):
        raise ValueError("a profile needs a CUDA device; --toy shows on a CPU that the command runs")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = Model(args.model, 2 if args.toy else args.batch_size, device, args.toy)
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
    texts, found = (
        [f"# {args.model} on {torch.cuda.get_device_name() if device.type == 'cuda' else 'a CPU, toy size'}"],
        {},
    )
    for name, call in (("inference", model.infer), ("training step", model.train)):
        trace = args.out / f"{name.replace(' ', '-')}.trace.json" if args.out else None
        found[name] = profiled(call, device, trace)
        texts.append(f"## {name}\n\n{report(found[name], args.top)}")
    text = "\n\n".join(texts)
    print(text)
    if args.out:
        (args.out / "profile.md").write_text(text + "\n", encoding="utf-8")
        data = {name: [entry._asdict() for entry in entries] for name, entries in found.items()}
        (args.out / "profile.json").write_text(json.dumps(data, indent=2), encoding="utf-8")
    return 0


def profiled(call: Callable[[], Any], device: torch.device, trace: Path | None = None) -> list[Entry]:
    """The kernels (on a CPU: operations) of one call, the longest first."""
    return summed(kernel_times(call, device, trace))


def kernel_times(call: Callable[[], Any], device: torch.device, trace: Path | None = None) -> list[tuple[str, float]]:
    """Each launch of a kernel (on a CPU: each operation) of one call, and its microseconds."""
    for _ in range(WARM_UP):
        call()
    on_gpu = device.type == "cuda"
    activities = [torch.profiler.ProfilerActivity.CPU, *([torch.profiler.ProfilerActivity.CUDA] if on_gpu else [])]
    with torch.profiler.profile(activities=activities) as profile:
        call()
        if on_gpu:
            torch.cuda.synchronize(device)
    if trace is not None:
        profile.export_chrome_trace(str(trace))
    if on_gpu:
        return [(e.name, e.self_device_time_total) for e in device_events(profile)]
    return [(e.name, e.self_cpu_time_total) for e in profile.events()]


def summed(timed: Iterable[tuple[str, float]]) -> list[Entry]:
    """Entries of (kernel, microseconds), the longest first; what took no time is left out."""
    counts: dict[str, int] = {}
    times: dict[str, float] = {}
    for name, microseconds in timed:
        counts[name] = counts.get(name, 0) + 1
        times[name] = times.get(name, 0.0) + microseconds
    entries = [Entry(name, kind_of(name), counts[name], time) for name, time in times.items() if time > 0]
    return sorted(entries, key=lambda entry: -entry.microseconds)


def kind_of(kernel: str) -> str:
    """`fastdeit`, one of the libraries' kinds, or `left to fuse`."""
    if kernel in _our_kernels():
        return OURS
    return next((kind for kind, pattern in _LIBRARY_KINDS.items() if re.search(pattern, kernel, re.IGNORECASE)), LEFT)


def report(entries: list[Entry], top: int) -> str:
    """Time by kind, and the kernels that take most of it; of no entries, that the profiler saw none."""
    if not entries:
        return "The profiler saw nothing run on the device: it may not read the GPU's counters here."
    total = sum(entry.microseconds for entry in entries)
    launches = sum(entry.count for entry in entries)
    kinds: dict[str, list[Entry]] = {}
    for entry in entries:
        kinds.setdefault(entry.kind, []).append(entry)
    by_kind = sorted(kinds.items(), key=lambda item: -sum(entry.microseconds for entry in item[1]))
    rows = [
        _row(kind, sum(e.count for e in found), sum(e.microseconds for e in found), total) for kind, found in by_kind
    ]
    kernels = [{**_row(e.kernel[:90], e.count, e.microseconds, total), "kind": e.kind} for e in entries[:top]]
    return "\n\n".join([f"{launches} launches, {total / 1e3:.2f} ms on the device.", table(rows), table(kernels)])


def _row(name: str, count: int, microseconds: float, total: float) -> dict[str, Any]:
    return {"what": name, "count": count, "µs": microseconds, "share, %": 100 * microseconds / total}


@functools.cache
def _our_kernels() -> frozenset[str]:
    return frozenset(row.kernel.__name__ for arch in catalog.ARCHITECTURES for row in catalog.aot_configs(arch))
