"""`fastdeit kernels`: a table of every configuration and what the compiler made of it, without a GPU."""

import argparse
import dataclasses
import os
import sys
from collections.abc import Iterable, Iterator

import triton

from fastdeit.aot import catalog, reachable, report, resource_limits, workloads
from fastdeit.aot.catalog import ARCHITECTURES, KERNEL_FILES, Resources
from fastdeit.aot.execution import Execution

SAMPLE = 16  # configurations an architecture that calls reach beyond the listed ones


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--arch", metavar="sm_NN", help=f"one of {', '.join(f'sm_{a}' for a in ARCHITECTURES)}")
    parser.add_argument("--only", metavar="FILE", help=f"one kernel file of {', '.join(KERNEL_FILES)}")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--committed", action="store_true", help="compile only what has changed since resources.json")
    parser.add_argument(
        "--update",
        action="store_true",
        help="as --committed; also execute what has changed on the CPU, and rewrite resources.json",
    )
    parser.add_argument(
        "--execute",
        action="store_true",
        help="with --update, execute every configuration on the CPU again (default: those that have changed)",
    )
    parser.add_argument(
        "--sample",
        type=int,
        default=SAMPLE,
        metavar="N",
        help=f"also compile, for each architecture, N configurations that random calls reach (default {SAMPLE}; "
        "not with --only, --committed or --update)",
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="random seed of that sample")
    parser.add_argument(
        "--streams", action="store_true", help="also compile rows of resources.json that have no instruction stream"
    )


def run(args: argparse.Namespace) -> int:
    """Prints the table; 1 if a configuration does not compile or breaks a limit.

    Raises:
        ValueError: an unknown architecture or kernel file, --execute without --update, or kernels are interpreted in this process.
    """
    chosen = report.entries(_architectures(args.arch), _files(args.only))
    if triton.knobs.runtime.interpret:
        raise ValueError("interpreted kernels cannot be compiled: unset TRITON_INTERPRET")
    if args.execute and not args.update:
        raise ValueError("--execute: only with --update")
    committed = report.read_committed()
    executions = {} if args.execute else {key: found.execution for key, found in committed.items()}
    known = committed if args.committed or args.update else {}
    keys = [catalog.row_key(entry.row, entry.arch) for entry in chosen]
    if args.streams:
        known = {key: resources for key, resources in known.items() if resources.stream is not None}
    missing = [entry for entry, key in zip(chosen, keys, strict=True) if key not in known]
    compiled = dict(zip((entry.name for entry in missing), report.compile_entries(missing), strict=True))
    results = [compiled.get(entry.name) or known[key] for entry, key in zip(chosen, keys, strict=True)]

    results = [
        result if isinstance(result, str) else dataclasses.replace(result, execution=executions.get(key))
        for result, key in zip(results, keys, strict=True)
    ]
    failed: list[str] = []
    if args.update:
        results, failed = _executed(chosen, keys, results)

    rows, faults = {}, []
    for entry, result in zip(chosen, results, strict=True):
        if isinstance(result, str):
            faults.append((entry, f"does not compile: {result}"))
        else:
            rows[entry.name] = entry.as_dict(result)
            faults += [(entry, fault) for fault in resource_limits.breaches(entry.row, entry.arch, result)]
    shown = list(rows.values())
    estimates = {entry.name: _estimates(entry, found) for entry, found in zip(chosen, results, strict=True)}
    print(report.as_json(shown) if args.json else _table(shown, [estimates[name] for name in rows]), end="")
    for entry, fault in faults:
        print("{} ({}) on {}: ".format(*entry.name) + fault, file=sys.stderr)
    print(*failed, sep="\n", end="\n" if failed else "", file=sys.stderr)
    if args.update:
        report.update_committed(rows, {entry.name for entry in chosen})
    sampled: list[str] = []
    if args.sample and not args.committed and not args.update and args.only is None:
        archs = reachable.ARCHITECTURES if args.arch is None else _architectures(args.arch)
        sampled = list(_sampled_faults(archs, args.sample, args.seed))
        print(*sampled, sep="\n", end="\n" if sampled else "", file=sys.stderr)
    return 1 if faults or sampled or failed else 0


