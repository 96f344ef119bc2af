"""`fastdeit kernels`: a table of every shipped configuration and what the compiler made of it, without a GPU.

The figures are committed in resources.json, each under a key of what was compiled, so that the tests and `--committed` need to
compile only what has changed since.
"""

import argparse
import json
import os
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path

import triton

from fastdeit.aot import catalog, reachable, resource_limits, workloads
from fastdeit.aot.catalog import ARCHITECTURES, KERNEL_FILES, Resources
from fastdeit.aot.instruction_stream import InstructionStream
from fastdeit.kernels.runtime.aot_config import AotConfig

RESOURCES_FILE = Path(__file__).with_name("resources.json")
UPDATE_COMMAND = "fastdeit kernels --update"
SAMPLE = 16  # configurations an architecture that calls reach beyond the listed ones
_MOST_WORKERS = 16  # each takes a gigabyte or so
_POOL_FROM = 8  # fewer configurations compile sooner than worker processes start


@dataclass(frozen=True)
class Entry:
    """A shipped configuration on one architecture."""

    file: str
    index: int  # in the file's `aot_configs(arch)`, by which a worker process finds it
    arch: int
    row: AotConfig

    @property
    def name(self) -> tuple[str, str, str]:
        return self.row.kernel.__name__, self.row.label, f"sm_{self.arch}"

    def as_dict(self, resources: Resources) -> dict:
        kernel, label, arch = self.name
        config = f"{label}; {_count(self.row.num_warps, 'warp')}, {_count(self.row.num_stages, 'stage')}"
        key = {"key": catalog.row_key(self.row, self.arch)}
        return {"kernel": kernel, "config": config, "arch": arch, **asdict(resources), **key}


def entries(archs: Iterable[int] = ARCHITECTURES, files: Iterable[str] = KERNEL_FILES) -> list[Entry]:
    """Every shipped configuration, in the order of the committed file.

    Raises:
        ValueError: two configurations of one kernel on one architecture have the same label.
    """
    found = [
        Entry(file, index, arch, row)
        for arch in archs
        for file in files
        for index, row in enumerate(catalog.aot_configs(arch, (file,)))
    ]
    names = set()
    for entry in found:
        if entry.name in names:
            raise ValueError("two shipped configurations are both called {} ({}) on {}".format(*entry.name))
        names.add(entry.name)
    return sorted(found, key=lambda entry: (entry.file, entry.row.kernel.__name__, entry.arch))


def compile_entries(chosen: list[Entry]) -> list[Resources | str]:
    """What the compiler makes of each configuration, or the first line of why it does not compile."""
    if len(chosen) < _POOL_FROM:
        return [_progress(_compile(e.file, e.index, e.arch), e, i, len(chosen)) for i, e in enumerate(chosen, 1)]
    # Started anew rather than forked: PyTorch has threads.
    workers = min(os.cpu_count() or 1, _MOST_WORKERS)
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        jobs = [pool.submit(_compile, e.file, e.index, e.arch) for e in chosen]
        return [_progress(j.result(), e, i, len(jobs)) for i, (j, e) in enumerate(zip(jobs, chosen, strict=True), 1)]


def read_committed() -> dict[str, Resources]:
    """The committed figures by key; none where they were made with another Triton version."""
    if not RESOURCES_FILE.exists():
        return {}
    committed = json.loads(RESOURCES_FILE.read_text(encoding="utf-8"))
    if committed["triton"] != triton.__version__:
        return {}
    return {row["key"]: _from_record(row) for row in committed["rows"]}


def _from_record(row: dict) -> Resources:
    facts = {name: row[name] for name in Resources.__dataclass_fields__ if name != "stream"}
    stream = row.get("stream")
    return Resources(**facts, stream=None if stream is None else InstructionStream.from_dict(stream))


