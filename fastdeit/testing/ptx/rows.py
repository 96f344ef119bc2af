"""Runs the cases of an architecture, reports on them, and puts on record what each shipped row did in them."""

import contextlib
import dataclasses
import functools
import multiprocessing
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch

from fastdeit.aot import catalog
from fastdeit.aot.execution import Execution
from fastdeit.aot.report import REEXECUTE_COMMAND, read_committed
from fastdeit.kernels.runtime.aot_config import AotConfig
from fastdeit.testing.ptx.cases import Case, Errors, cases
from fastdeit.testing.ptx.compiler import Variant
from fastdeit.testing.ptx.counts import Counts
from fastdeit.testing.ptx.harness import Launched, executing, launches_noted
from fastdeit.testing.ptx.machine import IN_STEP, Schedule

SHUFFLED = Schedule(seed=1, shuffled=True)
PERTURBED = Schedule(seed=1, perturbed=True)


@dataclasses.dataclass
class Ran:
    """One case: what it launched, its errors, and what went wrong.

    executions: key of each shipped row that it launched -> what the row did; none if the case failed. instructions: of all
    launches, in warps. failure: None, or the error's text. seconds: of processor time.
    """

    case: str
    executions: dict[str, Execution] = dataclasses.field(default_factory=dict)
    instructions: int = 0
    errors: Errors = dataclasses.field(default_factory=dict)
    failure: str | None = None
    seconds: float = 0.0

    @property
    def worst(self) -> tuple[float, float, float]:
        """Largest RMS error beside its limit among outputs and gradients: the kernels', PyTorch's, and that as a share."""
        rms = [error[1] for error in self.errors.values() if error[1].limit > 0]
        found = max(rms, key=lambda e: e.fused / e.limit, default=None)
        return (found.fused, found.eager, found.fused / found.limit) if found else (0.0, 0.0, 0.0)


def run_case(case: Case, arch: int, *, thorough: bool) -> Ran:
    """Executes a case in step and, if thorough, under another schedule (equal bits) and with perturbed approximations."""
    ran, counts = Ran(case.name), dict[str, Counts]()
    started = time.process_time()

    def note(launched: Launched) -> None:
        ran.instructions += int(launched.machine.executed.sum())
        if (key := keys_of(arch).get(launched.variant)) is not None:
            counts[key] = counts.get(key, Counts()) + launched.counts

    runs: Sequence[Sequence[Schedule]] = ((IN_STEP, SHUFFLED), (PERTURBED,)) if thorough else ((IN_STEP,),)
    try:
        for schedules in runs:
            torch.manual_seed(0)
            with executing(arch, schedules, on_launch=note if schedules is runs[0] else None):
                errors = case.run()
            ran.errors = ran.errors or errors
        fused, eager, share = (float(f"{number:.3g}") for number in ran.worst)
        ran.executions = {
            key: Execution(case.name, fused, eager, share, found.instructions, found.once, found.loop)
            for key, found in counts.items()
        }
    except Exception as error:
        ran.failure = f"{type(error).__name__}: {error}"
    ran.seconds = time.process_time() - started
    return ran


def run_named(job: tuple[int, str, bool]) -> Ran:
    """`run_case` for an architecture, a case's name and whether to be thorough: what a worker process is handed."""
    arch, name, thorough = job
    torch.set_num_threads(1)
    return run_case(next(case for case in cases(arch) if case.name == name), arch, thorough=thorough)


def run_cases(arch: int, names: Sequence[str], *, thorough: bool, jobs: int) -> Iterator[Ran]:
    """Runs the named cases in their order, `jobs` at a time in processes of their own."""
    work = [(arch, name, thorough) for name in names]
    if jobs == 1:
        yield from map(run_named, work)
        return
    with multiprocessing.get_context("spawn").Pool(jobs) as pool:
        yield from pool.imap(run_named, work)