def _executed(
    entries: list[report.Entry], keys: list[str], results: list[Resources | str]
) -> tuple[list[Resources | str], list[str]]:
    """The results, with counts of an execution added where they had none and the code can be executed; and the failures.

    Nothing is executed with a version of Triton that the PTX machine is not tested with.
    """
    from fastdeit.testing.ptx import compiler, harness, rows

    if reason := compiler.why_untested():
        print(f"nothing is executed: {reason}", file=sys.stderr)
        return results, []
    found, failures = dict[str, Execution](), list[str]()
    for arch in harness.ARCHITECTURES:
        wanted = {
            key
            for entry, key, result in zip(entries, keys, results, strict=True)
            if entry.arch == arch
            and not isinstance(result, str)
            and result.can_be_executed
            and result.execution is None
        }
        if wanted:
            new, failed = rows.record(arch, wanted, os.cpu_count() or 1)
            found |= new
            failures += failed
    return [
        dataclasses.replace(result, execution=found[key]) if key in found and not isinstance(result, str) else result
        for key, result in zip(keys, results, strict=True)
    ], failures


def _sampled_faults(archs: Iterable[int], count: int, seed: int) -> Iterator[str]:
    """Compiles a sample of what calls can reach and the catalog does not list; yields a sentence for each that no GPU can run."""
    for arch in archs:
        rows = reachable.sample(arch, count, seed)
        for done, row in enumerate(rows, 1):
            name = row.kernel.__name__
            print(
                f"[{done}/{len(rows)}] {name} sm_{arch}, reached by a call (seed {seed})", file=sys.stderr, flush=True
            )
            yield from (f"{name} ({row.label}) on sm_{arch}: {fault}" for fault in reachable.faults(row, arch))


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


def _estimates(entry: report.Entry, found: Resources | str) -> str:
    """The estimated share of the floor in each model that launches a row by default, and what bounds it."""
    if isinstance(found, str) or found.stream is None:
        return "-"
    shares = workloads.estimates(entry.row, entry.arch, found)
    return ", ".join(f"{model} {x.share:.0%} {x.bound}" for model, x in shares.items()) or "-"


def _table(rows: list[dict], estimates: list[str]) -> str:
    header = ("kernel", "config", "arch", "registers", "spilled_bytes", "shared_bytes", "blocks_per_sm")
    executed = ("executed", "sectors", "wavefronts")
    stream = ("access_bytes", "in_flight_KB", "wgmma", "instructions a tile", "share of the floor")
    cells: list[tuple[str, ...]] = [(*header, *executed, *stream, "matrix_instructions")]
    for row, estimate in zip(rows, estimates, strict=True):
        matrix = ", ".join(f"{count} {name}" for name, count in row["matrix_instructions"].items())
        figures = (*_executed_cells(row["execution"]), *_stream_cells(row["stream"]))
        cells.append((*(str(row[name]) for name in header), *figures, estimate, matrix or "-"))
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = []
    for line in cells:
        padded = [cell.ljust(width) for cell, width in zip(line, widths, strict=True)]
        padded[3:10] = [cell.rjust(width) for cell, width in zip(line[3:10], widths[3:10], strict=True)]
        lines.append("  ".join(padded).rstrip())
    return "\n".join(lines) + "\n"


def _executed_cells(execution: dict | None) -> tuple[str, ...]:
    """Warp instructions executed, sectors and wavefronts over the ideal."""
    if execution is None:
        return ("-",) * 3
    found = Execution.from_dict(execution)
    accesses = found.accesses
    return str(sum(found.instructions.values())), f"{accesses.sector_ratio:.2f}", f"{accesses.wavefront_ratio:.2f}"


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
