"""`python -m fastdeit.testing.ptx`: executes what ships, row by row, on the CPU."""

import argparse
import os
import re
import sys
from collections import Counter

from fastdeit.aot.catalog import aot_configs
from fastdeit.testing.ptx.cases import cases
from fastdeit.testing.ptx.compiler import why_untested
from fastdeit.testing.ptx.harness import ARCHITECTURES
from fastdeit.testing.ptx.mutations import KINDS, kinds_named
from fastdeit.testing.ptx.mutations import run as run_mutants
from fastdeit.testing.ptx.mutations import table as mutation_table
from fastdeit.testing.ptx.rows import not_launched, off_the_record, report, run_cases, uses_tcgen05

NAMES = {f"sm_{arch}": arch for arch in ARCHITECTURES}


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m fastdeit.testing.ptx", description=__doc__)
    parser.add_argument("--arch", action="append", help="sm_80, sm_89, sm_90 or sm_100; may be repeated (default: all)")
    parser.add_argument("--thin", action="store_true", help="leave out widths and dtypes of kernels that stay in")
    parser.add_argument("--thorough", action="store_true", help="also shuffled, to equal bits, and perturbed")
    parser.add_argument("--only", default="", metavar="TEXT", help="cases whose name contains TEXT")
    parser.add_argument("--part", type=_part, default="1/1", metavar="I/N", help="every N-th case, from the I-th")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes (default: one a core)")
    parser.add_argument(
        "--mutants", type=int, metavar="N", help="instead, plant up to N faults of each kind in each kernel"
    )
    parser.add_argument(
        "--kinds", action="append", metavar="TEXT", help="of those, kinds whose name contains TEXT; may be repeated"
    )
    parser.add_argument("--seed", type=int, help="of the choice of faults (default: 0)")
    options = parser.parse_args(arguments)
    for name in options.arch or ():
        if name not in NAMES:
            parser.error(f"--arch: expected one of {', '.join(NAMES)}, got {name!r}")
    if options.mutants is None and (options.kinds or options.seed is not None):
        parser.error("--kinds and --seed choose among the faults that --mutants plants: give that too")
    if options.mutants is not None and options.thorough:
        parser.error("--mutants executes in step and shuffled: leave --thorough out")
    if options.mutants is not None and options.mutants < 1:
        parser.error(f"--mutants: expected at least 1 fault of each kind, got {options.mutants}")
    for text in options.kinds or ():
        if not kinds_named([text]):
            parser.error(f"--kinds: expected a part of a kind's name, got {text!r}; the kinds are {', '.join(KINDS)}")
    if options.only and not any(named(options, arch) for arch in options.arch or NAMES):
        among = f"{', '.join(options.arch or NAMES)}{' that --thin leaves in' * options.thin}"
        parser.error(f"--only: expected a part of the name of a case of {among}, got {options.only!r}")
    return options


def named(options: argparse.Namespace, arch: str) -> list[str]:
    """The names of the cases of an architecture that --only and --thin leave in."""
    return [c.name for c in cases(NAMES[arch]) if options.only in c.name and (c.thin or not options.thin)]


def _part(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise argparse.ArgumentTypeError(f"expected I/N with I from 1 to N, got {text!r}")
    return int(match[1]), int(match[2])


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    if reason := why_untested():
        print(f"skipped: {reason}")
        return 0
    part, parts = options.part
    failed, outcomes = False, Counter()
    for name in options.arch or NAMES:
        arch, chosen = NAMES[name], named(options, name)[part - 1 :: parts]
        if options.mutants:
            planted_in = [c for c in cases(arch) if c.name in chosen]
            rest = [c for c in cases(arch) if c.name not in chosen]
            kinds, seed = options.kinds or (), options.seed or 0
            outcomes += run_mutants(planted_in, arch, options.mutants, seed, kinds=kinds, rest=rest)
            continue
        rans = list(run_cases(arch, chosen, thorough=options.thorough, jobs=options.jobs))
        report(rans, arch)
        failed |= any(ran.failure and not uses_tcgen05(ran.failure) for ran in rans)
        for difference in off_the_record(rans):
            failed = True
            print(f"sm_{arch}: {difference}")
        if not options.only and not options.thin and parts == 1:
            missing = not_launched(rans, arch)
            failed |= bool(missing) and not any(uses_tcgen05(ran.failure) for ran in rans)
            print(f"sm_{arch}: {len(list(aot_configs(arch)))} rows, not launched: {', '.join(missing) or 'none'}")
    if options.mutants:
        print("\n".join(mutation_table(outcomes)))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