@functools.cache
def keys_of(arch: int) -> dict[Variant, str]:
    """The key of every shipped row (`catalog.row_key`) by what a launch of it compiles."""
    return {variant_of_row(row): catalog.row_key(row, arch) for row in catalog.aot_configs(arch)}


def variant_of_row(row: AotConfig) -> Variant:
    types = tuple(catalog.argument_types(row).items())
    return Variant(row.kernel, types, frozenset(), row.num_warps, row.num_stages, row.fp_fusion)


def not_launched(rans: Iterable[Ran], arch: int) -> list[str]:
    """Shipped rows that no case launched."""
    launched = set().union(*(ran.executions for ran in rans))
    rows = [row for row in catalog.aot_configs(arch) if catalog.row_key(row, arch) not in launched]
    return [f"{row.kernel.__name__} ({row.label})" for row in rows]


def launched_by(case: Case, arch: int) -> set[str]:
    """Keys of the shipped rows that a case launches, found without compiling or executing any."""
    torch.manual_seed(0)
    with launches_noted(arch) as variants, contextlib.suppress(AssertionError):  # the outputs are never written
        case.run()
    return {keys_of(arch)[variant] for variant in variants if variant in keys_of(arch)}


def record(arch: int, wanted: set[str], jobs: int) -> tuple[dict[str, Execution], list[str]]:
    """Executes the rows with the wanted keys, in all schedules, each in the first case that launches it and that can be executed.

    Returns:
        What each row did by key, without rows that no case launches and those of cases that use tcgen05; and, as sentences,
        which cases failed.
    """
    launching: dict[str, list[str]] = {}
    for case in cases(arch) if wanted else ():
        for key in sorted(launched_by(case, arch) & wanted):
            launching.setdefault(key, []).append(case.name)
    found, failures = dict[str, Execution](), list[str]()
    while names := list(dict.fromkeys(left[0] for key, left in launching.items() if left and key not in found)):
        for done, ran in enumerate(run_cases(arch, names, thorough=True, jobs=min(jobs, len(names))), 1):
            print(f"[{done}/{len(names)}] sm_{arch}, executed: {ran.case}", file=sys.stderr, flush=True)
            if ran.failure and not uses_tcgen05(ran.failure):
                failures.append(f"sm_{arch}, {ran.case}: {ran.failure}")
            found |= {key: x for key, x in ran.executions.items() if launching.get(key, [])[:1] == [ran.case]}
        launching = {key: [name for name in left if name not in names] for key, left in launching.items()}
    return found, failures


def off_the_record(rans: Iterable[Ran]) -> list[str]:
    """Counts that differ from those of resources.json for the same compiled row in the same case, as sentences."""
    committed = {key: resources.execution for key, resources in read_committed().items()}
    found = []
    for ran in rans:
        for key, new in ran.executions.items():
            old = committed.get(key)
            if old is None or old.case != ran.case:
                continue
            for name in ("instructions", "once", "loop"):
                if getattr(new, name) != getattr(old, name):
                    found.append(
                        f"{ran.case}: {name} of row {key}: {getattr(new, name)}, on record {getattr(old, name)}. "
                        f"If the cases have changed, run: {REEXECUTE_COMMAND}"
                    )
    return found


def uses_tcgen05(failure: str | None) -> bool:
    """Whether a case failed only because the machine does not know sm_100's tensor memory."""
    return failure is not None and "unknown instruction tcgen05" in failure


def report(rans: Sequence[Ran], arch: int, print_line: Callable[[str], None] = print) -> None:
    """A line a case: warp instructions, RMS error beside PyTorch's, seconds."""
    for ran in rans:
        fused, eager, share = ran.worst
        state = ran.failure or f"RMS {fused:.2e}, eager {eager:.2e}, {share:.2f} of the limit"
        print_line(f"sm_{arch} {ran.case}: {ran.instructions} warp instructions, {state}, {ran.seconds:.1f} s")
