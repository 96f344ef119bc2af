"""`python -m fastdeit.testing.ptx`: executes what ships, row by row, on the CPU."""

import argparse
import os
import sys
from collections import Counter

from fastdeit.aot.catalog import aot_configs
from fastdeit.testing.ptx.cases import cases
from fastdeit.testing.ptx.compiler import why_untested
from fastdeit.testing.ptx.harness import ARCHITECTURES
from fastdeit.testing.ptx.mutations import run as run_mutants
from fastdeit.testing.ptx.mutations import table as mutation_table
from fastdeit.testing.ptx.rows import not_launched, off_the_record, report, run_cases, uses_tcgen05


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m fastdeit.testing.ptx", description=__doc__)
    parser.add_argument("--arch", action="append", help="sm_80, sm_89, sm_90 or sm_100; may be repeated (default: all)")
    parser.add_argument("--thin", action="store_true", help="leave out widths and dtypes of kernels that stay in")
    parser.add_argument("--thorough", action="store_true", help="also shuffled, to equal bits, and perturbed")
    parser.add_argument("--only", default="", metavar="TEXT", help="cases whose name contains TEXT")
    parser.add_argument("--part", default="1/1", metavar="I/N", help="every N-th case, from the I-th")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes (default: one a core)")
    parser.add_argument(
        "--mutants", type=int, metavar="N", help="instead, plant up to N faults of each kind in each kernel"
    )
    parser.add_argument("--kinds", default="", metavar="TEXT", help="of those, kinds whose name contains TEXT")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of faults (default: 0)")
    options = parser.parse_args(arguments)
    if reason := why_untested():
        print(f"skipped: {reason}")
        return 0
    names = {f"sm_{arch}": arch for arch in ARCHITECTURES}
    for name in options.arch or ():
        if name not in names:
            parser.error(f"--arch: expected one of {', '.join(names)}, got {name!r}")
    part, parts = map(int, options.part.split("/"))
    failed, outcomes = False, Counter()
    for arch in [names[name] for name in options.arch or names]:
        chosen = [c.name for c in cases(arch) if options.only in c.name and (c.thin or not options.thin)][
            part - 1 :: parts
        ]
        if options.mutants:
            planted_in = [c for c in cases(arch) if c.name in chosen]
            rest = [c for c in cases(arch) if c.name not in chosen]
            outcomes += run_mutants(planted_in, arch, options.mutants, options.seed, kinds=options.kinds, rest=rest)
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