def as_json(rows: list[dict]) -> str:
    """The committed form: one row a line."""
    lines = ",\n".join(f"    {json.dumps(row)}" for row in rows)
    return f'{{\n  "triton": {json.dumps(triton.__version__)},\n  "rows": [\n{lines}\n  ]\n}}\n'


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--arch", metavar="sm_NN", help=f"one of {', '.join(f'sm_{a}' for a in ARCHITECTURES)}")
    parser.add_argument("--only", metavar="FILE", help=f"one kernel file of {', '.join(KERNEL_FILES)}")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--committed", action="store_true", help="compile only what has changed since resources.json")
    parser.add_argument("--update", action="store_true", help="the same, and write resources.json anew")
    parser.add_argument(
        "--sample",
        type=int,
        default=SAMPLE,
        metavar="N",
        help=f"compile besides, for each architecture, N configurations that calls drawn at random reach (default {SAMPLE}; "
        "not with --only, --committed or --update)",
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of that sample")
    parser.add_argument(
        "--streams", action="store_true", help="compile also what is on record without its instruction stream"
    )


def _sampled_faults(archs: Iterable[int], count: int, seed: int) -> Iterator[str]:
    """Compiles a sample of what calls can reach beyond the listed configurations; what no GPU could run, as sentences."""
    for arch in archs:
        rows = reachable.sample(arch, count, seed)
        for done, row in enumerate(rows, 1):
            name = row.kernel.__name__
            print(
                f"[{done}/{len(rows)}] {name} sm_{arch}, reached by a call (seed {seed})", file=sys.stderr, flush=True
            )
            yield from (f"{name} ({row.label}) on sm_{arch}: {fault}" for fault in reachable.faults(row, arch))


def run(args: argparse.Namespace) -> int:
    """Prints the table; 1 if a configuration does not compile or breaks a limit.

    Raises:
        ValueError: an unknown architecture or kernel file, or kernels are interpreted in this process.
    """
    chosen = entries(_architectures(args.arch), _files(args.only))
    if triton.knobs.runtime.interpret:
        raise ValueError("interpreted kernels cannot be compiled: unset TRITON_INTERPRET")
    known = read_committed() if args.committed or args.update else {}
    keys = [catalog.row_key(entry.row, entry.arch) for entry in chosen]
    if args.streams:
        known = {key: resources for key, resources in known.items() if resources.stream is not None}
    missing = [entry for entry, key in zip(chosen, keys, strict=True) if key not in known]
    compiled = dict(zip((entry.name for entry in missing), compile_entries(missing), strict=True))
    results = [compiled.get(entry.name) or known[key] for entry, key in zip(chosen, keys, strict=True)]

    rows, faults = {}, []
    for entry, result in zip(chosen, results, strict=True):
        if isinstance(result, str):
            faults.append((entry, f"does not compile: {result}"))
        else:
            rows[entry.name] = entry.as_dict(result)
            faults += [(entry, fault) for fault in resource_limits.breaches(entry.row, entry.arch, result)]
    shown = list(rows.values())
    estimates = {entry.name: _estimates(entry, found) for entry, found in zip(chosen, results, strict=True)}
    print(as_json(shown) if args.json else _table(shown, [estimates[name] for name in rows]), end="")
    for entry, fault in faults:
        print("{} ({}) on {}: ".format(*entry.name) + fault, file=sys.stderr)
    if args.update:
        _update(rows, {entry.name for entry in chosen})
    sampled = ()
    if args.sample and not args.committed and not args.update and args.only is None:
        archs = reachable.ARCHITECTURES if args.arch is None else _architectures(args.arch)
        sampled = list(_sampled_faults(archs, args.sample, args.seed))
        print(*sampled, sep="\n", end="\n" if sampled else "", file=sys.stderr)
    return 1 if faults or sampled else 0


def _architectures(arch: str | None) -> tuple[int, ...]:
    if arch is None:
        return ARCHITECTURES
    if arch not in (names := [f"sm_{a}" for a in ARCHITECTURES]):
        raise ValueError(f"--arch: expected one of {', '.join(names)}, got {arch!r}")
    return (int(arch.removeprefix("sm_")),)


def _files(only: str | None) -> tuple[str, ...]:
    if only is not None and only not in KERNEL_FILES:
        raise ValueError(f"--only: expected one of {', '.join(KERNEL_FILES)}, got {only!r}")
    return KERNEL_FILES if only is None else (only,)


def _compile(file: str, index: int, arch: int) -> Resources | str:
    row = list(catalog.aot_configs(arch, (file,)))[index]
    try:
        return catalog.compile_config(row, arch)
    except Exception as error:  # the compiler has no exception of its own; a report names what failed and goes on
        return f"{type(error).__name__}: {error}".strip().splitlines()[0]


def _progress(result, entry: Entry, done: int, total: int):
    print("[{}/{}] {} ({}) {}".format(done, total, *entry.name), file=sys.stderr, flush=True)
    return result


def _update(rows: dict[tuple[str, str, str], dict], covered: set[tuple[str, str, str]]) -> None:
    """Writes the rows, and keeps what the file holds of other current configurations."""
    everything, known = entries(), read_committed()
    kept = []
    for entry in everything:
        if entry.name in rows:
            kept.append(rows[entry.name])
        elif entry.name not in covered and (key := catalog.row_key(entry.row, entry.arch)) in known:
            kept.append(entry.as_dict(known[key]))
    RESOURCES_FILE.write_text(as_json(kept), encoding="utf-8")


def _estimates(entry: Entry, found: Resources | str) -> str:
    """The estimated share of the floor in each model that launches a row by default, and what bounds it."""
    if isinstance(found, str) or found.stream is None:
        return "-"
    shares = workloads.estimates(entry.row, entry.arch, found)
    return ", ".join(f"{model} {x.share:.0%} {x.bound}" for model, x in shares.items()) or "-"


def _table(rows: list[dict], estimates: list[str]) -> str:
    header = ("kernel", "config", "arch", "registers", "spilled_bytes", "shared_bytes", "blocks_per_sm")
    stream = ("access_bytes", "in_flight_KB", "wgmma", "instructions a tile", "share of the floor")
    cells = [(*header, *stream, "matrix_instructions")]
    for row, estimate in zip(rows, estimates, strict=True):
        matrix = ", ".join(f"{count} {name}" for name, count in row["matrix_instructions"].items())
        cells.append((*(str(row[name]) for name in header), *_stream_cells(row["stream"]), estimate, matrix or "-"))
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = []
    for line in cells:
        padded = [cell.ljust(width) for cell, width in zip(line, widths, strict=True)]
        padded[3:7] = [cell.rjust(width) for cell, width in zip(line[3:7], widths[3:7], strict=True)]
        lines.append("  ".join(padded).rstrip())
    return "\n".join(lines) + "\n"


def _stream_cells(stream: dict | None) -> tuple[str, ...]:
    """Narrowest and widest access, bytes in flight, trouble with wgmma, and the instructions of the loop, else of the kernel."""
    if stream is None:
        return ("?",) * 4
    wgmma = " ".join(x for x in (stream["serialised"], "unfenced" if stream["unfenced"] else "") if x)
    counts = (stream["loop"] if stream["loops"] else stream["once"])["instructions"]
    return (
        f"{stream['narrowest_access']}-{stream['widest_access']}",
        f"{stream['in_flight_bytes'] / 1024:.0f}",
        wgmma or "-",
        " ".join(f"{name} {count}" for name, count in counts.items()),
    )


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
